"""Delta log amplitude against closed forms, an FFT and the recorded original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import delta_log_amplitude, half_diagonal, log_amplitude
from clvsmim.plugin import load

FLOOR = np.log(1e-6)


def delta(maps: np.ndarray) -> np.ndarray:
    """Of maps (rows, columns) or (rows, columns, D) without prefix."""
    grid = maps.shape[:2]
    tokens = jnp.asarray(maps.reshape(grid[0] * grid[1], -1), jnp.float32)
    return np.asarray(delta_log_amplitude(tokens, grid=grid, prefix=0))


def by_fft(maps: np.ndarray) -> np.ndarray:
    """The definition in float64, for square maps (g, g, D)."""
    g = len(maps)
    log = np.log(np.abs(np.fft.fft2(maps.astype(float), axes=(0, 1))) + 1e-6)
    line = np.diagonal(np.roll(log.mean(axis=2), (g // 2, g // 2), (0, 1)))[g // 2 :]
    return line - line[0]


def noise(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


@pytest.mark.parametrize("g", [3, 4, 7, 14])
def test_equals_the_definition_by_fft(g):
    maps = noise(g, g, 5) + 0.5
    got = delta(maps)
    assert len(got) == -(-g // 2)
    np.testing.assert_allclose(got, by_fft(maps), atol=1e-5)


def test_hand_made_cases_and_the_order_of_mean_and_log():
    ramp = np.arange(16.0).reshape(4, 4)
    other = np.array([[1, 2, 0, 1], [0, 3, 1, 2], [2, 1, 4, 0], [1, 0, 2, 5.0]])
    for maps, want in (
        (ramp, -18.6030023),
        (other, -2.1202632),
        (np.stack([ramp, other], axis=2), -10.3616328),
    ):
        np.testing.assert_allclose(delta(maps), [0, want], rtol=1e-6)


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (6, 9)])
def test_an_impulse_is_flat(grid):
    impulse = np.zeros(grid)
    impulse[2, 3] = 1
    np.testing.assert_allclose(delta(impulse), 0, atol=1e-6)


@pytest.mark.parametrize("value", [2.0, -0.1, 1e4])
@pytest.mark.parametrize("grid", [(14, 14), (14, 10)])
def test_a_constant_has_no_high_frequency(value, grid):
    total = grid[0] * grid[1] * abs(value)
    got = delta(np.full(grid, value))
    np.testing.assert_allclose(got[1:], FLOOR - np.log(total), rtol=1e-3)


def test_a_diagonal_wave_is_seen_at_its_frequency():
    place = np.add.outer(np.arange(14), np.arange(14))
    got = delta(1 + 0.5 * np.cos(2 * np.pi * 3 * place / 14))
    np.testing.assert_allclose(got[3], np.log(0.25), atol=1e-5)
    assert np.all(np.delete(got, [0, 3]) < -17)


def test_axis_aligned_waves_and_the_checkerboard_are_not_seen():
    row, column = np.indices((14, 14))
    for maps in (np.cos(2 * np.pi * 3 * column / 14), (-1.0) ** (row + column)):
        assert np.all(delta(1 + maps)[1:] < -17)


def test_white_noise_has_half_log_two_everywhere():
    got = delta(noise(14, 14, 40_000))
    np.testing.assert_allclose(got[1:], 0.5 * np.log(2), atol=0.03)


def test_a_field_of_one_over_f():
    f = np.hypot(*np.meshgrid(*2 * [np.fft.fftfreq(14, 1 / 14)]))
    f[0, 0] = 1
    spectrum = np.fft.fft2(noise(14, 14, 20_000), axes=(0, 1)) / f[..., None]
    got = delta(np.fft.ifft2(spectrum, axes=(0, 1)).real)
    want = 0.3466 - np.log(np.sqrt(2) * np.arange(1, 7))
    np.testing.assert_allclose(got[1:], want, atol=0.04)


def test_invariances_and_what_is_not_one():
    maps = noise(6, 6, 4) + 1
    base = delta(maps)
    for same in (
        maps * np.array([3, 0.2, 1, 10]),
        maps[..., ::-1],
        np.roll(maps, (2, 1), (0, 1)),
        maps.swapaxes(0, 1),
        maps[::-1, ::-1],
    ):
        np.testing.assert_allclose(delta(same), base, atol=1e-5)
    assert np.all(delta(maps + 5)[1:] < base[1:] - 0.1)
    assert np.abs(delta(maps @ np.linalg.qr(noise(4, 4))[0]) - base).max() > 1e-2


def test_grids_that_are_not_square():
    """The bins nearest to equal frequency on both axes, and true bins of the FFT."""
    np.testing.assert_array_equal(half_diagonal((14, 14)), [[f, f] for f in range(7)])
    np.testing.assert_array_equal(
        half_diagonal((14, 10)), [[0, 0], [1, 1], [3, 2], [4, 3], [6, 4]]
    )
    np.testing.assert_array_equal(
        half_diagonal((10, 14)), half_diagonal((14, 10))[:, ::-1]
    )
    maps = noise(14, 10, 3)
    bins = tuple(half_diagonal((14, 10)).T)
    log = np.log(np.abs(np.fft.fft2(maps, axes=(0, 1)))[bins] + 1e-6).mean(axis=1)
    np.testing.assert_allclose(delta(maps), log - log[0], atol=1e-5)
    assert all(
        2 * half_diagonal((a, b)).max(axis=0)[i] < (a, b)[i]
        for a in range(3, 17)
        for b in range(3, 17)
        for i in (0, 1)
    )


def test_a_large_mean_does_not_drown_the_detail():
    """Residual streams have channels like this; the bins above zero must not move."""
    maps = noise(14, 14, 4)
    plain, lifted = (
        log_amplitude(jnp.asarray(x.reshape(196, 4)), grid=(14, 14), prefix=0)
        for x in (maps, maps + 1000)
    )
    np.testing.assert_allclose(lifted[1:], plain[1:], atol=1e-3)


def test_prefix_tokens_are_not_seen():
    tokens = jnp.asarray(noise(18, 3), jnp.float32)
    with_junk = tokens.at[:2].set(jnp.nan)
    got = delta_log_amplitude(with_junk, grid=(4, 4), prefix=2)
    np.testing.assert_array_equal(got, delta(np.asarray(tokens[2:]).reshape(4, 4, 3)))


def test_zero_features_are_flat_and_bad_grids_are_explained():
    np.testing.assert_array_equal(delta(np.zeros((4, 4, 2))), [0, 0])
    with pytest.raises(ValueError, match="at least 3 x 3"):
        load("metrics", "fourier", grid=(2, 7), prefix=1)
    with pytest.raises(ValueError, match="got 17 tokens, expected 16 = prefix 0"):
        log_amplitude(jnp.ones((17, 2)), grid=(4, 4), prefix=0)


@pytest.mark.parametrize("recording", ["metrics", "metrics_on_analysis_moco_vit"])
def test_agrees_with_the_recorded_original(golden, recording):
    record = golden(recording)
    taps = record if "zs" in record else golden("analysis_moco_vit")
    metric = load("metrics", "fourier", grid=(4, 4), prefix=1)
    residual = tuple(map(jnp.asarray, taps["zs"]))
    rows = jax.jit(metric.update)({"residual": residual}, jnp.ones(8))
    _, curve, _ = metric.compute(metric.to_state(rows))
    np.testing.assert_allclose(
        curve.values, record["fourier_half_diagonal"], rtol=1e-5, atol=1e-6
    )


def test_series_tell_the_site_and_the_true_frequency():
    metric = load("metrics", "fourier", grid=(6, 6), prefix=1)
    residual = tuple(jnp.asarray(noise(3, 37, 8, key=i)) for i in range(5))
    rows = metric.update({"residual": residual}, jnp.ones(3))
    last, curve, log = metric.compute(metric.to_state(rows))
    sites = ((0, "embed"), (1, "attn"), (1, "mlp"), (2, "attn"), (2, "mlp"))
    assert [a.values for a in curve.axes] == [sites, (0, 2 / 6, 4 / 6)]
    assert [a.values for a in last.axes] == [sites[::2]]
    np.testing.assert_array_equal(last.axes[0].positions, [0, 1, 2])
    np.testing.assert_array_equal(last.values, curve.values[::2, 2])
    one = jax.vmap(lambda t: delta_log_amplitude(t, grid=(6, 6), prefix=1))(residual[4])
    np.testing.assert_allclose(last.values[2], one[:, 2].mean(), rtol=1e-5)
    np.testing.assert_allclose(last.stderr, curve.stderr[::2, 2])
    np.testing.assert_allclose(curve.values, log.values - log.values[:, :1], atol=1e-6)
