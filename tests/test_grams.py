"""Gram matrices that are kept, and CKA between two models made of them."""

import functools

import jax
import numpy as np
import pytest

from clvsmim.metrics import between_models, biased_floor, cross_model_cka
from clvsmim.metrics.cka import jackknife
from clvsmim.plugin import load

HEADS, TOKENS, WIDTH, N, BATCH = 2, 7, 4, 4, 24  # N images are a mini-batch


@functools.cache
def metric(name: str = "grams"):
    return load("metrics", name, prefix=1, group=N)


@functools.cache
def step(name: str = "grams"):
    return jax.jit(metric(name).update)


def features(depth: int, seed: int) -> dict:
    """Of a tiny encoder; those of all seeds resemble each other."""
    shape = (BATCH, HEADS, TOKENS, WIDTH)
    common = np.random.default_rng(0).standard_normal(shape)
    noise = np.random.default_rng(seed).standard_normal((depth, *shape))
    return {
        "head_outputs": tuple((common + noise).astype("f4")),
        "residual": tuple(noise[:1, :, 0].astype("f4")) * (2 * depth + 1),
        "index": np.arange(BATCH, dtype="i4"),
    }


def state_of(given: dict, name: str = "grams", weights=None):
    weights = np.ones(BATCH, "f4") if weights is None else weights
    return metric(name).to_state(step(name)(given, weights))


def part(given: dict, start: int, stop: int):
    """The state of some of the images; the rest is NaN and weighs nothing."""
    inside = (np.arange(BATCH) >= start) & (np.arange(BATCH) < stop)
    maps = [
        np.where(inside[:, None, None, None], x, np.nan) for x in given["head_outputs"]
    ]
    maps = tuple(x.astype("f4") for x in maps)
    return state_of({**given, "head_outputs": maps}, weights=inside.astype("f4"))


@pytest.fixture(scope="module")
def models():
    """States of two models, of 3 and of 2 blocks."""
    return state_of(features(3, seed=1)), state_of(features(2, seed=2))


def reference_gram(x: np.ndarray) -> np.ndarray:
    """The U-centred Gram matrix of features (n, p), float64."""
    x = x.astype(float) - x.mean(axis=0, dtype=float)
    k = x @ x.T
    np.fill_diagonal(k, 0)
    n = len(k)
    row = k.sum(axis=1) / (n - 2) - k.sum() / (2 * (n - 1) * (n - 2))
    k -= row[:, None] + row
    np.fill_diagonal(k, 0)
    return k


def test_the_state_holds_the_upper_triangle_of_every_block(models):
    state, maps = models[0], features(3, seed=1)["head_outputs"]
    assert state["gram"].shape == (6, 3, 6) and state["gram"].dtype == np.float32
    np.testing.assert_array_equal(state["index"], 4 * np.arange(6))
    want = reference_gram(maps[2][8:12, :, 1:].reshape(4, -1))
    np.testing.assert_allclose(
        state["gram"][2, 2], want[np.triu_indices(4, 1)], rtol=1e-4, atol=1e-4
    )
    assert (state["width"] == HEADS * (TOKENS - 1) * WIDTH).all()
    assert metric().compute(state) == [] and metric().limit == 4096


def test_a_model_with_itself_is_cka_between_its_depths(models):
    values, stderr = cross_model_cka(models[0], models[0])
    np.testing.assert_allclose(np.diagonal(values), 1, rtol=1e-12)
    np.testing.assert_allclose(values, values.T, rtol=1e-12)
    series = metric("cka").compute(state_of(features(3, seed=1), "cka"))
    (depths,) = [s for s in series if s.name == "CKA between depths, matrix"]
    np.testing.assert_allclose(values, depths.values, rtol=1e-5)
    np.testing.assert_allclose(stderr, depths.stderr, rtol=1e-4, atol=1e-9)
    assert 0.05 < values[0, 1] < 0.9


def test_two_models_against_the_definition(models):
    a, b = features(3, seed=1), features(2, seed=2)

    def grams(x: np.ndarray) -> np.ndarray:
        flat = x[:, :, 1:].reshape(BATCH // N, N, -1)
        return np.stack([reference_gram(g) for g in flat])

    k = [grams(x) for x in a["head_outputs"]]
    m = [grams(x) for x in b["head_outputs"]]
    keep = [np.delete(np.arange(6), i) for i in range(6)]

    def cka(groups) -> np.ndarray:
        dot = lambda x, y: np.sum(x[groups] * y[groups])  # noqa: E731
        return np.array(
            [[dot(x, y) / np.sqrt(dot(x, x) * dot(y, y)) for y in m] for x in k]
        )

    values, stderr = cross_model_cka(*models)
    np.testing.assert_allclose(values, cka(np.arange(6)), rtol=1e-4)
    without = np.stack([cka(groups) for groups in keep])
    want = np.sqrt(5 * np.mean(np.square(without - without.mean(axis=0)), axis=0))
    np.testing.assert_allclose(stderr, want, rtol=1e-3)
    turned, _ = cross_model_cka(*models[::-1])
    np.testing.assert_allclose(turned, values.T, rtol=1e-12)


def test_incomplete_and_not_finite_mini_batches_are_not_kept(models):
    given = features(3, seed=1)
    state = part(given, 0, 11)
    np.testing.assert_array_equal(state["index"], [0, 4])
    assert state["nonfinite"] == 0
    given["head_outputs"][1][5, 0, 3] = np.nan
    state = state_of(given)
    np.testing.assert_array_equal(state["index"], [0, 8, 12, 16, 20])
    assert state["nonfinite"] == 1
    np.testing.assert_array_equal(
        state["gram"], np.delete(models[0]["gram"], 1, axis=0)
    )
    assert "1 of 6 mini-batches" in between_models(state, state).notes[1]


def test_models_must_have_seen_the_same_mini_batches(models):
    a, b = models
    fewer = part(features(2, seed=2), 0, 20)
    with pytest.raises(ValueError, match="has 6 mini-batches and the other 5"):
        cross_model_cka(a, fewer)
    with pytest.raises(ValueError, match="of which 5 are in both"):
        cross_model_cka(a, {**b, "index": b["index"] + 4})
    larger = {**b, "gram": np.zeros((6, 2, 28), "f4")}
    with pytest.raises(ValueError, match="got 4 and 8 images.*--group"):
        cross_model_cka(a, larger)


def test_the_series_names_both_models(models):
    series = between_models(*models, name_a="moco_v3", name_b="simmim")
    assert series.name == "CKA between models" and series.kind == "matrix"
    assert [a.name for a in series.axes] == ["block of moco_v3", "block of simmim"]
    assert [a.values for a in series.axes] == [(1, 2, 3), (1, 2)]
    assert series.count == BATCH and "mini-batches of 4 images" in series.notes[0]
    floor = biased_floor(N, 48, 48)
    assert f"would be {floor:.3f}" in series.notes[0]
    np.testing.assert_array_equal(series.values, cross_model_cka(*models)[0])


def test_one_mini_batch_has_no_error_and_none_has_no_value(models):
    given = features(3, seed=1)
    one, none = part(given, 0, 4), part(given, 0, 3)
    values, stderr = cross_model_cka(one, one)
    assert stderr is None and np.isfinite(values).all()
    series = between_models(none, none)
    assert np.isnan(series.values).all() and series.stderr is None
    assert series.count == 0 and "needs 4 images" in series.notes[0]


def test_a_constant_block_has_cka_zero(models):
    given = features(2, seed=2)
    given["head_outputs"][1][:] = 3.7
    values, _ = cross_model_cka(models[0], state_of(given))
    assert (values[:, 1] == 0).all() and (values[:, 0] != 0).all()


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).standard_normal((9, 3))
    sums = np.stack([x, np.ones_like(x)], axis=1)  # of values, and of how many
    got = jackknife(lambda total: total[0] / total[1], sums)
    np.testing.assert_allclose(got, x.std(axis=0, ddof=1) / 3, rtol=1e-12)
    assert jackknife(lambda total: total[0], sums[:1]) is None
