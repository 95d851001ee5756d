"""Metrics of one attention map or one tap at a time, several in one reading of it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim.metrics._contract import Features, Image, Metric, Series
from clvsmim.metrics._states import State, add, moments


def of_each(
    feature: str,
    kernel: Callable[[Image], dict[str, jax.Array]],
    compute: Callable[[State], list[Series]],
    to_state: Callable[[dict[str, Any]], State] = moments,
    merge: Callable[[State, State], State] = add,
) -> Metric:
    """A metric that looks at one image and one place of a feature at a time.

    The kernel is given a dict. Of "attention" it is {"attention": (H, T, T)} of a
    block; of "residual" {"tokens": (T, D)} of a tap and {"before": (T, D)} of the tap
    before it, but for the embedding. "place" is the number of the block or tap, from 0.
    It returns values by name, none at a place that it leaves out. The rows are
    {"weight", "values": a tuple over places}; `to_state` gets the values of all places
    stacked, (B, places, ...).
    """

    def stacked(rows: dict[str, Any]) -> State:
        values = jax.tree.map(lambda *x: np.stack(x, axis=1), *rows["values"])
        return to_state({**rows, "values": values})

    return Metric(
        needs=(feature,),
        update=lambda features, weights: {
            "weight": weights,
            "values": over_each(feature, {"": kernel}, features)[""],
        },
        compute=compute,
        to_state=stacked,
        merge=merge,
        each=kernel,
    )


def over_each(
    feature: str, kernels: dict[str, Callable], features: Features
) -> dict[str, tuple[Any, ...]]:
    """The kernels of several metrics `of_each`, in one reading of their feature.

    Returns:
      {name: a tuple over places of values (B, ...)}.
    """
    found = {name: [] for name in kernels}
    for place, arrays in enumerate(PLACES[feature](features[feature])):

        def all_kernels(arrays: Image, place: int = place) -> dict[str, Any]:
            image = {**arrays, "place": place}
            return {name: kernel(image) for name, kernel in kernels.items()}

        for name, values in over_images(all_kernels, arrays).items():
            if values:
                found[name].append(values)
    return {name: tuple(values) for name, values in found.items()}


def _maps(attention: tuple[jax.Array, ...]) -> list[Image]:
    return [{"attention": maps} for maps in attention]


def _taps(residual: tuple[jax.Array, ...]) -> list[Image]:
    first, *others = residual
    return [
        {"tokens": first},
        *(
            {"before": before, "tokens": tokens}
            for before, tokens in zip(residual, others, strict=False)
        ),
    ]


PLACES = {"attention": _maps, "residual": _taps}


def over_images(function: Callable, x: Any) -> Any:
    """`function` of each image: x and the results have the images in front.

    On a CPU one after the other: what is computed on the way then stays in a cache and
    is never there for all images, which takes less time and far less memory.
    """

    def one_by_one(x: Any) -> Any:
        images = len(jax.tree.leaves(x)[0])
        ways = _devices() if images % _devices() == 0 else 1
        if ways == 1:
            return jax.lax.map(function, x)
        split = (ways, images // ways)  # one image of each device at a time
        rows = jax.lax.map(jax.vmap(function), _swap(_reshape(x, 1, split)))
        return _reshape(_swap(rows), 2, (images,))

    return jax.lax.platform_dependent(x, cpu=one_by_one, default=jax.vmap(function))


@functools.partial(jax.jit, static_argnums=0)
def stored(function: Callable, *args: jax.Array) -> jax.Array:
    """`function(*args)`, an array, kept in memory for several to read.

    On a CPU the compiler would otherwise weave it into each that reads it, and there
    compute it again at a fraction of the speed; what a branch returns, it must keep.
    Outside of `jit` every new function is compiled: give one of a module, no lambda.
    """

    def in_a_branch(*args: jax.Array) -> jax.Array:
        always = jax.lax.optimization_barrier(jnp.bool_(True))  # not known beforehand
        return jax.lax.cond(
            always, function, lambda *args: jnp.zeros_like(function(*args)), *args
        )

    return jax.lax.platform_dependent(*args, cpu=in_a_branch, default=function)


def _reshape(x: Any, axes: int, shape: tuple[int, ...]) -> Any:
    """Give the first `axes` axes of all leaves another shape."""
    return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[axes:]), x)


def _swap(x: Any) -> Any:
    return jax.tree.map(lambda a: a.swapaxes(0, 1), x)


def _devices() -> int:
    """Of the mesh in use, over which images are split; 1 without a mesh."""
    return max(jax.sharding.get_abstract_mesh().size, 1)
