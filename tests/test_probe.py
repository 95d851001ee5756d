"""The ridge probe against scikit-learn, and its sums against the whole."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from clvsmim.metrics import Series, image_features, ridge_predict, ridge_probe
from clvsmim.metrics.probe import ALPHAS, validation_images
from clvsmim.plugin import load

WIDTH, CLASSES = 6, 3
fit = jax.jit(ridge_probe)


@pytest.fixture(scope="module")
def metric():
    return load("metrics", "probe", prefix=1, classes=CLASSES)


def images(count: int, seed: int = 0, noise: float = 1.5):
    """Features of `count` images of one block, whose classes overlap by `noise`."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, count)
    centre = np.random.default_rng(99).standard_normal((CLASSES, WIDTH))
    tokens = noise * rng.standard_normal((3, count, 4, WIDTH)) + centre[label][:, None]
    return {
        "residual": tuple(tokens.astype("f4")),
        "label": label.astype("i4"),
        "index": np.arange(count, dtype="i4"),
    }


def take(given, chosen):
    return jax.tree.map(lambda x: x[np.asarray(chosen, int)], given)


def put(x: np.ndarray, at, value) -> np.ndarray:
    """A copy of `x` with other values in one place."""
    x = x.copy()
    x[at] = value
    return x


def rows_of(metric, given, weights=None):
    weights = np.ones(len(given["label"])) if weights is None else weights
    return metric.update(given, np.asarray(weights, "f4"))


def measure(metric, train, test, weights=None):
    state = metric.fit_state(rows_of(metric, train, weights))
    return metric.compute(state, metric.to_state(rows_of(metric, test)))


def standardised(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    std = like.std(axis=0)
    return (x - like.mean(axis=0)) / np.where(std > 0, std, np.inf)


def by_hand(train, test, block: int) -> tuple[float, float]:
    """Alpha per image and accuracy, from the images themselves, by scikit-learn."""
    vectors = [
        np.asarray(image_features(given["residual"], prefix=1)[:, block], float)
        for given in (train, test)
    ]
    x, target = vectors[0], np.eye(CLASSES)[train["label"]]
    held = validation_images(train["index"])

    def scores(chosen, alpha, at):
        model = Ridge(alpha=alpha * chosen.sum())
        model.fit(standardised(x[chosen], x[chosen]), target[chosen])
        return model.predict(standardised(at, x[chosen]))

    errors = [np.square(scores(~held, a, x[held]) - target[held]).sum() for a in ALPHAS]
    alpha = ALPHAS[np.argmin(errors)]
    found = scores(held | True, alpha, vectors[1]).argmax(axis=1)
    return alpha, 100 * (found == np.asarray(test["label"])).mean()


@pytest.mark.parametrize("alpha", [0.1, 10.0, 1e4])
def test_a_probe_is_ridge_regression_on_standardised_features(alpha):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 5)) @ rng.standard_normal((5, 5)) + 3
    x[:, 2] = 7  # does not vary
    y = rng.standard_normal((50, 3)) + x[:, :3]
    z = standardised(x, x)
    want = Ridge(alpha=alpha).fit(z, y)
    probe = fit(jnp.asarray(x), jnp.asarray(y), alpha)
    std = np.where(x.std(axis=0) > 0, x.std(axis=0), np.inf)
    np.testing.assert_allclose(probe.weights, (want.coef_ / std).T, atol=2e-5)
    np.testing.assert_allclose(probe.intercept, want.intercept_, rtol=1e-5)
    assert (probe.weights[2] == 0).all()
    got = ridge_predict(probe, jnp.asarray(x))
    np.testing.assert_array_equal(got, want.predict(z).argmax(axis=1))


def test_the_intercept_is_not_penalised():
    x = np.random.default_rng(0).standard_normal((20, 4))
    probe = fit(jnp.asarray(x), jnp.full((20, 2), 5.0), 1e6)
    np.testing.assert_allclose(probe.intercept, [5, 5], rtol=1e-6)
    assert (probe.weights == 0).all()


@pytest.mark.parametrize("seed, noise", [(0, 1.0), (1, 2.0), (2, 5.0)])
def test_sums_give_what_the_images_give(metric, seed, noise):
    train = images(150, seed, noise)
    test = images(80, seed + 10, noise)
    accuracy, alpha = measure(metric, train, test)
    want = [by_hand(train, test, block) for block in (0, 1)]
    np.testing.assert_allclose(alpha.values, [a for a, _ in want], rtol=1e-12)
    np.testing.assert_allclose(accuracy.values, [p for _, p in want], rtol=1e-12)
    assert 30 < accuracy.values[1] < 100


def test_penalties_of_all_sizes_are_chosen(metric):
    """Otherwise the test above would not see how they are chosen."""
    found = [
        measure(metric, images(150, s, n), images(5))[1].values
        for s, n in ((0, 0.3), (1, 5.0), (2, 20.0), (3, 20.0))
    ]
    assert len(np.unique(found)) >= 3


def test_states_of_other_models_do_not_merge(metric):
    other = load("metrics", "probe", prefix=1, classes=4)
    a, b = (m.fit_state(rows_of(m, images(9))) for m in (metric, other))
    with pytest.raises(ValueError, match="cannot merge states"):
        metric.fit_merge(a, b)


def test_massive_channels_change_nothing(metric):
    """A mean of 1e4 and a spread of 1, as in residual streams, and a constant."""
    mean = np.array([1e4, -1e4, 0, 0, 3e4, 0], "f4")

    def at(given, mean):
        # Multiples of 1/64 are exact in float32 also after the mean is added.
        moved = tuple(np.round(x * 64) / 64 + mean for x in given["residual"])
        return {**given, "residual": tuple(put(x, np.s_[..., 5], 1e4) for x in moved)}

    train, test = images(120), images(60, 1)
    want = measure(metric, at(train, 0 * mean), at(test, 0 * mean))
    got = measure(metric, at(train, mean), at(test, mean))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.values, b.values)
    x, y = at(train, mean)["residual"][0][:, 1], np.eye(CLASSES)[train["label"]]
    probe, near = (fit(jnp.asarray(v), jnp.asarray(y), 10.0) for v in (x, x - mean))
    np.testing.assert_allclose(probe.weights, near.weights, atol=1e-4)


def test_separable_classes_are_all_found_and_random_ones_are_chance(metric):
    accuracy, _ = measure(metric, images(80, 0, 0.05), images(50, 1, 0.05))
    assert (accuracy.values == 100).all() and (accuracy.stderr == 0).all()
    rng = np.random.default_rng(0)

    def shuffled(given):
        return {**given, "label": rng.permutation(given["label"])}

    accuracy, alpha = measure(metric, shuffled(images(400)), shuffled(images(900, 1)))
    np.testing.assert_allclose(accuracy.values, 100 / 3, atol=6)
    p = accuracy.values / 100
    np.testing.assert_allclose(accuracy.stderr, 100 * np.sqrt(p * (1 - p) / 900))
    assert accuracy.notes == ("400 training images; chance is 33.3%",)


def test_the_series_say_what_they_are(metric):
    series = measure(metric, images(30), images(7, 1))
    for s, name, unit, count in zip(
        series,
        ("ridge probe accuracy", "ridge probe alpha"),
        ("%", "per image"),
        (7, 30),
        strict=True,
    ):
        assert (s.name, s.unit, s.count, s.kind) == (name, unit, count, "depth")
        assert s.axes[0].values == ((0, "embed"), (1, "mlp")) and s.source == "Fig. 10"
        again = Series.from_json(json.loads(json.dumps(s.to_json(), allow_nan=False)))
        np.testing.assert_array_equal(again.values, s.values)


def test_the_cls_token_can_be_probed():
    metric = load("metrics", "probe", prefix=1, classes=CLASSES, pool="cls")
    given = images(5)
    got = rows_of(metric, given)["features"]
    want = np.stack([x[:, 0] for x in given["residual"][::2]], axis=1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"pool": "clss"}, "did you mean 'cls'"),
        ({"pool": "cls", "prefix": 0}, "no prefix token"),
    ],
)
def test_settings_that_cannot_be_are_errors(changed, match):
    with pytest.raises(ValueError, match=match):
        load("metrics", "probe", **{"prefix": 1, "classes": 3, **changed})


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_class_beyond_the_classes_is_an_error(metric, label):
    good = images(12)
    bad = {**good, "label": put(good["label"], 4, label)}
    for train, test in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=f"class {label}, expected 0 to 2"):
            measure(metric, train, test)


def test_degenerate_data_give_defined_values_that_say_why(metric):
    test = images(20, 1)
    one = {**images(30), "label": np.full(30, 2, "i4")}
    accuracy, alpha = measure(metric, one, test)
    share = 100 * np.mean(np.asarray(test["label"]) == 2)
    np.testing.assert_allclose(accuracy.values, share)
    assert "2 of 3 classes have no training image" in accuracy.notes

    flat = {**images(30), "residual": (np.ones((30, 4, WIDTH), "f4"),) * 3}
    accuracy, alpha = measure(metric, flat, test)
    most = np.bincount(flat["label"]).argmax()  # what an intercept alone says
    share = 100 * np.mean(np.asarray(test["label"]) == most)
    np.testing.assert_allclose(accuracy.values, share)

    few = take(images(9), np.flatnonzero(~validation_images(np.arange(9)))[:4])
    accuracy, alpha = measure(metric, few, test)
    assert (alpha.values == 1).all() and np.isfinite(accuracy.values).all()
    assert "too few training images to choose alpha: 1 per image taken" in alpha.notes

    for series in measure(metric, images(9), test, np.zeros(9)):
        assert np.isnan(series.values).all()
        assert "no training image to average" in series.notes
    accuracy, alpha = measure(metric, images(30), take(test, []))
    assert np.isnan(accuracy.values).all() and accuracy.stderr is None
    assert "no image to average" in accuracy.notes
    assert np.isfinite(alpha.values).all()


@pytest.mark.parametrize("period", [1, 10, 16, 144, 1000])
def test_a_tenth_of_every_class_is_for_validation(period):
    """Also where the class of an image is its number modulo the number of classes."""
    held = validation_images(np.arange(144_000)).reshape(-1, period)
    share = held.mean(axis=0)
    assert abs(held.mean() - 0.1) < 0.003
    assert np.abs(share - 0.1).max() < 5 * np.sqrt(0.09 / len(held))


def test_the_validation_images_are_always_the_same():
    found = np.flatnonzero(validation_images(np.arange(60)))
    np.testing.assert_array_equal(found, [2, 18, 29, 30, 31, 43])
    assert validation_images(found.astype(np.int32)[::-1]).all()
