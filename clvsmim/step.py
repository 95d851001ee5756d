"""The training step as a pure function of (state, batch); no I/O, no config."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clvsmim import optim, tree
from clvsmim.objectives import Objective, cast_kernels, fold

Tree = Any


class State(NamedTuple):
    """All that a run is between two steps; randomness is derived from `step`."""

    step: jax.Array
    params: Tree
    extra: Tree
    opt: Tree


class Optimizer(NamedTuple):
    """Which leaves are trained, how, and at what learning rate (for the log)."""

    groups: Tree
    transform: optax.GradientTransformation
    rate: Callable


def make_init(
    objective: Objective, optimizer: Optimizer, batch: Tree, *, seed: int
) -> Callable[..., State]:
    """`init(given=None) -> State`, from a trained encoder if one is given.

    `batch` gives shapes (arrays or ShapeDtypeStruct).
    """

    def init(given: Tree = None) -> State:
        params, extra = init_params(objective, batch, seed, given)
        trainable, _ = tree.partition(params, optim.keep(optimizer.groups))
        opt = optimizer.transform.init(trainable)
        return State(jnp.zeros((), jnp.int32), params, extra, opt)

    return init


def init_params(
    objective: Objective, batch: Tree, seed: int, given: Tree = None
) -> tuple[Tree, Tree]:
    """(params, extra) of an objective, on a batch of zeros of the given shapes."""
    key = fold(jax.random.key(seed), "init")
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    return objective.init(key, objective.prepare(key, zeros, train=True), given)


def make_step(
    objective: Objective, optimizer: Optimizer, *, seed: int, total: int
) -> Callable[[State, Tree], tuple[State, dict]]:
    """`step(state, batch) -> (state, logs)`; only trainable leaves are differentiated.

    Args:
      seed: with the step's number, it determines every draw of the step.
      total: steps in all; `progress = step / total`.
    """
    keep = optim.keep(optimizer.groups)
    dtype = objective.encoder.spec.dtype

    def step(state: State, batch: Tree) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        inputs = objective.prepare(key, batch, train=True)
        trainable, frozen = tree.partition(state.params, keep)

        def loss_of(trainable: Tree) -> tuple[jax.Array, tuple[Tree, dict]]:
            params = tree.combine(trainable, frozen)
            # The branches of a hybrid share this copy.
            params = {**params, "encoder": cast_kernels(params["encoder"], dtype)}
            progress = state.step / total
            return objective.loss(
                params, state.extra, inputs, key, progress=progress, train=True
            )

        grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (extra, logs)), grads = grad(trainable)
        updates, opt = optimizer.transform.update(grads, state.opt, trainable)
        params = tree.combine(optax.apply_updates(trainable, updates), frozen)
        extra = objective.after(params, extra, (state.step + 1) / total)
        logs = logs | {
            "loss": loss,
            **norms(grads),
            "learning_rate": optimizer.rate(state.step),
        }
        return State(state.step + 1, params, extra, opt), logs

    return step


def norms(grads: Tree) -> dict[str, jax.Array]:
    """Lengths of the gradient, and of its part at the patch embedding if that learns.

    There MoCo v3 saw the spikes that make training a ViT unstable (section 4.2).
    """
    named = tree.named(grads)
    stem = [x for name, x in named.items() if name.startswith("encoder/patch_embed/")]
    whole = {"gradient_norm": optax.tree.norm(grads)}
    if not stem:
        return whole
    return whole | {"gradient_norm/patch_embed": optax.tree.norm(stem)}


def make_evaluate(objective: Objective) -> Callable[[State, Tree], dict]:
    """`evaluate(state, batch) -> {name: sum over the real images, "images": count}`.

    The batch is one of `eval_batches` of `objective.view`; what is random in it, if
    anything is, is the same in every evaluation.
    """

    def evaluate(state: State, batch: Tree) -> dict:
        key = fold(jax.random.key(0), "evaluate")
        inputs = objective.prepare(key, batch, train=False)
        found = objective.evaluate(state.params, state.extra, inputs)
        weight = batch["weight"]
        # Padding may hold anything, and 0 x NaN is NaN.
        sums = {k: jnp.sum(jnp.where(weight > 0, x, 0)) for k, x in found.items()}
        return sums | {"images": jnp.sum(weight)}

    return evaluate
