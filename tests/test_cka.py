"""CKA against closed forms, hand-made cases and errors known from other code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clvsmim.metrics import (
    biased_cka,
    biased_floor,
    centred_gram,
    feature_hsic,
    hsic,
    linear_cka,
)
from clvsmim.plugin import load

X = np.array([[1, 0], [2, 1], [3, -1], [0, 2], [4, 1], [1, 3]], float)
Y = np.array([[1, 1, 0], [2, 0, 1], [0, 1, 3], [1, 2, 0], [5, 0, 1], [0, 4, 1]], float)
DEPTH, HEADS, TOKENS, HEAD_WIDTH = 3, 2, 7, 4  # one of the tokens is CLS
N, BATCH = 4, 24  # images of a mini-batch and, padding included, of a batch
cka_of, biased_of = jax.jit(linear_cka), jax.jit(biased_cka)
gram_of, feature_hsic_of = jax.jit(centred_gram), jax.jit(feature_hsic)
hsic_of = jax.jit(lambda x, y: hsic(centred_gram(x), centred_gram(y)))


@pytest.fixture
def normal():
    """Seeded draws: `normal(n, p)` float32."""
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape).astype("f4")


def reference_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC_1 of Song et al. 2012 as it is written there, float64."""
    x, y = (a.astype(float) - a.mean(axis=0, dtype=float) for a in (x, y))
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    n = len(k)
    both = k.sum() * m.sum() / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (k @ m).sum()
    return (np.trace(k @ m) + both - cross) / (n * (n - 3))


def reference_cka(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Summed over mini-batches (x, y), then divided once."""
    xy, xx, yy = (
        sum(reference_hsic(*(pair[i] for i in which)) for pair in pairs)
        for which in ((0, 1), (0, 0), (1, 1))
    )
    return xy / np.sqrt(xx * yy)


# The kernels


def test_hand_made_case():
    want = {(0, 0): 8.1666667, (0, 1): 0.6944444, (1, 1): 11.2666667}
    for (i, j), value in want.items():
        pair = (X, Y)[i], (X, Y)[j]
        np.testing.assert_allclose(reference_hsic(*pair), value, rtol=1e-6)
        np.testing.assert_allclose(hsic_of(*pair), value, rtol=1e-5)
        np.testing.assert_allclose(feature_hsic_of(*pair), value, rtol=1e-5)
    np.testing.assert_allclose(cka_of(X, Y), 0.0723965, rtol=1e-5)
    np.testing.assert_allclose(biased_of(X, Y), 0.4986289, rtol=1e-5)


@pytest.mark.parametrize("mean", [0, 10, 100, 1000])
def test_large_means_do_not_cost_the_digits_of_float32(normal, mean):
    x = normal(64, 768) + np.float32(mean)
    y = x[:, ::2] + normal(64, 384)
    want = reference_cka([(x, y)])
    assert 0.3 < want < 0.9
    np.testing.assert_allclose(hsic_of(x, x), reference_hsic(x, x), rtol=1e-4)
    np.testing.assert_allclose(cka_of(x, y), want, rtol=1e-4)
    assert cka_of(x, y).dtype == jnp.float32


def test_one_up_to_rotation_scale_and_shift_but_not_up_to_any_linear_map(normal):
    x, shift = normal(32, 8), normal(8)
    turn = np.linalg.qr(normal(8, 8))[0]
    np.testing.assert_allclose(cka_of(x, x), 1, rtol=3e-7)
    for y in (x @ turn, 1e-3 * x, -50 * x, x + 100 * shift, 3 * x @ turn + shift):
        np.testing.assert_allclose(cka_of(x, y), 1, rtol=1e-5)
        other = normal(32, 5) + x[:, :5]
        np.testing.assert_allclose(cka_of(y, other), cka_of(x, other), rtol=1e-4)
        np.testing.assert_allclose(cka_of(other, y), cka_of(y, other), rtol=1e-6)
    assert cka_of(x, x @ np.diag(2.0 ** np.arange(8)).astype("f4")) < 0.8


def test_some_of_the_columns_give_the_root_of_their_share(normal):
    """sqrt(4 / 16), which without the square root would be 1 / 4."""
    x = normal(4096, 16)
    xx, xy, yy = (
        feature_hsic_of(a, b) for a, b in ((x, x), (x, x[:, :4]), (x[:, :4], x[:, :4]))
    )
    np.testing.assert_allclose(xy / np.sqrt(xx * yy), 0.5, atol=0.015)
    np.testing.assert_allclose(cka_of(x[:512], x[:512, :4]), 0.5, atol=0.05)


def test_hsic_estimates_the_squared_norm_of_the_covariance(normal):
    draws = [hsic_of(x, x) for x in normal(20, 256, 50)]
    np.testing.assert_allclose(np.mean(draws), 50, atol=0.6)


def test_both_forms_of_hsic_agree(normal):
    x, y = normal(64, 6) + 5, normal(64, 9)
    y[:, :6] += x
    want = reference_hsic(x, y)
    np.testing.assert_allclose(hsic_of(x, y), want, rtol=1e-5)
    np.testing.assert_allclose(feature_hsic_of(x, y), want, rtol=1e-5)
    batch = jax.jit(jax.vmap(linear_cka))(np.stack([x, x[::-1]]), np.stack([y, y]))
    want = reference_cka([(x, y)]), reference_cka([(x[::-1], y)])
    np.testing.assert_allclose(batch, want, rtol=1e-4, atol=1e-5)


def test_images_must_be_in_the_same_order(normal):
    """Two loaders that shuffle apart give 0, not an error."""
    x, order = normal(64, 768), np.random.default_rng(1).permutation(64)
    y = x + normal(64, 768)
    np.testing.assert_allclose(cka_of(x[order], y[order]), cka_of(x, y), rtol=1e-5)
    assert cka_of(x, y) > 0.4 and abs(cka_of(x[order], y)) < 0.05


@pytest.mark.parametrize("n, floor", [(64, 0.923), (256, 0.75), (1024, 0.429)])
def test_biased_cka_of_unrelated_features_is_not_zero(normal, n, floor):
    np.testing.assert_allclose(biased_floor(n, 768, 768), floor, atol=5e-4)
    x, y = normal(n, 768), normal(n, 768)
    np.testing.assert_allclose(biased_of(x, y), floor, atol=0.01)
    np.testing.assert_allclose(cka_of(x, y), 0, atol=0.02)


def test_the_diagonals_are_zeroed_not_the_columns(normal):
    """`k - diag(k)` with a vector takes it from columns: HSIC below 0, then NaN."""
    for n in (4, 9):
        x = normal(n, 3) * 10
        kc = np.asarray(gram_of(x))
        assert (np.diagonal(kc) == 0).all()
        np.testing.assert_allclose(kc, kc.T, atol=1e-4)
        np.testing.assert_allclose(kc.sum(axis=1), 0, atol=1e-3)
        assert hsic_of(x, x) > 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_than_four_images_are_refused(normal, n):
    x = normal(n, 5)
    for function in (linear_cka, feature_hsic):
        with pytest.raises(ValueError, match=f"got {n} images.*expected at least 4"):
            function(x, x)
    with pytest.raises(ValueError, match="at least 4"):
        centred_gram(x)
    with pytest.raises(ValueError, match="at least 4"):
        load("metrics", "cka", prefix=1, group=n)


def test_features_that_never_differ_have_cka_zero(normal):
    """As those of a layer that was never hooked, where others divide 0 by 0."""
    x = normal(13, 8)  # 1 / 13 is rounded, and so is a mean
    for same in (np.zeros((13, 300), "f4"), np.tile(1e3 * normal(1, 300), (13, 1))):
        assert (np.asarray(gram_of(same)) == 0).all()
        for cka in (cka_of(x, same), cka_of(same, x), cka_of(same, same)):
            assert cka == 0
    assert biased_of(x, np.zeros((13, 300), "f4")) == 0
    assert np.isnan(cka_of(x, x * np.nan))


# The metric


@functools.cache
def metric(group: int = N):
    return load("metrics", "cka", prefix=1, group=group)


@functools.cache
def step(group: int = N):
    return jax.jit(metric(group).update)


def features(images: int, depth: int = DEPTH, heads: int = HEADS) -> dict:
    """Of a tiny encoder; blocks and heads resemble each other."""
    rng = np.random.default_rng(3)
    shape = (images, heads, TOKENS, HEAD_WIDTH)
    common = rng.standard_normal(shape)
    draw = [(common + rng.standard_normal(shape)).astype("f4") for _ in range(depth)]
    stream = rng.standard_normal((2 * depth + 1, images, TOKENS, 6)).astype("f4")
    return {
        "head_outputs": tuple(draw),
        "residual": tuple(stream.cumsum(axis=0)),
        "index": np.arange(images, dtype="i4"),
    }


def take(given: dict, images) -> dict:
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(images)], given)


def spoil(given: dict, images: list[int]) -> dict:
    """NaN in the features of some images."""

    def leaf(x: np.ndarray) -> np.ndarray:
        x = np.array(x)
        if images and np.issubdtype(x.dtype, np.floating):
            x[np.asarray(images)] = np.nan
        return x

    return jax.tree.map(leaf, given)


def state_of(given: dict, weights=None, group: int = N):
    """Of a batch that is padded with NaN to one size, which compiles once."""
    images = len(given["index"])
    weights = np.ones(images) if weights is None else weights
    more = np.arange(images, BATCH) % images
    full = spoil(take(given, [*range(images), *more]), [*range(images, BATCH)])
    weights = np.pad(weights, (0, len(more))).astype("f4")
    return metric(group).to_state(step(group)(full, weights))


def by_name(state) -> dict:
    return {s.name: s for s in metric().compute(state)}


def assert_same(got, want, rtol: float = 1e-12) -> None:
    for a, b in zip(metric().compute(got), metric().compute(want), strict=True):
        assert (a.name, a.count) == (b.name, b.count)
        np.testing.assert_allclose(a.values, b.values, rtol=rtol, atol=rtol)
        if b.stderr is not None:
            np.testing.assert_allclose(a.stderr, b.stderr, rtol=rtol, atol=rtol)


def flat(x: jax.Array, group: int = N) -> np.ndarray:
    """Mini-batches of features in rows: (B, ...) -> (G, n, p)."""
    return np.asarray(x).reshape(len(x) // group, group, -1)


def panel(sets: list[np.ndarray]) -> np.ndarray:
    """Reference CKA of every two of k sets, each (G, n, p)."""
    return np.array(
        [[reference_cka(list(zip(x, y, strict=True))) for y in sets] for x in sets]
    )


def off_diagonal(cka: np.ndarray) -> float:
    return cka[~np.eye(len(cka), dtype=bool)].mean()


def test_each_panel_is_cka_of_its_features():
    given = features(12)
    found = by_name(state_of(given))
    inner = [x[:, :, 1:] for x in given["head_outputs"]]  # CLS dropped
    heads = [panel([flat(x[:, h]) for h in range(HEADS)]) for x in inner]
    positions = [panel([flat(x[:, :, t]) for t in range(TOKENS - 1)]) for x in inner]
    depths = panel([flat(x) for x in inner])
    stream = panel([flat(x[:, 1:]) for x in given["residual"]])
    want = {
        "CKA between heads": [off_diagonal(x) for x in heads],
        "CKA between heads, matrices": heads,
        "CKA between depths": (depths.sum(axis=1) - 1) / (DEPTH - 1),
        "CKA between depths, matrix": depths,
        "CKA between positions": [off_diagonal(x) for x in positions],
        "CKA between taps, matrix": stream,
    }
    assert list(found) == list(want)
    for name, values in want.items():
        np.testing.assert_allclose(found[name].values, values, rtol=1e-4, atol=1e-5)
        assert found[name].count == 12 and found[name].source == "Fig. 5"
    assert [a.labels[-1] for a in found["CKA between taps, matrix"].axes] == [
        "3 mlp"
    ] * 2
    np.testing.assert_array_equal(
        np.diagonal(found["CKA between depths, matrix"].values), 1
    )


def test_hsic_is_summed_before_it_is_divided():
    given = features(12)
    parts = [state_of(take(given, range(i, i + N))) for i in (0, 4, 8)]
    apart = [by_name(p)["CKA between depths"].values for p in parts]
    whole = by_name(state_of(given))["CKA between depths"].values
    assert np.abs(np.mean(apart, axis=0) - whole).max() > 1e-2


def test_states_of_other_mini_batches_or_models_do_not_merge():
    given = features(24)
    four, eight = state_of(given), state_of(given, group=8)
    with pytest.raises(ValueError, match="of 4 images meet ones of 8.*--group"):
        metric().merge(four, eight)
    shallow = state_of(features(24, depth=2))
    with pytest.raises(ValueError, match="shape"):
        metric().merge(four, shallow)
    shallow["width"]["taps"] += 1
    with pytest.raises(ValueError, match="other widths"):
        metric().merge(shallow, state_of(features(24, depth=2)))


def test_the_value_depends_on_the_mini_batch_but_hardly_on_average():
    given = features(24)
    four, eight = by_name(state_of(given)), by_name(state_of(given, group=8))
    a, b = (f["CKA between depths"] for f in (four, eight))
    assert not np.allclose(a.values, b.values, atol=1e-4)
    np.testing.assert_allclose(a.values, b.values, atol=4 * np.max(a.stderr))


def test_an_incomplete_mini_batch_is_dropped_and_said():
    given = features(12)
    weights = np.repeat([1.0, 0.0], [10, 2])
    padded = take(given, [*range(10), 9, 9])
    assert_same(state_of(padded, weights), state_of(take(given, range(8))))
    for holds in (padded, spoil(padded, [10, 11])):
        for series in metric().compute(state_of(holds, weights)):
            assert series.notes[1:] == ("2 images in an incomplete mini-batch dropped",)
            assert "mini-batches of 4 images" in series.notes[0]
            assert series.count == 8 and np.isfinite(series.values).all()


def test_without_a_whole_mini_batch_the_values_are_nan_and_say_why():
    for series in metric().compute(state_of(features(4), [1, 1, 1, 0])):
        assert np.isnan(series.values).all() and series.stderr is None
        assert series.count == 0
        assert series.notes == (
            "no whole mini-batch: needs 4 images, or a smaller --group",
            "3 images in an incomplete mini-batch dropped",
        )


def test_the_biased_floor_is_printed():
    found = by_name(state_of(features(8)))
    for name, p in (
        ("CKA between heads", 6 * HEAD_WIDTH),
        ("CKA between depths", 6 * HEADS * HEAD_WIDTH),
        ("CKA between positions", HEADS * HEAD_WIDTH),
        ("CKA between taps, matrix", 6 * 6),
    ):
        assert f"would be {p / (N + p):.3f}" in found[name].notes[0]


def test_equal_heads_and_equal_positions_have_cka_one():
    given = features(8)
    for axis, name in ((1, "heads"), (2, "positions")):
        alike = [
            np.broadcast_to(x.take([1], axis=axis), x.shape)
            for x in given["head_outputs"]
        ]
        found = by_name(state_of({**given, "head_outputs": tuple(alike)}))
        np.testing.assert_allclose(found[f"CKA between {name}"].values, 1, rtol=1e-5)
        assert found["CKA between depths"].values.max() < 0.9


def test_independent_heads_have_cka_zero():
    rng = np.random.default_rng(5)
    draw = rng.standard_normal((DEPTH, 24, HEADS, TOKENS, HEAD_WIDTH)).astype("f4")
    given = {**features(24), "head_outputs": tuple(draw)}
    found = by_name(state_of(given, group=8))
    for name in ("heads", "depths", "positions"):
        values = found[f"CKA between {name}"].values
        np.testing.assert_allclose(values.mean(), 0, atol=0.1)


def test_a_constant_block_has_cka_zero_and_a_note():
    given = features(8)
    maps = [*given["head_outputs"]]
    maps[1] = np.broadcast_to(maps[1][:1] + 7, maps[1].shape)
    found = by_name(state_of({**given, "head_outputs": tuple(maps)}))
    depths = found["CKA between depths, matrix"]
    want = by_name(state_of(given))["CKA between depths, matrix"].values
    np.testing.assert_allclose(depths.values[::2, ::2], want[::2, ::2], rtol=1e-6)
    assert (depths.values[1] == 0).all() and (depths.values[:, 1] == 0).all()
    assert np.isfinite(found["CKA between positions"].values).all()
    note = (
        "1 of 3 sets of features are the same for all images; their CKA is given as 0"
    )
    assert note in depths.notes
    assert "2 of 6" in found["CKA between heads"].notes[1]
    assert not found["CKA between taps, matrix"].notes[1:]


def test_the_number_of_blocks_does_not_enter():
    """Others divide by the number of layers where they mean mini-batches."""
    three, two = features(8), features(8)
    two["head_outputs"], two["residual"] = two["head_outputs"][:2], two["residual"][:5]
    for name in ("CKA between depths, matrix", "CKA between taps, matrix"):
        small, large = by_name(state_of(two))[name], by_name(state_of(three))[name]
        k = len(small.values)
        np.testing.assert_allclose(small.values, large.values[:k, :k], rtol=1e-6)


def test_with_one_head_or_block_there_is_no_mean_over_pairs():
    found = by_name(state_of(features(4, depth=1, heads=1)))
    assert list(found) == [
        "CKA between heads, matrices",
        "CKA between depths, matrix",
        "CKA between positions",
        "CKA between taps, matrix",
    ]
    assert found["CKA between depths, matrix"].values == [[1]]


def test_the_error_is_the_jackknife_over_mini_batches():
    given = features(20)
    state = state_of(given)
    for name in ("CKA between heads", "CKA between taps, matrix"):
        without = [
            by_name(state_of(take(given, np.delete(np.arange(20), np.s_[i : i + N]))))
            for i in range(0, 20, N)
        ]
        values = np.array([f[name].values for f in without])
        want = np.sqrt(4 / 5 * np.square(values - values.mean(axis=0)).sum(axis=0))
        got = by_name(state)[name].stderr
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)
    assert by_name(state_of(take(given, range(4))))["CKA between heads"].stderr is None


def test_more_than_sixteen_mini_batches_share_blocks_of_the_jackknife():
    given = features(24)
    parts = [{**given, "index": given["index"] + start} for start in (0, 24, 48)]
    state = functools.reduce(metric().merge, map(state_of, parts))
    np.testing.assert_array_equal(state["groups"], [2, 2, *[1] * 14])
    got = by_name(state)["CKA between depths"]
    assert got.count == 72 and (got.stderr > 0).all()


def test_a_mini_batch_may_be_spread_over_devices():
    """8 images a device: a quarter of a mini-batch."""
    given, weights = features(64, depth=1), np.ones(64, "f4")
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.device_put((given, weights), split)
    rows = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(metric(32).update, out_shardings=rows).lower(*spread).compile()
    one = metric(32).to_state(step(32)(given, weights))
    many = metric(32).to_state(jax.tree.map(np.asarray, compiled(*spread)))
    got, want = by_name(many), by_name(one)
    for name, series in want.items():
        np.testing.assert_allclose(
            got[name].values, series.values, rtol=1e-5, atol=1e-6
        )


def test_temporary_memory_does_not_grow_with_depth():
    """Features are made block by block here, as an encoder makes them."""

    def forward(x: jax.Array, depth: int):
        residual, outputs = [x], []
        for _ in range(depth):
            outputs.append(jnp.sin(x).reshape(16, TOKENS, HEADS, -1).swapaxes(1, 2))
            residual += [x := x + jnp.cos(x), x := jnp.tanh(x)]
        return metric(16).update(
            {
                "residual": tuple(residual),
                "head_outputs": tuple(outputs),
                "index": jnp.arange(16),
            },
            jnp.ones(16),
        )

    def temporary(depth: int) -> int:
        lowered = jax.jit(functools.partial(forward, depth=depth)).lower(
            jnp.ones((16, TOKENS, 64))
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < 1.5 * temporary(4)
