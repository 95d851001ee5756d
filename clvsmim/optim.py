"""Parameter groups by name, and the optimizers that read them.

    groups = optim.groups(params, no_decay=(optim.VECTORS,), frozen=(...))
    trainable, frozen = tree.partition(params, optim.keep(groups))
    rate = optim.schedule("cosine", base=..., total_steps=..., ...)
    tx = optim.optimizer(groups, "adamw", schedule=rate, b1=..., ...)
    state = tx.init(trainable)

Groups are read off the names, so `params` may be abstract. Equal arguments give the
identical transformation, so building a step twice does not trace it twice.
"""

import functools
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from clvsmim import plugin, tree
from clvsmim.schedules import Schedule, schedule

# What PyTorch stores with one dimension: biases, norm scales, layer scales. A name
# and not ndim <= 1, because our q/k/v biases are (heads, head dim).
VECTORS = r".*/(bias|scale|gamma_[12])"

__all__ = [
    "VECTORS",
    "Group",
    "groups",
    "keep",
    "layer_id",
    "optimizer",
    "schedule",
]


@dataclass(frozen=True, kw_only=True)
class Group:
    """What the optimizer does with one parameter.

    decay: multiplies the weight decay. trust: LARS adapts its rate. frozen: no
    gradient, no decay, no optimizer state. lr_scale: multiplies the learning rate.
    """

    decay: float
    trust: bool
    frozen: bool
    lr_scale: float


def groups(
    params: tree.Tree,
    *,
    no_decay: Sequence[str] = (),
    no_trust: Sequence[str] = (),
    frozen: Sequence[str] = (),
    layer_decay: float | None = None,
    lr_scales: Sequence[tuple[str, float]] = (),
) -> tree.Tree:
    """A Group for every leaf of `params` (arrays or shapes).

    Args:
      no_decay, no_trust, frozen: regular expressions on whole "/"-joined names.
      layer_decay: the multiplier per layer, from the top down (BEiT, MAE); None is 1.
      lr_scales: (expression, factor on the learning rate), first match, on top of it.

    Raises:
      ValueError: an expression that matches no parameter.
    """
    hit = functools.partial(_matches, params)
    decay = hit(no_decay, "no_decay")
    trust = hit(no_trust, "no_trust")
    held = hit(frozen, "frozen")
    own = tree.by_rule(params, [*lr_scales, (".*", 1.0)], "lr_scales")
    scale = jax.tree.map(lambda a, b: a * b, _layer_scales(params, layer_decay), own)
    return jax.tree.map(
        lambda d, t, f, s: Group(decay=1.0 - d, trust=not t, frozen=f, lr_scale=s),
        *(decay, trust, held, scale),
    )


def keep(groups: tree.Tree) -> tree.Tree:
    """The tree of bools that `tree.partition` wants: True where a leaf is trained."""
    return jax.tree.map(lambda g: not g.frozen, groups)


def layer_id(name: str, depth: int) -> int:
    """0 for what feeds block 0, i + 1 for block i, depth + 1 for all the rest.

    As in BEiT, SimMIM (mask token 0, a shared bias table depth + 1) and MAE.
    """
    block = re.match(r"encoder/block_(\d+)/", name)
    if block:
        return int(block[1]) + 1
    stem = r"encoder/(cls_token|registers|pos_embed|patch_embed/.*)|(.*/)?mask_token"
    return 0 if re.fullmatch(stem, name) else depth + 1


def _matches(params: tree.Tree, patterns: Sequence[str], what: str) -> tree.Tree:
    rules = [(pattern, True) for pattern in patterns]
    return tree.by_rule(params, [*rules, (".*", False)], what)


def _layer_scales(params: tree.Tree, decay: float | None) -> tree.Tree:
    if decay is None:
        return jax.tree.map(lambda _: 1.0, params)
    blocks = (re.match(r"encoder/block_(\d+)/", name) for name in tree.named(params))
    depth = 1 + max((int(m[1]) for m in blocks if m), default=-1)
    return tree.map_named(
        lambda name, _: decay ** (depth + 1 - layer_id(name, depth)), params
    )


def optimizer(
    groups: tree.Tree,
    name: str,
    *,
    schedule: Schedule,
    clip: float | None = None,
    moment_dtype: str | None = None,
    **settings: float,
) -> optax.GradientTransformation:
    """The transformation for the trainable part of the parameters.

    Args:
      groups: a Group per leaf, from `groups`.
      name: "adamw" (settings b1, b2, eps, weight_decay), "lars" (momentum,
        trust_coefficient, weight_decay) or "sgd" (momentum, weight_decay).
      schedule: (step, scale) -> learning rate; steps are counted from 0 in the state.
      clip: the largest global L2 norm of the gradients, applied first.
      moment_dtype: of the first moment or momentum in the state, else the parameter's.

    Decay is multiplied by the current learning rate, as in PyTorch. For a decay that
    follows the schedule but not the peak (big_vision), pass weight_decay / base.

    Raises:
      ValueError: an unknown name, or a missing or unknown setting.
    """
    if name not in OPTIMIZERS:
        raise ValueError(plugin.unknown("optimizer", name, OPTIMIZERS))
    accepted = {**settings, "groups": groups, "moment_dtype": moment_dtype}
    plugin.check(OPTIMIZERS[name], f"optimizer {name!r}", accepted)
    table = tuple(tree.named(groups).items())
    return _build(table, name, schedule, clip, moment_dtype, tuple(settings.items()))


def settings(name: str | None) -> set[str]:
    """The keywords of `optimizer` for the rule `name`; without a rule, those of all."""
    rules = [OPTIMIZERS[name]] if name in OPTIMIZERS else OPTIMIZERS.values()
    own = {key for rule in rules for key in inspect.signature(rule).parameters}
    return (own | {"clip"}) - {"groups"}


@functools.lru_cache(maxsize=64)
def _build(table, name, schedule, clip, moment_dtype, settings):
    groups = dict(table)
    rule = OPTIMIZERS[name](groups, moment_dtype=moment_dtype, **dict(settings))
    first = [_clip(clip)] if clip is not None else []
    chain = optax.chain(*first, *rule, _scale_by_lr(groups, schedule))
    return optax.GradientTransformation(_only_trainable(groups, chain), chain.update)


def _adamw(groups, *, moment_dtype, b1, b2, eps, weight_decay):
    """AdamW (Loshchilov and Hutter 2019) as in torch.optim.AdamW."""
    return _adam(b1, b2, eps, moment_dtype), _decay(groups, weight_decay)


def _lars(groups, *, moment_dtype, momentum, trust_coefficient, weight_decay):
    """LARS (You et al. 2017) as in MoCo v3: the momentum buffer holds no rate."""
    trace = optax.trace(momentum, accumulator_dtype=moment_dtype)
    return _decay(groups, weight_decay), _trust(groups, trust_coefficient), trace


def _sgd(groups, *, moment_dtype, momentum, weight_decay):
    """torch.optim.SGD with momentum; the decay is part of the gradient."""
    trace = optax.trace(momentum, accumulator_dtype=moment_dtype)
    return _decay(groups, weight_decay), trace


OPTIMIZERS = {"adamw": _adamw, "lars": _lars, "sgd": _sgd}


class AdamState(NamedTuple):
    count: jax.Array
    mu: tree.Tree
    nu: tree.Tree


def _adam(b1, b2, eps, moment_dtype):
    """optax.scale_by_adam with torch's bias correction.

    optax forms 1 - b2**t in float32, which is 1e-5 off in the first steps (b2 0.999).
    """

    def init(params):
        mu = optax.tree.zeros_like(params, dtype=moment_dtype)
        nu = optax.tree.zeros_like(params)
        return AdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(grads, state, params=None):
        del params
        t = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        c1, c2 = _correction(b1, t), _correction(b2, t)
        ratio = jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), mu, nu)
        return ratio, AdamState(t, optax.tree.cast(mu, moment_dtype), nu)

    return optax.GradientTransformation(init, update)


def _correction(beta: float, t: jax.Array) -> jax.Array:
    """1 - beta**t, exact to float32."""
    return -jnp.expm1(t * math.log(beta)) if beta else jnp.ones(())


def _decay(groups, weight_decay):
    def leaf(name, update, param):
        decay = weight_decay * groups[name].decay
        return update + decay * param if decay else update

    return _stateless(leaf)


def _trust(groups, coefficient):
    """Times coefficient * |parameter| / |update|, per tensor of the originals.

    They store the kernels of q, k and v as one tensor, so these share one ratio.
    """

    def update(updates, state, params):
        u, p = tree.named(updates), tree.named(params)
        parts: dict[str, list[str]] = {}
        for name in (n for n in u if groups[n].trust):
            parts.setdefault(_fused(name), []).append(name)
        ratio = {
            tensor: _ratio([p[n] for n in names], [u[n] for n in names], coefficient)
            for tensor, names in parts.items()
        }
        return tree.map_named(lambda n, x: x * ratio.get(_fused(n), 1), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _fused(name):
    return re.sub(r"/attn/[qkv]/kernel$", "/attn/qkv/kernel", name)


def _ratio(params, updates, coefficient):
    """coefficient * |params| / |updates|; 1 if either norm is 0."""
    p, u = optax.tree.norm(params), optax.tree.norm(updates)
    usable = (p > 0) & (u > 0)
    return jnp.where(usable, coefficient * p / jnp.where(usable, u, 1), 1)


def _clip(limit):
    """torch.nn.utils.clip_grad_norm_: times min(1, limit / (norm + 1e-6)).

    optax.clip_by_global_norm leaves the 1e-6 out, so small limits give other updates.
    """

    def update(grads, state, params=None):
        del params
        factor = jnp.minimum(1, limit / (optax.tree.norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _scale_by_lr(groups, schedule):
    """Times minus the leaf's learning rate; the step count is the state."""

    def update(updates, state, params=None):
        del params
        scales = {g.lr_scale for g in groups.values()}
        lr = {scale: schedule(state.count, scale) for scale in scales}
        new = tree.map_named(lambda n, u: -lr[groups[n].lr_scale] * u, updates)
        return new, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    zero = optax.ScaleByScheduleState
    return optax.GradientTransformation(
        lambda params: zero(jnp.zeros((), jnp.int32)), update
    )


def _stateless(leaf):
    return optax.GradientTransformation(
        optax.init_empty_state,
        lambda updates, state, params: (tree.map_named(leaf, updates, params), state),
    )


def _only_trainable(groups, chain):
    """`chain.init`, which refuses any other leaves than the trainable ones."""
    expected = {name for name, group in groups.items() if not group.frozen}

    def init(params):
        got = set(tree.named(params))
        if got != expected:
            raise ValueError(
                "the optimizer takes exactly the trainable parameters; unexpected: "
                f"{sorted(got - expected)[:3]}, missing: {sorted(expected - got)[:3]}. "
                "Pass tree.partition(params, optim.keep(groups))[0]"
            )
        return chain.init(params)

    return init
