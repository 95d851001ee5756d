"""What holds for every metric: sums that merge, images apart, any number of devices."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clvsmim import metrics, plugin
from clvsmim.metrics import Axis, Metric, Series, moments, taps

DEPTH, HEADS, WIDTH, GRID = 3, 2, 8, (4, 4)
FACTS = {
    "distance": {"grid": GRID, "patch": 4, "prefix": 1},
    "nmi": {"prefix": 1},
    "fourier": {"grid": GRID, "prefix": 1},
}
every_metric = pytest.mark.parametrize("name", FACTS)


def features(images: int, dtype=jnp.float32) -> metrics.Features:
    """Seeded features of a tiny encoder; images differ from each other."""
    tokens = 1 + GRID[0] * GRID[1]
    rng = np.random.default_rng(0)

    def draw(n: int, *shape: int) -> list[jax.Array]:
        x = rng.standard_normal((n, images, *shape)).astype("f4")
        return [jnp.asarray(a) for a in x]

    logits = draw(DEPTH, HEADS, tokens, tokens)
    return {
        "residual": tuple(x.astype(dtype) for x in draw(2 * DEPTH + 1, tokens, WIDTH)),
        "attention": tuple(jax.nn.softmax(3 * x).astype(dtype) for x in logits),
        "head_outputs": tuple(
            x.astype(dtype) for x in draw(DEPTH, HEADS, tokens, WIDTH // HEADS)
        ),
    }


def take(given: metrics.Features, images: np.ndarray) -> metrics.Features:
    return jax.tree.map(lambda x: x[images], given)


def spoil(given: metrics.Features, images: list[int]) -> metrics.Features:
    return jax.tree.map(lambda x: x.at[np.array(images)].set(jnp.nan), given)


def state_of(metric: Metric, given: metrics.Features, weights=None) -> metrics.State:
    if weights is None:
        weights = np.ones(len(given["residual"][0]))
    return metric.to_state(jax.jit(metric.update)(given, jnp.asarray(weights, "f4")))


def assert_same(got: list[Series], want: list[Series], rtol: float = 1e-12) -> None:
    assert [s.name for s in got] == [s.name for s in want]
    for a, b in zip(got, want, strict=True):
        assert (a.count, a.notes) == (b.count, b.notes)
        np.testing.assert_allclose(a.values, b.values, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(a.stderr, b.stderr, rtol=1e-4, atol=1e-7)


def test_metrics_import_with_jax_and_numpy_alone():
    heavy = {"flax", "optax", "orbax", "tensorflow", "matplotlib", "grain", "clu"}
    code = (
        "import sys, clvsmim.metrics; dir(clvsmim.metrics);"
        "from clvsmim.metrics import attention_distance;"
        f"print(sorted({heavy!r} & {{m.split('.')[0] for m in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_kernel_is_public_under_a_name_of_its_own():
    files = plugin.names("metrics")
    kernels = [k for f in files for k in getattr(metrics, f).__all__]
    assert set(files) >= set(FACTS) and len(kernels) == len(set(kernels))
    assert not set(kernels) & {*files, *vars(metrics)}
    for file in files:
        for kernel in getattr(metrics, file).__all__:
            assert getattr(metrics, kernel) is getattr(getattr(metrics, file), kernel)
            assert callable(getattr(metrics, kernel)) and kernel in dir(metrics)
    with pytest.raises(ImportError, match="atention_distance"):
        from clvsmim.metrics import atention_distance  # noqa: F401


@every_metric
def test_states_merge_to_the_whole_in_any_order(name):
    metric = plugin.load("metrics", name, **FACTS[name])
    given, rng = features(8), np.random.default_rng(1)
    whole = metric.compute(state_of(metric, given))
    parts = np.split(rng.permutation(8), [1, 4, 4])
    states = [state_of(metric, take(given, p)) for p in parts if len(p)]
    states.append(state_of(metric, take(given, np.arange(2)), [0, 0]))  # no image
    for order in (states, states[::-1]):
        total = order[0]
        for state in order[1:]:
            total = metric.merge(total, state)
        assert_same(metric.compute(total), whole, rtol=1e-6)
    assert total["count"] == 8 and all(
        x.dtype == np.float64 for x in jax.tree.leaves(total)
    )


@every_metric
def test_padding_never_counts_even_if_it_holds_nan(name):
    metric = plugin.load("metrics", name, **FACTS[name])
    given = features(6)
    want = metric.compute(state_of(metric, take(given, np.array([0, 2, 3, 5]))))
    padded = spoil(given, [1, 4])
    got = metric.compute(state_of(metric, padded, [1, 0, 1, 1, 0, 1]))
    assert_same(got, want, rtol=1e-6)
    assert got[0].count == 4 and not got[0].notes


@every_metric
def test_a_real_image_that_is_not_finite_is_left_out_and_reported(name):
    metric = plugin.load("metrics", name, **FACTS[name])
    given = features(6)
    want = metric.compute(state_of(metric, take(given, np.array([0, 2, 3, 5]))))
    got = metric.compute(state_of(metric, spoil(given, [1, 4])))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.values, b.values, rtol=1e-6, atol=1e-6)
        assert a.count == 4 and "2 of 6 images left out: not finite" in a.notes


@every_metric
def test_with_no_image_left_the_values_are_nan_and_say_why(name):
    metric = plugin.load("metrics", name, **FACTS[name])
    for series in metric.compute(state_of(metric, spoil(features(2), [0, 1]))):
        assert np.isnan(series.values).all() and series.stderr is None
        assert series.count == 0 and "no image to average" in series.notes


@every_metric
def test_the_order_of_images_does_not_matter_and_heads_follow_theirs(name):
    metric = plugin.load("metrics", name, **FACTS[name])
    given = features(5)
    want = metric.compute(state_of(metric, given))
    shuffled = take(given, np.array([3, 1, 4, 0, 2]))
    assert_same(metric.compute(state_of(metric, shuffled)), want, rtol=1e-6)
    turned = {**given, "attention": tuple(a[:, ::-1] for a in given["attention"])}
    for a, b in zip(metric.compute(state_of(metric, turned)), want, strict=True):
        heads = [axis.name for axis in b.axes].count("head")
        moved = b.values[:, ::-1] if heads else b.values
        np.testing.assert_allclose(a.values, moved, rtol=1e-6)


@every_metric
def test_one_and_eight_devices_agree(name):
    metric = plugin.load("metrics", name, **FACTS[name])
    given, weights = features(16), jnp.ones(16).at[-3:].set(0)
    devices = jax.devices()
    assert len(devices) == 8
    sharding = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))
    spread = jax.device_put((given, weights), sharding)
    step = jax.jit(metric.update, out_shardings=sharding)
    rows = step(*spread)
    assert all(len(x.addressable_shards) == 8 for x in jax.tree.leaves(rows))
    assert "all-reduce" not in step.lower(*spread).compile().as_text()
    one = metric.compute(state_of(metric, given, weights))
    assert_same(metric.compute(metric.to_state(rows)), one, rtol=1e-6)


@every_metric
def test_images_are_measured_apart(name):
    """Rows are per image: spoiling one image changes no other one's row."""
    metric = plugin.load("metrics", name, **FACTS[name])
    given, weights = features(4), jnp.ones(4)
    step = jax.jit(metric.update)
    clean, spoilt = step(given, weights), step(spoil(given, [2]), weights)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(spoilt), strict=True):
        assert a.dtype == jnp.float32 and len(a) == 4
        np.testing.assert_array_equal(a[np.array([0, 1, 3])], b[np.array([0, 1, 3])])


@every_metric
def test_bfloat16_features_give_float32_statistics(name):
    metric = plugin.load("metrics", name, **FACTS[name])
    rounded = features(8, jnp.bfloat16)
    got = metric.compute(state_of(metric, rounded))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    assert_same(got, metric.compute(state_of(metric, exact)), rtol=1e-6)
    want = metric.compute(state_of(metric, features(8)))
    tolerance = {"distance": 0.05, "nmi": 5e-3, "fourier": 0.05}[name]
    np.testing.assert_allclose(got[0].values, want[0].values, atol=tolerance)
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(metric.update).lower(features(2), jnp.ones(2)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert bool(products) == (name == "fourier") and "bf16" not in text


@every_metric
def test_degenerate_features_give_defined_values(name):
    metric = plugin.load("metrics", name, **FACTS[name])
    given = features(2)
    on_cls = jax.tree.map(
        lambda a: jnp.zeros_like(a).at[..., 0].set(1), given["attention"]
    )
    flat = jax.tree.map(jnp.zeros_like, given["residual"])
    series = metric.compute(
        state_of(metric, {**given, "attention": on_cls, "residual": flat})
    )
    assert all(np.isfinite(s.values).all() and s.count == 2 for s in series)
    if name != "fourier":
        assert (series[-2].values == 1).all() and (series[-1].values == 16).all()


@every_metric
def test_series_can_be_saved_exactly(name):
    metric = plugin.load("metrics", name, **FACTS[name])
    for series in metric.compute(state_of(metric, features(3))):
        text = json.dumps(series.to_json(), allow_nan=False)
        again = Series.from_json(json.loads(text))
        np.testing.assert_array_equal(again.values, series.values)
        np.testing.assert_array_equal(again.stderr, series.stderr)
        for field in ("name", "axes", "kind", "unit", "source", "count", "notes"):
            assert getattr(again, field) == getattr(series, field)


def analyse(metric: Metric, x: jax.Array, depth: int) -> metrics.State:
    """A forward of `depth` blocks, x (B, T, D), and the metric in one function."""
    residual, attention = [x], []
    for _ in range(depth):
        maps = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x))
        attention.append(jnp.repeat(maps[:, None], HEADS, axis=1))
        x = x + jnp.einsum("bhqk,bkd->bqd", attention[-1], x)
        residual += [x, x := jnp.tanh(x)]
    taken = {"residual": tuple(residual), "attention": tuple(attention)}
    return metric.update(taken, jnp.ones(len(x)))


@every_metric
def test_temporary_memory_does_not_grow_with_depth(name):
    metric = plugin.load("metrics", name, **FACTS[name])

    def temporary(depth: int) -> int:
        step = jax.jit(lambda x: analyse(metric, x, depth))
        compiled = step.lower(jnp.ones((32, 17, WIDTH))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(16) < 1.5 * temporary(4)


def series(values, stderr=None, **changed) -> Series:
    fields = {
        "name": "a",
        "axes": (Axis("block", (1, 2, 3)),),
        "kind": "depth",
        "unit": "px",
        "source": "",
        "count": 1,
    }
    return Series(**{**fields, **changed}, values=values, stderr=stderr)


def test_a_series_saves_nan_as_null():
    plain = series([0.1, np.nan, 1e-300]).to_json()
    assert plain["values"] == [0.1, None, 1e-300] and plain["stderr"] is None
    again = Series.from_json(json.loads(json.dumps(plain, allow_nan=False)))
    np.testing.assert_array_equal(again.values, [0.1, np.nan, 1e-300])
    assert again.stderr is None
    number = Series.from_json(series(0.5, axes=()).to_json())
    assert number.values.shape == () and number.values == 0.5


def test_a_series_checks_its_shape_and_kind():
    with pytest.raises(
        ValueError, match=r"values of series 'a' has shape \(2,\).*\(3,"
    ):
        series([1, 2])
    with pytest.raises(ValueError, match=r"stderr of series 'a' has shape \(\)"):
        series([1, 2, 3], 0.0)
    with pytest.raises(ValueError, match="did you mean 'depth'"):
        series([1, 2, 3], kind="dpth")


def test_a_metric_checks_what_it_needs():
    with pytest.raises(ValueError, match="feature 'atention': did you mean 'attention"):
        Metric(needs=("atention",), update=lambda f, w: {}, compute=lambda s: [])


def test_depth_is_a_block_and_a_site():
    axis = Axis("depth", taps(2))
    assert axis.values == (
        (0, "embed"),
        (1, "attn"),
        (1, "mlp"),
        (2, "attn"),
        (2, "mlp"),
    )
    np.testing.assert_array_equal(axis.positions, [0, 0.5, 1, 1.5, 2])
    assert axis.labels == ("embed", "1 attn", "1 mlp", "2 attn", "2 mlp")
    np.testing.assert_array_equal(Axis("class", ("cat", "dog")).positions, [0, 1])
    assert Axis("f", (0, 1 / 7)).labels == ("0", "0.143")


def test_moments_give_the_mean_and_its_standard_error():
    values = np.random.default_rng(0).standard_normal((5, 3)).astype("f4") + 100
    state = moments({"weight": np.ones(5), "values": {"x": values}})
    got = metrics.mean_series(
        state,
        "x",
        name="x",
        axes=(Axis("block", (1, 2, 3)),),
        kind="depth",
        unit="",
        source="",
    )
    np.testing.assert_allclose(got.values, values.mean(axis=0, dtype=float), rtol=1e-12)
    want = values.std(axis=0, ddof=1, dtype=float) / 5**0.5
    np.testing.assert_allclose(got.stderr, want, rtol=1e-6)


def test_states_of_other_shapes_do_not_merge():
    a, b = (moments({"weight": [1], "values": {"x": np.ones((1, n))}}) for n in (1, 4))
    with pytest.raises(ValueError, match=r"shape \(1,\) meets one of shape \(4,\)"):
        metrics.add(a, b)
