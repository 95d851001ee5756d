"""What holds for every metric: sums that merge, images apart, any number of devices."""

import dataclasses
import functools
import json
import re
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
GROUP, UNITS = 4, 8  # images of a mini-batch; a unit is a mini-batch or an image
BATCH = GROUP * UNITS
FACTS = {
    "grid": GRID,
    "patch": 4,
    "prefix": 1,
    "depth": DEPTH,
    "group": GROUP,
    "classes": 3,
    "views": GROUP,
    "neighbours": (3, 5),
}
METRICS = [x for x in plugin.names("metrics") if hasattr(getattr(metrics, x), "make")]
# How far bfloat16 features may move the first Series of a metric.
BFLOAT16 = {
    "amplitude": 0.1,
    "cka": 2e-3,
    "displacement": 2e-3,
    "distance": 5e-3,  # pixels
    "diversity": 1e-4,
    "fourier": 0.05,
    "grams": 5e-3,
    "knn": 12.5,  # one image of 8
    "lidar": 0.02,
    "nmi": 5e-3,
    "offsets": 5e-3,  # pixels
    "probe": 12.5,
    "rank": 0.01,
    "rollout": 5e-4,
    "smoothing": 1e-3,
    "spectrum": 2e-3,
    "variance": 0.01,
}
# The reasons for which values may be NaN.
WHY = r"^no (training )?image to average|^no whole mini-batch|^needs 100 eigenvalues"
WHY += r"|^one image has no covariance"
LABELS = {"label", "index"}
every_metric = pytest.mark.parametrize("name", METRICS)


@functools.cache
def load(name: str) -> Metric:
    """Any metric of the tiny encoder below."""
    metric = plugin.load_with("metrics", name, FACTS)
    if name != "grams":
        return metric
    # Alone it says nothing; here the model is compared with itself.
    compare = metrics.between_models
    return dataclasses.replace(metric, compute=lambda state: [compare(state, state)])


def features(images: int, dtype=jnp.float32, depth: int = DEPTH) -> metrics.Features:
    """Seeded features of a tiny encoder; images differ from each other."""
    tokens = 1 + GRID[0] * GRID[1]
    rng = np.random.default_rng(0)

    def draw(n: int, *shape: int) -> np.ndarray:
        return rng.standard_normal((n, images, *shape)).astype("f4")

    def cast(blocks: np.ndarray) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(x, dtype) for x in blocks)

    stream = draw(2 * depth + 1, tokens, WIDTH)
    stream[0] += 1
    stream = stream.cumsum(axis=0)
    width = WIDTH // HEADS
    heads = draw(1, 1, tokens, width) + draw(depth, HEADS, tokens, width)
    logits = 3 * draw(depth, HEADS, tokens, tokens)
    return {
        "residual": cast(stream),
        "attention": cast(jax.nn.softmax(logits)),
        "head_outputs": cast(heads),
        "output": jnp.asarray(stream[-1], dtype),
        "label": jnp.arange(images, dtype=jnp.int32) % FACTS["classes"],
        "index": jnp.arange(images, dtype=jnp.int32),
    }


def in_units(metric: Metric, units) -> np.ndarray:
    """The images of some units."""
    first = metric.group * np.asarray(units)
    return (first[:, None] + np.arange(metric.group)).reshape(-1)


def take(given: metrics.Features, images) -> metrics.Features:
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(images)], given)


def put(given: metrics.Features, at, value: float, number: int | None = None):
    """`value` in all floats at some place, and `number` in all integers of an image."""

    def leaf(x: jax.Array) -> np.ndarray:
        x = np.array(x)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x[at] = value
        elif number is not None:
            x[at] = number
        return x

    return jax.tree.map(leaf, given)


def spoil(given: metrics.Features, images) -> metrics.Features:
    """NaN in some real images: in the last channel of tokens, at the last key."""
    return put(given, (np.asarray(images), ..., -1), np.nan)


def blank(given: metrics.Features, images) -> metrics.Features:
    """Padding that holds nothing of use, not even numbers."""
    return put(given, np.asarray(images), np.nan, number=99)


@functools.cache
def step(metric: Metric):
    return jax.jit(metric.update)


def rows_of(
    metric: Metric, given: metrics.Features, weights=None, part: str = "test"
) -> metrics.State:
    """Of a batch filled up with padding, so that it compiles once.

    The metric gets what it needs only. It learns from the same images in the negative.
    """
    given = {k: given[k] for k in metric.needs}
    if part == "train":
        flipped = {k: jax.tree.map(jnp.negative, given[k]) for k in {*given} - LABELS}
        given = {**given, **flipped}
    images = len(jax.tree.leaves(given)[0])
    weights = np.ones(images) if weights is None else np.asarray(weights)
    more = np.arange(max(BATCH - images, 0))
    full = blank(take(given, [*range(images), *(0 * more)]), images + more)
    weights = np.pad(weights, (0, len(more))).astype("f4")
    return jax.device_get(step(metric)(full, weights))


def state_of(
    metric: Metric, given: metrics.Features, weights=None, part: str = "test"
) -> metrics.State:
    return metric.summing(part)(rows_of(metric, given, weights, part))


def sound(found: list[Series]) -> list[Series]:
    """The same, in which no NaN is silent."""
    for s in found:
        said = any(re.search(WHY, note) for note in s.notes)
        assert np.isfinite(s.values).all() or (np.isnan(s.values).all() and said)
        assert s.stderr is None or np.isfinite(s.stderr).all()
    return found


def measure(metric: Metric, given: metrics.Features, weights=None) -> list[Series]:
    states = (state_of(metric, given, weights, part) for part in metric.parts)
    return sound(metric.compute(*states))


def assert_same(
    got: list[Series], want: list[Series], rtol: float = 1e-12, notes: bool = True
) -> None:
    assert [s.name for s in got] == [s.name for s in want]
    for a, b in zip(got, want, strict=True):
        assert a.count == b.count and (a.notes == b.notes or not notes)
        np.testing.assert_allclose(a.values, b.values, rtol=rtol, atol=rtol)
        assert (a.stderr is None) == (b.stderr is None)
        if b.stderr is not None:
            np.testing.assert_allclose(a.stderr, b.stderr, rtol=1e-4, atol=1e-6)


def assert_same_states(got: metrics.State, want: metrics.State, rtol: float) -> None:
    def leaf(a: np.ndarray, b: np.ndarray) -> None:
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)

    jax.tree.map(leaf, got, want)


# The package


def test_metrics_import_with_jax_and_numpy_alone():
    """Not even with more of scipy than jax loads; the files come when asked for."""
    code = (
        "import sys, jax, jax.scipy.linalg, jax.scipy.special; before = {*sys.modules};"
        "import clvsmim.metrics; files = {m for m in sys.modules if 'metrics.' in m};"
        "dir(clvsmim.metrics); from clvsmim.metrics import attention_distance;"
        "new = {m.split('.')[0] for m in {*sys.modules} - before};"
        "print(new - {*sys.stdlib_module_names, 'jax', 'jaxlib', 'numpy'});"
        "print(all(m.split('.')[2][0] == '_' for m in files if 'clvsmim' in m))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["{'clvsmim'}", "True"]


def test_every_kernel_is_public_under_a_name_of_its_own():
    files = plugin.names("metrics")
    kernels = [k for f in files for k in getattr(metrics, f).__all__]
    assert len(kernels) == len(set(kernels))
    assert not set(kernels) & {*files, *vars(metrics)}
    assert metrics.kernels() == sorted(kernels) == metrics.__all__
    for file in files:
        for kernel in getattr(metrics, file).__all__:
            found = getattr(metrics, kernel)
            assert found is getattr(getattr(metrics, file), kernel)
            assert callable(found) and found.__doc__ and kernel in dir(metrics)
    with pytest.raises(ImportError, match="atention_distance"):
        from clvsmim.metrics import atention_distance  # noqa: F401


def test_every_file_with_make_is_a_metric_and_private_ones_are_none():
    files = plugin.names("metrics")
    assert set(METRICS) == set(BFLOAT16) and set(METRICS) < set(files)
    assert not any(file.startswith("_") for file in files)
    for private in ("_contract", "_each", "_states"):
        with pytest.raises(ValueError, match=f"unknown metrics name '{private}'"):
            plugin.load("metrics", private)
    for name in METRICS:
        metric = load(name)
        assert isinstance(metric, Metric) and metric.parts
        assert metric.limit is None or metric.limit % metric.group == 0


# Every metric


@every_metric
def test_a_metric_reads_what_it_needs_and_nothing_else(name):
    """`measure` hands over nothing else, so here is what is left to see."""
    metric = load(name)
    given = {k: v for k, v in features(BATCH).items() if k in metric.needs}
    for key in metric.needs:
        less = {k: v for k, v in given.items() if k != key}
        with pytest.raises(KeyError, match=key):
            jax.eval_shape(metric.update, less, jnp.ones(BATCH))


@every_metric
def test_states_merge_to_the_whole_in_any_order(name):
    metric = load(name)
    given = features(UNITS * metric.group)
    whole = measure(metric, given)
    images = UNITS * (metric.group if name in ("cka", "grams") else 1)
    assert all(s.count == images for s in whole)
    chunks = np.split(np.random.default_rng(1).permutation(UNITS), [1, 4])
    totals = []
    for part in metric.parts:
        merge, sums = metric.merging(part), metric.summing(part)
        rows = rows_of(metric, given, part=part)
        a, b, c = (sums(jax.tree.map(lambda x, at=at: x[at], rows)) for at in chunks)
        none = state_of(metric, given, np.zeros(len(given["index"])), part)
        kept = jax.tree.map(np.copy, (a, b, c, none))
        totals.append(
            (
                merge(merge(a, b), merge(c, none)),
                merge(none, merge(c, merge(b, a))),
                merge(merge(merge(b, none), a), c),
            )
        )
        jax.tree.map(np.testing.assert_array_equal, (a, b, c, none), kept)
        want = sums(rows)
        for total in totals[-1]:
            assert_same_states(total, want, rtol=1e-9)
        halves = [in_units(metric, at) for at in ([5, 0, 3, 6], [4, 1, 7, 2])]
        batches = (state_of(metric, take(given, at), part=part) for at in halves)
        assert_same_states(merge(*batches), want, rtol=1e-6)
        for x in jax.tree.leaves(want):
            assert isinstance(x, np.ndarray | np.generic)
            assert x.dtype == np.float64 or merge is metrics.join
    for states in zip(*totals, strict=True):
        assert_same(sound(metric.compute(*states)), whole, rtol=1e-9)


@every_metric
def test_states_of_other_models_do_not_merge(name):
    metric = load(name)
    other = plugin.load_with("metrics", name, {**FACTS, "grid": (3, 5)})
    narrow = jax.tree.map(
        lambda x: x[:, :, :-1, :-1] if x.ndim == 4 else x[:, :-1, :-1],
        {k: features(BATCH, depth=2)[k] for k in metric.needs if k not in LABELS},
    )
    labels = {k: features(BATCH)[k] for k in metric.needs if k in LABELS}
    shapes = jax.eval_shape(other.update, {**narrow, **labels}, jnp.ones(BATCH))
    rows = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    for part in metric.parts:
        mine = state_of(metric, features(BATCH), part=part)
        with pytest.raises(ValueError, match="cannot merge states"):
            metric.merging(part)(mine, other.summing(part)(rows))


@every_metric
def test_padding_never_counts_even_if_it_holds_nan(name):
    """Nor does an incomplete mini-batch, whatever it holds."""
    metric = load(name)
    given = features(UNITS * metric.group)
    rest = take(given, in_units(metric, [0, 2, 3, 5, 6, 7]))
    want = measure(metric, rest)
    lost = in_units(metric, [1, 4])
    weights = np.ones(UNITS * metric.group)
    weights[lost] = 0
    padded = blank(given, lost)
    assert_same(measure(metric, padded, weights), want, rtol=1e-6)
    for part in metric.parts:
        got = state_of(metric, padded, weights, part)
        assert_same_states(got, state_of(metric, rest, part=part), rtol=1e-6)
    weights[lost[lost % metric.group > 0]] = 1
    for holds in (given, spoil(given, lost)):
        partly = measure(metric, holds, weights)
        assert_same(partly, want, rtol=1e-6, notes=metric.group == 1)
        assert not any("not finite" in note for s in partly for note in s.notes)


@every_metric
def test_a_real_image_that_is_not_finite_is_left_out_and_reported(name):
    """Wholly, also if only one block of one feature is not finite."""
    metric = load(name)
    given = features(UNITS * metric.group)
    want = measure(metric, take(given, in_units(metric, [0, 2, 3, 5, 6, 7])))
    one, other = in_units(metric, [1, 4])[metric.group - 1 :: metric.group]
    said = r"2 of 8 (training )?(images|mini-batches) left out: not finite"
    for key in sorted({*metric.needs} - LABELS):
        blocks = given[key] if isinstance(given[key], tuple) else (given[key],)
        last = spoil(put(blocks[-1], (one, ..., 3), np.inf), [other])
        bad = (*blocks[:-1], last) if blocks is given[key] else last
        got = measure(metric, {**given, key: bad})
        assert_same(got, want, rtol=1e-6, notes=False)
        for s in got:
            assert any(re.fullmatch(said, note) for note in s.notes)
        said_of_parts = [note for note in got[0].notes if re.fullmatch(said, note)]
        assert len(said_of_parts) == len(metric.parts)


@every_metric
def test_with_no_image_left_the_values_are_nan_and_say_why(name):
    metric = load(name)
    given = features(2 * metric.group)
    everywhere = np.arange(2 * metric.group)
    nothing = 0 * everywhere
    for found in (
        measure(metric, spoil(given, everywhere)),
        measure(metric, blank(given, everywhere), nothing),
        measure(metric, given, nothing),
    ):
        for series in found:
            assert np.isnan(series.values).all() and series.stderr is None
            assert series.count == 0
        said_of_parts = [note for note in found[0].notes if re.search(WHY, note)]
        assert len(said_of_parts) == len(metric.parts)


@every_metric
def test_the_order_of_images_does_not_matter_and_heads_follow_theirs(name):
    """Images in any order within a mini-batch, and mini-batches in any order."""
    metric, rng = load(name), np.random.default_rng(2)
    given = features(UNITS * metric.group)
    want = measure(metric, given)
    mixed = rng.permuted(in_units(metric, range(UNITS)).reshape(UNITS, -1), axis=1)
    order = rng.permutation(mixed).reshape(-1)
    assert_same(measure(metric, take(given, order)), want, rtol=1e-5)
    per_head = {
        k: tuple(x[:, ::-1] for x in given[k]) for k in ("attention", "head_outputs")
    }
    for a, b in zip(measure(metric, {**given, **per_head}), want, strict=True):
        heads = [i for i, axis in enumerate(b.axes) if axis.name == "head"]
        moved = np.flip(b.values, heads)
        np.testing.assert_allclose(a.values, moved, rtol=1e-5, atol=1e-6)


@every_metric
def test_one_and_eight_devices_agree(name):
    """Four images a device; none needs anything of another's, if the mesh is known."""
    metric = load(name)
    weights = jnp.ones(BATCH).at[-3:].set(0)
    given = {k: v for k, v in features(BATCH).items() if k in metric.needs}
    devices = jax.devices()
    assert len(devices) == 8
    mesh = Mesh(np.array(devices), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.device_put((given, weights), split)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(metric.update, out_shardings=split).lower(*spread).compile()
    assert not re.search(r"all-|collective-|reduce-scatter", compiled.as_text())
    rows = compiled(*spread)
    for x in jax.tree.leaves(rows):
        assert [len(s.data) for s in x.addressable_shards] == 8 * [len(x) // 8]
    one = rows_of(metric, given, weights)
    for part in metric.parts:
        many = jax.device_get(rows)
        got, want = (metric.summing(part)(x) for x in (many, one))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            got,
            want,
        )


@every_metric
def test_images_are_measured_apart(name):
    """Rows are per image: spoiling one image changes no other one's row."""
    metric = load(name)
    given = features(BATCH)
    clean, spoilt = rows_of(metric, given), rows_of(metric, blank(given, [9]))
    mine = 9 // metric.group
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(spoilt), strict=True):
        assert a.dtype in (np.float32, np.int32) and len(a) == BATCH // metric.group
        np.testing.assert_array_equal(np.delete(a, mine, 0), np.delete(b, mine, 0))


@pytest.mark.parametrize(
    "feature, some",
    {"attention": {"distance", "nmi"}, "residual": {"fourier", "rank"}}.items(),
)
def test_metrics_of_each_place_may_share_one_reading(feature, some):
    joint = {n: load(n) for n in METRICS if load(n).each and feature in load(n).needs}
    assert some <= set(joint)
    kernels, given = {k: m.each for k, m in joint.items()}, features(BATCH)
    read = {feature: given[feature]}
    found = jax.jit(functools.partial(metrics.over_each, feature, kernels))(read)
    for name, metric in joint.items():
        alone = rows_of(metric, given)["values"]
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            jax.device_get(found[name]),
            alone,
        )


def test_what_is_stored_survives_the_compiler_of_a_cpu():
    a = jax.ShapeDtypeStruct((17, 17), np.float32)
    kernel = functools.partial(metrics.attention_nmi, prefix=1)
    text = jax.jit(kernel).lower(a).compile().as_text()
    assert len(re.findall(r" conditional\(", text)) == 1


def test_a_kernel_outside_of_jit_is_compiled_once():
    one = lambda a: metrics.patch_attention(a, prefix=1)  # noqa: E731
    a = jax.random.uniform(jax.random.key(0), (3, 23, 23))  # a size of no other test
    lowered = []

    def listen(event: str, *_, **__) -> None:
        if "jaxpr_to_mlir_module" in event:
            lowered.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for call in (lambda: [one(x) for x in a], lambda: jax.vmap(one)(a)):
            call()
            assert lowered
            lowered.clear()
            call()
            assert not lowered
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_kernel_works_in_shard_map():
    kernel = jax.vmap(functools.partial(metrics.attention_nmi, prefix=1))
    a = jax.random.uniform(jax.random.key(0), (8, 17, 17))
    mesh = Mesh(np.asarray(jax.devices()[:2]), "data")
    split = PartitionSpec("data")
    got = jax.shard_map(kernel, mesh=mesh, in_specs=split, out_specs=split)(a)
    np.testing.assert_allclose(got, kernel(a), rtol=1e-6)


def imprecise(text: str) -> list[str]:
    """The products of a lowered program that may be computed in less than float32."""
    products = re.findall(r".*(?:dot_general|convolution).*", text)
    return [line for line in products if "[HIGHEST, HIGHEST]" not in line]


def test_imprecise_products_are_seen():
    x = jnp.ones((2, 2))
    for precision in ("bfloat16", "high"):
        with jax.default_matmul_precision(precision):
            assert imprecise(jax.jit(jnp.matmul).lower(x, x).as_text())


@every_metric
def test_bfloat16_features_give_float32_statistics(name):
    metric = load(name)
    rounded = features(UNITS * metric.group, jnp.bfloat16)
    got = measure(metric, rounded)
    exact = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, rounded
    )
    assert_same(got, measure(metric, exact), rtol=1e-6)
    for part in metric.parts:
        states = (state_of(metric, x, part=part) for x in (rounded, exact))
        assert_same_states(*states, rtol=1e-5)
    want = measure(metric, features(UNITS * metric.group))
    np.testing.assert_allclose(got[0].values, want[0].values, atol=BFLOAT16[name])
    given = {k: v for k, v in features(BATCH).items() if k in metric.needs}
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(metric.update).lower(given, jnp.ones(BATCH)).as_text()
    assert not imprecise(text) and "bf16" not in text and "f64" not in text


def on_cls(given: metrics.Features) -> metrics.Features:
    """All attention on the CLS token, all features zero."""
    nothing = put(given, ..., 0)
    return {**nothing, "attention": put(nothing["attention"], (..., 0), 1)}


def constant(given: metrics.Features) -> metrics.Features:
    """Uniform attention, features that are the same everywhere."""
    return {**put(given, ..., 3.7), "attention": put(given["attention"], ..., 1 / 17)}


def alike(given: metrics.Features) -> metrics.Features:
    """One image many times."""
    same = take(given, np.zeros_like(given["index"]))
    return {**same, **{k: given[k] for k in LABELS}}


def idle(given: metrics.Features) -> metrics.Features:
    """A first block that adds nothing to the stream."""
    stream = given["residual"]
    return {**given, "residual": (stream[0],) * 3 + stream[3:]}


@every_metric
@pytest.mark.parametrize("case", [on_cls, constant, alike, idle])
def test_degenerate_features_give_values_or_say_why_not(name, case):
    metric = load(name)
    given = features(UNITS * metric.group)
    found = measure(metric, case(given))
    want = measure(metric, given)
    for s, usual in zip(found, want, strict=True):
        assert s.count == usual.count
        np.testing.assert_array_equal(np.isnan(s.values), np.isnan(usual.values))
    if case is on_cls:
        values = {s.name: s.values for s in found}
        assert np.all(values.get("attention mass on CLS", 1) == 1)
        assert np.all(values.get("null attention rows", 16) == 16)


@every_metric
def test_one_image_has_no_standard_error(name):
    metric = load(name)
    for series in measure(metric, features(metric.group)):
        assert series.stderr is None and series.count >= 1
    several = measure(metric, features(UNITS * metric.group))
    unknown = {s.name for s in several if s.stderr is None}
    assert (unknown == {s.name for s in several}) == (name in ("rank", "lidar"))
    assert unknown <= {"ridge probe alpha"} or name in ("rank", "lidar")
    if name in ("rank", "lidar"):
        assert all("8 images together" in s.notes[-1] for s in several)


@every_metric
def test_series_can_be_saved_exactly(name):
    metric = load(name)
    for images in (UNITS * metric.group, metric.group):
        for series in measure(metric, features(images)):
            text = json.dumps(series.to_json(), allow_nan=False)
            again = Series.from_json(json.loads(text))
            np.testing.assert_array_equal(again.values, series.values)
            np.testing.assert_array_equal(again.stderr, series.stderr)
            for field in ("name", "axes", "kind", "unit", "source", "count", "notes"):
                assert getattr(again, field) == getattr(series, field)


def analyse(metric: Metric, x: jax.Array, depth: int) -> metrics.State:
    """A forward of `depth` blocks, x (B, T, D), and the metric in one function."""
    images, tokens, _ = x.shape
    residual, attention, outputs = [x], [], []
    for _ in range(depth):
        heads = x.reshape(images, tokens, HEADS, -1).swapaxes(1, 2)
        maps = jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", heads, heads))
        attention.append(maps)
        outputs.append(jnp.einsum("bhqk,bhkd->bhqd", maps, heads))
        x = x + outputs[-1].swapaxes(1, 2).reshape(x.shape)
        residual += [x, x := x + jnp.tanh(x)]
    given = {
        "residual": tuple(residual),
        "attention": tuple(attention),
        "head_outputs": tuple(outputs),
        "output": x,
        "label": jnp.zeros(images, jnp.int32),
        "index": jnp.arange(images),
    }
    return metric.update({k: given[k] for k in metric.needs}, jnp.ones(images))


def temporary(metric: Metric, depth: int) -> int:
    """Bytes of a compiled forward beside its results."""
    images = jnp.ones((BATCH, 17, WIDTH))
    lowered = jax.jit(lambda x: analyse(metric, x, depth)).lower(images)
    # Memory is planned before machine code is made, which may be slow code.
    compiled = lowered.compile({"xla_backend_optimization_level": 0})
    return compiled.memory_analysis().temp_size_in_bytes


@every_metric
def test_temporary_memory_does_not_grow_with_depth(name):
    """From depth 4: below, XLA shares less between blocks."""
    metric = load(name)
    # XLA keeps a rollout's product of every block, (B, T, T): as much as the attention
    # of one head. Written otherwise, it keeps that of all heads in a forward.
    products = 12 * 32 * 17 * 17 * 4 if name == "rollout" else 0
    assert temporary(metric, 16) < 1.5 * temporary(metric, 4) + products


@pytest.mark.parametrize("key", ["residual", "attention", "head_outputs"])
def test_a_metric_that_stacks_features_is_seen_to_grow(key):
    def update(given: metrics.Features, weights: jax.Array) -> dict:
        stacked = jnp.stack(given[key])
        order = jnp.flip(stacked.reshape(-1)).reshape(stacked.shape)
        return {"x": jnp.sort(order, axis=-1).sum(axis=(0, 2, 3))}

    metric = Metric(needs=(key,), update=update, compute=lambda state: [])
    assert temporary(metric, 16) > 2 * temporary(metric, 4)


# The contract itself


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


def test_a_metric_checks_what_it_needs_and_which_parts_it_reads():
    nothing = {"update": lambda f, w: {}, "compute": lambda *s: []}
    with pytest.raises(ValueError, match="feature 'atention': did you mean 'attention"):
        Metric(needs=("atention",), **nothing)
    with pytest.raises(ValueError, match="part 'tain': did you mean 'train'"):
        Metric(needs=(), parts=("tain", "test"), **nothing)


def test_a_metric_may_learn_from_other_sums_than_it_measures():
    same = Metric(needs=(), update=lambda f, w: {}, compute=lambda *s: [])
    for part in metrics.PARTS:
        assert same.summing(part) is moments and same.merging(part) is metrics.add
    other = dataclasses.replace(same, fit_state=metrics.keep, fit_merge=metrics.join)
    assert other.summing("train") is metrics.keep
    assert other.merging("train") is metrics.join
    for part in ("test", "views"):
        assert other.summing(part) is moments and other.merging(part) is metrics.add


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
    outputs = metrics.block_axis(3)
    assert (outputs.name, outputs.labels) == ("depth", ("embed", "1 mlp", "2 mlp"))


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


def test_kept_rows_are_those_of_real_images_sorted_by_index():
    x = np.arange(10, dtype="f4").reshape(5, 2)
    x[2], x[3, 1] = np.nan, np.inf  # padding and an image
    rows = {
        "weight": np.array([1, 1, 0, 1, 1], "f4"),
        "index": np.array([7, 2, 4, 9, 3], "i4"),
        "x": x,
    }
    state = metrics.keep(rows)
    assert sorted(state) == ["index", "nonfinite", "x"] and state["nonfinite"] == 1
    np.testing.assert_array_equal(state["index"], [2, 3, 7])
    np.testing.assert_array_equal(state["x"], x[[1, 4, 0]])
    assert (state["index"].dtype, state["x"].dtype) == (np.int32, np.float32)
    more = {"index": np.array([5, 1], "i4"), "x": -x[:2], "weight": np.ones(2)}
    other = metrics.keep(more)
    for joined in (metrics.join(state, other), metrics.join(other, state)):
        np.testing.assert_array_equal(joined["index"], [1, 2, 3, 5, 7])
        np.testing.assert_array_equal(joined["x"][[0, 3]], -x[[1, 0]])
        np.testing.assert_array_equal(joined["x"][[1, 2, 4]], state["x"])
        assert joined["nonfinite"] == 1 and joined["x"].dtype == np.float32
    assert metrics.join(state, state)["nonfinite"] == 2
    wide = {**state, "x": np.ones((3, 4))}
    with pytest.raises(ValueError, match=r"x of shape \(2,\) meets \(4,\)"):
        metrics.join(state, wide)


def test_a_group_with_padding_in_it_does_not_count():
    weights = jnp.array([1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0], jnp.float32)
    got = metrics.group_weights(weights, 4)
    np.testing.assert_array_equal(got, [1, 0, 0])
    np.testing.assert_array_equal(metrics.group_weights(weights, 1), weights)


def test_image_features_are_of_the_embedding_and_the_block_outputs():
    taken = features(3, jnp.bfloat16, depth=2)["residual"]
    exact = [np.asarray(x, float) for x in taken[::2]]
    for pool, want in (
        ("patches", [x[:, 1:].mean(axis=1) for x in exact]),
        ("cls", [x[:, 0] for x in exact]),
    ):
        got = metrics.image_features(taken, prefix=1, pool=pool)
        assert got.shape == (3, 3, WIDTH) and got.dtype == jnp.float32
        np.testing.assert_allclose(got, np.stack(want, axis=1), rtol=1e-5, atol=1e-6)
