"""Image-level singular values (Fig. 7) and the family of effective ranks.

The mean patch token of each of M images, at the embedding and after each block, makes
M observations of C channels. Their covariance is summed over all images: the spectrum
of a batch is another quantity, and means of it are not this one. No rank exceeds M - 1,
so compare models, blocks and papers at equal numbers of images only.

The ranks are those of `dimension`.
"""

from typing import Any

import jax
import numpy as np

from clvsmim.metrics import (
    Axis,
    Image,
    Metric,
    Series,
    State,
    block_axis,
    keep,
    of_each,
    pooled,
)
from clvsmim.metrics._covariance import (
    add_scatters,
    covariance_spectrum,
    eigenvalues,
    floor_notes,
    floored_log,
    log_spectrum,
    scatter,
)
from clvsmim.metrics.dimension import (
    FIT,
    AlphaReQ,
    alpha_req,
    effective_rank,
    numerical_rank,
    participation_ratio,
    rank_me,
    stable_rank,
    unit_length,
)

__all__ = ["image_log_spectrum"]

POOLS = {"patches": "image-level", "cls": "CLS-level"}


def image_log_spectrum(features: jax.Array) -> jax.Array:
    """Log eigenvalues of the covariance over images: (M, C) -> (K,) float32.

    Descending, K = min(M - 1, C); never below ln(1e-12) plus the first. On TPU an svd
    compiles for minutes.

    Raises:
      ValueError: fewer than 2 images.

    Source: Fig. 7.
    """
    return log_spectrum(features)


def make(*, prefix: int, cls: bool = True) -> Metric:
    """Spectra over images per block, of patches and of CLS, and ranks of the patches.

    A state holds C x C numbers per block: 61 MB for a ViT-B, twice that with `cls`.
    """
    pools = {k: v for k, v in POOLS.items() if k == "patches" or (cls and prefix)}

    def kernel(image: Image) -> dict[str, jax.Array]:
        if image["place"] % 2:  # between attention and MLP
            return {}
        return {p: pooled(image["tokens"], prefix=prefix, pool=p) for p in pools}

    def to_state(rows: dict[str, Any]) -> State:
        index = np.arange(len(rows["weight"]))
        kept = keep({"weight": rows["weight"], "index": index, **rows["values"]})
        unit = unit_length(np, kept["patches"].astype(np.float64))
        return {
            "count": np.float64(len(unit)),
            "nonfinite": kept["nonfinite"],
            "unit": {"sum": unit.sum(axis=0), "square": np.square(unit).sum(axis=0)},
            **{p: scatter(kept[p]) for p in pools},
        }

    def merge(a: State, b: State) -> State:
        return add_scatters(a, b, pools)

    def compute(state: State) -> list[Series]:
        series = [
            one
            for pool, level in pools.items()
            for one in spectrum_series(state, state[pool], level)
        ]
        return [*series, *rank_series(state, state["patches"])]

    return of_each("residual", kernel, compute, to_state, merge)


def spectrum_series(state: State, pool: State, level: str) -> list[Series]:
    """The log spectrum of one pool at every block, and its mean over ranks."""
    values = covariance_spectrum(pool, state["count"])  # (L+1, K)
    log, low = floored_log(values)
    notes = floor_notes(low.sum(), low.size)
    depth, rank = block_axis(len(log)), Axis("rank", (*range(1, log.shape[1] + 1),))
    name = f"{level} log singular value"
    curve = {"axes": (depth, rank), "kind": "curve", "source": "Fig. 7"}
    mean = log.mean(axis=1)
    return [
        image_series(state, f"{name}, mean over ranks", mean, notes, source="Fig. 7"),
        image_series(state, f"{name}s", log, notes, **curve),
    ]


def rank_series(state: State, pool: State) -> list[Series]:
    """The family of effective ranks at every block."""
    count, (depth, channels) = state["count"], pool["mean"].shape
    centred = covariance_spectrum(pool, count)  # (L+1, K)
    around_zero = pool["scatter"] + count * _outer(pool["mean"])
    raw = np.sqrt(eigenvalues(around_zero, max(1, min(int(count), channels))))
    sigma, threshold = np.sqrt(centred), max(count, channels) * 2.0**-23
    above = f"singular values above {threshold:.1e} of the largest, centred features"
    origin, covariance = ("features not centred",), ("of the covariance",)
    flat = int((centred[:, 0] == 0).sum())
    equal = (f"all images are equal at {flat} of {depth} depths: ranks count as 1",)
    fit = (f"ranks {FIT[0]} to {FIT[1]}, weights 1 / rank",)
    if centred.shape[1] < FIT[1]:
        alpha = AlphaReQ(*np.full((2, depth), np.nan))
        fit = (f"needs {FIT[1]} eigenvalues, so more than {FIT[1]} images",)
    else:
        alpha = alpha_req(centred)
    table = {
        "RankMe": (rank_me(raw), origin),
        "RankMe, centred": (rank_me(sigma), ()),
        "effective rank": (effective_rank(raw), origin),
        "participation ratio": (participation_ratio(centred), covariance),
        "stable rank": (stable_rank(centred), covariance),
        "numerical rank": (numerical_rank(sigma, threshold=threshold), (above,)),
        "alpha-ReQ": (alpha.alpha, fit),
        "alpha-ReQ, R squared": (alpha.r_squared, fit),
        "std of normalised features": (_spread(state), ()),
    }
    notes = equal if flat else ()
    return [image_series(state, k, v, (*n, *notes)) for k, (v, n) in table.items()]


def image_series(
    state: State, name: str, values: np.ndarray, notes: tuple[str, ...], **fields: Any
) -> Series:
    """A Series over all images together: no standard error, NaN below 2 images.

    It is over depth alone, unless `fields` say otherwise.
    """
    n, lost = float(state["count"]), float(state["nonfinite"])
    fields = {
        "axes": (block_axis(len(values)),),
        "kind": "depth",
        "source": "",
        **fields,
    }
    said = (f"of {n:.0f} images together; compare only with equally many",)
    if n < 2:
        values, notes = np.full(np.shape(values), np.nan), ()
        said = ("one image has no covariance" if n else "no image to average",)
    if lost:
        said += (f"{lost:.0f} of {n + lost:.0f} images left out: not finite",)
    return Series(
        name=name,
        values=values,
        stderr=None,
        unit="",
        count=int(n),
        notes=(*notes, *said),
        **fields,
    )


def _outer(mean: np.ndarray) -> np.ndarray:
    return mean[:, :, None] * mean[:, None]  # (L+1, C) -> (L+1, C, C)


def _spread(state: State) -> np.ndarray:
    """`normalised_std` of all images at each depth: (L+1,)."""
    n, unit = max(float(state["count"]), 2.0), state["unit"]
    square = unit["square"] - np.square(unit["sum"]) / n
    return np.sqrt(np.maximum(square, 0.0) / (n - 1)).mean(axis=1)
