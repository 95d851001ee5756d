"""Gram matrices of every block, kept so that two encoders can be compared afterwards.

CKA between two models needs both at once, but each is analysed alone. What it needs of
a block is the U-centred Gram matrix of a mini-batch, which is small, so those are kept;
`between_models` makes CKA of two such states. Both must have seen the same images in
the same order.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim.metrics import (
    Axis,
    Features,
    Metric,
    Series,
    State,
    group_weights,
    join,
    keep,
)
from clvsmim.metrics._grams import block_grams, first_images, u_centred
from clvsmim.metrics.cka import BLOCKS, cka, jackknife, notes_on

__all__ = ["between_models", "cross_model_cka"]


def make(*, prefix: int, group: int = 64, limit: int = 4096) -> Metric:
    """U-centred Gram matrices of all heads' outputs, per block and mini-batch.

    A mini-batch of 64 images takes 8 KB per block; `limit` images are kept at most.
    """

    def update(features: Features, weights: jax.Array) -> dict[str, Any]:
        whole = group_weights(weights, group)  # (G,)
        _, h, t, d = features["head_outputs"][0].shape
        found = block_grams(features, group=group, prefix=prefix)
        blocks = [u_centred(by_head.sum(axis=1)) for by_head, _ in found]  # (G, n, n)
        return {
            "weight": whole,
            "index": first_images(features, group),
            "width": jnp.full_like(whole, h * (t - prefix) * d),
            "gram": jnp.stack(blocks, axis=1),
        }

    def to_state(rows: dict[str, Any]) -> State:
        i, j = np.triu_indices(group, 1)
        return keep({**rows, "gram": np.asarray(rows["gram"])[..., i, j]})

    return Metric(
        needs=("head_outputs", "index"),
        update=update,
        compute=lambda state: [],  # one model alone says nothing
        to_state=to_state,
        merge=join,
        limit=limit,
        group=group,
    )


def cross_model_cka(a: State, b: State) -> tuple[np.ndarray, np.ndarray | None]:
    """CKA of each block of one model with each of another, from states of `make`.

    Args:
      a, b: states of La and Lb blocks. The caller has checked that they come from the
        same images in the same order.

    Returns:
      (La, Lb) float64, and its standard error over mini-batches by the jackknife, None
      with one mini-batch; NaN without any.

    Raises:
      ValueError: the mini-batches differ in number or size.
    """
    if not np.array_equal(a["index"], b["index"]):
        twice = np.intersect1d(a["index"], b["index"])
        raise ValueError(
            f"CKA between models needs the same images: one has {len(a['index'])} "
            f"mini-batches and the other {len(b['index'])}, of which {len(twice)} are "
            "in both; analyse the same images, and see that no mini-batch was left out "
            "as not finite"
        )
    if a["gram"].shape[2] != b["gram"].shape[2]:
        raise ValueError(
            f"CKA between models needs mini-batches of one size, got {images_in(a)} "
            f"and {images_in(b)} images; analyse both with the same --group"
        )
    la, lb = a["gram"].shape[1], b["gram"].shape[1]
    if not len(a["index"]):
        return np.full((la, lb), np.nan), None
    both = np.concatenate([a["gram"], b["gram"]], axis=1).astype(np.float64)
    # What the ratio does not see is left out: the other triangle and 1 / (n (n - 3)).
    hsic = both @ both.transpose(0, 2, 1)  # (G, la + lb, la + lb)
    block = a["index"] // images_in(a) % BLOCKS
    sums = np.stack([hsic[block == k].sum(axis=0) for k in np.unique(block)])

    def between(total: np.ndarray) -> np.ndarray:
        return cka(total)[:la, la:]

    return between(sums.sum(axis=0)), jackknife(between, sums)


def between_models(
    a: State, b: State, *, name_a: str = "A", name_b: str = "B"
) -> Series:
    """`cross_model_cka` as a matrix, block of A x block of B, with its notes."""
    values, stderr = cross_model_cka(a, b)
    axes = (
        Axis(f"block of {name}", (*range(1, size + 1),))
        for name, size in zip((name_a, name_b), values.shape, strict=True)
    )
    widths = (max(s["width"], default=0) for s in (a, b))
    groups, lost = len(a["index"]), a["nonfinite"]
    return Series(
        name="CKA between models",
        axes=tuple(axes),
        values=values,
        stderr=stderr,
        kind="matrix",
        unit="",
        source="",
        count=groups * images_in(a),
        notes=notes_on(images_in(a), groups, lost, *widths),
    )


def images_in(state: State) -> int:
    """n, from the n (n - 1) / 2 entries that are kept of a Gram matrix."""
    return (1 + math.isqrt(1 + 8 * state["gram"].shape[2])) // 2
