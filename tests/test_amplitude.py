"""The full spectrum against an FFT in float64, closed forms and its symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_metrics_contract import features, state_of

from clvsmim.metrics import (
    half_diagonal,
    log_amplitude,
    log_amplitude_plane,
    radial_average,
    radial_frequencies,
    taps,
)
from clvsmim.plugin import load

METRIC = load("metrics", "amplitude", grid=(4, 4), prefix=1)
kernel = jax.jit(log_amplitude_plane, static_argnames=("grid", "prefix"))
half_diagonal_of = jax.jit(log_amplitude, static_argnames=("grid", "prefix"))
GRIDS = [(4, 4), (5, 5), (6, 9), (7, 4), (14, 14), (1, 8), (2, 2)]


def plane(maps: np.ndarray) -> np.ndarray:
    """Of maps (rows, columns) or (rows, columns, D) without prefix."""
    grid = maps.shape[:2]
    tokens = jnp.asarray(maps.reshape(grid[0] * grid[1], -1), jnp.float32)
    return np.asarray(kernel(tokens, grid=grid, prefix=0))


def by_fft(maps: np.ndarray) -> np.ndarray:
    """The definition in float64."""
    maps = np.float32(maps).astype(float).reshape(*maps.shape[:2], -1)
    log = np.log(np.abs(np.fft.fft2(maps, axes=(0, 1))) + 1e-6).mean(axis=2)
    return np.fft.fftshift(log)


def by_rings(values: np.ndarray) -> list[float]:
    """Means over rings, bin by bin, in float64."""
    rows, columns = values.shape
    rings: dict[int, list[float]] = {}
    for (i, j), value in np.ndenumerate(values):
        u, v = 2 * (i - rows // 2) / rows, 2 * (j - columns // 2) / columns
        radius = np.hypot(u, v) * min(rows, columns) / 2
        ring = max(1, int(radius + 0.5)) if radius else 0
        rings.setdefault(ring, []).append(value)
    return [np.mean(rings[k]) for k in sorted(rings)]


def noise(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


def middle(values: np.ndarray) -> tuple[int, int]:
    return values.shape[0] // 2, values.shape[1] // 2


def others(values: np.ndarray) -> np.ndarray:
    """All bins but zero frequency."""
    return np.delete(values.ravel(), np.ravel_multi_index(middle(values), values.shape))


@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_definition_by_fft(grid):
    maps = noise(*grid, 3) + 0.5
    got = plane(maps)
    assert got.shape == grid and got.dtype == np.float32
    np.testing.assert_allclose(got, by_fft(maps), atol=1e-5)


def test_zero_frequency_is_in_the_middle():
    maps = noise(6, 9, 2) + 3
    want = np.log(np.abs(maps.sum(axis=(0, 1)))).mean()
    np.testing.assert_allclose(plane(maps)[3, 4], want, rtol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (7, 7), (14, 14), (14, 10), (5, 8)])
def test_its_half_diagonal_is_the_one_of_fourier(grid):
    maps = noise(*grid, 4) + 1
    tokens = jnp.asarray(maps.reshape(-1, 4), jnp.float32)
    want = half_diagonal_of(tokens, grid=grid, prefix=0)
    got = plane(maps)
    u, v = half_diagonal(grid).T
    np.testing.assert_allclose(
        got[middle(got)[0] + u, middle(got)[1] + v], want, atol=1e-5
    )


def test_white_noise_has_half_log_two_but_where_the_bin_is_real():
    got = plane(noise(6, 6, 20_000))
    rise = got - got[3, 3]
    real = np.zeros((6, 6), bool)
    real[np.ix_([0, 3], [0, 3])] = True
    np.testing.assert_allclose(rise[real], 0, atol=0.04)
    np.testing.assert_allclose(rise[~real], 0.3466, atol=0.04)


def test_an_impulse_is_flat():
    for grid in ((14, 14), (6, 9)):
        impulse = np.zeros(grid)
        impulse[2, 3] = 1
        np.testing.assert_allclose(plane(impulse), 0, atol=1e-5)


def test_waves_along_an_axis_and_the_checkerboard_are_seen():
    row, column = np.indices((14, 14))
    vertical = plane(1 + np.cos(2 * np.pi * 3 * row / 14))
    np.testing.assert_allclose(vertical[[4, 10], 7], np.log(98), atol=1e-5)
    horizontal = plane(1 + np.cos(2 * np.pi * 3 * column / 14))
    np.testing.assert_allclose(horizontal[7, [4, 10]], np.log(98), atol=1e-5)
    board = plane(1 + (-1.0) ** (row + column))
    np.testing.assert_allclose(board[0, 0], np.log(196), atol=1e-5)
    for got, seen in ((vertical, 3), (horizontal, 3), (board, 2)):
        assert np.sum(got > -8) == seen  # these and zero frequency


@pytest.mark.parametrize("value", [2.0, -0.1, 1e4])
@pytest.mark.parametrize("grid", [(14, 14), (5, 8)])
def test_a_constant_has_zero_frequency_only(value, grid):
    got = plane(np.full((*grid, 2), value))
    total = grid[0] * grid[1] * abs(value)
    np.testing.assert_allclose(got[middle(got)], np.log(total), rtol=1e-5)
    np.testing.assert_allclose(others(got), np.log(1e-6), rtol=1e-3)


def test_a_large_mean_does_not_drown_the_detail():
    maps = noise(14, 14, 4)
    np.testing.assert_allclose(
        others(plane(maps + 1000)), others(plane(maps)), atol=1e-3
    )


def test_invariances():
    maps = noise(6, 6, 4) + 1
    base = plane(maps)
    for same in (
        maps[..., ::-1],
        np.roll(maps, (2, 1), (0, 1)),
        maps[::-1, ::-1],
        -maps,
    ):
        np.testing.assert_allclose(plane(same), base, atol=1e-5)
    np.testing.assert_allclose(plane(maps.swapaxes(0, 1)), base.T, atol=1e-5)
    np.testing.assert_allclose(plane(10 * maps), base + np.log(10), atol=1e-5)
    mirrored = plane(maps[:, ::-1])  # horizontal frequencies change sign
    np.testing.assert_allclose(mirrored[:, 1:], base[:, :0:-1], atol=1e-5)
    for same in (mirrored, base.T):
        np.testing.assert_allclose(
            radial_average(jnp.asarray(same)),
            radial_average(jnp.asarray(base)),
            atol=1e-5,
        )


@pytest.mark.parametrize("grid", [*GRIDS, (14, 4), (3, 16)])
def test_rings_hold_every_bin_once_and_zero_alone(grid):
    values = noise(*grid).astype("f4")
    got = radial_average(jnp.asarray(values))
    np.testing.assert_allclose(got, by_rings(values), atol=1e-6)
    frequencies = radial_frequencies(grid)
    assert got.shape == frequencies.shape and frequencies[0] == 0
    np.testing.assert_array_equal(got[0], values[middle(values)])
    steps = np.diff(frequencies) * min(grid) / 2
    np.testing.assert_allclose(steps, 1, rtol=1e-12)  # no ring is empty
    np.testing.assert_allclose(radial_average(jnp.full(grid, 3.0)), 3, rtol=1e-6)


def test_rings_of_the_usual_grid():
    np.testing.assert_allclose(radial_frequencies((14, 14)), np.arange(11) / 7)
    last = np.zeros((14, 14), "f4")
    last[0, 0] = 5  # the checkerboard
    np.testing.assert_array_equal(radial_average(jnp.asarray(last)), [0] * 10 + [5])


def test_a_field_of_one_over_f_falls_with_the_logarithm():
    f = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(14, 1 / 14)]))
    f[0, 0] = 1
    spectrum = np.fft.fft2(noise(14, 14, 2000), axes=(0, 1)) / f[..., None]
    got = plane(np.fft.ifft2(spectrum, axes=(0, 1)).real)
    u, v = np.indices((6, 6)) + 1  # complex bins
    want = 0.3466 - np.log(np.hypot(u, v))
    np.testing.assert_allclose(got[8:, 8:] - got[7, 7], want, atol=0.1)


def test_prefix_tokens_are_not_seen_and_a_wrong_grid_is_explained():
    tokens = jnp.asarray(noise(18, 3), jnp.float32)
    got = kernel(tokens.at[:2].set(jnp.nan), grid=(4, 4), prefix=2)
    want = by_fft(np.asarray(tokens[2:]).reshape(4, 4, 3))
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(plane(np.zeros((4, 4, 2))), np.log(1e-6), rtol=1e-6)
    with pytest.raises(ValueError, match="got 18 tokens, expected 16 = prefix 0"):
        log_amplitude_plane(tokens, grid=(4, 4), prefix=0)


def test_vmap_of_the_kernel_is_the_kernel_of_each():
    tokens = jnp.asarray(noise(3, 16, 4), jnp.float32)
    got = jax.vmap(lambda t: kernel(t, grid=(4, 4), prefix=0))(tokens)
    want = [plane(t.reshape(4, 4, 4)) for t in np.asarray(tokens)]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_series_are_of_the_embedding_and_the_block_outputs():
    given = features(6)
    spectrum, delta, log = METRIC.compute(state_of(METRIC, given))
    assert [s.name for s in (spectrum, delta, log)] == [
        "log amplitude spectrum",
        "radial log amplitude",
        "radial log amplitude, absolute",
    ]
    assert [s.kind for s in (spectrum, delta, log)] == ["matrix", "curve", "curve"]
    for s in (spectrum, delta, log):
        assert (s.axes[0].name, s.axes[0].values) == ("depth", taps(3)[::2])
    stream = [np.asarray(x)[:, 1:].reshape(6, 4, 4, -1) for x in given["residual"]]
    planes = np.array([[by_fft(m) for m in tap] for tap in stream[::2]])
    # Of these amplitudes, in the middle 3.4, one is 1.3e-4: float32 has 3 digits of it.
    np.testing.assert_allclose(spectrum.values, planes.mean(axis=1), atol=1e-4)
    want = np.array([by_rings(p) for p in planes.mean(axis=1)])
    np.testing.assert_allclose(log.values, want, atol=1e-4)
    np.testing.assert_allclose(delta.values, want - want[:, :1], atol=1e-4)
    assert delta.axes[1].values == log.axes[1].values == (0, 0.5, 1, 1.5)
    assert [a.values for a in spectrum.axes[1:]] == 2 * [(-1, -0.5, 0, 0.5)]
