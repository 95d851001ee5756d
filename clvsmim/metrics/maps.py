"""Attention maps to look at, of one head of one image (Fig. 2).

All are of attention among patches, each row scaled to sum 1 as everywhere here; for the
mean over heads, average the maps of the heads. To mark a query on the image, draw a
square of one patch at (row * patch, column * patch): the paper's viewer uses steps and
squares of 14 pixels on patches of 16, so its marker drifts off by up to 26 pixels.
"""

import jax
import jax.numpy as jnp

from clvsmim.metrics import check_tokens
from clvsmim.metrics.distance import patch_attention

__all__ = ["key_map", "mass_mask", "query_map"]


def query_map(
    attention: jax.Array,
    query: tuple[int, int],
    *,
    grid: tuple[int, int],
    prefix: int,
) -> jax.Array:
    """Where one query looks.

    Args:
      attention: (T, T) probabilities after the softmax, rows = queries.
      query: (row, column) of the patch that asks, from (0, 0), top left.
      grid: (rows, columns) of patches.
      prefix: number of tokens before the patches.

    Returns:
      (rows, columns) float32 of sum 1; uniform if the query attends to no patch.

    Raises:
      ValueError: the query is outside the grid, or the grid and prefix do not make T
        tokens.

    Source: Fig. 2.
    """
    check_tokens(len(attention), grid, prefix)
    (row, column), (rows, columns) = query, grid
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(
            f"got query {(row, column)}, expected a (row, column) of a grid of {rows} "
            f"x {columns} patches, counted from 0"
        )
    return patch_attention(attention, prefix=prefix)[row * columns + column].reshape(
        grid
    )


def key_map(attention: jax.Array, *, grid: tuple[int, int], prefix: int) -> jax.Array:
    """How much each patch is looked at, mean over queries: (T, T) -> (rows, columns).

    The P(k) of `attention_information`: sum 1, whose entropy is `key_entropy`.

    Raises:
      ValueError: the grid and prefix do not make T tokens.
    """
    check_tokens(len(attention), grid, prefix)
    return patch_attention(attention, prefix=prefix).mean(axis=0).reshape(grid)


def mass_mask(weights: jax.Array, *, mass: float = 0.6) -> jax.Array:
    """The fewest entries, largest first, that hold the share `mass` of the sum.

    Args:
      weights: non-negative, any shape; a map of the above, for instance.
      mass: share of the sum to keep, above 0 and at most 1.

    Returns:
      bool of the same shape. Of equal entries the first are kept; of a map of zeros,
      none.

    Raises:
      ValueError: `mass` is out of range.

    Source: the masks of Caron et al. 2021 (DINO), Fig. 4.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"got mass {mass}, expected a share above 0 and at most 1")
    flat = weights.astype(jnp.float32).reshape(-1)
    order = jnp.argsort(-flat)  # stable
    held = jnp.cumsum(flat[order])
    # An entry is kept if those before it do not hold enough yet.
    kept = held - flat[order] < mass * held[-1]
    return kept[jnp.argsort(order)].reshape(weights.shape)
