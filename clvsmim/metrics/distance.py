"""Attention distance: how far, in pixels, the patches of one head look (Fig. 3).

Prefix tokens (CLS, registers) are dropped as queries and as keys, and each row is
scaled back to sum 1. `cls_mass` says how much that hides, `null_rows` how many rows it
leaves with nothing, `cls_attention` what the CLS token itself gives to patches.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim.metrics import (
    Axis,
    Image,
    Metric,
    Series,
    State,
    check_tokens,
    mean_series,
    of_each,
    shared,
    stored,
)

__all__ = [
    "attention_distance",
    "cls_attention",
    "cls_mass",
    "grid_distances",
    "null_rows",
    "patch_attention",
]

# Below this a row has no patch attention left. It is far from float32's subnormal
# numbers, so dividing by a mass above it is safe.
NULL_MASS = 1e-32
HIGHEST = jax.lax.Precision.HIGHEST


def grid_distances(grid: tuple[int, int], patch: int) -> np.ndarray:
    """Distances between patch centres in pixels: (N, N) float32.

    Patch n of a grid of (rows, columns) is at (n // columns, n % columns).
    """
    where = np.indices(grid).reshape(2, -1)  # (2, N)
    offset = where[:, :, None] - where[:, None, :]  # (2, N, N)
    return (patch * np.hypot(offset[0], offset[1])).astype(np.float32)


def patch_attention(
    attention: jax.Array, *, prefix: int, eps: float = 0.0
) -> jax.Array:
    """Attention among patches only: (T, T) -> (N, N), float32, rows sum to 1.

    A row with all its mass on the prefix becomes uniform. `eps` is added to every entry
    before the rows are scaled.
    """
    attention = attention.astype(jnp.float32) + eps
    return _scaled(attention, _mass(attention, prefix))


def null_rows(attention: jax.Array, *, prefix: int) -> jax.Array:
    """How many patch queries attend to no patch at all: (T, T) -> scalar float32."""
    return _null_rows(_mass(attention, prefix))


def cls_mass(attention: jax.Array, *, prefix: int) -> jax.Array:
    """Attention from a patch to the prefix, mean over patches: (T, T) -> scalar.

    With a CLS token alone this is the mass on CLS; registers are counted with it.
    """
    return attention.astype(jnp.float32)[prefix:, :prefix].sum(axis=1).mean()


def cls_attention(attention: jax.Array, *, prefix: int) -> jax.Array:
    """Attention from CLS to a patch, mean over patches: (T, T) -> scalar in [0, 1 / N].

    The reverse of `cls_mass`; times the number of patches N, it is the share of its
    attention that CLS gives to patches rather than to itself and to registers.

    Raises:
      ValueError: there is no CLS token.
    """
    if prefix < 1:
        raise ValueError(f"got prefix {prefix}, expected at least 1: CLS comes first")
    return attention.astype(jnp.float32)[0, prefix:].mean()


def attention_distance(
    attention: jax.Array, *, grid: tuple[int, int], patch: int, prefix: int
) -> jax.Array:
    """Mean distance from a query to what it attends, of one head of one image.

    Args:
      attention: (T, T) probabilities after the softmax, rows = queries.
      grid: (rows, columns) of patches; need not be square.
      patch: side of a patch in pixels of the network's input.
      prefix: number of tokens before the patches.

    Returns:
      Scalar float32 in pixels: 0 if patches attend to themselves, 116.49 if uniform on
      14 x 14 patches of 16 pixels.

    Raises:
      ValueError: the grid and prefix do not make T tokens.

    Source: Fig. 3; the mean attention distance of Dosovitskiy et al. 2021, Fig. 7.
    """
    check_tokens(len(attention), grid, prefix)
    inner = patch_attention(attention, prefix=prefix)  # (N, N)
    return _mean_distance(inner, grid_distances(grid, patch))


def make(*, grid: tuple[int, int], patch: int, prefix: int) -> Metric:
    """Attention distance per block and head, and the mass and rows left out of it."""

    far = grid_distances(grid, patch)

    def kernel(image: Image) -> dict[str, jax.Array]:
        attention = image["attention"]  # (H, T, T)
        check_tokens(attention.shape[-1], grid, prefix)
        inner = patches(image, prefix)  # (H, N, N)
        found = {"distance": jax.vmap(lambda a: _mean_distance(a, far))(inner)}
        if prefix:
            found["cls"] = jax.vmap(lambda a: cls_attention(a, prefix=prefix))(
                attention
            )
        return found | left_out(image, prefix)

    def compute(state: State) -> list[Series]:
        axes = blocks_and_heads(state["sum"]["distance"])
        series = [
            mean_series(
                state,
                key,
                name=name,
                axes=axes,
                kind="depth",
                unit=unit,
                source=source,
            )
            for key, name, unit, source in (
                ("distance", "attention distance", "px", "Fig. 3"),
                ("cls", "attention of CLS on patches", "per patch", ""),
            )
            if key in state["sum"]  # without a CLS token there is no "cls"
        ]
        return [*series, *left_out_series(state)]

    return of_each("attention", kernel, compute)


def patches(image: Image, prefix: int) -> jax.Array:
    """`patch_attention` of all heads, which metrics share: (H, N, N)."""

    def derive(image: Image) -> jax.Array:
        return jax.vmap(_scaled)(image["attention"], _masses(image, prefix))

    return shared(image, f"patch attention {prefix}", derive)


def left_out(image: Image, prefix: int) -> dict[str, jax.Array]:
    """What every metric of patch attention reports beside its own number: (H,) each."""
    on_cls = functools.partial(cls_mass, prefix=prefix)
    return {
        "cls_mass": jax.vmap(on_cls)(image["attention"]),
        "null_rows": jax.vmap(_null_rows)(_masses(image, prefix)),
    }


def left_out_series(state: State) -> list[Series]:
    """The Series of `left_out`."""
    axes = blocks_and_heads(state["sum"]["null_rows"])
    note = ("rows with no attention on patches were taken as uniform",)
    return [
        mean_series(
            state,
            "cls_mass",
            name="attention mass on CLS",
            axes=axes,
            kind="depth",
            unit="",
            source="",
        ),
        mean_series(
            state,
            "null_rows",
            name="null attention rows",
            axes=axes,
            kind="depth",
            unit="rows per image",
            source="",
            notes=note if np.any(state["sum"]["null_rows"]) else (),
        ),
    ]


def blocks_and_heads(like: np.ndarray) -> tuple[Axis, Axis]:
    """The axes of an (L, H) array; blocks and heads count from 1."""
    depth, heads = np.shape(like)
    return Axis("block", (*range(1, depth + 1),)), Axis("head", (*range(1, heads + 1),))


def _mean_distance(inner: jax.Array, far: np.ndarray) -> jax.Array:
    """Of (N, N) attention of rows that sum to 1, at distances (N, N)."""
    # One product of long vectors: on a CPU four times faster than multiply and add.
    total = jnp.dot(inner.reshape(-1), far.reshape(-1), precision=HIGHEST)
    return total / len(inner)


def _scaled(attention: jax.Array, mass: jax.Array) -> jax.Array:
    """`patch_attention` of (T, T), whose `_mass` (N,) is known."""
    return stored(_rows_of_sum_1, attention, mass)  # most read it more than once


def _rows_of_sum_1(attention: jax.Array, mass: jax.Array) -> jax.Array:
    n, mass = len(mass), mass[:, None]
    null = mass < NULL_MASS
    inner = attention.astype(jnp.float32)[-n:, -n:]  # (T, T) -> (N, N)
    return jnp.where(null, 1 / n, inner / jnp.where(null, 1.0, mass))


def _null_rows(mass: jax.Array) -> jax.Array:
    return jnp.sum(mass < NULL_MASS, dtype=jnp.float32)


def _masses(image: Image, prefix: int) -> jax.Array:
    """`_mass` of all heads, which metrics share: (H, N)."""
    one = jax.vmap(lambda attention: _mass(attention, prefix))
    return shared(image, f"mass {prefix}", lambda image: one(image["attention"]))


def _mass(attention: jax.Array, prefix: int) -> jax.Array:
    """Attention of each patch query on patches: (T, T) -> (N,).

    As a product with zeros and ones: slicing the map first would copy it.
    """
    on_patches = np.ones(len(attention), np.float32)
    on_patches[:prefix] = 0
    attention = attention.astype(jnp.float32)
    return jnp.matmul(attention, on_patches, precision=HIGHEST)[prefix:]
