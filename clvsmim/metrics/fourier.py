"""Delta log amplitude: how much high frequency a token map holds, relative to its mean.

The patch tokens of one tap are a map of D channels over the grid. The unnormalised
two-dimensional Fourier transform of each is read on its half diagonal, from zero
frequency outwards (Fig. 8; Park and Kim 2022). Beware of two readings. The last entry
of 14 x 14 patches is 6/7 of the Nyquist frequency, not Nyquist. And, being relative to
the mean, the curve falls when detail goes, but also when a constant is added: hence the
absolute log amplitude is reported with it.
"""

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
    taps,
)
from clvsmim.metrics.smoothing import centred_patches

__all__ = ["delta_log_amplitude", "half_diagonal", "log_amplitude"]

EPS = 1e-6  # the released code's; the logarithm of an absent frequency


def half_diagonal(grid: tuple[int, int]) -> np.ndarray:
    """The bins (u, v) of the Fourier transform read, zero frequency first: (F, 2) int.

    On a square grid of side g these are (f, f) for f < g / 2. On other grids, u / rows
    and v / columns should stay equal (the same frequency per pixel along both axes), so
    f counts along the shorter side and the longer takes the bin nearest to that. Being
    true bins of the grid, they ignore constants and circular shifts on any grid.
    F = ceil(shorter / 2).

    Raises:
      ValueError: a side has fewer than 3 patches, and so no bin but zero.
    """
    short = min(grid)
    if short < 3:
        raise ValueError(
            f"got a grid of {grid[0]} x {grid[1]} patches, expected at least 3 x 3: "
            "smaller ones have no frequency but zero; use smaller patches, or leave "
            "fourier out of --metrics"
        )
    f = np.arange((short + 1) // 2)  # (F,)
    return np.stack([(2 * f * n + short) // (2 * short) for n in grid], axis=1)


def log_amplitude(
    tokens: jax.Array, *, grid: tuple[int, int], prefix: int
) -> jax.Array:
    """log(|Fourier transform| + 1e-6) on the half diagonal, mean over channels.

    Args:
      tokens: (T, D) of one image at one tap.
      grid: (rows, columns) of patches.
      prefix: number of tokens before the patches.

    Returns:
      (F,) float32, see `half_diagonal`.

    Raises:
      ValueError: the grid and prefix do not make T tokens, or the grid is too small.
    """
    check_tokens(len(tokens), grid, prefix)
    maps = tokens.astype(jnp.float32)[prefix:]  # (T, D) -> (N, D)
    return _log_amplitude(maps - maps[:1], maps.sum(axis=0), grid)


def delta_log_amplitude(
    tokens: jax.Array, *, grid: tuple[int, int], prefix: int
) -> jax.Array:
    """`log_amplitude` minus its value at zero frequency: (T, D) -> (F,), first entry 0.

    Source: Fig. 8. White noise gives 0.347 = log(2) / 2 at every other frequency.
    """
    log = log_amplitude(tokens, grid=grid, prefix=prefix)
    return log - log[:1]


def make(*, grid: tuple[int, int], prefix: int) -> Metric:
    """Curves at every tap, and the highest frequency over depth as in Fig. 8."""
    f = np.arange(len(half_diagonal(grid)))
    frequency = Axis("frequency (pi)", tuple((2 * f / min(grid)).tolist()))

    def kernel(image: Image) -> dict[str, jax.Array]:
        check_tokens(len(image["tokens"]), grid, prefix)
        rest, mean = centred_patches(image, prefix)
        log = _log_amplitude(rest, len(rest) * mean, grid)
        return {"log": log, "delta": log - log[:1]}

    def compute(state: State) -> list[Series]:
        sites = taps(len(state["sum"]["delta"]) // 2)
        curve = {"axes": (Axis("depth", sites), frequency), "kind": "curve", "unit": ""}
        return [
            mean_series(
                state,
                "delta",
                at=np.s_[::2, -1],  # the embedding and the output of each block
                name="delta log amplitude at the highest frequency",
                axes=(Axis("depth", sites[::2]),),
                kind="depth",
                unit="",
                source="Fig. 8",
            ),
            mean_series(
                state, "delta", name="delta log amplitude", source="Fig. 8", **curve
            ),
            mean_series(state, "log", name="log amplitude", source="", **curve),
        ]

    return of_each("residual", kernel, compute)


def _log_amplitude(
    rest: jax.Array, total: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """`log_amplitude` of patch tokens whose sum is `total` (D,), the zero frequency.

    `rest` (N, D) are the tokens with something that all have in common taken out, one
    of them or the mean. The bins after the first do not see it, and are safe from its
    rounding error: residual streams have channels with very large means.
    """
    waves = jnp.einsum(
        "wfn,nd->wfd", _waves(grid), rest, precision=jax.lax.Precision.HIGHEST
    )  # (2, F-1, D), cosine and sine parts
    others = jnp.sqrt(jnp.square(waves).sum(axis=0))
    amplitude = jnp.concatenate([jnp.abs(total)[None], others])
    return jnp.log(amplitude + EPS).mean(axis=1)  # (F, D) -> (F,)


def _waves(grid: tuple[int, int]) -> np.ndarray:
    """Cosines and sines of the bins after the first over the patches: (2, F-1, N)."""
    row, column = np.indices(grid).reshape(2, -1)  # (N,) each
    u, v = half_diagonal(grid)[1:].T[:, :, None]  # (F-1, 1) each
    turns = u * row[None] / grid[0] + v * column[None] / grid[1]  # (F-1, N)
    return np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)]).astype("f4")
