"""States of metrics: float64 sums, or rows kept per image; how they merge."""

from typing import Any

import jax
import numpy as np

State = Any  # a pytree of numpy arrays; sums are float64


def moments(rows: dict[str, Any]) -> State:
    """Sums over images of {"weight": (B,), "values": {key: (B, ...)}}, in float64.

    Padding (weight 0) is left out whatever it holds. A real image with a value that is
    not finite is left out under every key and counted.

    Returns:
      {"count", "nonfinite": numbers of images, "sum", "square": {key: (...)}}.
    """
    values = {k: np.asarray(v) for k, v in rows["values"].items()}
    real = np.asarray(rows["weight"]) > 0  # (B,)
    finite = np.ones_like(real)
    for v in values.values():
        finite &= np.isfinite(v).all(axis=tuple(range(1, v.ndim)))
    kept = {k: v[real & finite].astype(np.float64) for k, v in values.items()}
    return {
        "count": np.float64(np.sum(real & finite)),
        "nonfinite": np.float64(np.sum(real & ~finite)),
        "sum": {k: v.sum(axis=0) for k, v in kept.items()},
        "square": {k: np.square(v).sum(axis=0) for k, v in kept.items()},
    }


def add(a: State, b: State) -> State:
    """Leaf-by-leaf sum of two states.

    Raises:
      ValueError: the states are of models or settings of different shapes.
    """

    def leaf(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if np.shape(x) != np.shape(y):
            raise ValueError(
                f"cannot merge states: a sum of shape {np.shape(x)} meets one of shape "
                f"{np.shape(y)}; merge states of one model, grid and metric only"
            )
        return np.add(x, y, dtype=np.float64)

    return jax.tree.map(leaf, a, b)


def keep(rows: dict[str, Any]) -> State:
    """The rows of real images themselves, for what is not a sum.

    Args:
      rows: {"weight": (B,), "index": (B,), key: (B, ...)}; every key is kept as it is.

    Returns:
      the same keys without "weight", sorted by index, and "nonfinite", the number of
      images left out because a value of theirs is not finite.
    """
    rows = {k: np.asarray(v) for k, v in rows.items()}
    real = rows.pop("weight") > 0  # (B,)
    finite = np.ones_like(real)
    for v in rows.values():
        if np.issubdtype(v.dtype, np.floating):
            finite &= np.isfinite(v).all(axis=tuple(range(1, v.ndim)))
    order = np.argsort(rows["index"], kind="stable")
    chosen = order[(real & finite)[order]]
    kept = {k: v[chosen] for k, v in rows.items()}
    return {**kept, "nonfinite": np.float64(np.sum(real & ~finite))}


def join(a: State, b: State) -> State:
    """The union of two states of `keep`, sorted by index.

    Raises:
      ValueError: rows of different shapes.
    """
    index = np.concatenate([a["index"], b["index"]])
    order = np.argsort(index, kind="stable")

    def leaf(key: str) -> np.ndarray:
        x, y = a[key], b[key]
        if x.shape[1:] != y.shape[1:]:
            raise ValueError(
                f"cannot merge states: {key} of shape {x.shape[1:]} meets "
                f"{y.shape[1:]}; merge states of one model and metric only"
            )
        return np.concatenate([x, y])[order]

    joined = {k: leaf(k) for k in a if k != "nonfinite"}
    return {**joined, "nonfinite": a["nonfinite"] + b["nonfinite"]}
