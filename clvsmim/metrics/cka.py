"""CKA: how alike two sets of features are, up to rotation and scale (Fig. 5).

Linear centred kernel alignment with the unbiased estimator of HSIC (Song et al. 2012;
Nguyen, Raghu and Kornblith 2021), between the heads of a block, between blocks, between
the positions of a block, and between all taps of the residual stream. Images are cut
into mini-batches of a fixed number n. HSIC is summed over mini-batches and divided
once; the result depends on n and on which images share a mini-batch, but not on the
number of devices. An incomplete mini-batch is dropped.
"""

import math
from collections.abc import Callable
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
    add,
    group_weights,
    taps,
)
from clvsmim.metrics._grams import (
    block_grams,
    centred,
    check_group,
    cut_groups,
    dot,
    first_images,
    hsic_matrix,
    token_gram,
    u_centred,
)

__all__ = [
    "biased_cka",
    "biased_floor",
    "centred_gram",
    "feature_hsic",
    "hsic",
    "linear_cka",
]

BLOCKS = 16  # of mini-batches, for the jackknife


def centred_gram(x: jax.Array) -> jax.Array:
    """The U-centred Gram matrix of n examples: (n, p) -> (n, n) float32.

    Its diagonal is 0 and so are the sums of its rows. Features are centred before the
    product, without which float32 loses all digits when their means are large. If all
    examples are alike, up to rounding, it is exactly 0.

    Raises:
      ValueError: fewer than 4 examples.
    """
    x = centred(x)
    return u_centred(dot(x, x.T))


def hsic(kc: jax.Array, lc: jax.Array) -> jax.Array:
    """Unbiased HSIC of two matrices of `centred_gram`, (n, n) each -> scalar.

    Of features with themselves it estimates the squared Frobenius norm of their
    covariance. It may be negative otherwise. Source: Song et al. 2012, HSIC_1.
    """
    n = len(kc)
    return jnp.sum(kc * lc) / (n * (n - 3))


def feature_hsic(x: jax.Array, y: jax.Array) -> jax.Array:
    """The same from features (n, p) and (n, q): no n x n matrix, cheap if p << n."""
    n = check_group(len(x))
    x, y = centred(x), centred(y)
    sx, sy = jnp.square(x).sum(axis=1), jnp.square(y).sum(axis=1)  # (n,)
    biased = jnp.square(dot(x.T, y)).sum()
    own = n / (n - 2) * jnp.sum(sx * sy)
    return (biased - own + sx.sum() * sy.sum() / ((n - 1) * (n - 2))) / (n * (n - 3))


def linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    """Unbiased linear CKA of one mini-batch: (n, p) and (n, q) -> scalar float32.

    1 if y is x rotated, scaled or shifted; 0 on average if they are unrelated; not
    clipped, so it may be slightly outside [0, 1]. 0 if x or y is the same for all
    examples. For several mini-batches sum `hsic` and divide once.

    Raises:
      ValueError: fewer than 4 examples.

    Source: Fig. 5; Nguyen, Raghu and Kornblith 2021.
    """
    kc, lc = centred_gram(x), centred_gram(y)
    return _ratio(hsic(kc, lc), hsic(kc, kc), hsic(lc, lc))


def biased_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    """Linear CKA with the biased HSIC (Kornblith et al. 2019), to compare with others.

    Beware: of unrelated features it is not 0 but about
    sqrt(p q / ((n + p) (n + q))), see `biased_floor`: 0.923 for 64 examples of 768
    features, 0.75 for 256 and 0.429 for 1024. Shapes as in `linear_cka`.
    """
    x, y = centred(x), centred(y)
    k, m = dot(x, x.T), dot(y, y.T)
    return _ratio(jnp.sum(k * m), jnp.sum(k * k), jnp.sum(m * m))


def biased_floor(n: int, p: int, q: int) -> float:
    """What `biased_cka` gives for unrelated Gaussian features (n, p) and (n, q)."""
    return math.sqrt(p / (n + p) * q / (n + q))


def make(*, prefix: int, group: int = 64) -> Metric:
    """CKA of head outputs between heads, blocks and positions, and between taps.

    A mean over pairs is left out where there is no pair, as with a single head.
    """
    check_group(group)

    def one(grams: tuple, residual: tuple) -> dict[str, Any]:
        stream = [u_centred(token_gram(x, prefix=prefix)) for x in residual]
        blocks = [u_centred(by_head.sum(axis=0)) for by_head, _ in grams]
        return {
            # Tuples over blocks: stacking would hold all of them twice.
            "heads": tuple(hsic_matrix(u_centred(x)) for x, _ in grams),
            "positions": tuple(hsic_matrix(u_centred(x)) for _, x in grams),
            "depths": hsic_matrix(jnp.stack(blocks)),
            "taps": hsic_matrix(jnp.stack(stream)),
        }

    def update(features: Features, weights: jax.Array) -> dict[str, Any]:
        head_outputs, residual = features["head_outputs"], features["residual"]
        whole = group_weights(weights, group)  # (G,)
        _, h, t, d = head_outputs[0].shape
        n_patches = t - prefix
        widths = {
            "heads": n_patches * d,
            "positions": h * d,
            "depths": h * n_patches * d,
            "taps": n_patches * residual[0].shape[-1],
        }
        return {
            "weight": whole,
            "group": first_images(features, group) // group,
            "dropped": weights.reshape(-1, group).sum(axis=1) * (1 - whole),
            "width": {k: jnp.full_like(whole, p) for k, p in widths.items()},
            "hsic": jax.vmap(one)(
                block_grams(features, group=group, prefix=prefix),
                cut_groups(residual, group),
            ),
        }

    return Metric(
        needs=("head_outputs", "residual", "index"),
        update=update,
        compute=compute,
        to_state=lambda rows: {"n": np.float64(group), **sums(rows)},
        merge=merge,
        group=group,
    )


def sums(rows: dict[str, Any]) -> State:
    """Sums of HSIC over the mini-batches of each jackknife block, in float64.

    The HSIC matrices are symmetric; of each, only the upper half is kept.
    """
    values = {
        k: np.stack(v, axis=1) if isinstance(v, tuple) else np.asarray(v)
        for k, v in rows["hsic"].items()
    }  # each (G, ..., k, k)
    whole = np.asarray(rows["weight"]) > 0  # (G,)
    finite = np.ones_like(whole)
    for v in values.values():
        finite &= np.isfinite(v).all(axis=tuple(range(1, v.ndim)))
    block = np.asarray(rows["group"]) % BLOCKS
    mine = (block == np.arange(BLOCKS)[:, None]) & whole & finite  # (BLOCKS, G)

    def total(v: np.ndarray) -> np.ndarray:
        i, j = np.triu_indices(v.shape[-1])
        half = v[..., i, j]
        return np.stack([half[m].sum(axis=0, dtype=np.float64) for m in mine])

    return {
        "groups": mine.sum(axis=1, dtype=np.float64),
        "nonfinite": np.float64(np.sum(whole & ~finite)),
        "dropped": np.asarray(rows["dropped"]).sum(dtype=np.float64),
        "width": {k: np.float64(v[0]) for k, v in rows["width"].items()},
        "hsic": {k: total(v) for k, v in values.items()},
    }


def merge(a: State, b: State) -> State:
    """The sums of both.

    Raises:
      ValueError: mini-batches of other sizes, or another model.
    """
    if (a["n"], a["width"]) != (b["n"], b["width"]):
        raise ValueError(
            f"cannot merge states: mini-batches of {a['n']:.0f} images meet ones of "
            f"{b['n']:.0f}, or features of other widths; merge states of one model and "
            "one --group only"
        )
    return {**add(a, b), "n": a["n"], "width": a["width"]}


def compute(state: State) -> list[Series]:
    """CKA and its jackknife error from the sums."""
    depth, heads = (
        math.isqrt(2 * state["hsic"][k].shape[-1]) for k in ("depths", "heads")
    )
    block, stream = Axis("block", (*range(1, depth + 1),)), Axis("depth", taps(depth))
    head = Axis("head", (*range(1, heads + 1),))
    return [
        _series(state, key, value, name, axes)
        for key, value, name, axes in (
            ("heads", mean_of_pairs, "CKA between heads", (block,)),
            ("heads", cka, "CKA between heads, matrices", (block, head, head)),
            ("depths", mean_of_others, "CKA between depths", (block,)),
            ("depths", cka, "CKA between depths, matrix", (block, block)),
            ("positions", mean_of_pairs, "CKA between positions", (block,)),
            ("taps", cka, "CKA between taps, matrix", (stream, stream)),
        )
        if value is cka or state["hsic"][key].shape[-1] > 1
    ]


def unpacked(half: np.ndarray) -> np.ndarray:
    """Symmetric matrices (..., k, k) from their upper halves (..., k (k + 1) / 2)."""
    k = math.isqrt(2 * half.shape[-1])
    i, j = np.triu_indices(k)
    whole = np.empty((*half.shape[:-1], k, k))
    whole[..., i, j] = whole[..., j, i] = half
    return whole


def cka(sums: np.ndarray) -> np.ndarray:
    """HSIC of every two of k sets of features -> their CKA, both (..., k, k).

    0 where one of the two is the same for all images.
    """
    # Never negative, but for rounding where the jackknife takes away all there is.
    own = np.maximum(np.diagonal(sums, axis1=-2, axis2=-1), 0)
    scale = np.sqrt(own[..., :, None] * own[..., None, :])
    return np.divide(sums, scale, out=np.zeros_like(sums), where=scale > 0)


def mean_of_others(sums: np.ndarray) -> np.ndarray:
    """Mean CKA of each set of features with the other ones: (..., k, k) -> (..., k)."""
    found = cka(sums)
    own = np.diagonal(found, axis1=-2, axis2=-1)
    return (found.sum(axis=-1) - own) / (found.shape[-1] - 1)


def mean_of_pairs(sums: np.ndarray) -> np.ndarray:
    """Mean CKA of two different sets of features: (..., k, k) -> (...)."""
    return mean_of_others(sums).mean(axis=-1)


def jackknife(
    value: Callable[[np.ndarray], np.ndarray], blocks: np.ndarray
) -> np.ndarray | None:
    """Standard error of `value(blocks.sum(axis=0))`, or None with a single block.

    `blocks` are the sums of disjoint sets of mini-batches, empty sets left out. Each in
    turn is taken away; with one mini-batch per block this is the usual jackknife.
    """
    n = len(blocks)
    if n < 2:
        return None
    total = blocks.sum(axis=0)
    without = np.stack([value(total - block) for block in blocks])
    return np.sqrt((n - 1) * np.var(without, axis=0))


def notes_on(n: int, groups: int, lost: float, p: float, q: float) -> tuple[str, ...]:
    """What a reader of any CKA must know.

    `groups` mini-batches of n images were used, `lost` were not finite; p and q are the
    numbers of features.
    """
    notes = (f"no whole mini-batch: needs {n} images, or a smaller --group",)
    if groups:
        floor = biased_floor(n, p, q)
        notes = (
            f"unbiased, mini-batches of {n} images; biased CKA of unrelated features "
            f"of this size would be {floor:.3f}",
        )
    if lost:
        notes += (
            f"{lost:.0f} of {groups + lost:.0f} mini-batches left out: not finite",
        )
    return notes


def _series(
    state: State, key: str, value: Callable, name: str, axes: tuple[Axis, ...]
) -> Series:
    """`value` of the sums under `key`."""
    n, groups = int(state["n"]), int(state["groups"].sum())
    width, dropped = state["width"][key], state["dropped"]
    blocks = state["hsic"][key][state["groups"] > 0]
    total = unpacked(blocks.sum(axis=0))
    same = np.diagonal(total, axis1=-2, axis2=-1) == 0
    values = value(total)
    notes = notes_on(n, groups, state["nonfinite"], width, width)
    if groups and same.any():
        notes += (
            f"{same.sum()} of {same.size} sets of features are the same for all "
            "images; their CKA is given as 0",
        )
    if dropped:
        notes += (f"{dropped:.0f} images in an incomplete mini-batch dropped",)
    return Series(
        name=name,
        axes=axes,
        values=values if groups else np.full_like(values, np.nan),
        stderr=jackknife(lambda half: value(unpacked(half)), blocks),
        kind="matrix" if value is cka else "depth",
        unit="",
        source="Fig. 5",
        count=n * groups,
        notes=notes,
    )


def _ratio(xy: jax.Array, xx: jax.Array, yy: jax.Array) -> jax.Array:
    """xy / sqrt(xx yy), or 0 where that is 0 / 0."""
    scale = jnp.sqrt(xx) * jnp.sqrt(yy)
    return jnp.where(scale == 0, 0.0, xy / jnp.where(scale == 0, 1.0, scale))
