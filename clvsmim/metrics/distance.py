"""Attention distance: how far, in pixels, the patches of one head look (Fig. 3).

Prefix tokens (CLS, registers) are dropped as queries and as keys, and each row is
scaled back to sum 1. `cls_mass` says how much that hides, `null_rows` how many rows it
leaves with nothing, `cls_attention` what the CLS token itself gives to patches.
"""

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim.metrics import (
    Axis,
    Metric,
    Series,
    State,
    check_tokens,
    mean_series,
    of_each_map,
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
    mass = _mass(attention, prefix)  # (N,)
    n = len(mass)
    mass = (mass + n * eps)[:, None]
    null = mass < NULL_MASS
    inner = attention.astype(jnp.float32)[prefix:, prefix:] + eps  # (T, T) -> (N, N)
    return jnp.where(null, 1 / n, inner / jnp.where(null, 1.0, mass))


def null_rows(attention: jax.Array, *, prefix: int) -> jax.Array:
    """How many patch queries attend to no patch at all: (T, T) -> scalar float32."""
    return jnp.sum(_mass(attention, prefix) < NULL_MASS, dtype=jnp.float32)


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
    far = grid_distances(grid, patch)  # (N, N)
    # One product of long vectors: on a CPU four times faster than multiply and add.
    total = jnp.dot(inner.reshape(-1), far.reshape(-1), precision=HIGHEST)
    return total / len(inner)


def make(*, grid: tuple[int, int], patch: int, prefix: int) -> Metric:
    """Attention distance per block and head, and the mass and rows left out of it."""

    def head(attention: jax.Array) -> dict[str, jax.Array]:
        far = attention_distance(attention, grid=grid, patch=patch, prefix=prefix)
        cls = {"cls": cls_attention(attention, prefix=prefix)} if prefix else {}
        return {"distance": far, **cls, **left_out(attention, prefix)}

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

    return of_each_map(jax.vmap(head), compute)


def left_out(attention: jax.Array, prefix: int) -> dict[str, jax.Array]:
    """What every metric of patch attention reports beside its own number."""
    return {
        "cls_mass": cls_mass(attention, prefix=prefix),
        "null_rows": null_rows(attention, prefix=prefix),
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


def _mass(attention: jax.Array, prefix: int) -> jax.Array:
    """Attention of each patch query on patches: (T, T) -> (N,).

    As a product with zeros and ones: slicing the map first would copy it.
    """
    on_patches = np.ones(len(attention), np.float32)
    on_patches[:prefix] = 0
    attention = attention.astype(jnp.float32)
    return jnp.matmul(attention, on_patches, precision=HIGHEST)[prefix:]
