"""Image-level spectra and ranks, streamed, against whole-sample float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import (
    Metric,
    Series,
    alpha_req,
    image_log_spectrum,
    normalised_std,
    participation_ratio,
    rank_me,
    stable_rank,
)
from clvsmim.plugin import load

ranks = load("metrics", "rank", prefix=1)
LOWEST = np.log(np.finfo(np.float32).tiny)
SPECTRA = ("image-level log singular values", "CLS-level log singular values")


def noise(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


def as_taps(features: np.ndarray, tokens: int = 4) -> tuple[jax.Array, ...]:
    """(M, L+1, C) -> 2L+1 taps (M, 1 + tokens, C): those on every patch and, four
    times as large, on CLS; the taps after attention hold something else."""
    cls = 4 * features
    taps = []
    for i in range(features.shape[1]):
        patches = np.repeat(features[:, i, None], tokens, axis=1)
        taps.append(np.concatenate([cls[:, i, None], patches], axis=1))
        taps.append(noise(*taps[-1].shape, key=i))
    return tuple(jnp.asarray(x, jnp.float32) for x in taps[:-1])


@functools.cache
def jitted(metric: Metric):
    return jax.jit(metric.update)


def state_of(taps: tuple, weights=None, metric: Metric = ranks):
    weights = np.ones(len(taps[0])) if weights is None else weights
    rows = jitted(metric)({"residual": taps}, jnp.asarray(weights, "f4"))
    return metric.to_state(jax.device_get(rows))


def measure(taps: tuple, weights=None, metric: Metric = ranks) -> dict[str, Series]:
    return {s.name: s for s in metric.compute(state_of(taps, weights, metric))}


def spectrum(x: np.ndarray) -> np.ndarray:
    """Eigenvalues of the covariance over images of (M, C), by svd in float64."""
    x = x.astype(float) - x.astype(float).mean(axis=0)
    s = np.linalg.svd(x, compute_uv=False)
    return s[: min(len(x) - 1, x.shape[1])] ** 2 / (len(x) - 1)


@pytest.mark.parametrize("images", [7, 40])
def test_spectra_are_of_all_images_together(images):
    x = noise(images, 2, 12).astype("f4")
    found = measure(as_taps(x))
    for name, factor in zip(SPECTRA, (1, 4), strict=True):
        curve = found[name]
        want = np.log([spectrum(factor * x[:, i]) for i in range(2)])
        assert curve.values.shape == (2, min(images - 1, 12))
        np.testing.assert_allclose(curve.values, want, atol=1e-6)
        assert [a.labels[0] for a in curve.axes] == ["embed", "1"]
        assert curve.axes[0].values == ((0, "embed"), (1, "mlp"))
        assert curve.kind == "curve" and curve.source == "Fig. 7"
        assert curve.stderr is None and curve.count == images
        assert curve.notes[0].startswith(f"of {images} images together; compare only")
        mean = found[name[:-1] + ", mean over ranks"]
        np.testing.assert_allclose(mean.values, want.mean(axis=1), atol=1e-6)
        got = jax.jit(image_log_spectrum)(jnp.asarray(factor * x[:, 0]))
        np.testing.assert_allclose(got, want[0], atol=1e-5)


def test_each_rank_is_of_the_features_it_names():
    """RankMe as published without centring; the others of the covariance."""
    x = (noise(130, 2, 110) * np.arange(1, 111) ** -0.4 + 1).astype("f4")
    found = measure(as_taps(x, tokens=1))
    raw = [np.linalg.svd(x[:, i].astype("f8"), compute_uv=False) for i in range(2)]
    centred = [spectrum(x[:, i]) for i in range(2)]
    alpha, fit = zip(*map(alpha_req, centred), strict=True)
    want = {
        "RankMe": [rank_me(s) for s in raw],
        "RankMe, centred": [rank_me(np.sqrt(s)) for s in centred],
        "effective rank": [rank_me(s, eps=0) for s in raw],
        "participation ratio": [participation_ratio(s) for s in centred],
        "stable rank": [stable_rank(s) for s in centred],
        "numerical rank": [110, 110],
        "alpha-ReQ": alpha,
        "alpha-ReQ, R squared": fit,
        "std of normalised features": [normalised_std(x[:, i]) for i in range(2)],
    }
    assert list(found)[4:] == list(want)
    for name, values in want.items():
        np.testing.assert_allclose(found[name].values, values, rtol=1e-6)
        assert found[name].kind == "depth" and found[name].axes[0].name == "depth"
    assert found["RankMe"].values.max() < 0.8 * found["RankMe, centred"].values.min()
    assert "features not centred" in found["RankMe"].notes
    assert "1.5e-05 of the largest" in found["numerical rank"].notes[0]


def test_class_constant_features_have_one_rank_less_than_classes():
    x = np.repeat(noise(5, 1, 16), 8, axis=0).astype("f4")
    found = measure(as_taps(x, tokens=1))
    assert found["numerical rank"].values == 4
    curve = found[SPECTRA[0]]
    np.testing.assert_allclose(
        curve.values[0, 4:], curve.values[0, 0] + np.log(1e-12), rtol=1e-6
    )
    assert "12 of 16 singular values are zero up to rounding" in curve.notes[0]


def test_a_constant_changes_nothing_and_a_factor_shifts_the_logarithms():
    x = noise(9, 1, 6).astype("f4")
    base = measure(as_taps(x))[SPECTRA[0]].values
    moved = measure(as_taps(x + 8))[SPECTRA[0]].values
    np.testing.assert_allclose(moved, base, atol=1e-5)  # float32 has the constant
    scaled = measure(as_taps(4 * x))[SPECTRA[0]].values
    np.testing.assert_allclose(scaled, base + 2 * np.log(4), atol=1e-6)
    turn = np.linalg.qr(noise(6, 6))[0]
    turned = measure(as_taps(x @ turn))[SPECTRA[0]].values
    np.testing.assert_allclose(turned, base, atol=1e-5)


def test_every_image_twice():
    x = noise(9, 1, 6).astype("f4")
    once, twice = (
        measure(as_taps(y))[SPECTRA[0]].values for y in (x, np.concatenate([x, x]))
    )
    np.testing.assert_allclose(twice, once + np.log(8 * 2 / 17), rtol=1e-9)


@pytest.mark.parametrize("recording", ["metrics", "metrics_on_analysis_moco_vit"])
def test_agrees_with_the_recorded_spectra(golden, recording):
    record = golden(recording)
    taps = record if "zs" in record else golden("analysis_moco_vit")
    want = record["f64_image_level_singular_values_of_cov"][::2, :7]  # of 8 images
    curve = measure(tuple(map(jnp.asarray, taps["zs"])))[SPECTRA[0]]
    np.testing.assert_allclose(curve.values, np.log(want), atol=1e-6)
    pooled = taps["zs"][-1][:, 1:].mean(axis=1, dtype="f8")
    got = image_log_spectrum(jnp.asarray(pooled))
    np.testing.assert_allclose(got, np.log(want[-1]), atol=1e-5)


def test_large_means_and_many_batches_lose_no_digits():
    """Sums of products would: the mean is 1e5 times what varies."""
    x = (noise(24, 1, 5) + 1e5 * noise(5, key=1)).astype("f4")
    taps = as_taps(x, tokens=1)
    parts = [state_of(tuple(t[i : i + 3] for t in taps)) for i in range(0, 24, 3)]
    whole = functools.reduce(ranks.merge, parts)
    curve = {s.name: s for s in ranks.compute(whole)}[SPECTRA[0]]
    np.testing.assert_allclose(curve.values[0], np.log(spectrum(x[:, 0])), atol=1e-8)


def test_without_two_images_there_is_no_covariance():
    taps = as_taps(noise(2, 2, 5))
    for weights, note in (([0, 0], "no image to average"), ([0, 1], "one image has")):
        for series in measure(taps, weights).values():
            assert np.isnan(series.values).all() and series.count == sum(weights)
            assert note in series.notes[0] and len(series.notes) == 1


def test_equal_images_are_flat_and_said_to_be():
    taps = tuple(jnp.repeat(x, 3, axis=0) for x in as_taps(noise(1, 2, 5)))
    whole = functools.reduce(ranks.merge, [state_of(taps)] * 4)
    for s in ranks.compute(whole):
        if s.name.startswith("alpha"):
            assert np.isnan(s.values).all() and "needs 100 eigenvalues" in s.notes[0]
        elif s.name in SPECTRA:
            np.testing.assert_allclose(s.values, LOWEST)
        elif s.name == "std of normalised features":
            np.testing.assert_allclose(s.values, 0, atol=1e-7)
        elif "rank" in s.name or "ratio" in s.name:
            level = LOWEST if "log" in s.name else 1
            np.testing.assert_allclose(s.values, level, rtol=1e-4)
    assert any("all images are equal at 2 of 2 depths" in n for n in s.notes)


def test_cls_is_an_option_and_needs_a_token():
    taps = as_taps(noise(4, 2, 5))
    for options in ({"prefix": 1, "cls": False}, {"prefix": 0}):
        names = measure(taps, metric=load("metrics", "rank", **options))
        assert not any("CLS" in name for name in names)
        assert SPECTRA[0] in names and "RankMe" in names
