"""LiDAR: how many directions tell images apart better than their random crops do.

The effective rank of a linear discriminant analysis whose classes are the images
themselves, each seen in several views (Thilak et al. 2023). Unlike RankMe it does not
count directions that differ as much between two crops of one image. Features are the
mean patch tokens, at the embedding and after each block. With few crops low ranks come
out too high: means of q crops still differ by 1 / q of what crops differ by.
"""

from typing import Any

import jax
import numpy as np

from clvsmim.metrics import (
    Features,
    Metric,
    Series,
    State,
    group_weights,
    image_features,
    keep,
)
from clvsmim.metrics._covariance import add_scatters, scatter
from clvsmim.metrics.dimension import floats, perplexity
from clvsmim.metrics.rank import image_series

__all__ = ["lidar_rank"]

EPS = 1e-8  # added to each share of the spectrum; the authors' value


def lidar_rank(features: jax.Array, *, delta: float = 1e-4) -> jax.Array:
    """exp of the entropy of the whitened covariance between objects.

    Args:
      features: (n, q, D), q views of each of n objects.
      delta: added to the diagonal of the covariance within objects. The number depends
        on it where features are small, so state it.

    Returns:
      Scalar from 1 to min(D, n - 1); float32, or float64 if `features` is a numpy
      array.

    Raises:
      ValueError: fewer than 2 objects or 2 views.

    Source: Thilak et al. 2023.
    """
    xp, x = floats(features)
    n, q, width = x.shape
    if min(n, q) < 2:
        raise ValueError(f"got {n} objects of {q} views, expected at least 2 of 2")
    mean = x.mean(axis=1, keepdims=True)  # (n, 1, D)
    between = (mean - mean.mean(axis=0, keepdims=True)).reshape(n, width)
    within = (x - mean).reshape(n * q, width)
    with jax.default_matmul_precision("highest"):
        return _rank(
            xp,
            between.T @ between / (n - 1),
            within.T @ within / (n * (q - 1)),
            delta,
        )


def make(
    *, prefix: int, views: int = 10, objects: int = 100, delta: float = 1e-4
) -> Metric:
    """LiDAR per block, of the first `objects` images in `views` random crops each.

    A state holds twice C x C numbers per block: 122 MB for a ViT-B.
    """
    if views < 2:
        raise ValueError(f"got {views} views of each image, expected at least 2")

    def update(features: Features, weights: jax.Array) -> dict[str, Any]:
        x = image_features(features["residual"], prefix=prefix)  # (B, L+1, D)
        groups = x.reshape(-1, views, *x.shape[1:])
        return {"weight": group_weights(weights, views), "features": groups}

    def to_state(rows: dict[str, Any]) -> State:
        kept = keep({**rows, "index": np.arange(len(rows["weight"]))})
        x = kept["features"].astype(np.float64)  # (n, q, L+1, D)
        mean = x.mean(axis=1)
        off = (x - mean[:, None]).reshape(-1, *mean.shape[1:]).swapaxes(0, 1)
        return {
            "count": np.float64(len(x)),
            "nonfinite": kept["nonfinite"],
            "between": scatter(mean),
            "within": off.swapaxes(1, 2) @ off,
        }

    def merge(a: State, b: State) -> State:
        return add_scatters(a, b, ("between",))

    def compute(state: State) -> list[Series]:
        n = max(float(state["count"]), 2.0)
        between = state["between"]["scatter"] / (n - 1)
        within = state["within"] / (n * (views - 1))
        ranks = np.array(
            [_rank(np, b, w, delta) for b, w in zip(between, within, strict=True)]
        )
        notes = (f"{views} random crops of each image, delta {delta:g}",)
        return [image_series(state, "LiDAR", ranks, notes)]

    return Metric(
        needs=("residual",),
        update=update,
        to_state=to_state,
        merge=merge,
        compute=compute,
        parts=("views",),
        limit=objects * views,
        group=views,
    )


def _rank(xp: Any, between: Any, within: Any, delta: float) -> Any:
    """LiDAR of two covariances (D, D)."""
    values, vectors = xp.linalg.eigh(within)
    scale = 1 / xp.sqrt(xp.maximum(values, 0.0) + delta)  # (D,)
    half = vectors * scale[None]
    spectrum = xp.maximum(xp.linalg.eigvalsh(half.T @ between @ half), 0.0)
    total = spectrum.sum()
    return perplexity(xp, spectrum / xp.where(total > 0, total, 1.0) + EPS)
