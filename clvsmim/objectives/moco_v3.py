"""MoCo v3 (Chen, Xie, He 2021): contrast two views through a momentum encoder."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from clvsmim import flops, plugin, views
from clvsmim.heads import MLPHead
from clvsmim.objectives import (
    Objective,
    Tree,
    apply,
    cast_kernels,
    ema,
    ema_rate,
    fold,
    init_encoder,
    random_crop,
)
from clvsmim.vit import Spec, ViT

NAME = "moco_v3"


def make(
    *,
    encoder: ViT,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop: dict[str, Any],
    view_1: dict[str, Any],
    view_2: dict[str, Any],
    projector: tuple[int, ...],
    predictor: tuple[int, ...],
    tau: float,
    momentum: float,
) -> Objective:
    """MoCo v3 for a ViT with a CLS token.

    Args:
      encoder: the student; the teacher has the same form.
      mean, std: of the input, per channel, of pixels in [0, 1].
      crop: arguments of `RandomResizedCrop`, but its size and name.
      view_1, view_2: arguments of `views.moco_view`: the two asymmetric recipes.
      projector, predictor: widths of the MLP heads, output last.
      tau: temperature.
      momentum: of the teacher at the start; it grows to 1 along a half cosine.
    """
    if not encoder.spec.prefix:
        raise ValueError("moco_v3 reads the CLS token: set encoder.prefix >= 1")
    if not projector or tuple(projector)[-1:] != tuple(predictor)[-1:]:
        raise ValueError(
            f"projector {projector} and predictor {predictor} must end in one width"
        )
    size = encoder.spec.image
    heads = {
        "projector": MLPHead(tuple(projector), encoder.spec.dtype),
        "predictor": MLPHead(tuple(predictor), encoder.spec.dtype),
    }
    colour = {"mean": tuple(mean), "std": tuple(std)}
    recipes = tuple(
        plugin.bind(views.moco_view, where, ("key", "image"), **view, **colour)
        for where, view in (("view_1", view_1), ("view_2", view_2))
    )
    return Objective(
        name=NAME,
        encoder=encoder,
        views=tuple(random_crop(f"{NAME}/{i}", size, crop) for i in (1, 2)),
        prepare=partial(prepare, recipes),
        init=partial(init, encoder, heads),
        loss=partial(loss, encoder, heads, tau, momentum),
        after=partial(after, momentum),
        flops=work(encoder.spec, projector, predictor),
    )


def work(spec: Spec, projector: tuple, predictor: tuple) -> flops.Forward:
    """Two views through the student and the teacher; the teacher has no predictor.

    A patch projection that the recipe freezes counts as trained: 0.3% of ViT-B.
    """
    project = flops.embed(spec) + flops.encode(spec) + flops.mlp(spec.width, projector)
    predict = flops.mlp(projector[-1], predictor)
    return flops.Forward(trained=2 * (project + predict), frozen=2 * project)


def prepare(recipes: tuple, key: jax.Array, batch: dict, *, train: bool) -> tuple:
    """Two normalised views (B, rows, columns, 3) by recipe 1 and recipe 2."""
    del train  # a contrastive loss needs two different views in evaluation too
    return tuple(
        _each(recipe, fold(key, f"{NAME}/view/{i}"), view)
        for i, (recipe, view) in enumerate(zip(recipes, batch["views"], strict=True))
    )


def _each(recipe: Any, key: jax.Array, images: jax.Array) -> jax.Array:
    return jax.vmap(recipe)(jax.random.split(key, images.shape[0]), images)


def init(
    encoder: ViT, heads: dict, key: jax.Array, inputs: tuple, given: Tree = None
) -> tuple[Tree, Tree]:
    """Parameters, and {batch statistics, teacher = copy of encoder and projector}."""
    variables = {"encoder": init_encoder(encoder, key, inputs[0], given)}
    x = jnp.zeros((2, encoder.spec.width))
    for name, head in heads.items():
        variables[name] = head.init(fold(key, f"{NAME}/{name}"), x, True)
        x = jnp.zeros((2, head.widths[-1]))
    params = {name: v["params"] for name, v in variables.items()}
    stats = {name: v["stats"] for name, v in variables.items()}
    names = ("encoder", "projector")
    teacher = {n: jax.tree.map(jnp.copy, params[n]) for n in names}
    teacher_stats = {n: jax.tree.map(jnp.copy, stats[n]) for n in names}
    return split(params), split(stats, teacher=teacher, teacher_stats=teacher_stats)


def split(tree: Tree, **more: Tree) -> Tree:
    """{"encoder", name...} -> {"encoder": ..., "heads": {name...}}."""
    rest = {k: v for k, v in tree.items() if k != "encoder"}
    return {"encoder": tree["encoder"], "heads": rest | more}


def loss(
    encoder: ViT,
    heads: dict,
    tau: float,
    momentum: float,
    params: Tree,
    extra: Tree,
    inputs: tuple,
    key: jax.Array,
    *,
    progress: jax.Array,
    train: bool,
) -> tuple[jax.Array, tuple[Tree, dict]]:
    """ctr(q1, k2) + ctr(q2, k1), symmetrised over the two views (section 3).

    Logged is the rate at which the teacher in use was last moved.
    """
    modules = {"encoder": encoder} | heads
    trained = cast_kernels(params["heads"], encoder.spec.dtype)
    student = {"encoder": params["encoder"]} | trained
    stats = {"encoder": extra["encoder"]} | extra["heads"]
    teacher, teacher_stats = stats.pop("teacher"), stats.pop("teacher_stats")
    queries, keys = [], []
    # One pass per view, in order: BatchNorm statistics are those of one view.
    for i, x in enumerate(inputs):
        drop = fold(key, f"{NAME}/drop/{i}") if train else None
        q, stats = project(modules, student, stats, x, drop, train)
        queries.append(q)
    for x in inputs:
        k, teacher_stats = project(modules, teacher, teacher_stats, x, None, train)
        keys.append(jax.lax.stop_gradient(k))
    first, hits = contrast(queries[0], keys[1], tau)
    second, _ = contrast(queries[1], keys[0], tau)
    extra = split(stats, teacher=teacher, teacher_stats=teacher_stats)
    logs = {"top1": hits, "ema_rate": ema_rate(momentum, progress)}
    return first + second, (extra, logs)


def project(
    modules: dict, params: Tree, stats: Tree, x: jax.Array, key: Any, train: bool
) -> tuple[jax.Array, Tree]:
    """View -> CLS token -> projector -> predictor, if `params` has one: (B, out)."""
    new = dict(stats)
    encode = partial(apply, modules["encoder"], params["encoder"])
    patches, new["encoder"] = encode(stats["encoder"], x, train=train, method="embed")
    placed = modules["encoder"].apply(
        {"params": params["encoder"]}, patches, method="place"
    )
    run = partial(encode, method="encode", taps=False)
    (tokens, _), _ = run(stats["encoder"], placed, key, train=train)
    out = tokens[:, 0]  # (B, T, D) -> (B, D)
    for name in ("projector", "predictor"):
        if name in params:
            out, new[name] = apply(
                modules[name], params[name], stats[name], out, train=train
            )
    return out, new


def contrast(q: jax.Array, k: jax.Array, tau: float) -> tuple[jax.Array, jax.Array]:
    """2 tau x cross-entropy of each query against all keys, its own the target.

    Args:
      q, k: (B, out), not normalised. Negatives are the other B - 1 keys.

    Returns:
      The loss, and how often the own key is the nearest. The factor 2 tau keeps the
      gradient's scale independent of tau.
    """
    # At full precision on every device: a TPU would round float32 factors to bfloat16.
    logits = jnp.matmul(unit(q), unit(k).T, precision="highest") / tau  # (B, B)
    log_p = jnp.diagonal(jax.nn.log_softmax(logits))
    hits = jnp.argmax(logits, axis=1) == jnp.arange(len(logits))
    return -2 * tau * jnp.mean(log_p), jnp.mean(hits.astype(jnp.float32))


def unit(x: jax.Array) -> jax.Array:
    """Rows of x at L2 norm 1, float32; a zero row stays zero, its gradient finite."""
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def after(momentum: float, params: Tree, extra: Tree, progress: jax.Array) -> Tree:
    """Move the teacher's parameters, not its buffers, towards the student."""
    rate = ema_rate(momentum, progress)
    student = {"encoder": params["encoder"]} | params["heads"]
    old = extra["heads"]["teacher"]
    teacher = {name: ema(old[name], student[name], rate) for name in old}
    return {**extra, "heads": {**extra["heads"], "teacher": teacher}}
