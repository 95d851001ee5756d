"""Covariances of rows of features: how they add up, and their eigenvalues."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim.metrics._states import State, add

FLOOR = 1e-12  # of the largest eigenvalue: what is below is rounding, in float64 too
ZERO = float(np.finfo(np.float32).tiny)  # the floor if the largest is zero
THREADS = 8  # at most: each may hold 100 MB


def in_threads(function: Callable, items: Iterable) -> list:
    """`function` of each, in threads if OpenBLAS is told to use one thread.

    `clvsmim` tells it. OpenBLAS with threads of its own is slower in several threads
    than in one, and XLA slower beside one busy core than beside all a little busy.
    """
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        return list(map(function, items))
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
    with ThreadPoolExecutor(min(cores, THREADS)) as threads:
        return list(threads.map(function, items))


def rank_count(observations: int, channels: int) -> int:
    """Eigenvalues that a covariance can have above zero.

    Raises:
      ValueError: fewer than 2 observations.
    """
    if observations < 2:
        raise ValueError(
            f"got {observations} observations of {channels} channels, expected at "
            "least 2: one alone has no covariance"
        )
    return min(observations - 1, channels)


def eigenvalues(matrix: np.ndarray, ranks: int) -> np.ndarray:
    """The `ranks` largest of (..., n, n), descending: (..., ranks), not negative.

    numpy asks LAPACK for values only, which is far more accurate for the small ones
    than the mode with vectors that jax uses on CPU.
    """
    values = np.linalg.eigvalsh(matrix)[..., ::-1][..., :ranks]
    return np.maximum(values, 0.0)


def floored_log(spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of (..., K) descending eigenvalues, and which were raised to the floor."""
    floor = np.maximum(FLOOR * spectrum[..., :1], ZERO)
    return np.log(np.maximum(spectrum, floor)), spectrum < floor


def floor_notes(low: float, measured: float) -> tuple[str, ...]:
    """What to say if `low` of the `measured` values were raised to the floor."""
    if not low:
        return ()
    return (
        f"{low:.0f} of {measured:.0f} singular values are zero up to rounding and "
        f"count as {FLOOR:g} of the largest, or as {ZERO:.1e} if that is zero",
    )


def log_spectrum(rows: jax.Array) -> jax.Array:
    """Log eigenvalues of the covariance of (N, C) observations: (K,) float32."""
    x = rows.astype(jnp.float32)
    n, ranks = len(x), rank_count(*x.shape)
    # Large means would drown the small values. The first row takes them out exactly; a
    # mean does not, not even twice: XLA sums again, in another order, where it is used.
    x = x - x[:1]
    x = x - x.mean(axis=0, keepdims=True)
    r = jnp.linalg.qr(x.T if n < x.shape[1] else x, mode="r")
    s = jnp.linalg.svd(r, compute_uv=False)[:ranks]
    log = 2 * jnp.log(s) - np.float32(np.log(n - 1))
    lowest = jnp.maximum(log[:1] + np.float32(np.log(FLOOR)), np.float32(np.log(ZERO)))
    return jnp.maximum(log, lowest)


def scatter(x: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and sum of squares around it of (M, L+1, C): (L+1, C) and (L+1, C, C)."""
    x = x.astype(np.float64).swapaxes(0, 1)  # (L+1, M, C)
    mean = x.sum(axis=1) / max(x.shape[1], 1)
    x = x - mean[:, None]
    return {"mean": mean, "scatter": x.swapaxes(1, 2) @ x}


def add_scatters(a: State, b: State, keys: Any) -> State:
    """Like `add`, where a[key] and b[key] are of `scatter` (Chan et al. 1979)."""
    whole, m, n = add(a, b), float(a["count"]), float(b["count"])
    total = max(m + n, 1.0)
    for key in keys:
        first, second = a[key]["mean"], b[key]["mean"]  # (L+1, C)
        whole[key]["mean"] = (m * first + n * second) / total
        step = np.sqrt(m * n / total) * (second - first)
        for sums, d in zip(whole[key]["scatter"], step, strict=True):
            sums += np.outer(d, d)  # in place: these are large
    return whole


def covariance_spectrum(pool: State, count: float) -> np.ndarray:
    """Eigenvalues of the covariance: (L+1, min(M - 1, C)); (L+1, 1) zeros if M < 2."""
    ranks = max(1, min(int(count) - 1, pool["mean"].shape[1]))
    return eigenvalues(pool["scatter"] / max(count - 1, 1), ranks)
