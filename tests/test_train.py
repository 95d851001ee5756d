"""A run that was killed, however and wherever, ends as if it had not been."""

import dataclasses
import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import runs

from clvsmim import build, checkpoint, log, meta, train, tree


class Stop(Exception):
    """Where a test ends a run."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(name)` -> the folder of an uninterrupted run on one device."""
    folder = tmp_path_factory.mktemp("whole")

    def get(name):
        if not (folder / name).exists():
            runs.run(folder / name, name)
        return folder / name

    return get


@pytest.fixture
def on_step(monkeypatch):
    """`on_step(before, after)`: call them with what goes into and comes out of a step.

    `before(number, state)` may be anything, `after(number, state, logs)` returns the
    logs; numbers count from 1, the first step of the whole run.
    """
    real = build.build

    def install(before=lambda *_: None, after=lambda number, state, logs: logs):
        def step_of(program):
            def step(state, batch):
                number = int(jax.device_get(state.step)) + 1
                before(number, state)
                state, logs = program.step(state, batch)
                return state, after(number, state, logs)

            return step

        def wrapped(*args):
            program = real(*args)
            return dataclasses.replace(program, step=step_of(program))

        monkeypatch.setattr(train, "build", wrapped)

    return install


def stop_at(number):
    """Raise at the call whose first argument, the step, is `number`."""

    def check(step, *_):
        if step == number:
            raise Stop

    return check


def stop_in_data(monkeypatch, number):
    """The data fail when the step `number` asks for its batch."""
    real = train.batches

    def failing(*args, start, **settings):
        data = real(*args, start=start, **settings)

        class Data:
            steps = itertools.count(start + 1)
            close = data.close

            def __next__(self):
                stop_at(number)(next(self.steps))
                return next(data)

        return Data()

    monkeypatch.setattr(train, "batches", failing)


def stop_in_save(monkeypatch, number, *, after):
    """Stop just before or just after the call that saves `number`."""
    real = train.Checkpoints.save

    def save(self, step, state):
        if not after:
            stop_at(number)(step)
        real(self, step, state)
        stop_at(number)(step)

    monkeypatch.setattr(train.Checkpoints, "save", save)


def stop_in_log(monkeypatch, number):
    """Stop after the log has step `number` and before anything else happens."""
    real = log.JsonlLog.write

    def write(self, record):
        real(self, record)
        stop_at(number)(record["step"])

    monkeypatch.setattr(log.JsonlLog, "write", write)


ACCIDENTS = {
    "data, before anything is saved": lambda m: stop_in_data(m, 2),
    "between log and save": lambda m: stop_in_save(m, 5, after=False),
    "while saving": lambda m: stop_in_save(m, 5, after=True),
    "data": lambda m: stop_in_data(m, 8),
    "log": lambda m: stop_in_log(m, 8),
    "between the last log and save": lambda m: stop_in_save(m, 12, after=False),
}


SLOW = ("mae", "hybrid")  # nothing in stopping is its own


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in runs.OBJECTIVES
    ],
)
def test_stopped_everywhere_it_ends_bit_for_bit_as_if_it_had_not(whole, tmp_path, name):
    reached = []
    for accident in ACCIDENTS.values():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            accident(patch)
            runs.run(tmp_path, name)
        reached.append(steps_on_disk(tmp_path))
    assert reached == [[], [], [5], [5], [5], [5, 10]]
    runs.run(tmp_path, name)
    assert_same(tmp_path, whole(name))
    steps = [r["step"] for r in runs.trace(tmp_path) if "eval/images" not in r]
    assert steps == list(range(1, runs.TOTAL + 1))


def steps_on_disk(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_the_step_raises_and_the_run_goes_on(whole, tmp_path, on_step):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        on_step(before=stop_at(7))
        runs.run(tmp_path)
        patch.undo()
    on_step()
    runs.run(tmp_path)
    assert runs.trace(tmp_path) == runs.trace(whole("simmim"))


SLOW_RUN = """
import os, sys, time
import jax
import runs
from clvsmim import train
if sys.argv[2] == "while saving":
    save = train.Checkpoints.save
    def save_and_die(self, step, state):
        save(self, step, state)
        os.kill(os.getpid(), 9)
    train.Checkpoints.save = save_and_die
put = train.meshes.put
def slow_put(*args):
    time.sleep(float(sys.argv[3]))
    return put(*args)
train.meshes.put = slow_put
runs.run(sys.argv[1])
"""


def start(workdir, how="", seconds=0.0):
    """The run in a process of its own, with the settings of this one."""
    env = os.environ | {
        "PYTHONPATH": str(runs.ROOT / "tests"),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    command = [sys.executable, "-c", SLOW_RUN, str(workdir), how, str(seconds)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, env=env)


def assert_same(workdir, whole):
    assert runs.trace(workdir) == runs.trace(whole)
    runs.assert_identical(runs.state(workdir, runs.TOTAL), runs.state(whole))


def test_sigkill_while_a_save_is_being_written(whole, tmp_path):
    process = start(tmp_path, "while saving")
    assert process.wait(120) == -signal.SIGKILL
    assert steps_on_disk(tmp_path) in ([], [5])
    runs.run(tmp_path)
    assert_same(tmp_path, whole("simmim"))


def kill_after(workdir, lines, seconds):
    """SIGKILL once the log has so many lines, and some milliseconds later."""
    process, path = start(workdir, seconds=0.1), workdir / "log.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_sigkill_in_the_middle_and_on_in_another_process(whole, tmp_path):
    kill_after(tmp_path, 7, 0.03)
    assert start(tmp_path).wait(120) == 0
    assert_same(tmp_path, whole("simmim"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_again_and_again(whole, tmp_path, seed):
    rng = np.random.default_rng(seed)
    for lines in sorted(rng.integers(1, 11, 4)):
        kill_after(tmp_path, lines, rng.uniform(0, 0.3))
    assert start(tmp_path).wait(120) == 0
    assert_same(tmp_path, whole("simmim"))


def test_started_again_when_done_it_changes_nothing(whole, capsys):
    folder = whole("simmim")
    paths = [folder / "log.jsonl", folder / "checkpoints"]
    before = runs.snapshot(folder), [p.stat().st_mtime_ns for p in paths]
    capsys.readouterr()
    runs.run(folder)
    assert (runs.snapshot(folder), [p.stat().st_mtime_ns for p in paths]) == before
    said = capsys.readouterr().err
    assert (
        said == "simmim: 12 of 12 steps of 16 images on 1 x cpu; nothing left to do\n"
    )


FREE = {
    "log.every": {"log__every": 3},
    "log.save and log.keep": {"log__save": 3, "log__keep": 1},
    "data.threads and data.prefetch": {"data__threads": 3, "data__prefetch": 5},
    "data.workers": {"data__workers": 2},
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped at step 6 and saved at 5; copy it."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_in_log(patch, 6)
        runs.run(workdir)
    return workdir


def copy(folder, to):
    return shutil.copytree(folder, to / "run")


@pytest.mark.parametrize("what", FREE)
def test_settings_that_change_no_number_may_change(whole, stopped, tmp_path, what):
    workdir = copy(stopped, tmp_path)
    runs.run(workdir, **FREE[what])
    every = FREE[what].get("log__every", 1)
    want = [
        r
        for r in runs.trace(whole("simmim"))
        if r["step"] <= 5 or r["step"] % every == 0
    ]
    assert runs.trace(workdir) == want
    runs.assert_identical(runs.state(workdir, 12), runs.state(whole("simmim"), 12))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"optim__schedule__base": 1e-4},
        {"epochs": 4.0},
        {"batch": 8},
        {"data__source__length": 80},
        {"encoder__drop_path": 0.2},
        {"objective__mask_ratio": 0.5},
    ],
)
def test_settings_that_change_numbers_may_not(stopped, change):
    before = runs.snapshot(stopped)
    (key,) = change
    with pytest.raises(ValueError, match=f"{key.replace('__', '.')} is .* there and"):
        runs.run(stopped, **change)
    assert runs.snapshot(stopped) == before


@pytest.mark.parametrize(
    "devices, fsdp", [pytest.param(8, 1, marks=pytest.mark.slow), (8, 4)]
)
def test_it_goes_on_with_other_devices(whole, tmp_path, devices, fsdp):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_in_log(patch, 6)
        runs.run(tmp_path, "moco_v3")
    runs.run(tmp_path, "moco_v3", devices=devices, mesh__fsdp=fsdp)
    got, want = runs.trace(tmp_path), runs.trace(whole("moco_v3"))
    assert got[:5] == want[:5]
    assert got[5]["loss"] == pytest.approx(want[5]["loss"], rel=1e-5)
    assert [r["step"] for r in got] == [r["step"] for r in want]


@pytest.mark.slow
def test_from_eight_devices_it_goes_on_with_fewer(tmp_path):
    """The step after the restore; later ones differ more, by rounding that grows."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_in_log(patch, 6)
        runs.run(tmp_path / "stopped", "moco_v3", devices=8)
    loss = {}
    for devices in (8, 4, 1):
        workdir = shutil.copytree(tmp_path / "stopped", tmp_path / str(devices))
        runs.run(workdir, "moco_v3", devices=devices)
        loss[devices] = runs.trace(workdir)[5]["loss"]
    assert loss[4] == pytest.approx(loss[8], rel=1e-5)
    assert loss[1] == pytest.approx(loss[8], rel=1e-5)


def test_an_evaluation_that_sigterm_cuts_short_is_made_up_for(
    whole, tmp_path, monkeypatch
):
    real, cut = train.evaluate, []

    def evaluate(*args):
        if not cut:
            cut.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(*args)

    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(SystemExit) as error:
        runs.run(tmp_path, "classify")
    assert error.value.code == 143
    assert not any("eval/top1" in r for r in runs.trace(tmp_path))
    runs.run(tmp_path, "classify")
    assert runs.trace(tmp_path) == runs.trace(whole("classify"))


@pytest.mark.parametrize("number, saved", [(8, [5, 7]), (6, [5])])
def test_when_a_worker_is_lost_to_sigterm_the_step_before_is_saved(
    whole, tmp_path, monkeypatch, number, saved
):
    """A signal to the process group ends the workers before the loop sees it. What is
    saved already is not written again, for that would remove it first."""
    real, seen, written = train.meshes.put, [], []
    save = train.Checkpoints.save

    def put(*args):
        seen.append(args)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGTERM)
            raise train.WorkerLost("a data worker was killed")
        return real(*args)

    def note(self, step, state):
        written.append(step)
        save(self, step, state)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.meshes, "put", put)
        patch.setattr(train.Checkpoints, "save", note)
        runs.run(tmp_path)
    assert written == checkpoint.saved_steps(tmp_path) == saved
    runs.run(tmp_path)
    assert_same(tmp_path, whole("simmim"))


def test_other_images_are_another_run(stopped, tmp_path):
    workdir = copy(stopped, tmp_path)
    about = meta.read_meta(str(workdir))
    about["images"]["train"] += 1
    meta.write_meta(str(workdir), about)
    with pytest.raises(ValueError, match="images.train is 65 there and 64 here"):
        runs.run(workdir)


def test_held_out_images_none_of_which_can_be_read_are_an_error(tmp_path, monkeypatch):
    program = build.build(runs.config("classify"), jax.devices()[:1])
    nothing = dataclasses.replace(
        program, evaluate=lambda state, batch: {"top1": 0.0, "images": 0.0}
    )
    settings = build.plain(runs.config("classify"))
    with pytest.raises(ValueError, match="none of the held-out images of 'photos'"):
        train.evaluate(nothing, settings, None)


def test_checkpoints_are_kept_by_policy(tmp_path):
    runs.run(tmp_path, log__save=2, log__keep=1, log__keep_every=6)
    assert checkpoint.saved_steps(tmp_path) == [6, runs.TOTAL]


def test_the_state_is_split_over_fsdp_devices(tmp_path):
    program = build.build(runs.config("moco_v3", mesh__fsdp=4))
    kernels = tree.named(program.state.params["heads"])
    split = [n for n, x in kernels.items() if any(x.sharding.spec)]
    assert any(name.startswith("projector") for name in split)
    moments = tree.named(program.state.opt)
    for name in split:
        found = [x for n, x in moments.items() if n.endswith(f"heads/{name}")]
        assert found and all(x.sharding == kernels[name].sharding for x in found)


def begun(config, folder):
    """The state at step 0 of a config on one device."""
    program = build.build(config, jax.devices()[:1])
    with checkpoint.Checkpoints(str(folder), keep=1) as checkpoints:
        given = train.given_encoder(
            program, config.init.path, build.plain(config.input)
        )
        state, start = train.begin(program, checkpoints, given)
    assert start == 0
    return state


def leaves(x):
    return {name: np.asarray(leaf) for name, leaf in tree.named(x).items()}


@pytest.mark.parametrize("name", ["moco_v3", "hybrid"])
def test_it_can_start_from_the_encoder_of_another_run(whole, tmp_path, name):
    given = runs.state(whole("simmim"))
    start = "params/encoder/"
    given = {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
    fresh = begun(runs.config(name), tmp_path / "a")
    state = begun(runs.config(name, init__path=str(whole("simmim"))), tmp_path / "b")
    runs.assert_identical(leaves(state.params["encoder"]), given)
    teacher = state.extra["heads"]
    teacher = (teacher["moco_v3"] if name == "hybrid" else teacher)["teacher"]
    runs.assert_identical(leaves(teacher["encoder"]), given)
    runs.assert_identical(leaves(state.params["heads"]), leaves(fresh.params["heads"]))
    runs.assert_identical(leaves(state.opt), leaves(fresh.opt))


def test_a_run_that_started_from_another_goes_on_without_it(whole, tmp_path):
    first = copy(whole("simmim"), tmp_path)
    settings = {"init__path": str(first), "epochs": 0.5}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stop_in_save(patch, 1, after=True)
        runs.run(tmp_path / "second", **settings, log__save=1)
    first.rename(tmp_path / "gone")
    runs.run(tmp_path / "second", **settings)
    assert runs.trace(tmp_path / "second")[-1]["step"] == 2


def test_a_record_has_what_one_wants_to_see(whole):
    for name in runs.OBJECTIVES:
        for record in log.read(whole(name) / "log.jsonl"):
            own = {"loss", "learning_rate", "gradient_norm", "seconds"}
            own = {"eval/images"} if "eval/images" in record else own
            assert {"step", *own} <= set(record)
            assert all(np.isfinite(value) for value in record.values())
    rates = [r["learning_rate"] for r in runs.trace(whole("simmim"))]
    assert rates[0] == 0 and max(rates) <= 2e-3 and rates[-1] < rates[5]
    parts = runs.trace(whole("hybrid"))[-1]
    lam = runs.config("hybrid").objective.lam
    mixed = (1 - lam) * parts["simmim/loss"] + lam * parts["moco_v3/loss"]
    assert parts["loss"] == pytest.approx(mixed, rel=1e-6)


def test_meta_says_what_was_trained_and_with_what(whole):
    found = meta.read_meta(whole("simmim"))
    assert found["config"]["objective"]["name"] == "simmim"
    assert found["encoder"]["width"] == 16
    assert found["versions"]["jax"] == jax.__version__
    shapes = runs.state(whole("simmim"))
    sizes = (x.size for n, x in shapes.items() if n.startswith("params/encoder/"))
    assert found["parameters"] == sum(sizes)


def test_progress_has_images_per_second_and_the_time_left(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        train, "Progress", lambda *a, **k: log.Progress(*a, every=0, **k)
    )
    runs.run(tmp_path)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith("simmim: 0 of 12 steps of 16 images on 1 x cpu; compiling")
    assert [line.split(",")[0] for line in lines][-1] == "step 12/12 (100%)"
    pattern = r"step \d+/12 \(\d+%\), \d+ images/s, \d:\d\d:\d\d left, loss 0\.\d+"
    assert all(re.fullmatch(pattern, line) for line in lines[1:])


def test_the_speed_shown_is_that_of_the_steps(tmp_path, monkeypatch, on_step):
    """Records are written late and in pairs before a save; the speed must not jump."""
    stream = io.StringIO()
    monkeypatch.setattr(
        train,
        "Progress",
        lambda *a, **k: log.Progress(*a, every=0, stream=stream, **k),
    )
    on_step(before=lambda *_: time.sleep(0.1))
    runs.run(tmp_path, log__every=2)
    speeds = re.findall(r"(\d+) images/s", stream.getvalue())
    assert len(speeds) == 5
    most = 16 / 0.1 * 1.02  # no step is shorter; times are written in milliseconds
    assert all(0 < float(speed) <= most for speed in speeds), speeds


class Watched:
    """An array of the logs that tells when the host reads it."""

    def __init__(self, array, step, reads):
        self._array, self._step, self._reads = array, step, reads

    def __array__(self, *args, **kwargs):
        self._reads.append(self._step)
        return np.asarray(self._array)

    def __float__(self):
        return float(self.__array__())


def test_the_host_never_waits_for_the_step_that_it_has_just_dispatched(
    tmp_path, on_step
):
    newest = [0]

    class Reads(list):
        def append(self, step):
            super().append((step, newest[0]))

    reads = Reads()

    def after(number, state, logs):
        newest[0] = number
        return {k: Watched(v, number, reads) for k, v in logs.items()}

    on_step(after=after)
    runs.run(tmp_path, log__every=2)
    got = sorted(set(reads))
    # A record is read when the next one is due, one step or more later, or before a
    # save, which waits for the step anyhow.
    assert got == [(2, 4), (4, 5), (5, 5), (6, 8), (8, 10), (10, 10), (12, 12)]


@pytest.mark.parametrize(
    "name, number, every, written",
    [("loss", 7, 1, [1, 2, 3, 4, 5, 6, 7]), ("gradient_norm", 10, 4, [4, 8])],
)
def test_what_is_not_finite_is_neither_trained_on_nor_saved(
    tmp_path, on_step, name, number, every, written
):
    def after(step, state, logs):
        value = jax.device_put(np.float32("nan" if step >= number else 1.0))
        return logs | {name: logs[name] * value}

    on_step(after=after)
    reason = f"{name} is nan at step {number}; the last checkpoint is of step 5"
    with pytest.raises(ValueError, match=reason):
        runs.run(tmp_path, log__every=every)
    assert steps_on_disk(tmp_path) == [5]
    assert [r["step"] for r in runs.trace(tmp_path)] == written


def test_the_loop_runs_under_the_transfer_guard(tmp_path, on_step):
    def after(number, state, logs):
        return {"loss": logs["loss"] + np.ones(())}  # an implicit transfer

    on_step(after=after)
    with pytest.raises(Exception, match="[Dd]isallowed host-to-device transfer"):
        runs.run(tmp_path)


def test_a_checkpoint_is_the_state_at_its_step(tmp_path, on_step):
    states = {}

    def after(number, state, logs):
        states[number] = {n: np.array(x) for n, x in tree.named(state).items()}
        return logs

    on_step(after=after)
    runs.run(tmp_path, "moco_v3")
    program = build.build(runs.config("moco_v3"), jax.devices()[:1])
    for step in (12, 10, 5):
        with checkpoint.Checkpoints(str(tmp_path), keep=9) as checkpoints:
            state, found = checkpoints.restore(program.state)
            assert found == step
            runs.assert_identical(leaves(state), states[step])
        (tmp_path / "checkpoints" / str(step)).rename(tmp_path / str(step))
