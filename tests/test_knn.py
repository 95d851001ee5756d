"""k-NN accuracy against a plain float64 search, and its neighbours against ties."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clvsmim.metrics import (
    Nearest,
    Series,
    knn,
    knn_predict,
    knn_scores,
    merge_nearest,
    nearest,
)
from clvsmim.plugin import load

WIDTH, CLASSES = 8, 6
KS = (1, 3, 10)


@pytest.fixture(scope="module")
def metric():
    return load("metrics", "knn", prefix=1, classes=CLASSES, neighbours=KS)


def images(count: int, seed: int = 0, noise: float = 1.0):
    """Tokens of `count` images whose classes overlap by `noise`."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, count)
    centre = np.random.default_rng(99).standard_normal((CLASSES, WIDTH))
    tokens = noise * rng.standard_normal((count, 4, WIDTH)) + centre[label][:, None]
    return {
        "output": tokens.astype("f4"),
        "label": label.astype("i4"),
        "index": np.arange(count, dtype="i4"),
    }


def one_token(vectors: np.ndarray, label: np.ndarray):
    """Images whose CLS and patch token are both the given vector (n, D)."""
    tokens = np.repeat(np.asarray(vectors, "f4")[:, None], 2, axis=1)
    index = np.arange(len(tokens), dtype="i4")
    return {"output": tokens, "label": np.asarray(label, "i4"), "index": index}


def take(given, chosen):
    return jax.tree.map(lambda x: x[np.asarray(chosen, int)], given)


def state_of(metric, given, weights=None):
    weights = np.ones(len(given["label"])) if weights is None else weights
    return metric.to_state(metric.update(given, np.asarray(weights, "f4")))


def measure(metric, train, test, **kw):
    return metric.compute(state_of(metric, train), state_of(metric, test, **kw))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_hand(train, test, k: int, temperature: float) -> np.ndarray:
    """Top-1 and top-5 in percent for CLS and for patches, (2, 2), image by image."""
    right = np.zeros((2, 2))
    for pool, pick in enumerate((lambda x: x[:, 0], lambda x: x[:, 1:].mean(axis=1))):
        bank, query = (unit(pick(g["output"].astype(float))) for g in (train, test))
        for x, label in zip(query, test["label"], strict=True):
            near = sorted(range(len(bank)), key=lambda i, x=x: (-(bank[i] @ x), i))[:k]
            votes = np.zeros(CLASSES)
            for i in near:
                votes[train["label"][i]] += np.exp(bank[i] @ x / temperature)
            order = [c for c in np.argsort(-votes, kind="stable") if votes[c]][:5]
            right[:, pool] += [order[0] == label, label in order]
    return 100 * right / len(query)


@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_accuracy_is_that_of_a_plain_search(metric, noise):
    train, test = images(40, 0, noise), images(20, 1, noise)
    series = measure(metric, train, test)
    for j, k in enumerate(KS):
        want = by_hand(train, test, k, 0.07)
        np.testing.assert_allclose([s.values[:, j] for s in series], want, rtol=1e-12)
    top, top5 = (s.values for s in series)
    assert np.all(top <= top5) and top.min() > 0 and top.max() < 100
    p = top / 100
    np.testing.assert_allclose(series[0].stderr, 100 * np.sqrt(p * (1 - p) / 20))


def test_chunks_do_not_matter(metric, monkeypatch):
    train, test = images(40), images(20, 1)
    want = measure(metric, train, test)
    monkeypatch.setattr(knn, "QUERIES", 15)
    monkeypatch.setattr(knn, "BANK", 7)  # fewer than the largest k
    for a, b in zip(measure(metric, train, test), want, strict=True):
        np.testing.assert_array_equal(a.values, b.values)


def test_hand_made_case():
    query, bank = np.array([0.9, 0.1]), np.array([[1, 0], [0.8, 0.6], [0, 1]])
    similarity = unit(bank) @ (query / np.linalg.norm(query))
    np.testing.assert_allclose(similarity, [0.9938837, 0.8613659, 0.1104315], rtol=1e-6)
    labels = jnp.array([0, 1, 1])
    scores = knn_scores(jnp.asarray(similarity), labels, classes=2, temperature=0.07)
    weights = [1466426.5, 220847.4, 4.84]
    want = np.array([weights[0], weights[1] + weights[2]]) / weights[0]
    np.testing.assert_allclose(scores, want, rtol=1e-4)
    for k in (1, 2, 3):
        near = nearest(jnp.asarray(similarity), jnp.arange(3), k)
        scores = knn_scores(
            near.similarity, labels[near.ids], classes=2, temperature=0.07
        )
        assert knn_predict(scores)[0] == 0


def test_with_itself_as_bank_the_nearest_image_is_right(metric):
    given = images(40, noise=5.0)
    top, _ = measure(metric, given, given)
    assert (top.values[:, 0] == 100).all()
    other, _ = measure(metric, given, images(20, 1, noise=5.0))
    assert (other.values < 60).all()


def test_towards_infinite_temperature_the_majority_wins():
    similarity, labels = jnp.array([0.9, 0.5, 0.4, 0.1]), jnp.array([2, 1, 1, 0])
    cold = knn_scores(similarity, labels, classes=4, temperature=0.07)
    hot = knn_scores(similarity, labels, classes=4, temperature=1e9)
    np.testing.assert_allclose(hot, [1, 2, 1, 0], rtol=1e-6)
    assert knn_predict(cold)[0] == 2 and knn_predict(hot)[0] == 1
    frozen = knn_scores(similarity, labels, classes=4, temperature=1e-4)
    np.testing.assert_allclose(frozen, [0, 0, 1, 0], atol=1e-30)


def test_top_5_names_only_classes_of_neighbours():
    """Else one neighbour would be right about five classes (and dino#89)."""
    np.testing.assert_array_equal(
        knn_predict(jnp.array([0, 0, 0, 0, 0, 0, 0.5, 1]), top=5), [7, 6, -1, -1, -1]
    )
    np.testing.assert_array_equal(knn_predict(jnp.array([1.0, 1, 2]), top=5), [2, 0, 1])


def test_one_neighbour_gives_the_same_top_5_as_top_1(metric):
    top, top5 = measure(metric, images(40), images(20, 1))
    np.testing.assert_array_equal(top.values[:, 0], top5.values[:, 0])
    assert (top5.values[:, 2] > top.values[:, 2]).any()


def test_one_hot_features_find_their_own_kind(metric):
    """All images of a class are equally near, all others equally far."""
    labels = np.tile(np.arange(CLASSES), 12)
    given = one_token(np.eye(CLASSES)[labels], labels)
    top, _ = measure(metric, given, take(given, range(20)))
    assert (top.values == 100).all() and top.count == 20
    # -0 is as far as 0
    near = nearest(jnp.array([-0.0, 0.0, -0.0, 1.0]), jnp.arange(4), 3)
    np.testing.assert_array_equal(near.ids, [3, 0, 1])


def test_the_number_of_classes_is_that_of_the_data(metric):
    """Also where neither bank nor queries show them all."""
    train, test = one_token(np.eye(3), [0, 1, 2]), one_token(np.eye(3)[:2], [0, 5])
    top, _ = measure(metric, train, test)
    np.testing.assert_array_equal(top.values, 50)
    assert top.notes[0] == "3 training images; chance is 16.7%"


def test_neighbours_merge_in_any_order_and_grouping():
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 4, 40) / 4  # many ties
    order = np.lexsort((np.arange(40), -similarity))
    merge = jax.jit(merge_nearest, static_argnames="k")
    for seed in range(3):
        cut = np.split(np.random.default_rng(seed).permutation(40), [3, 20, 25, 25])
        found = []
        for ids in map(np.sort, cut):
            near = nearest(jnp.asarray(similarity[ids]), jnp.asarray(ids), 6)
            found.append(near)
        left = found[0]
        for more in found[1:]:
            left = merge(left, more, k=6)
        right = found[4]
        for more in found[3::-1]:
            right = merge(more, right, k=6)
        for near in (left, right):
            np.testing.assert_array_equal(near.ids, order[:6])
            np.testing.assert_array_equal(near.similarity, similarity[order[:6]])


def test_merging_few_neighbours_gives_fewer_than_k():
    a = Nearest(jnp.array([0.5]), jnp.array([3]))
    b = Nearest(jnp.array([0.5, 0.2]), jnp.array([1, 2]))
    np.testing.assert_array_equal(merge_nearest(a, b, 9).ids, [1, 3, 2])


def test_equal_images_are_chosen_by_their_number(metric):
    """Whatever the order in which they were read."""
    train = one_token(np.ones((4, WIDTH)), [1, 1, 2, 2])
    train["index"] = np.array([7, 2, 9, 8], "i4")
    test = one_token(np.ones((1, WIDTH)), [1])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        top, _ = measure(metric, take(train, order), test)
        assert (top.values == 100).all()  # 2 alone, or 2, 7 and 8


def test_the_series_say_what_they_are(metric):
    series = measure(metric, images(40), images(20, 1))
    names = ["k-NN accuracy", "k-NN accuracy, top 5"]
    assert [s.name for s in series] == names
    for s in series:
        assert [a.name for a in s.axes] == ["pool", "neighbours"]
        assert s.axes[0].values == ("cls", "patches") and s.axes[1].values == KS
        assert (s.kind, s.unit, s.count) == ("curve", "%", 20)
        again = Series.from_json(json.loads(json.dumps(s.to_json(), allow_nan=False)))
        np.testing.assert_array_equal(again.values, s.values)
    bare = load("metrics", "knn", prefix=0, classes=CLASSES, neighbours=KS)
    assert measure(bare, images(40), images(20))[0].axes[0].values == ("patches",)


def test_more_neighbours_than_images_are_left_out(metric):
    top, _ = measure(metric, images(5), images(20, 1))
    assert top.axes[1].values == (1, 3)
    assert "k = 10 left out: more than there are training images" in top.notes
    assert measure(metric, images(10), images(20, 1))[0].axes[1].values == KS
    far = load("metrics", "knn", prefix=1, classes=CLASSES)
    top, _ = measure(far, images(5), images(20, 1))
    assert top.axes[1].values == (5,) and np.isfinite(top.values).all()


def test_degenerate_data_give_defined_values_that_say_why(metric):
    test = images(20, 1)
    top, _ = measure(metric, one_token(np.zeros((40, WIDTH)), np.zeros(40)), test)
    share = 100 * np.mean(test["label"] == 0)
    np.testing.assert_allclose(top.values, share)
    for series in measure(metric, take(images(5), []), test):
        assert np.isnan(series.values).all() and series.axes[1].values == KS
        assert "no training image to average" in series.notes
    for series in measure(metric, images(40), take(test, [])):
        assert np.isnan(series.values).all() and series.stderr is None
        assert "no image to average" in series.notes


def test_settings_and_labels_that_cannot_be_are_errors(metric):
    for changed, match in (
        ({"neighbours": ()}, "1 or more"),
        ({"neighbours": (0, 5)}, "1 or more"),
        ({"temperature": 0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            load("metrics", "knn", prefix=1, classes=2, **changed)
    small = load("metrics", "knn", prefix=1, classes=2)
    good = one_token(np.eye(2), [0, 1])
    for pair in ((images(9), good), (good, images(9))):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            measure(small, *pair)


def test_features_have_length_one_in_float32_on_any_number_of_devices(metric):
    given = images(16)
    rounded = {**given, "output": jnp.asarray(given["output"], jnp.bfloat16)}
    sharding = NamedSharding(
        Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
    )
    spread = jax.device_put((rounded, np.ones(16, "f4")), sharding)
    step = jax.jit(metric.update, out_shardings=sharding).lower(*spread).compile()
    assert "all-reduce" not in step.as_text()
    rows = step(*spread)
    exact = np.asarray(rounded["output"], float)
    for pool, want in (("cls", exact[:, 0]), ("patches", exact[:, 1:].mean(axis=1))):
        assert rows[pool].dtype == jnp.float32
        np.testing.assert_allclose(rows[pool], unit(want), atol=1e-6)
