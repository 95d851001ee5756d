"""Numbers do not depend on batches, devices, processes or on being interrupted."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import runs

from clvsmim import analysis, analyze, build, files, mesh, present, tree
from clvsmim.data.pipeline import eval_batches
from clvsmim.measure import Settings, eval_view
from clvsmim.metrics import Axis, Metric, Series

IMAGES = 21
# One of each kind: sums, sums of mini-batches, a covariance. test_measure.py has all.
SOME = ("distance", "nmi", "cka", "rank", "fourier")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished SimMIM run."""
    folder = tmp_path_factory.mktemp("analysis") / "run"
    runs.run(folder)
    return folder


@pytest.fixture(scope="module")
def trained(workdir):
    return analyze.load(str(workdir))


@pytest.fixture(scope="module")
def sharp(trained):
    """The variables of an encoder whose attention depends on the query.

    After twelve steps attention is uniform but for 1e-5, and its information is what
    rounding leaves of a difference of nearly equal numbers.
    """

    def leaf(name, x):
        return x * 30 if name.endswith(("attn/q/kernel", "attn/k/kernel")) else x

    return tree.map_named(leaf, trained.variables)


@pytest.fixture(scope="module")
def metrics(trained):
    facts = analysis.facts_of(trained.objective.encoder, group=4, classes=16)
    return analysis.make_metrics(SOME, facts)


@pytest.fixture(scope="module")
def measured(trained, sharp, metrics):
    """`measured(batch, devices)` -> (states, ids) of the first images."""
    found = {}

    def get(batch, devices=1, change=lambda batch: batch, **split):
        key = (batch, devices, change, *split.items())
        if key not in found:
            source = build.make_source(trained.config["data"], "test")
            view = eval_view(trained.objective.encoder.spec.image)
            data = eval_batches(source, view, batch=batch, limit=IMAGES, **split)
            *_, so_far = analysis.run(
                trained.objective.encoder,
                sharp,
                map(change, data),
                metrics,
                mesh=mesh.make(jax.devices()[:devices]),
                **trained.config["input"],
            )
            found[key] = so_far()
        return found[key]

    return get


def assert_close(got, want, tolerance):
    """Two sets of states, relative to the largest number of each array."""
    got, want = tree.named(got), tree.named(want)
    assert list(got) == list(want)
    for name, x in want.items():
        assert got[name].shape == x.shape and got[name].dtype == np.float64
        worst = np.abs(got[name] - x).max() / (np.abs(x).max() or 1)
        assert worst <= tolerance, f"{name}: {worst}"


def whole_of(done):
    """A pass over test images as an analysis."""
    return analysis.Analysis({"encoder": "a"}, {}, {}).with_part("test", done)


def test_two_processes_measure_what_one_does(measured, metrics):
    one = whole_of(measured(8))
    a, b = (whole_of(measured(8, process=p, processes=2)) for p in range(2))
    ids = [x.ids["test"] for x in (a, b)]
    assert all(map(len, ids)) and not set(ids[0]) & set(ids[1])
    for merged in (analysis.merge(metrics, a, b), analysis.merge(metrics, b, a)):
        assert merged.stamp == {"encoder": "a"}
        np.testing.assert_array_equal(merged.ids["test"], np.arange(IMAGES))
        assert_close(merged.states, one.states, 1e-6)


def test_padding_may_hold_anything(measured):
    def spoil(batch):
        view = batch["views"][0].copy()
        view[batch["weight"] == 0] = 255
        return {**batch, "views": (view,)}

    assert_close(measured(8, change=spoil).states, measured(8).states, 0)


def test_rows_of_eight_devices_come_in_image_order():
    rows = np.arange(48.0).reshape(16, 3)
    split = mesh.put(rows, mesh.make(jax.devices()))
    assert len({s.index[0].start for s in split.addressable_shards}) == 8
    np.testing.assert_array_equal(analysis.local(split), rows)


def test_rows_of_one_device_are_not_copied():
    rows = jax.device_put(np.arange(48.0).reshape(16, 3), jax.devices()[0])
    assert np.shares_memory(analysis.local(rows), np.asarray(rows))


def test_nothing_to_measure(trained, metrics):
    nothing = analysis.run(
        trained.objective.encoder,
        trained.variables,
        [],
        metrics,
        mesh=mesh.make(jax.devices()[:1]),
        **trained.config["input"],
    )
    with pytest.raises(ValueError, match="no image"):
        list(nothing)


def test_a_total_copies_each_state_a_few_times():
    sizes = []

    def merge(a, b):
        sizes.append(a + b)
        return a + b

    total = analysis.Total(merge)
    for _ in range(1000):
        total.add(1)
    assert total.fold() == 1000 and sum(sizes) < 1000 * 12


@pytest.fixture(scope="module")
def whole(measured):
    found = whole_of(measured(8))
    return found._replace(stamp={"encoder": "a", "metrics": ["nmi"]})


def test_an_analysis_comes_back_exactly(whole, tmp_path):
    analysis.save(tmp_path / "new" / "state_0.npz", whole, {"at": {"batch": 3}})
    back, more = analysis.load(tmp_path / "new" / "state_0.npz")
    assert back.stamp == whole.stamp and more == {"at": {"batch": 3}}
    np.testing.assert_array_equal(back.ids["test"], whole.ids["test"])
    some, _ = analysis.load(tmp_path / "new" / "state_0.npz", within="states/nmi/")
    assert list(some.states) == ["nmi"] and list(some.ids) == ["test"]
    assert_close(back.states, whole.states, 0)
    assert jax.tree.structure(back.states) == jax.tree.structure(whole.states)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["state_0.npz"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    files.save_arrays(path, {"x": np.arange(3)})

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(analysis.epath.Path(path)), "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        files.save_arrays(path, {"x": np.arange(4)})
    np.testing.assert_array_equal(files.load_arrays(path)["x"], np.arange(3))


def test_no_pickle_is_ever_read(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.savez(file, x=np.array([{}], object))
    with pytest.raises(ValueError, match="pickle"):
        files.load_arrays(tmp_path / "a.npz")


FOREIGN = {
    "other weights": ({"encoder": "b"}, "differ in encoder (a and b)"),
    "other settings": ({"metrics": ["distance"]}, "differ in metrics (['nmi'] and"),
    "other data": ({"data": 1}, "differ in data (None and 1)"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_analyses_refuse_to_merge(metrics, whole, kind):
    change, reason = FOREIGN[kind]
    ids = {"test": whole.ids["test"] + 100}
    other = whole._replace(stamp=whole.stamp | change, ids=ids)
    with pytest.raises(ValueError, match="do not belong together") as error:
        analysis.merge(metrics, whole, other)
    assert reason in str(error.value)


def test_an_image_counts_once(metrics, whole):
    other = whole._replace(ids={"test": whole.ids["test"] + 19})
    with pytest.raises(ValueError, match="2 test images are in both .*number 19"):
        analysis.merge(metrics, whole, other)


def test_the_digest_sees_names_shapes_types_and_bytes():
    x = {"a": np.arange(4, dtype=np.float32)}
    others = [
        {"b": x["a"]},
        {"a": x["a"].reshape(2, 2)},
        {"a": x["a"].view(np.int32)},
        {"a": x["a"] + np.float32(1e-6)},
        x | {"b": np.zeros(0)},
    ]
    assert len({analysis.digest(tree) for tree in (x, *others)}) == 6
    assert analysis.digest({"a": jax.numpy.arange(4.0)}) == analysis.digest(x)


def one_series(name, value):
    series = Series(
        name=name,
        axes=(Axis("depth", (0,)),),
        values=np.array([value]),
        stderr=None,
        kind="depth",
        unit="",
        source="",
        count=1,
    )
    return Metric(needs=(), update=lambda *_: {}, compute=lambda state: [series])


def test_a_series_of_two_metrics_is_kept_once():
    metrics = {"a": one_series("x", 1.0), "b": one_series("x", 2.0)}
    metrics["c"] = one_series("y", 3.0)
    found = analysis.series(metrics, dict.fromkeys("abc", {"test": None}))
    assert [(s.name, float(s.values[0])) for s in found] == [("x", 1.0), ("y", 3.0)]


SETTINGS = Settings(
    images=16, batch=7, group=4, train_images=16, metrics=(*SOME, "probe")
)


@pytest.fixture(scope="module")
def done(workdir, tmp_path_factory):
    """(series, folder) of an analysis by the command's function, on eight devices."""
    out = tmp_path_factory.mktemp("done") / "analysis"
    return analyze.analyze(str(workdir), str(out), SETTINGS), out


def assert_series(got, want):
    assert [s.to_json() for s in got] == [s.to_json() for s in want]


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_the_numbers_on_disk_are_those_returned(done):
    series, out = done
    assert {p.name for p in out.iterdir()} == {
        "series.json",
        "state.npz",
        "pictures.npz",
    }
    found = analysis.read_series(out)
    assert_series(found["series"], series)
    assert (found["images"], found["step"]) == (16, runs.TOTAL)
    assert {s.count for s in series} <= {3, 16}  # three images show their tokens
    assert json.loads((out / "series.json").read_text())["stamp"] == found["stamp"]
    assert analysis.read_series(out / "nowhere") is None


def test_the_paper_s_three_measures_are_there(done):
    names = {s.name for s in done[0]}
    assert {
        "attention distance",
        "normalized mutual information",
        "delta log amplitude",
    } <= names
    for series in done[0]:
        assert np.isfinite(series.values).all() or series.notes
        assert series.stderr is None or np.isfinite(series.stderr).all()


def test_the_second_time_there_is_nothing_to_do(workdir, done, monkeypatch):
    series, out = done
    before = times(out)
    monkeypatch.setattr(analyze, "measure", None)
    assert_series(analyze.analyze(str(workdir), str(out), SETTINGS), series)
    assert times(out) == before


CHANGED = {
    "fewer images": {"images": 8},
    "more images than there are": {"images": 999},
    "metrics": {"metrics": ("nmi",)},
    "split": {"split": "train", "metrics": SOME},
    "other images": {"skip": 8},
    "mini-batches": {"group": 8},
    "training images": {"train_images": 8},
}


@pytest.mark.parametrize("what", CHANGED)
def test_another_measurement_is_made_anew(workdir, done, tmp_path, monkeypatch, what):
    class Measured(Exception):
        pass

    def measure(*_, **__):
        raise Measured

    monkeypatch.setattr(analyze, "measure", measure)
    _, out = done
    with pytest.raises(Measured):
        analyze.analyze(str(workdir), str(out), SETTINGS._replace(**CHANGED[what]))


def test_other_weights_are_measured_anew(workdir, done, monkeypatch):
    real = analyze.load

    def load(workdir):
        run = real(workdir)
        params = jax.tree.map(lambda x: x + 1e-6, run.params)
        return run._replace(params=params)

    monkeypatch.setattr(analyze, "load", load)
    monkeypatch.setattr(analyze, "measure", None)
    with pytest.raises(TypeError, match="not callable"):
        analyze.analyze(str(workdir), str(done[1]), SETTINGS)


def test_an_analysis_cut_short_after_the_pass_measures_nothing_again(
    workdir, done, tmp_path
):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(analyze, "save_pictures", stop)
        analyze.analyze(str(workdir), str(tmp_path), SETTINGS)
    assert analysis.read_series(tmp_path) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "make_measure", None)
        again = analyze.analyze(str(workdir), str(tmp_path), SETTINGS)
    assert_series(again, done[0])


def test_while_it_is_written_nothing_counts_as_measured(workdir, done, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(done[1], out)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(analysis, "write_series", stop)
        analyze.analyze(str(workdir), str(out), SETTINGS._replace(images=8))
    assert analysis.read_series(out) is None


def test_a_diverged_encoder_is_measured_as_not_finite(workdir, tmp_path, monkeypatch):
    real = analyze.load

    def load(workdir):
        run = real(workdir)
        return run._replace(params=jax.tree.map(lambda x: x * np.nan, run.params))

    monkeypatch.setattr(analyze, "load", load)
    settings = SETTINGS._replace(metrics=("nmi",))
    found = analyze.analyze(str(workdir), str(tmp_path), settings)
    assert all("16 of 16 images left out: not finite" in s.notes for s in found)
    assert present.one(str(tmp_path)).exists()


def test_lidar_may_be_measured_alone(workdir, tmp_path):
    settings = SETTINGS._replace(metrics=("lidar",))
    found = analyze.analyze(str(workdir), str(tmp_path), settings)
    assert found[0].name == "LiDAR" and found[0].count == 16


def test_damaged_series_are_named(done, tmp_path):
    (tmp_path / "series.json").write_text('{"series": [{}]}')
    with pytest.raises(ValueError, match="series.json is damaged"):
        analysis.read_series(tmp_path)


@pytest.fixture(scope="module")
def pictures(done):
    return files.load_arrays(done[1] / "pictures.npz")


def test_visible_pixels_are_those_of_the_image(pictures, trained):
    source = build.make_source(trained.config["data"], "test")
    view = eval_view((16, 16))
    (images,) = next(iter(eval_batches(source, view, batch=4, limit=4)))["views"]
    original, mask, found = (
        pictures[k] for k in ("original", "mask", "reconstruction")
    )
    flipped = images[:, :, ::-1]  # SimMIM's view flips half of them
    for i, image in enumerate(original):
        want = min((images[i], flipped[i]), key=lambda x: np.abs(x / 255 - image).max())
        np.testing.assert_allclose(image, want / 255, atol=1e-6)
    np.testing.assert_array_equal(pictures["image"], images[0])
    assert set(np.unique(mask)) == {0, 1} and mask.mean() == 0.75
    seen = mask == 0
    # One rounding: XLA may fuse the way back to [0, 1] differently for the two.
    np.testing.assert_allclose(found[seen], original[seen], rtol=0, atol=1.2e-7)
    assert (np.abs(found - original)[~seen] > 0).mean() > 0.9


def test_attention_maps_are_rows_of_attention_without_the_prefix(pictures, trained):
    maps = pictures["attention"]
    assert maps.shape == (2, 2, 2, 4, 4)  # blocks, heads, queries, rows, columns
    sums = maps.sum(axis=(-2, -1))
    assert (maps >= 0).all() and (sums > 0.5).all() and (sums < 1).all()
    encoder = trained.objective.encoder
    x = (pictures["image"] / 255 - trained.config["input"]["mean"]) / np.array(
        trained.config["input"]["std"]
    )
    _, taps = encoder.apply(trained.variables, np.float32(x)[None])
    for block, attention in enumerate(taps["attention"]):
        for query, (row, column) in enumerate(pictures["places"]):
            want = attention[0, :, 1 + row * 4 + column, 1:].reshape(2, 4, 4)
            np.testing.assert_allclose(maps[block, :, query], want, atol=1e-6)


def test_queries_lie_on_every_grid():
    for rows in range(1, 8):
        for columns in range(1, 8):
            for row, column in analyze.pictures.queries((rows, columns)):
                assert 0 <= row < rows and 0 <= column < columns


ENCODERS = {
    "conv stem": {"encoder__stem": "conv"},
    "no CLS, not square": {
        "encoder__prefix": 0,
        "encoder__image": (16, 24),
        "optim__no_decay": (r".*/(bias|scale|gamma_[12])",),
    },
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_that_trains_can_be_analyzed(tmp_path, capsys, kind):
    workdir = tmp_path / "run"
    runs.run(workdir, epochs=0.25, **ENCODERS[kind])
    few = ["--images=8", "--batch=8", "--group=4", "--train_images=16"]
    analyze.main([str(workdir), *few])
    report = workdir / "analysis" / "report.html"
    assert capsys.readouterr().out.strip() == str(report)
    assert "Masked reconstructions" in report.read_text()
    found = analysis.read_series(workdir / "analysis")
    assert found["step"] == 1 and len(found["series"]) >= 3
    assert all(np.isfinite(s.values).all() or s.notes for s in found["series"])


def test_batch_statistics_are_restored_and_used(tmp_path):
    runs.run(tmp_path, epochs=0.25, encoder__stem="conv")
    run = analyze.load(str(tmp_path))
    stats = tree.named(run.variables["stats"])
    means = [x for name, x in stats.items() if name.endswith("mean")]
    assert means and all(np.any(x) for x in means)
    assert analysis.digest(run.variables) != analysis.digest(
        run.variables | {"stats": jax.tree.map(np.zeros_like, run.variables["stats"])}
    )


def test_the_words_beside_the_figures(workdir, done):
    run = present.read(str(done[1]))
    assert (run.name, run.family) == ("SimMIM (MIM)", "mim")
    assert run.facts["encoder"] == "width 16, depth 2, 2 heads; 16 x 16 px, patch 4"
    assert run.facts["trained on"] == "photos, 192 images in 12 steps"
    assert run.facts["measured on"] == "16 test images"
    assert run.facts["final loss"] == f"{run.log[-1]['loss']:.4g}"
    assert dataclasses.is_dataclass(run) and len(run.log) == runs.TOTAL
    title = present.title(
        runs.config("hybrid", objective__lam=0.25).objective.to_dict()
    )
    assert title == "hybrid, λ = 0.25"
