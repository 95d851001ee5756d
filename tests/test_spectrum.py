"""Token-level spectra: closed forms, accuracy over long ranges, the recorded ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import Series, token_log_spectrum, token_spectrum
from clvsmim.metrics.spectrum import log_spectra
from clvsmim.plugin import load

LOWEST = np.log(np.finfo(np.float32).tiny)  # a zero spectrum counts as this
log_spectrum = jax.jit(lambda x: token_log_spectrum(x, prefix=0))
spectra = load("metrics", "spectrum", prefix=1)
ship = jax.jit(spectra.update)


def noise(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


@functools.cache
def bases(n: int, channels: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    ones = noise(n, rank + 1)
    ones[:, 0] = 1
    q = np.linalg.qr(ones)[0][:, 1:]  # orthonormal, and orthogonal to the ones
    return q, np.linalg.qr(noise(channels, rank, key=1))[0]


def planted(s: np.ndarray, n: int, channels: int, shift: float = 0.0) -> np.ndarray:
    """(n, channels) tokens around a common vector, with centred singular values s."""
    q, v = bases(n, channels, len(s))
    return (q * s) @ v.T + shift * noise(channels, key=2)


def by_svd(tokens: np.ndarray) -> np.ndarray:
    """The definition in float64, without squaring the condition number."""
    x = tokens.astype(float) - tokens.astype(float).mean(axis=0)
    k = min(len(x) - 1, x.shape[1])
    return np.linalg.svd(x, compute_uv=False)[:k] ** 2 / (len(x) - 1)


def residual(images: int, depth: int = 1, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    """2 * depth + 1 taps of `images` images of 17 tokens, the first of them CLS."""
    x = noise(2 * depth + 1, images, 17, 8).astype("f4")
    return tuple(jnp.asarray(a).astype(dtype) for a in x)


def measure(taps: tuple, weights=None, metric=spectra) -> list[Series]:
    return metric.compute(state_of(taps, weights, metric))


def state_of(taps: tuple, weights=None, metric=spectra):
    weights = np.ones(len(taps[0])) if weights is None else weights
    rows = ship({"residual": taps}, jnp.asarray(weights, "f4"))
    return metric.to_state(jax.device_get(rows))


@pytest.mark.parametrize("n, channels", [(12, 30), (30, 12)])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_planted_singular_values_are_found_whatever_the_mean(n, channels, shift):
    s = np.linspace(9, 1, min(n - 1, channels))
    tokens = planted(s, n, channels, shift)
    want = s**2 / (n - 1)
    np.testing.assert_allclose(token_spectrum(tokens, prefix=0), want, rtol=1e-12)
    got = log_spectrum(jnp.asarray(tokens, jnp.float32))
    np.testing.assert_allclose(got, np.log(want), atol=1e-5)


def test_hand_made_case():
    tokens = np.array([[1, 0, 2], [0, 1, 1], [3, 1, 0], [2, 2, 1.0]])
    want = [2.1371580, 0.6050692, 0.2577728]
    np.testing.assert_allclose(token_spectrum(tokens, prefix=0), want, rtol=1e-6)
    logs = [0.7594769, -0.5024125, -1.3556767]
    np.testing.assert_allclose(log_spectrum(jnp.asarray(tokens)), logs, rtol=1e-5)


def test_noise_lies_within_the_edges_of_marchenko_and_pastur():
    values = token_spectrum(noise(2, 196, 768), prefix=0)
    assert values.shape == (2, 195)
    np.testing.assert_allclose(values[:, 0], 8.908, rtol=0.03)
    np.testing.assert_allclose(values[:, -1], 0.969, rtol=0.1)


@pytest.mark.parametrize(
    "log_range, shift, channels",
    [(12, 0.0, 256), (15.8, 1000.0, 256), (20, 0.0, 768), (21, 1000.0, 768)],
)
def test_long_ranges_on_the_host_and_in_float32(log_range, shift, channels):
    """As in deep layers, where a float32 Gram matrix is off by 0.02 to 60."""
    s = 100 * np.arange(1, 196.0) ** (-log_range / 2 / np.log(195))
    tokens = planted(s, 196, channels, shift).astype("f4")
    want = np.log(by_svd(tokens))
    if not shift:
        np.testing.assert_allclose(want[0] - want[-1], log_range, atol=1e-4)
    host = np.log(token_spectrum(tokens, prefix=0))
    np.testing.assert_allclose(host, want, atol=1e-7)
    got = log_spectrum(jnp.asarray(tokens))
    tolerance = {12: 1e-5, 15.8: 3e-5, 20: 1e-4, 21: 2e-4}[log_range]
    np.testing.assert_allclose(got, want, atol=tolerance)


@pytest.mark.parametrize("n, channels", [(9, 20), (20, 9), (10, 10)])
def test_the_smaller_gram_matrix_equals_the_covariance(n, channels):
    tokens = noise(n, channels)
    values = token_spectrum(tokens, prefix=0)
    covariance = np.cov(tokens, rowvar=False)
    want = np.linalg.eigvalsh(covariance)[::-1][: min(n - 1, channels)]
    np.testing.assert_allclose(values, want, rtol=1e-10)


def test_invariances():
    tokens = noise(10, 6)
    base = token_spectrum(tokens, prefix=0)
    turn = np.linalg.qr(noise(6, 6, key=1))[0]
    for same in (tokens @ turn, tokens[::-1], tokens[:, ::-1], tokens + noise(6)):
        np.testing.assert_allclose(token_spectrum(same, prefix=0), base, rtol=1e-10)
    scaled = token_spectrum(30 * tokens, prefix=0)
    np.testing.assert_allclose(np.log(scaled), np.log(base) + 2 * np.log(30))
    stretched = token_spectrum(tokens * np.arange(1, 7), prefix=0)
    assert np.abs(stretched / base - 1).max() > 0.5


def test_prefix_tokens_are_not_seen_and_leading_axes_are_images():
    tokens = noise(2, 3, 12, 5)
    tokens[:, :, :2] = np.nan
    values = token_spectrum(tokens, prefix=2)
    assert values.shape == (2, 3, 5) and values.dtype == np.float64
    np.testing.assert_allclose(values[1, 2], by_svd(tokens[1, 2, 2:]), rtol=1e-10)
    got = token_log_spectrum(jnp.asarray(tokens[1, 2], jnp.float32), prefix=2)
    np.testing.assert_allclose(got, np.log(values[1, 2]), atol=1e-5)


def test_one_patch_has_no_spectrum():
    for kernel in (token_spectrum, token_log_spectrum):
        with pytest.raises(ValueError, match="got 1 observations of 3 channels"):
            kernel(jnp.ones((2, 3)), prefix=1)


@pytest.mark.parametrize("recording", ["metrics", "metrics_on_analysis_moco_vit"])
def test_agrees_with_the_recorded_spectra(golden, recording):
    record = golden(recording)
    taps = record if "zs" in record else golden("analysis_moco_vit")
    want = record["f64_token_level_singular_values_of_cov"]  # (taps, images, C)
    values = token_spectrum(taps["zs"], prefix=1)
    assert values.shape == (*want.shape[:2], 15)  # 16 patches
    assert (want[..., 15:] < 1e-10 * want[..., :1]).all()
    assert (want[..., 14] > 1e-10 * want[..., 0]).all()
    np.testing.assert_allclose(values, want[..., :15], rtol=1e-6)
    _, curve = measure(tuple(map(jnp.asarray, taps["zs"])))
    logs = np.log(want[..., :15])
    np.testing.assert_allclose(curve.values, logs.mean(axis=1), atol=1e-6)
    error = logs.std(axis=1, ddof=1) / 8**0.5
    np.testing.assert_allclose(curve.stderr, error, rtol=1e-5)


def test_series_are_means_of_logarithms_at_every_tap():
    taps = residual(3, depth=2)
    mean, curve = measure(taps)
    assert mean.name == "token-level log singular value, mean over ranks"
    assert curve.name == "token-level log singular values"
    assert curve.kind == "curve" and mean.kind == "depth"
    assert curve.source == mean.source == "Fig. 7"
    assert curve.axes[0].labels == ("embed", "1 attn", "1 mlp", "2 attn", "2 mlp")
    assert curve.axes[1].values == (1, 2, 3, 4, 5, 6, 7, 8)
    logs = np.log([[by_svd(np.asarray(image[1:])) for image in x] for x in taps])
    np.testing.assert_allclose(curve.values, logs.mean(axis=1), atol=1e-10)
    np.testing.assert_allclose(mean.values, logs.mean(axis=(1, 2)), atol=1e-10)
    error = logs.mean(axis=2).std(axis=1, ddof=1) / 3**0.5
    np.testing.assert_allclose(mean.stderr, error, rtol=1e-6)
    assert curve.notes == ("no reference subtracted",) and curve.count == 3
    assert spectra.limit == 64


def test_references_are_subtracted_image_by_image():
    taps = residual(4)
    plain = measure(taps)
    for name, at in (("first_rank", np.s_[:, :1]), ("embed", np.s_[:1])):
        metric = load("metrics", "spectrum", prefix=1, reference=name)
        mean, curve = measure(taps, metric=metric)
        want = plain[1].values - plain[1].values[at]
        np.testing.assert_allclose(curve.values, want, atol=1e-12)
        np.testing.assert_allclose(mean.values, want.mean(axis=1), atol=1e-12)
        np.testing.assert_array_equal(curve.stderr[at], 0)
        assert curve.notes[0].startswith("relative to the ")
    with pytest.raises(ValueError, match="reference 'embeded': did you mean 'embed'"):
        load("metrics", "spectrum", prefix=1, reference="embeded")


def test_constant_tokens_are_floored_and_counted():
    flat, varied = jnp.full((2, 17, 8), 0.1), residual(2)
    mean, curve = measure((varied[0], flat, varied[2]))
    np.testing.assert_allclose(curve.values[1], LOWEST)
    assert np.isfinite(mean.values).all()
    assert "16 of 48 singular values are zero up to rounding" in curve.notes[1]
    np.testing.assert_allclose(log_spectrum(flat[0]), LOWEST, rtol=1e-6)


def test_what_is_below_the_floor_counts_as_the_floor():
    line = np.outer(noise(17), noise(8, key=1)).astype("f4")
    _, curve = measure(3 * (jnp.asarray(line)[None],))
    floor = np.repeat(curve.values[:, :1] + np.log(1e-12), 7, axis=1)
    np.testing.assert_allclose(curve.values[:, 1:], floor)
    assert "21 of 24 singular values" in curve.notes[1]
    axis = np.zeros((17, 8), "f4")
    axis[:, 0] = np.arange(17)  # exactly of rank 1 in float32, too
    got = np.asarray(log_spectrum(jnp.asarray(axis)))
    np.testing.assert_allclose(got[1:], got[0] + np.log(1e-12), rtol=1e-5)


@pytest.mark.parametrize("blas_threads", ["1", "2"])
@pytest.mark.parametrize("lost", [(), (5,), (1, 4, 5)])
def test_spectra_of_taps_in_threads(monkeypatch, blas_threads, lost):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", blas_threads)  # "1" is with threads
    tokens = noise(5, 6, 9, 4).astype(np.float32)  # (taps, images, N, C)
    weight = np.ones(6, np.float32)
    for image in lost:
        tokens[3, image] = np.inf  # not finite at one tap
    if 1 in lost:
        weight[1] = 0
        tokens[:, 1] = np.nan  # padding
    logs, low = log_spectra(weight, tuple(tokens))
    assert logs.shape == low.shape == (6, 5, 4)
    good = [i for i in range(6) if i not in lost]
    for tap, x in enumerate(tokens):
        want = np.log(token_spectrum(x[good], prefix=0))
        np.testing.assert_array_equal(logs[good, tap], want)
    assert np.isnan(logs[list(lost)]).all()
    assert not low.any()


def test_the_device_hands_over_patch_tokens_in_float32_and_nothing_more():
    rounded = residual(3, dtype=jnp.bfloat16)
    rows = ship({"residual": rounded}, jnp.ones(3))
    assert all(x.dtype == jnp.float32 for x in rows["tokens"])
    np.testing.assert_array_equal(rows["tokens"][1], rounded[1][:, 1:])
    (mean, _), (exact, _) = measure(rounded), measure(residual(3))
    np.testing.assert_allclose(mean.values, exact.values, atol=0.01)
    text = ship.lower({"residual": rounded}, jnp.ones(3)).as_text()
    assert "dot_general" not in text and "reduce" not in text


def test_the_kernel_batches():
    taps = np.stack(residual(3))
    batch = jax.jit(jax.vmap(lambda x: token_log_spectrum(x, prefix=1)))(taps[0])
    want = np.log(token_spectrum(taps[0], prefix=1))
    np.testing.assert_allclose(batch, want, atol=1e-5)
