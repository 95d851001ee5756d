"""One pass, many passes, stopped passes: the same numbers."""

import dataclasses

import jax
import numpy as np
import pytest
import runs

from clvsmim import analysis, analyze, build, measure, mesh, tree
from clvsmim.measure import Part, Settings, Subject, make_parts
from clvsmim.metrics import Metric, moments

EVERYTHING = (*analysis.METRICS, "lidar")
SETTINGS = Settings(
    images=22, train_images=12, batch=8, group=4, every=2, metrics=EVERYTHING
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure") / "run"
    runs.run(folder)
    return folder


@pytest.fixture(scope="module")
def trained(workdir):
    return analyze.load(str(workdir))


@pytest.fixture(scope="module")
def subject(trained):
    """Attention that depends on the query; after twelve steps it is uniform."""

    def leaf(name, x):
        return x * 30 if name.endswith(("attn/q/kernel", "attn/k/kernel")) else x

    variables = tree.map_named(leaf, trained.variables)
    colour = trained.config["input"]
    return Subject("simmim", trained.objective.encoder, variables, **colour)


@pytest.fixture(scope="module")
def metrics(subject):
    facts = analysis.facts_of(subject.encoder, group=4, classes=16)
    return analysis.make_metrics(EVERYTHING, facts)


@pytest.fixture(scope="module")
def take(trained, subject, metrics, tmp_path_factory):
    """`take(folder=None, devices=1, **settings)` -> the Analysis."""

    def make_source(split):
        return build.make_source(trained.config["data"], split)

    def call(folder=None, devices=1, chosen=metrics, **changed):
        settings = SETTINGS._replace(**changed)
        folder = folder or tmp_path_factory.mktemp("taken")
        with pytest.MonkeyPatch.context() as patch:
            grid = mesh.make(jax.devices()[:devices])
            patch.setattr(measure.meshes, "make", lambda: grid)
            parts = make_parts(make_source, (16, 16), settings, chosen)
            found = measure.measure(
                subject,
                parts,
                chosen,
                stamp={"encoder": "x"},
                out=str(folder),
                settings=settings,
            )
            measure.forget(str(folder))
            return found

    return call


@pytest.fixture(scope="module")
def whole(take):
    return take()


def assert_identical(got, want):
    runs.assert_identical(tree.named(got.states), tree.named(want.states))
    runs.assert_identical(got.ids, want.ids)


def assert_agree(metrics, got, want, tolerance):
    """Every number of every Series, relative to the largest of its Series."""
    got, want = (analysis.series(metrics, x.states) for x in (got, want))
    assert [s.name for s in got] == [s.name for s in want]
    for a, b in zip(got, want, strict=True):
        assert (a.count, a.notes, a.axes) == (b.count, b.notes, b.axes), a.name
        if a.name.startswith("CLS-level"):
            # The tiny encoder's CLS tokens are all alike: most of their singular values
            # are what rounding leaves.
            a, b = (np.exp(x.values - x.values.max()) for x in (a, b))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
            continue
        scale = np.nanmax(np.abs(b.values), initial=1.0)
        np.testing.assert_allclose(
            a.values, b.values, rtol=0, atol=tolerance * scale, err_msg=a.name
        )


def test_every_metric_says_something(metrics, whole):
    found = {s.name: s for s in analysis.series(metrics, whole.states)}
    assert len(found) > 40
    for series in found.values():
        undefined = np.isnan(series.values).any()
        assert not undefined or series.notes, f"silent NaN in {series.name}"
    assert found["CKA between heads"].count == 20  # 5 mini-batches of 22 images
    assert found["attention distance"].count == 22
    assert np.array_equal(whole.ids["test"], np.arange(22))
    assert np.array_equal(whole.ids["train"], np.arange(12))


def test_nothing_is_left_behind(take, tmp_path):
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch", [1, 12, 40])
def test_any_batch_gives_the_same(take, metrics, whole, batch):
    """1 is made 4, a mini-batch of CKA; 22 images end within a batch of 12."""
    assert_agree(metrics, take(batch=batch), whole, 1e-6)


def test_eight_devices_give_the_same(take, metrics, whole):
    assert_agree(metrics, take(devices=8), whole, 1e-6)


class Stop(Exception):
    pass


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_stopped_after_a_save_it_goes_on_to_the_same_bits(
    take, whole, saves, tmp_path, monkeypatch
):
    """22 images in 3 batches, 12 in 2, 22 x 10 views in 28: a save every two."""
    real, count = measure.Progress.save, []

    def save(self, *args):
        real(self, *args)
        count.append(args)
        if len(count) == saves:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.Progress, "save", save)
        with pytest.raises(Stop):
            take(tmp_path)
    read = []
    real_batches = measure.eval_batches

    def batches(*args, start, **kw):
        read.append(start)
        return real_batches(*args, start=start, **kw)

    monkeypatch.setattr(measure, "eval_batches", batches)
    assert_identical(take(tmp_path), whole)
    part, at = count[-1][1:]
    assert read[0] == at and len(read) == 3 - ["test", "train", "views"].index(part)
    assert list(tmp_path.iterdir()) == []


def test_stopped_between_saves_it_goes_on_from_the_last(take, whole, tmp_path):
    real, count = measure.eval_batches, []

    def batches(*args, **kw):
        for batch in real(*args, **kw):
            count.append(batch)
            if len(count) == 8:
                raise Stop
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "eval_batches", batches)
        with pytest.raises(Stop):
            take(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_identical(take(tmp_path), whole)


@pytest.fixture
def stopped(take, tmp_path):
    """A folder with one save of a pass."""
    real = measure.Progress.save

    def save(self, *args):
        real(self, *args)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.Progress, "save", save)
        with pytest.raises(Stop):
            take(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    return tmp_path


def test_other_settings_start_anew(take, stopped):
    assert_identical(take(stopped, images=21), take(images=21))


def test_other_devices_start_anew(take, metrics, whole, stopped):
    """A batch is another one there: what was saved would leave images out."""
    assert_agree(metrics, take(stopped, devices=8), whole, 1e-6)


def test_a_damaged_save_is_not_used(take, whole, stopped, capsys):
    (path,) = stopped.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert_identical(take(stopped), whole)
    assert f"not used: {path} holds no readable states" in capsys.readouterr().err


def test_saves_may_come_more_often(take, metrics, whole, stopped):
    assert_agree(metrics, take(stopped, every=1), whole, 1e-9)


def test_a_merge_of_two_halves_is_the_whole(take, metrics, whole):
    """Training images are those of both; mini-batches of CKA are the same."""
    no_limit = {n: m for n, m in metrics.items() if n not in ("lidar",)}
    a = take(chosen=no_limit, images=12)
    b = take(chosen=no_limit, images=10, skip=12)
    assert_agree(no_limit, analysis.merge(no_limit, a, b), whole, 1e-9)
    assert_agree(no_limit, analysis.merge(no_limit, b, a), whole, 1e-9)
    overlap = take(chosen=no_limit, images=10, skip=11)
    with pytest.raises(ValueError, match="1 test images are in both .*number 11"):
        analysis.merge(no_limit, a, overlap)
    less = take(chosen=no_limit, images=10, skip=12, train_images=11)
    with pytest.raises(ValueError, match="11 train images are in both"):
        analysis.merge(no_limit, a, less)


def counting(**fields):
    """A metric that keeps which images it saw."""

    def update(features, weights):
        index = features["index"].astype(np.float32)
        return {"weight": weights, "values": {"index": index[:, None]}}

    return Metric(needs=("index",), update=update, compute=lambda s: [], **fields)


def test_a_limit_is_of_images_not_of_batches(take):
    metrics = {"few": counting(limit=11), "all": counting()}
    for batch, devices in ((4, 1), (8, 1), (16, 1), (16, 8)):
        found = take(chosen=metrics, batch=batch, devices=devices).states
        assert found["few"]["test"]["count"] == 11
        assert found["few"]["test"]["sum"]["index"] == sum(range(11))
        assert found["all"]["test"]["sum"]["index"] == sum(range(22))


def test_views_of_an_image_follow_each_other(take):
    for limit, images in ((15, 3), (None, 22)):
        metrics = {"views": counting(parts=("views",), group=5, limit=limit)}
        state = take(chosen=metrics).states["views"]["views"]
        assert state["count"] == 5 * images
        assert state["sum"]["index"] == 5 * sum(range(images))


def test_what_a_metric_learns_from_has_a_state_of_its_own(take):
    metric = counting(parts=("train", "test"), fit_state=lambda rows: moments(rows))
    metric = dataclasses.replace(metric, fit_merge=lambda a, b: a)
    found = take(chosen={"x": metric}).states["x"]
    assert found["test"]["count"] == 22 and found["train"]["count"] == 8


REFUSED = {
    "one image": ({"images": 3}, "3 images .* less than one mini-batch of CKA, 4"),
    "all left out": ({"skip": 64}, "0 images .* 64 left out"),
    "no CKA": ({"skip": 64, "chosen": {"few": counting()}}, "less than one; give"),
    "learning": ({"split": "train"}, "--split=train is what probe, knn would learn"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_measured(take, tmp_path, what):
    changed, reason = REFUSED[what]
    with pytest.raises(ValueError, match=reason):
        take(tmp_path, **changed)
    assert list(tmp_path.iterdir()) == []


def test_a_part_counts_its_images(trained):
    source = build.make_source(trained.config["data"], "test")
    view = measure.random_view((16, 16))
    assert Part(source, view, 10, skip=60, copies=3).count == 3 * min(
        10, len(source) - 60
    )
