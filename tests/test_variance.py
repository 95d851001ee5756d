"""Feature map variance against numpy in float64 and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_metrics_contract import (
    features,
    state_of,
)

from clvsmim.metrics import map_variance, taps
from clvsmim.plugin import load

kernel = jax.jit(map_variance, static_argnames="prefix")
METRIC = load("metrics", "variance", prefix=1)


def variance(x: np.ndarray) -> float:
    return float(kernel(jnp.asarray(x, jnp.float32), prefix=0))


def by_numpy(x: np.ndarray) -> float:
    return np.asarray(x, float).var(axis=0, ddof=1).mean()


def noise(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


@pytest.mark.parametrize("shape", [(2, 1), (9, 5), (196, 32)])
def test_equals_the_unbiased_variance_of_numpy(shape):
    x = noise(*shape) * np.arange(1, shape[1] + 1) + noise(shape[1], key=1)
    np.testing.assert_allclose(variance(x), by_numpy(x), rtol=1e-5)


def test_closed_forms():
    checkerboard = (-1.0) ** np.add.outer(np.arange(4), np.arange(4)).reshape(16, 1)
    np.testing.assert_allclose(variance(checkerboard), 16 / 15, rtol=1e-6)
    np.testing.assert_allclose(variance(np.arange(16.0)[:, None]), 68 / 3, rtol=1e-6)
    half = np.concatenate([checkerboard, np.ones((16, 1))], axis=1)  # one of two moves
    np.testing.assert_allclose(variance(half), 8 / 15, rtol=1e-6)
    np.testing.assert_allclose(variance(noise(196, 768)), 1, atol=0.02)


def test_invariances_and_scale():
    x = noise(9, 6)
    turned = x @ np.linalg.qr(noise(6, 6, key=1))[0]
    order = np.random.default_rng(1).permutation(9)
    for same in (turned, x[order], x + noise(6, key=2), x / 3 * 3):
        np.testing.assert_allclose(variance(same), variance(x), rtol=1e-5)
    np.testing.assert_allclose(variance(3 * x), 9 * variance(x), rtol=1e-5)


def test_averaging_over_positions_lowers_it():
    attention = np.asarray(jax.nn.softmax(jnp.asarray(noise(16, 16))))
    x = noise(16, 32, key=3)
    assert variance(attention @ x) < 0.5 * variance(x)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4])
def test_a_constant_map_has_none(value):
    assert variance(np.full((196, 5), value)) == 0


def test_a_large_mean_does_not_drown_it():
    x = np.float32(noise(16, 8) + 1000)
    np.testing.assert_allclose(variance(x), by_numpy(x), rtol=1e-5)


def test_prefix_tokens_are_not_seen_and_one_patch_has_no_variance():
    x = jnp.asarray(noise(6, 4), jnp.float32)
    got = map_variance(x.at[:2].set(jnp.nan), prefix=2)
    np.testing.assert_allclose(got, by_numpy(x[2:]), rtol=1e-5)
    with pytest.raises(ValueError, match="got 6 tokens with a prefix of 5, expected"):
        map_variance(x, prefix=5)


def test_the_series_is_over_every_tap():
    given = features(6)
    (series,) = METRIC.compute(state_of(METRIC, given))
    assert series.name == "feature map variance" and series.kind == "depth"
    assert [(a.name, a.values) for a in series.axes] == [("depth", taps(3))]
    want = [[by_numpy(x[1:]) for x in tap] for tap in given["residual"]]
    np.testing.assert_allclose(series.values, np.mean(want, axis=1), rtol=1e-5)
