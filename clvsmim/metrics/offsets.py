"""Attention by offset: how far and in which direction from its query a head looks.

Each query's map is laid on a canvas of (2 rows - 1, 2 columns - 1) with the query at
the centre, and the canvases are summed over queries. A head that always looks at the
neighbour on the right is one point there; one that looks at content is a wide blur. The
canvas holds the attention distance and its distribution, but not what depends on the
query (Walmer et al. 2023).

Offsets are (down, right) in patches. The outer ones are had by few queries, which
`offset_visits` counts: canvas / queries is the share of attention at an offset,
canvas / visits the mean over those queries that have a patch there.
"""

import dataclasses

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
)
from clvsmim.metrics.distance import blocks_and_heads, patch_attention, patches

__all__ = [
    "aligned_attention",
    "distance_histogram",
    "distinct_distances",
    "mean_offset",
    "offset_heads",
    "offset_visits",
]


def aligned_attention(
    attention: jax.Array, *, grid: tuple[int, int], prefix: int
) -> jax.Array:
    """Attention at each offset from the query, summed over the patch queries.

    Args:
      attention: (T, T) probabilities after the softmax, rows = queries.
      grid: (rows, columns) of patches; need not be square.
      prefix: number of tokens before the patches.

    Returns:
      (2 rows - 1, 2 columns - 1) float32 of sum N, offset (0, 0) at the centre.

    Raises:
      ValueError: the grid and prefix do not make T tokens.

    Source: Walmer et al. 2023.
    """
    check_tokens(len(attention), grid, prefix)
    return _aligned(patch_attention(attention, prefix=prefix), grid)


def offset_visits(grid: tuple[int, int]) -> np.ndarray:
    """How many queries have a patch at each offset: the canvas's shape, float32."""
    counts = [n - np.abs(np.arange(1 - n, n)) for n in grid]
    return np.outer(*counts).astype(np.float32)


def mean_offset(canvas: jax.Array) -> jax.Array:
    """The mean offset of a canvas: (2 rows - 1, 2 columns - 1) -> (2,) float32.

    (down, right) in patches. At the border a head cannot look on: always one patch to
    the right is 13 / 14 on 14 columns if the last one looks at itself.
    """
    canvas = canvas.astype(jnp.float32)
    share = canvas / canvas.sum()
    down, right = _offsets(canvas.shape)
    return jnp.stack(
        [jnp.sum(share.sum(axis=1) * down), jnp.sum(share.sum(axis=0) * right)]
    )


def distinct_distances(grid: tuple[int, int], patch: int) -> np.ndarray:
    """All distances two patches can have, in pixels, ascending: (bins,) float64."""
    return patch * np.sqrt(np.unique(_squares(grid)))


def distance_histogram(canvas: jax.Array, *, grid: tuple[int, int]) -> jax.Array:
    """Share of attention at each of `distinct_distances`: canvas -> (bins,) of sum 1.

    Its mean is the attention distance.
    """
    canvas = canvas.astype(jnp.float32)
    _, which = np.unique(_squares(grid), return_inverse=True)
    bins = np.eye(which.max() + 1, dtype=np.float32)[which.reshape(-1)]
    total = jnp.matmul(canvas.reshape(-1), bins, precision=jax.lax.Precision.HIGHEST)
    return total / canvas.sum()


def offset_heads(canvas: np.ndarray, *, grid: tuple[int, int]) -> np.ndarray:
    """Whether a head looks at one fixed offset: (..., canvas) -> (...) bool.

    The canvas is sharpened: the mean attention over the queries that have a patch at an
    offset is squared, and summed over those queries. The head is an offset head if the
    mean offset of that is more than half a patch, so nearer to another patch than to
    the query, and the offsets spread around it by less than one patch (root mean
    square). A local head around the query itself is none, nor is one whose queries all
    look at the same patch. Best judged on the sum of many images. A rule of our own.
    """
    weight = np.square(np.asarray(canvas, np.float64)) / offset_visits(grid)
    weight /= weight.sum(axis=(-2, -1), keepdims=True)
    mean, square = 0.0, 0.0  # of the squared length
    for other, offset in zip((-1, -2), _offsets(weight.shape[-2:]), strict=True):
        share = weight.sum(axis=other)  # (..., 2 n - 1)
        mean = mean + np.square(share @ offset)
        square = square + share @ np.square(offset)
    return (mean > 0.5**2) & (square - mean < 1)


def make(*, grid: tuple[int, int], patch: int, prefix: int) -> Metric:
    """Mean offset, distribution of distances and aligned attention of every block.

    The state also has the canvases of all heads, summed over images.
    """

    def kernel(image: Image) -> dict[str, jax.Array]:
        check_tokens(image["attention"].shape[-1], grid, prefix)
        # (H, N, N) -> (H, 2 rows - 1, 2 columns - 1)
        canvas = jax.vmap(lambda a: _aligned(a, grid))(patches(image, prefix))
        mean = canvas.mean(axis=0)
        return {
            "canvas": canvas,
            "aligned": mean / np.prod(grid),
            "histogram": distance_histogram(mean, grid=grid),
            "offset": jax.vmap(mean_offset)(canvas),  # (H, 2)
        }

    def compute(state: State) -> list[Series]:
        block = blocks_and_heads(state["sum"]["canvas"][..., 0, 0])[0]
        far = tuple(distinct_distances(grid, patch).tolist())
        down, right = (tuple(range(1 - n, n)) for n in grid)
        return [
            _offset_series(state, grid, patch),
            mean_series(
                state,
                "histogram",
                name="attention by distance",
                axes=(block, Axis("distance (px)", far)),
                kind="curve",
                unit="share",
                source="",
                notes=("mean over heads",),
            ),
            mean_series(
                state,
                "aligned",
                name="aligned attention",
                axes=(block, Axis("patches down", down), Axis("patches right", right)),
                kind="matrix",
                unit="share",
                source="",
                notes=(
                    "mean over heads and queries; times patches / offset_visits(grid) "
                    "it is the mean over the queries that have a patch at an offset",
                ),
            ),
        ]

    return of_each("attention", kernel, compute)


def _aligned(inner: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """`aligned_attention` of (N, N) attention of rows that sum to 1."""
    rows, columns = grid
    inner = inner.reshape(rows, columns, rows, columns)
    # Along rows by sums of slices, which read the map once; what is left for the
    # product is 7 times smaller.
    by_row = [
        sum(inner[i, :, i + down] for i in range(max(0, -down), min(rows, rows - down)))
        for down in range(1 - rows, rows)
    ]  # (columns, columns) each
    return jnp.einsum(
        "uqk,qkv->uv",
        jnp.stack(by_row),
        _shifts(columns),
        precision=jax.lax.Precision.HIGHEST,
    )


def _offset_series(state: State, grid: tuple[int, int], patch: int) -> Series:
    """Length of the mean offset of each head; its error is at most the one given."""
    canvas = state["sum"]["canvas"]  # (L, H, 2 rows - 1, 2 columns - 1)
    notes = ()
    if state["count"] and np.any(flags := offset_heads(canvas, grid=grid)):
        heads = ", ".join(f"{b + 1}.{h + 1}" for b, h in np.argwhere(flags))
        notes = (f"offset heads (block.head): {heads}",)
    down, right = (
        mean_series(
            state,
            "offset",
            at=np.s_[..., i],
            name="mean attention offset",
            axes=blocks_and_heads(canvas[..., 0, 0]),
            kind="depth",
            unit="px",
            source="",
            notes=notes,
        )
        for i in (0, 1)
    )
    error = None if down.stderr is None else np.hypot(down.stderr, right.stderr) * patch
    length = np.hypot(down.values, right.values) * patch
    return dataclasses.replace(down, values=length, stderr=error)


def _offsets(canvas: tuple[int, int]) -> list[np.ndarray]:
    """Offsets along each side of a canvas of this shape, 0 in the middle; float32."""
    return [np.arange(n, dtype=np.float32) - n // 2 for n in canvas]


def _squares(grid: tuple[int, int]) -> np.ndarray:
    """Squared length of each offset, in whole patches, so that equal ones are equal."""
    down, right = (np.arange(1 - n, n) for n in grid)
    return down[:, None] ** 2 + right[None] ** 2


def _shifts(n: int) -> np.ndarray:
    """1 where key - query is the offset: (n queries, n keys, 2 n - 1) float32."""
    offset = np.arange(n)[None] - np.arange(n)[:, None]  # (n, n)
    return np.eye(2 * n - 1, dtype=np.float32)[offset + n - 1]
