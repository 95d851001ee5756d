"""The whole spectrum of a token map: every frequency, and averaged over directions.

`fourier` reads one diagonal of the spectrum, as the paper does; waves along an axis and
the Nyquist frequency are not on it. Here are all frequencies of the embedding and the
block outputs, as a plane and as its average over rings (Park and Kim 2022).
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
    block_axis,
    check_tokens,
    mean_series,
    of_each,
)
from clvsmim.metrics.fourier import EPS
from clvsmim.metrics.smoothing import centred_patches

__all__ = ["log_amplitude_plane", "radial_average", "radial_frequencies"]

HIGHEST = jax.lax.Precision.HIGHEST


def log_amplitude_plane(
    tokens: jax.Array, *, grid: tuple[int, int], prefix: int
) -> jax.Array:
    """log(|Fourier transform| + 1e-6) of the token map, mean over channels.

    Args:
      tokens: (T, D) of one image at one tap.
      grid: (rows, columns) of patches.
      prefix: number of tokens before the patches.

    Returns:
      (rows, columns) float32, zero frequency at (rows // 2, columns // 2). White noise
      has 0.347 = log(2) / 2 more elsewhere than there, but for the three bins (of even
      grids) which are real too: Nyquist along one axis or both, zero along the other.

    Raises:
      ValueError: the grid and prefix do not make T tokens.
    """
    check_tokens(len(tokens), grid, prefix)
    maps = tokens.astype(jnp.float32)[prefix:]  # (T, D) -> (N, D)
    return _unfold(_half_plane(maps - maps[:1], maps.sum(axis=0), grid), grid)


def radial_average(plane: jax.Array) -> jax.Array:
    """Mean over each ring of a plane with zero frequency at its centre.

    Args:
      plane: (rows, columns), as `log_amplitude_plane` returns.

    Returns:
      (F,) float32, of the frequencies `radial_frequencies((rows, columns))`.
    """
    rings = _rings(plane.shape)  # (rows * columns, F)
    return jnp.dot(plane.reshape(-1), rings, precision=HIGHEST)


def radial_frequencies(grid: tuple[int, int]) -> np.ndarray:
    """Radii of the rings in units of pi, where 1 is Nyquist of an axis: (F,) float64.

    A bin that is (u, v) from zero has the radius hypot(2 u / rows, 2 v / columns). Its
    ring is the nearest multiple of 2 / min(rows, columns), the step of the shorter
    side; zero frequency is alone in ring 0. Rings above 1 are corners of the plane, so
    they hold diagonal waves only; the last of an even grid is the checkerboard alone.
    """
    return np.unique(_ring_of_bins(grid)) * 2 / min(grid)


def make(*, grid: tuple[int, int], prefix: int) -> Metric:
    """The plane and its radial average, of the embedding and each block's output."""
    frequency = Axis("frequency (pi)", tuple(radial_frequencies(grid).tolist()))
    sides = tuple(
        Axis(f"{way} frequency (pi)", tuple((2 * _offsets(n) / n).tolist()))
        for way, n in zip(("vertical", "horizontal"), grid, strict=True)
    )

    def kernel(image: Image) -> dict[str, jax.Array]:
        check_tokens(len(image["tokens"]), grid, prefix)
        if image["place"] % 2:  # between attention and MLP
            return {}
        rest, mean = centred_patches(image, prefix)
        plane = _unfold(_half_plane(rest, len(rest) * mean, grid), grid)
        radial = radial_average(plane)  # (rows, columns) -> (F,)
        return {"plane": plane, "log": radial, "delta": radial - radial[:1]}

    def compute(state: State) -> list[Series]:
        depth = block_axis(len(state["sum"]["plane"]))
        return [
            mean_series(
                state,
                key,
                name=name,
                axes=(depth, *axes),
                kind=kind,
                unit="",
                source="",
            )
            for key, name, axes, kind in (
                ("plane", "log amplitude spectrum", sides, "matrix"),
                ("delta", "radial log amplitude", (frequency,), "curve"),
                ("log", "radial log amplitude, absolute", (frequency,), "curve"),
            )
        ]

    return of_each("residual", kernel, compute)


def _half_plane(rest: jax.Array, total: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The plane from vertical frequency 0 up; the rest of it mirrors this part.

    Of `rest` (N, D) and `total` (D,) as in `fourier`, to (U, columns) with
    U = rows // 2 + 1, columns in their final order.
    """
    (rows, columns), width = grid, rest.shape[1]
    down = jnp.matmul(_down(rows), rest.reshape(rows, -1), precision=HIGHEST)
    down = down.reshape(-1, 2 * columns, width)  # (2U, columns * D) -> (U, 2c, D)
    across = jnp.broadcast_to(_across(columns), (len(down), *2 * (2 * columns,)))
    waves = jnp.matmul(across, down, precision=HIGHEST)
    squares = jnp.square(waves).reshape(-1, 2, columns, width).sum(axis=1)
    half = jnp.log(jnp.sqrt(squares) + EPS).mean(axis=-1)  # (U, columns)
    zero = jnp.log(jnp.abs(total) + EPS).mean()
    at_zero = np.zeros(half.shape, bool)
    at_zero[0, columns // 2] = True
    return jnp.where(at_zero, zero, half)


def _unfold(half: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """(..., U, columns) -> (..., rows, columns) by the symmetry of real maps."""
    rows, columns = grid
    # Of frequencies -u; with their columns turned round they start from the highest.
    other = half[..., rows // 2 : 0 : -1, ::-1]
    other = jnp.roll(other, 1 - columns % 2, axis=-1)
    return jnp.concatenate([other, half[..., : rows - rows // 2, :]], axis=-2)


def _down(rows: int) -> np.ndarray:
    """Cosine and sine of each vertical frequency from 0 up, in turns: (2U, rows)."""
    turns = np.outer(np.arange(rows // 2 + 1), np.arange(rows)) / rows
    both = np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=1)
    return both.reshape(-1, rows).astype(np.float32)


def _across(columns: int) -> np.ndarray:
    """From (cosine, sine) x columns to (real, imaginary) x horizontal frequencies."""
    turns = np.outer(_offsets(columns), np.arange(columns)) / columns
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    both = np.block([[cos, -sin], [sin, cos]])  # sign of the imaginary part: no matter
    return both.astype(np.float32)


def _offsets(n: int) -> np.ndarray:
    """How far each bin of an axis is from zero frequency: (n,) int."""
    return np.arange(n) - n // 2


def _ring_of_bins(grid: tuple[int, int]) -> np.ndarray:
    """The number of each bin's ring: (rows, columns) float64."""
    u, v = (_offsets(n) / n for n in grid)
    nearest = np.floor(np.hypot(u[:, None], v[None]) * min(grid) + 0.5)
    away = (u != 0)[:, None] | (v != 0)[None]
    return np.where(away, np.maximum(nearest, 1), 0)


def _rings(grid: tuple[int, int]) -> np.ndarray:
    """One column per ring, which averages over its bins: (rows * columns, F)."""
    bins = _ring_of_bins(grid).reshape(-1, 1)
    member = bins == np.unique(bins)
    return (member / member.sum(axis=0)).astype(np.float32)
