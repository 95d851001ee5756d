"""How many dimensions features take: the family of effective ranks, as kernels.

Monitors of collapse that need no labels. All read 1 where there is nothing but zeros.
Arrays of jax are computed in float32 and may be traced, arrays of numpy in float64;
leading axes are examples. `rank` measures an encoder with them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim.metrics._covariance import FLOOR, ZERO

__all__ = [
    "AlphaReQ",
    "alpha_req",
    "effective_rank",
    "normalised_std",
    "numerical_rank",
    "participation_ratio",
    "rank_me",
    "stable_rank",
]

FIT = (4, 100)  # first and last rank of the fit of alpha-ReQ; the released code's
FLAT = 1e-8  # a log spectrum of less variance is rounding, which no line explains


class AlphaReQ(NamedTuple):
    """Decay of a spectrum like rank ** -alpha, and R squared of that fit (up to 1)."""

    alpha: jax.Array
    r_squared: jax.Array


def rank_me(singular_values: jax.Array, *, eps: float = 1e-7) -> jax.Array:
    """RankMe: exp of the entropy of p = s / sum(s) + eps: (..., K) -> (...).

    As published, of the singular values of features that are not centred: a large mean
    lowers it. `eps` is not normalised away: K equal values give a little more than K.
    Here and below, jax arrays are computed in float32, numpy arrays in float64.

    Source: Garrido et al. 2023.
    """
    xp, s = floats(singular_values)
    return perplexity(xp, _shares(xp, s) + eps)


def effective_rank(singular_values: jax.Array) -> jax.Array:
    """exp of the entropy of s / sum(s): (..., K) -> (...) in [1, K].

    Source: Roy and Vetterli 2007.
    """
    return rank_me(singular_values, eps=0.0)


def participation_ratio(eigenvalues: jax.Array) -> jax.Array:
    """sum(s) ** 2 / sum(s ** 2) of eigenvalues of a covariance: (..., K) -> (...)."""
    xp, s = floats(eigenvalues)
    return _inverse(xp, xp.sum(xp.square(_shares(xp, s)), axis=-1))


def stable_rank(eigenvalues: jax.Array) -> jax.Array:
    """sum(s) / max(s) of the eigenvalues of a covariance: (..., K) -> (...)."""
    xp, s = floats(eigenvalues)
    return _inverse(xp, _shares(xp, s).max(axis=-1))


def numerical_rank(singular_values: jax.Array, *, threshold: float) -> jax.Array:
    """How many exceed `threshold` times the largest, at least 1: (..., K) -> (...)."""
    xp, s = floats(singular_values)
    above = s > threshold * s.max(axis=-1, keepdims=True)
    return xp.maximum(above.sum(axis=-1).astype(s.dtype), 1)


def alpha_req(eigenvalues: jax.Array) -> AlphaReQ:
    """alpha-ReQ: the power of the decay of a covariance's spectrum.

    A line is fitted to log(eigenvalue) over log(rank) at the ranks 4 to 100, with
    weights 1 / rank; alpha is minus its slope.

    Args:
      eigenvalues: (..., K) descending, K >= 100. Below 1e-12 of the first they count
        as that.

    Returns:
      `alpha` and `r_squared` (weighted alike; 1 for a flat spectrum), (...) each.

    Raises:
      ValueError: fewer than 100 eigenvalues.

    Source: Agrawal et al. 2022.
    """
    xp, s = floats(eigenvalues)
    first, last = FIT
    if s.shape[-1] < last:
        raise ValueError(
            f"got {s.shape[-1]} eigenvalues, expected at least {last}: alpha-ReQ is "
            f"fitted to the ranks {first} to {last}; measure more than {last} images"
        )
    floor = xp.maximum(FLOOR * s[..., :1], ZERO)
    y = xp.log(xp.maximum(s, floor)[..., first - 1 : last])
    rank = np.arange(first, last + 1)
    weight = (1 / rank) / np.sum(1 / rank)
    x = np.log(rank) - weight @ np.log(rank)
    weight, x = xp.asarray(weight, s.dtype), xp.asarray(x, s.dtype)

    def average(values: Any) -> Any:  # (..., ranks) -> (..., 1)
        return xp.sum(weight * values, axis=-1, keepdims=True)

    y = y - average(y)
    slope = average(x * y) / average(x * x)
    total, missed = average(y * y), average(xp.square(y - slope * x))
    fit = 1 - missed / xp.where(total > FLAT, total, 1)
    return AlphaReQ(-slope[..., 0], fit[..., 0])


def normalised_std(features: jax.Array) -> jax.Array:
    """Spread of features scaled to length 1: (M, D) -> scalar, 0 if all are equal.

    The standard deviation over images, mean over dimensions; 1 / sqrt(D) if they point
    everywhere alike.

    Source: Chen and He 2021, their test for collapse.
    """
    xp, x = floats(features)
    return unit_length(xp, x).std(axis=0, ddof=1).mean()


def floats(x: Any) -> tuple[Any, Any]:
    """The array module to use and x in it: numpy in float64, or jax in float32."""
    if isinstance(x, np.ndarray):
        return np, x.astype(np.float64)
    return jnp, jnp.asarray(x, jnp.float32)


def perplexity(xp: Any, p: Any) -> Any:
    """exp of the entropy of (..., K) probabilities, where 0 log 0 = 0."""
    p = xp.where(p > 0, p, 1.0)
    return xp.exp(-xp.sum(p * xp.log(p), axis=-1))


def unit_length(xp: Any, x: Any) -> Any:
    """(..., D) scaled to length 1; zeros stay."""
    length = xp.sqrt(xp.sum(xp.square(x), axis=-1, keepdims=True))
    return x / xp.where(length > 0, length, 1.0)


def _shares(xp: Any, s: Any) -> Any:
    total = xp.sum(s, axis=-1, keepdims=True)
    return s / xp.where(total > 0, total, 1.0)


def _inverse(xp: Any, x: Any) -> Any:
    return 1 / xp.where(x > 0, x, 1.0)
