"""Displacement and translation share against closed forms and float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_metrics_contract import (
    features,
    state_of,
)

from clvsmim.metrics import TokenDisplacement, token_displacement, translation_share
from clvsmim.plugin import load

displacement_of = jax.jit(token_displacement, static_argnames="prefix")
share_of = jax.jit(translation_share, static_argnames="prefix")
METRIC = load("metrics", "displacement", prefix=1)


def moved(before: np.ndarray, after: np.ndarray) -> TokenDisplacement:
    pair = (jnp.asarray(x, jnp.float32) for x in (before, after))
    return displacement_of(*pair, prefix=0)


def share(update: np.ndarray, before: float = 0.0) -> float:
    before = jnp.full(np.shape(update), before, jnp.float32)
    after = before + jnp.asarray(update, jnp.float32)
    return float(share_of(before, after, prefix=0))


def by_numpy(before: np.ndarray, after: np.ndarray) -> TokenDisplacement:
    """The definition in float64."""
    x, u = np.asarray(before, float), np.asarray(after, float) - before
    length, size = np.linalg.norm(x, axis=1), np.linalg.norm(u, axis=1)
    cosine = np.mean(np.sum(x * u, axis=1) / (length * size))
    rms = np.sqrt(np.mean(u**2))
    return TokenDisplacement(np.mean(size / length), np.mean(size), rms, cosine)


def share_by_numpy(before: np.ndarray, after: np.ndarray) -> float:
    u = np.asarray(after, float) - before
    return len(u) * np.sum(u.mean(axis=0) ** 2) / np.sum(u**2)


def noise(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


def turn(x: np.ndarray) -> np.ndarray:
    return x @ np.linalg.qr(noise(x.shape[1], x.shape[1], key=9))[0]


def test_hand_made_cases():
    got = moved([[3, 4], [0, 1]], [[3, 4], [0, 2]])
    np.testing.assert_allclose(got, [0.5, 0.5, 0.5, 0.5], rtol=1e-6)
    # Lengths 5 and 1 of the tokens, 10 and 2 of the updates; one of them turns back.
    got = moved([[3, 4], [0, 1]], [[9, 12], [0, -1]])
    np.testing.assert_allclose(got, [2, 6, np.sqrt(104 / 4), 0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(share([[1, 0], [1, 2]]), 2 / 3, rtol=1e-6)


def test_equals_the_definition_in_float64():
    for n, d in ((1, 3), (9, 5), (196, 16)):
        x, y = noise(n, d) + 1, noise(n, d, key=1)
        np.testing.assert_allclose(moved(x, y), by_numpy(x, y), rtol=1e-4)
        got = translation_share(jnp.float32(x), jnp.float32(y), prefix=0)
        np.testing.assert_allclose(got, share_by_numpy(x, y), rtol=1e-4)


def test_doubling_and_reversing():
    x = noise(9, 4)
    size = np.linalg.norm(x, axis=1).mean()
    rms = np.sqrt(np.mean(x**2))
    np.testing.assert_allclose(moved(x, 2 * x), [1, size, rms, 1], rtol=1e-5)
    np.testing.assert_allclose(moved(x, -x), [2, 2 * size, 2 * rms, -1], rtol=1e-5)


def test_scale_rotation_and_order_of_tokens():
    x, y = noise(9, 6), noise(9, 6, key=1)
    base, base_share = moved(x, y), share(y - x)
    for a, b in ((turn(x), turn(y)), (x[::-1], y[::-1])):
        np.testing.assert_allclose(moved(a, b), base, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(share(b - a), base_share, rtol=1e-4)
    scaled = moved(10 * x, 10 * y)
    want = base._replace(absolute=10 * base.absolute, rms=10 * base.rms)
    np.testing.assert_allclose(scaled, want, rtol=1e-5)
    np.testing.assert_allclose(share(10 * (y - x)), base_share, rtol=1e-5)


def test_an_update_common_to_all_tokens_is_a_translation():
    common = np.tile(noise(1, 8), (16, 1))
    np.testing.assert_allclose(share(common), 1, rtol=1e-6)
    np.testing.assert_allclose(share(common, before=100.0), 1, rtol=1e-4)
    away = noise(16, 8)
    away -= away.mean(axis=0)
    assert share(away) < 1e-12
    both = share(common + away)  # the two parts are orthogonal
    want = np.sum(common**2) / (np.sum(common**2) + np.sum(away**2))
    np.testing.assert_allclose(both, want, rtol=1e-5)


def test_independent_updates_share_one_part_in_n():
    np.testing.assert_allclose(share(noise(16, 40_000)), 1 / 16, rtol=0.02)
    np.testing.assert_allclose(share(np.eye(16)), 1 / 16, rtol=1e-6)


def test_uniform_attention_translates_and_attention_to_oneself_does_not():
    """The tie to normalized mutual information: no query dependence is a share of 1."""
    values = noise(16, 8)
    values -= values.mean(axis=0) - 0.5
    np.testing.assert_allclose(share(np.full((16, 16), 1 / 16) @ values), 1, rtol=1e-5)
    assert share(values) < 0.3


def test_what_does_not_move_or_was_nothing_is_defined():
    x = noise(4, 3)
    assert moved(x, x) == (0, 0, 0, 0) and share(np.zeros((4, 3))) == 0
    assert moved(np.zeros((4, 3)), np.zeros((4, 3))) == (0, 0, 0, 0)
    first = moved(np.zeros((4, 3)), x)
    assert first.relative == np.inf and first.cosine == 0
    np.testing.assert_allclose(first.absolute, np.linalg.norm(x, axis=1).mean(), 1e-6)


def test_prefix_tokens_are_not_seen():
    x, y = (jnp.asarray(noise(6, 4, key=k), jnp.float32) for k in (0, 1))
    junk_x, junk_y = x.at[:2].set(jnp.nan), y.at[:2].set(7)
    got = token_displacement(junk_x, junk_y, prefix=2)
    np.testing.assert_allclose(got, by_numpy(x[2:], y[2:]), rtol=1e-5)
    got = translation_share(junk_x, junk_y, prefix=2)
    np.testing.assert_allclose(got, share_by_numpy(x[2:], y[2:]), rtol=1e-5)
    for kernel in (token_displacement, translation_share):
        with pytest.raises(ValueError, match="got 6 tokens with a prefix of 6"):
            kernel(x, y, prefix=6)


def series_of(given, weights=None):
    return {s.name: s for s in METRIC.compute(state_of(METRIC, given, weights))}


def test_series_tell_the_sites_apart():
    given = features(6)
    got = series_of(given)
    stream = [np.asarray(x)[:, 1:] for x in given["residual"]]
    pairs = list(zip(stream[:-1], stream[1:], strict=True))
    want = np.array([[by_numpy(*xy) for xy in zip(*p, strict=True)] for p in pairs])
    names = {
        "relative displacement": 0,
        "displacement": 1,
        "per-channel RMS displacement": 2,
        "cosine of update and stream": 3,
    }
    for name, i in names.items():
        axes = [(a.name, a.values) for a in got[name].axes]
        assert axes == [("block", (1, 2, 3)), ("site", ("attn", "mlp"))]
        mean = want[..., i].mean(axis=1).reshape(3, 2)
        np.testing.assert_allclose(got[name].values, mean, rtol=1e-4, atol=1e-5)
    attn, mlp = want[::2, :, 0], want[1::2, :, 0]  # (L, B) each
    part = got["share of attention in displacement"]
    assert [a.name for a in part.axes] == ["block"]
    np.testing.assert_allclose(part.values, (attn / (attn + mlp)).mean(1), rtol=1e-5)
    shares = [[share_by_numpy(*xy) for xy in zip(*p, strict=True)] for p in pairs]
    for i, site in enumerate(("attention", "MLP")):
        values = got[f"translation share of {site} updates"].values
        np.testing.assert_allclose(values, np.mean(shares, axis=1)[i::2], rtol=1e-4)
    assert len(got) == 7


def test_a_silent_mlp_leaves_all_to_attention_and_silence_is_even():
    still = jnp.ones((2, 17, 8))
    attn = still.at[:, 1:].add(jnp.asarray(noise(2, 16, 8), jnp.float32))
    got = series_of({"residual": (still, attn, attn, attn, attn)})
    part = got["share of attention in displacement"].values
    np.testing.assert_array_equal(part, [1, 0.5])
    np.testing.assert_array_equal(got["relative displacement"].values[:, 1], 0)
    np.testing.assert_array_equal(got["translation share of MLP updates"].values, 0)
    assert all(np.isfinite(s.values).all() for s in got.values())


def test_an_image_that_leaves_zero_is_left_out_and_reported():
    given = features(6)
    want = series_of(given, [1, 0, 1, 1, 1, 1])
    start = given["residual"][0].at[1, 5].set(0.0)
    got = series_of({**given, "residual": (start, *given["residual"][1:])})
    for name, s in got.items():
        np.testing.assert_array_equal(s.values, want[name].values)
        assert s.count == 5 and "1 of 6 images left out: not finite" in s.notes
