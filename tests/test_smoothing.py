"""The cosine between tokens against closed forms and all pairs in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_metrics_contract import (
    features,
    state_of,
)

from clvsmim.metrics import taps, token_cosine
from clvsmim.plugin import load

METRIC = load("metrics", "smoothing", prefix=1)

kernel = jax.jit(token_cosine, static_argnames=("prefix", "centred"))
HAND_MADE = np.array([[1, 0, 2], [0, 1, 1], [3, 1, 0], [2, 2, 1.0]])


def cosine(x: np.ndarray, centred: bool = False) -> float:
    return float(kernel(jnp.asarray(x, jnp.float32), prefix=0, centred=centred))


def by_pairs(x: np.ndarray, centred: bool = False) -> float:
    """The definition in float64: every pair, one by one."""
    x = np.asarray(x, float)
    x = x - x.mean(axis=0) if centred else x
    gram = x @ x.T
    length = np.sqrt(np.diagonal(gram))
    return (gram / np.outer(length, length))[~np.eye(len(x), dtype=bool)].mean()


def noise(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


def test_hand_made_case():
    np.testing.assert_allclose(cosine(HAND_MADE), 0.5711653, rtol=1e-6)


@pytest.mark.parametrize("centred", [False, True])
def test_equals_the_mean_over_all_pairs(centred):
    for x in (HAND_MADE, noise(16, 8), noise(5, 8) + 2, noise(7, 2) * 1e-8):
        want = by_pairs(x, centred)
        np.testing.assert_allclose(cosine(x, centred), want, rtol=1e-5, atol=1e-6)
    assert abs(by_pairs(noise(5, 8) + 2) - by_pairs(noise(5, 8) + 2, True)) > 0.5


def test_closed_forms():
    assert abs(cosine(np.linalg.qr(noise(16, 16))[0])) < 1e-6  # orthonormal
    np.testing.assert_allclose(cosine(np.tile(noise(1, 8), (9, 1))), 1, rtol=1e-6)
    simplex = np.eye(9) - 1 / 9  # as far apart as nine tokens can be
    np.testing.assert_allclose(cosine(simplex), -1 / 8, rtol=1e-5)
    np.testing.assert_allclose(cosine(np.eye(9) + 5, centred=True), -1 / 8, rtol=1e-5)
    two_ways = np.outer([1, 1, -1, -1], noise(6))  # 2 pairs alike, 4 opposed
    np.testing.assert_allclose(cosine(two_ways), -1 / 3, rtol=1e-5)
    assert abs(cosine(noise(196, 768))) < 1e-3  # independent


def test_invariances():
    x = noise(9, 6) + 1
    turned = x @ np.linalg.qr(noise(6, 6))[0]
    longer = x * np.random.default_rng(0).uniform(0.1, 10, (9, 1))
    for same in (turned, longer, x[np.random.default_rng(1).permutation(9)]):
        np.testing.assert_allclose(cosine(same), cosine(x), rtol=1e-5)
    for same in (turned, 3 * x, x + noise(6, key=2)):
        got = cosine(same, centred=True)
        np.testing.assert_allclose(got, cosine(x, centred=True), rtol=1e-4)


def test_tokens_that_are_nearly_alike_keep_their_digits_once_centred():
    x = noise(16, 8)
    got = cosine(np.float32(x + 1000), centred=True)
    np.testing.assert_allclose(got, by_pairs(x, centred=True), atol=1e-4)


@pytest.mark.parametrize("value", [0.1, -3.7, 1e4])
def test_a_constant_map_is_one_and_nothing_once_centred(value):
    x = np.full((196, 5), value)
    got = [cosine(x), cosine(x, centred=True)]
    np.testing.assert_allclose(got, [1, 0], atol=1e-5)


def test_tokens_of_zeros_have_no_direction():
    assert cosine(np.zeros((4, 3))) == cosine(np.zeros((4, 3)), centred=True) == 0
    x = np.array([[1, 0], [0, 0], [1, 0]])  # one pair in three is alike
    np.testing.assert_allclose(cosine(x), 1 / 3, rtol=1e-6)


def test_prefix_tokens_are_not_seen_and_one_patch_is_no_pair():
    x = jnp.asarray(noise(6, 4), jnp.float32)
    got = token_cosine(x.at[:2].set(jnp.nan), prefix=2)
    np.testing.assert_allclose(got, by_pairs(x[2:]), rtol=1e-5)
    with pytest.raises(ValueError, match="got 6 tokens with a prefix of 5, expected"):
        token_cosine(x, prefix=5)


def test_series_say_both_cosines_at_every_tap():
    given = features(6)
    series = METRIC.compute(state_of(METRIC, given))
    names = ["cosine between tokens", "cosine between centred tokens"]
    assert [s.name for s in series] == names
    for s, centred in zip(series, (False, True), strict=True):
        assert [(a.name, a.values) for a in s.axes] == [("depth", taps(3))]
        want = [[by_pairs(x[1:], centred) for x in tap] for tap in given["residual"]]
        np.testing.assert_allclose(s.values, np.mean(want, axis=1), atol=1e-6)
