"""X-rays are true, free of side effects, complete after any stop, and raise alarms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from clvsmim import analysis, build, log, measure, mesh, metrics, timeline, train, tree
from clvsmim import xray as xrays
from clvsmim.data.pipeline import eval_batches
from clvsmim.report import Run, write

ON = {"xray__share": 0.01, "xray__least": 4, "xray__images": 12}
STEPS = [0, 4, 8, 12]
DEPTH = 2


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """`seen(name)` -> the folder of a whole run with X-rays."""
    folder = tmp_path_factory.mktemp("seen")

    def get(name):
        if not (folder / name).exists():
            runs.run(folder / name, name, **ON)
        return folder / name

    return get


def lines(workdir):
    return log.read(f"{workdir}/xray.jsonl")


@pytest.mark.parametrize("name", runs.OBJECTIVES)
def test_every_method_is_seen_and_a_healthy_one_raises_no_alarm(seen, name):
    found = lines(seen(name))
    assert [r["step"] for r in found] == STEPS
    for record in found:
        assert record["images"] == 12
        assert set(record) == {"step", "images", *xrays.QUANTITIES}
        values = np.array([record[key] for key in xrays.QUANTITIES])
        assert values.shape == (len(xrays.QUANTITIES), DEPTH)
        assert np.isfinite(values).all()
    assert found[0]["effective_rank"] != found[-1]["effective_rank"]


def test_the_training_is_the_same_without(seen, tmp_path):
    runs.run(tmp_path)
    assert not (tmp_path / "xray.jsonl").exists()
    assert runs.trace(tmp_path) == runs.trace(seen("simmim"))
    runs.assert_identical(runs.state(tmp_path), runs.state(seen("simmim")))


@pytest.fixture(scope="module")
def program():
    return build.build(runs.config(**ON), jax.devices()[:1])


@pytest.fixture
def make(program, tmp_path):
    """`make(start=0)` -> the X-ray of a run in a folder of its own."""
    (tmp_path / "log.jsonl").touch()
    settings = build.plain(runs.config(**ON))

    def new(start=0):
        return xrays.XRay(program, settings, str(tmp_path), start)

    return new


def test_the_numbers_are_those_of_the_analysis(make, program):
    """The metrics themselves, on the same images, in other batches."""
    x, state = make(), program.init(None)
    params = changed(state, sharper)
    x.take(0, params, state.extra)
    x.write()
    (got,) = log.read(x.log._path)
    x.close()
    encoder = program.objective.encoder
    few = xrays.Spread(program.source, 12)
    names = ("distance", "nmi", "fourier", "displacement", "rank")
    chosen = analysis.make_metrics(
        names, analysis.facts_of(encoder, group=4, classes=16)
    )
    colour = build.plain(runs.config())["input"]
    passing = analysis.run(
        encoder,
        {"params": params["encoder"], "stats": {}},
        eval_batches(few, measure.eval_view(encoder.spec.image), batch=4),
        chosen,
        mesh=mesh.make(jax.devices()[:1]),
        **colour,
    )
    *_, last = passing
    states = {name: {"test": state} for name, state in last().states.items()}
    want = {s.name: s.values for s in analysis.series(chosen, states)}
    assert want["normalized mutual information"].min() > 0.01
    for key, quantity in xrays.QUANTITIES.items():
        values = want[quantity.series]
        if key.startswith("displacement"):
            values = values[:, ("attn", "mlp").index(quantity.site)]
        elif len(values) > DEPTH:
            values = values[1:]  # the embedding
        else:
            values = values.mean(axis=1)  # heads
        np.testing.assert_allclose(got[key], values, rtol=1e-4, err_msg=key)


def test_the_images_are_spread_over_the_source():
    class Source:
        name = "numbers"

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            return index

    few = xrays.Spread(Source(), 64)
    got = [few[i] for i in range(len(few))]
    assert got[0] == 0 and set(np.diff(got)) == {15, 16} and got[-1] > 980
    assert len(xrays.Spread(Source(), 5000)) == 1000


def test_eight_devices_see_the_same_with_padding(program):
    encoder = program.objective.encoder
    images = jnp.zeros((1, *encoder.spec.image, 3))
    variables = {"stats": {}, **encoder.init(jax.random.key(0), images)}
    found = []
    for devices in (1, 8):
        grid = mesh.make(jax.devices()[:devices])
        batch = xrays.probe(program.source, encoder.spec.image, 12, grid)
        assert len(batch["weight"]) == (12 if devices == 1 else 16)
        look = xrays.measuring(encoder, (0.5,) * 3, (0.25,) * 3, grid)
        whole = jax.device_put(variables, mesh.replicated(grid))
        rows = jax.device_get(look(whole, batch))
        assert rows["rank"]["weight"].sum() == 12
        found.append(xrays.numbers(xrays.make_metrics(encoder), rows))
    one, eight = found
    for key in xrays.QUANTITIES:
        np.testing.assert_allclose(eight[key], one[key], rtol=2e-4, atol=2e-6)


class Stop(Exception):
    pass


def stop_at_write(monkeypatch, number):
    """Stop after so many lines, of both logs."""
    real, count = log.JsonlLog.write, [0]

    def write(self, record):
        real(self, record)
        count[0] += 1
        if count[0] == number:
            raise Stop

    monkeypatch.setattr(log.JsonlLog, "write", write)


def test_stopped_anywhere_it_has_every_x_ray_once(seen, tmp_path):
    for number in (1, 3, 7, 4, 5):  # lines after the start, or after the last save
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            stop_at_write(patch, number)
            runs.run(tmp_path, **ON)
    runs.run(tmp_path, **ON)
    assert runs.trace(tmp_path) == runs.trace(seen("simmim"))
    want = (seen("simmim") / "xray.jsonl").read_bytes()
    assert (tmp_path / "xray.jsonl").read_bytes() == want


@pytest.mark.parametrize(
    "total, section, every",
    [
        (10_000, {"share": 0.01, "least": 50}, 100),
        (180, {"share": 0.01, "least": 50}, 50),
        (180, {"share": 0.0, "least": 50}, 0),
    ],
)
def test_how_often(total, section, every):
    assert xrays.interval(total, **section) == every


@pytest.mark.parametrize("key, value", [("share", -0.1), ("least", 0), ("images", 0)])
def test_settings_that_cannot_work_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"xray\.{key}={value}.*use a share from 0"):
        build.build(runs.config(**ON | {f"xray__{key}": value}), jax.devices()[:1])


def changed(state, rule):
    """Parameters with `rule(name, leaf)` applied to those of the encoder."""
    return {"encoder": tree.map_named(rule, state.params["encoder"])}


def sharper(name, x):
    """Attention that depends on the query."""
    return 60 * x if name.endswith(("/q/kernel", "/k/kernel")) else x


def uniform(name, x):
    return 0 * x if name.endswith("/q/kernel") else sharper(name, x)


def blind(name, x):
    """The same features for every image."""
    return 0 * x if name == "patch_embed/kernel" else sharper(name, x)


def test_planted_collapses_are_noticed_once(make, program, capsys):
    x, state = make(), program.init(None)
    phases = [sharper, uniform, uniform, sharper, blind, blind, sharper, uniform]
    for step, rule in enumerate(phases):
        x.take(step, changed(state, rule), state.extra)
        assert x.waiting  # nobody has waited for it
        x.write()
    said = capsys.readouterr().err.splitlines()
    alarms = [r for r in log.read(x.log._path) if "alarm" in r]
    x.close()
    collapsed = [(r["step"], r["quantity"], r["block"]) for r in alarms]
    assert collapsed == [
        (1, "nmi", 1),
        (1, "nmi", 2),
        (4, "nmi", 1),
        (4, "nmi", 2),
        (4, "effective_rank", 2),
        (7, "nmi", 1),
        (7, "nmi", 2),
    ]
    assert len(said) == len(alarms)
    assert said[0].startswith("clvsmim train: ALARM at step 1: attention of block 1 ")
    assert "the representation has collapsed (effective rank 1 " in said[4]


def gradients(*norms, name="gradient_norm"):
    return [{"step": i, name: norm} for i, norm in enumerate(norms, 1)]


@pytest.mark.parametrize("name", xrays.NORMS)
def test_a_gradient_spike_is_noticed_once(name):
    watch = xrays.Watch()
    usual = [1.0, 2.0, 1.5] * 5
    spike = [14.0, 16.0, 100.0, 8.0, 40.0, 1.0, 40.0]
    alarms = [a for r in gradients(*usual, *spike, name=name) for a in watch.see(r)]
    assert [a["step"] for a in alarms] == [17, 22]  # 16 times the median, twice
    assert {a["quantity"] for a in alarms} == {name}
    assert alarms[0]["alarm"] == f"{name} 16 is 11 times the usual 1.5"


def test_the_first_gradients_are_no_spike():
    """They fall or rise by a lot while there is nothing to compare with."""
    watch = xrays.Watch()
    norms = [100.0, *([0.1] * 8), 50.0, 0.1]
    assert not [a for r in gradients(*norms) for a in watch.see(r)]
    watch = xrays.Watch()
    zeros = [0.0] * 20
    assert not [a for r in gradients(*zeros) for a in watch.see(r)]


def looks(step, nmi=(0.0, 0.0), rank=10.0):
    entropy = [math.log(16)] * len(nmi)
    return {
        "step": step,
        "nmi": list(nmi),
        "entropy": entropy,
        "effective_rank": [10.0, rank],
    }


@pytest.mark.parametrize(
    "records, alarms",
    [
        # Uniform at the start is no collapse.
        ([looks(0), looks(1, (5e-4, 8e-3)), looks(2)], []),
        # A rank that begins at 1 may stay there; one that falls may not.
        ([looks(0, rank=1.1), looks(1, rank=1.0)], []),
        ([looks(0, rank=4.0), looks(1, rank=1.4)], [(1, "effective_rank", 2)]),
        ([looks(0, rank=40.0), looks(1, rank=7.0)], [(1, "effective_rank", 2)]),
        ([looks(0, rank=40.0), looks(1, rank=9.0)], []),
        # One block of two.
        ([looks(0, (0.1, 0.1)), looks(1, (9e-4, 2e-3))], [(1, "nmi", 1)]),
        # Around the limit it is one episode.
        (
            [looks(0, (0.1,) * 2)]
            + [looks(i, (x, 0.1)) for i, x in enumerate((9e-4, 15e-4, 9e-4), 1)],
            [(1, "nmi", 1)],
        ),
    ],
)
def test_what_counts_as_a_collapse(records, alarms):
    watch = xrays.Watch()
    found = [a for r in records for a in watch.see(r)]
    assert [(a["step"], a["quantity"], a["block"]) for a in found] == alarms


def test_a_run_taken_up_again_goes_on_with_its_alarms(make, program, capsys):
    state, first = program.init(None), make()

    def take(x, *steps):
        for step, rule in steps:
            x.take(step, changed(state, rule), state.extra)
            x.write()
        x.close()
        said = capsys.readouterr().err.count("ALARM")
        return said, [r["step"] for r in log.read(x.log._path)]

    both = [1, 2, 2, 2]  # an X-ray, another one with an alarm for each block
    assert take(first, (1, sharper), (2, uniform)) == (2, both)
    # The same episode goes on.
    assert take(make(start=2), (3, uniform)) == (0, [*both, 3])
    # From before it, it begins again.
    assert take(make(start=1), (2, uniform)) == (2, both)


def test_tensorboard_gets_a_scalar_per_block():
    record = {"step": 3, "images": 8, "distance": [5.0, 7.0], "nmi": [0.1, 0.2]}
    assert xrays.scalars(record) == {
        "step": 3,
        "xray/distance/block_1": 5.0,
        "xray/distance/block_2": 7.0,
        "xray/nmi/block_1": 0.1,
        "xray/nmi/block_2": 0.2,
    }


def test_the_board_of_a_run_gets_records_and_x_rays(tmp_path, monkeypatch):
    written = []

    class Board:
        def __init__(self, logdir):
            assert logdir == str(tmp_path)

        def write(self, record):
            written.append(record)

        def flush(self):
            pass

        close = flush

    monkeypatch.setattr(train, "TensorBoard", Board)
    runs.run(tmp_path, **ON, log__tensorboard=True, log__every=6)
    flat = [r["step"] for r in written if "xray/nmi/block_2" in r]
    assert flat == STEPS
    assert [r["step"] for r in written if "loss" in r] == [6, 12]


def test_records_have_speeds_and_gradients(seen):
    first, *rest = log.read(seen("moco_v3") / "log.jsonl")
    assert "images_per_second" not in first  # compilation
    for record in rest:
        assert record["images_per_second"] > 0 and 0 <= record["data_wait"] <= 1
        assert 0 < record["gradient_norm/patch_embed"] < record["gradient_norm"]
        assert "mfu" not in record  # of a CPU
    rates = [r["ema_rate"] for r in (first, *rest)]
    assert rates[0] == pytest.approx(0.01) and rates == sorted(rates, reverse=True)
    hybrid = log.read(seen("hybrid") / "log.jsonl")
    assert "moco_v3/ema_rate" in hybrid[-1]


def test_a_frozen_patch_embedding_has_no_norm(program):
    frozen = runs.config(optim__frozen=("encoder/patch_embed/.*",))
    made = build.build(frozen, jax.devices()[:1])
    _, logs = jax.eval_shape(made.step, made.state, made.batch)
    assert "gradient_norm" in logs and "gradient_norm/patch_embed" not in logs


@pytest.fixture
def ill(seen, tmp_path):
    """A workdir whose second X-ray raised an alarm."""
    file = log.JsonlLog(tmp_path / "run" / "xray.jsonl")
    for record in lines(seen("simmim")):
        file.write(record)
        if record["step"] == 4:
            text = {"alarm": "attention of block 2 has collapsed"}
            file.write({"step": 4, **text, "quantity": "nmi", "block": 2})
            text = {"alarm": "gradient_norm 16 is 11 times the usual 1.5"}
            file.write({"step": 4, **text, "quantity": "gradient_norm", "block": 0})
    file.close()
    return str(tmp_path / "run")


def test_the_report_has_depth_against_time_with_the_alarms(seen, ill, tmp_path):
    found = {s.name: s for s in timeline.series(ill)}
    assert len(found) == len(xrays.QUANTITIES)
    nmi = found["normalized mutual information while training"]
    assert [(a.name, a.values) for a in nmi.axes] == [
        ("block", (1, 2)),
        ("step", tuple(STEPS)),
    ]
    record = lines(seen("simmim"))[2]
    np.testing.assert_array_equal(nmi.values[:, 2], record["nmi"])
    assert nmi.marks == ((1, 1),)  # block 2, the second X-ray
    assert nmi.notes == ("step 4: attention of block 2 has collapsed",)
    assert nmi.count == 12 and found["attention distance while training"].unit == "px"
    assert not found["attention distance while training"].marks
    again = metrics.Series.from_json(nmi.to_json())
    assert again.marks == nmi.marks
    run = Run("SimMIM", "mim", list(found.values()))
    section = timeline.section([(run, ill)])
    page = write(tmp_path / "out", title="x", runs=[run], sections=[section])
    text = page.read_text()
    assert "The encoder while it trains" in text
    assert "gradient_norm 16 is 11 times the usual" in text
    assert list((tmp_path / "out" / "figures").glob("normalized*-while-training*.png"))


def test_a_run_without_x_rays_has_no_such_section(tmp_path):
    assert timeline.series(str(tmp_path)) == []
    assert timeline.section([(Run("SimMIM"), str(tmp_path))]) is None
