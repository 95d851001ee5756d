"""A run is restored bit for bit, on other devices, and after every kind of accident."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from sets import upload

from clvsmim import checkpoint, mesh, optim, tree

ONE = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


class State(NamedTuple):
    step: jax.Array
    params: Any
    extra: Any
    opt: Any


def make_state(step=3, seed=0):
    """Dicts, Nones, namedtuples, empty containers, scalars and a bfloat16 moment."""
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {
            "pos_embed": jnp.float32(rng.normal(size=(1, 5, 8))),
            "block_0": {"kernel": jnp.float32(rng.normal(size=(16, 8)))},
        },
        "heads": {"mask_token": jnp.float32(rng.normal(size=(1, 1, 8)))},
    }
    groups = optim.groups(params, frozen=("encoder/pos_embed",))
    trainable, _ = tree.partition(params, optim.keep(groups))
    tx = optim.optimizer(
        groups,
        "adamw",
        schedule=optim.schedule("constant", base=1.0, total_steps=1, steps_per_epoch=1),
        clip=1.0,
        moment_dtype="bfloat16",
        **{"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
    )
    _, opt = tx.update(trainable, tx.init(trainable), trainable)
    teacher = jnp.float32(rng.normal(size=(128, 128))).at[0].set(jnp.nan)
    extra = {"teacher": {"kernel": teacher}, "none": None, "no": {}}
    return State(jnp.int32(step), params, extra, opt)


def abstract(state, sharding=ONE):
    def shape(x):
        place = sharding(x) if callable(sharding) else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(shape, state)


def assert_identical(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, x in tree.named(want).items():
        y = tree.named(got)[name]
        assert (y.shape, y.dtype) == (x.shape, x.dtype), name
        assert np.asarray(y).tobytes() == np.asarray(x).tobytes(), name


def save(workdir, *steps, keep=5):
    with checkpoint.Checkpoints(workdir, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step, seed=step))


def restored(workdir):
    with checkpoint.Checkpoints(workdir, keep=5) as checkpoints:
        return checkpoints.restore(abstract(make_state()))


def test_a_state_comes_back_bit_for_bit(tmp_path):
    save(tmp_path, 3)
    state, step = restored(tmp_path)
    assert step == 3
    assert_identical(state, make_state(3, seed=3))


def test_from_one_device_to_eight_and_back(tmp_path):
    grid = mesh.make(jax.devices(), fsdp=8)

    def split(x):
        spec = PartitionSpec("fsdp") if x.shape[:1] == (16,) else PartitionSpec()
        return NamedSharding(grid, spec)

    want = make_state(1)
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, want)
        checkpoints.wait()
        spread, _ = checkpoints.restore(abstract(want, split))
        kernel = spread.params["encoder"]["block_0"]["kernel"]
        assert kernel.sharding == split(kernel)
        assert {s.data.shape for s in kernel.addressable_shards} == {(2, 8)}
        assert_identical(spread, want)
        checkpoints.save(2, spread)
        checkpoints.wait()
        back, step = checkpoints.restore(abstract(want))
    assert step == 2
    assert all(x.sharding == ONE for x in jax.tree.leaves(back))
    assert_identical(back, want)


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    add = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    state = {"params": {"w": jnp.zeros((512, 1024))}}
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(0, state)
        for _ in range(5):
            state = add(state)
        checkpoints.wait()
        got, _ = checkpoints.restore(abstract(state))
    assert not np.asarray(got["params"]["w"]).any()


def test_the_newest_and_the_round_steps_are_kept(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2, keep_every=10) as checkpoints:
        for step in (5, 10, 15, 20, 25, 30, 35):
            checkpoints.save(step, {"params": jnp.int32(step)})
        assert checkpoints.latest() == 35
    assert steps_on_disk(tmp_path) == [10, 20, 30, 35]


def steps_on_disk(workdir):
    folder = pathlib.Path(workdir) / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(folder):
    """The file with most of the arrays' bytes; they lie in folders named `d`."""
    files = [p for p in folder.rglob("d/*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


DAMAGE = {
    "data": lambda step: truncate(largest(step / "default")),
    "contents": lambda step: truncate(step / "default" / "_METADATA"),
    "manifest": lambda step: (step / "default" / "manifest.ocdbt").unlink(),
    "empty": lambda step: (step / "default").rename(step.parent.parent / "gone"),
}


@pytest.fixture
def warnings(monkeypatch):
    rows = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: rows.append(text % args)
    )
    return rows


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_step_falls_back_and_says_so(tmp_path, kind, warnings):
    save(tmp_path, 1, 2)
    DAMAGE[kind](tmp_path / "checkpoints" / "2")
    with checkpoint.Checkpoints(tmp_path, keep=5) as checkpoints:
        state, step = checkpoints.restore(abstract(make_state()))
        assert step == 1
        assert_identical(state, make_state(1, seed=1))
        assert "skipping an unreadable checkpoint: step 2" in warnings[0]
        checkpoints.save(2, make_state(2, seed=2))
    again, step = restored(tmp_path)
    assert step == 2
    assert_identical(again, make_state(2, seed=2))


def test_nothing_readable_lists_every_step(tmp_path, warnings):
    save(tmp_path, 1, 2)
    for step in "12":
        DAMAGE["contents"](tmp_path / "checkpoints" / step)
    with pytest.raises(ValueError, match="no readable checkpoint.*step 2:.*step 1:"):
        restored(tmp_path)
    assert len(warnings) == 2


def test_another_model_is_an_error_and_not_a_fallback(tmp_path):
    save(tmp_path, 1, 2)
    other = make_state()
    other.params["encoder"]["block_1"] = {"kernel": jnp.zeros(3)}
    other.params["heads"]["mask_token"] = jnp.zeros((1, 1, 9))
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=5)
    with checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore(abstract(other))
    for part in (
        "checkpoints/2",
        "1 missing (params/encoder/block_1/kernel",
        "(1, 1, 9)",
    ):
        assert part in str(error.value)


def test_parameters_alone_need_no_optimizer(tmp_path):
    save(tmp_path, 1, 2)
    found, step = checkpoint.restore_params(tmp_path)
    want = make_state(2, seed=2)
    assert step == 2
    assert_identical(found["params"], want.params)
    assert_identical(found["extra"], {"teacher": want.extra["teacher"]})
    replicated = mesh.replicated(mesh.make(jax.devices()))
    found, _ = checkpoint.restore_params(
        tmp_path, fields=("params",), sharding=replicated
    )
    assert set(found) == {"params"}
    assert all(x.sharding == replicated for x in jax.tree.leaves(found))


def test_parameters_fall_back_too(tmp_path, warnings):
    save(tmp_path, 1, 2)
    DAMAGE["contents"](tmp_path / "checkpoints" / "2")
    assert checkpoint.restore_params(tmp_path)[1] == 1
    assert warnings


def test_reading_does_not_disturb_a_run_that_writes(tmp_path):
    save(tmp_path, 1)
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert checkpoint.restore_params(tmp_path)[1] == 1
    assert unfinished.exists()


def test_no_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in .*--workdir"):
        checkpoint.restore_params(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() is None


SAVE_FOREVER = """
import sys
import jax.numpy as jnp
from clvsmim import checkpoint
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=3)
for step in range(1, 100_000):
    checkpoints.save(step, {"params": {"w": jnp.full((256, 256), float(step))}})
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.013])
def test_kill_9_while_saving_leaves_a_run_that_restores(tmp_path, delay):
    command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        while int(process.stdout.readline()) < 6:
            pass
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    want = {"params": {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32)}}
    with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
        state, step = checkpoints.restore(want)
        assert step >= 5
        np.testing.assert_array_equal(state["params"]["w"], float(step))
        checkpoints.save(step + 1, state)
    names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in names), names


def test_orbax_is_quiet_below_errors(tmp_path):
    save(tmp_path, 1)
    logger = logging.get_absl_logger()
    path = checkpoint.ocp.__file__
    make = lambda level: logger.makeRecord("absl", level, path, 1, "x", (), None)  # noqa: E731
    assert not logger.filter(make(20))
    assert not logger.filter(make(30))
    assert logger.filter(make(40))
    ours = logger.makeRecord("absl", 20, checkpoint.__file__, 1, "x", (), None)
    assert logger.filter(ours)


def test_buckets_are_not_taken_for_local_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(checkpoint.folder("gs://bucket/run")) == "gs://bucket/run/checkpoints"
    assert str(checkpoint.folder("run")) == str(tmp_path / "run" / "checkpoints")


def test_in_a_bucket_a_step_counts_when_its_last_file_is_there(tmp_path, monkeypatch):
    save(tmp_path / "run", 1, 2)
    (tmp_path / "run/checkpoints/1/commit_success.txt").write_text("as in a bucket")
    (tmp_path / "run/checkpoints/2/commit_success.txt").unlink(missing_ok=True)
    upload(tmp_path / "run", "gs://bucket/run", monkeypatch)
    assert checkpoint.saved_steps(str(tmp_path / "run")) == [1, 2]
    assert checkpoint.saved_steps("gs://bucket/run") == [1]
    assert checkpoint.saved_steps("gs://bucket/none") == []


def test_reads_given_up_are_silent_and_other_errors_are_not(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    checkpoint._drop_abandoned_reads()
    checkpoint._drop_abandoned_reads()
    thrown_away = ValueError("while reading")
    thrown_away.__context__ = GeneratorExit()
    other = OSError("someone else's")
    for error in (RuntimeError("Event loop is closed"), thrown_away, other):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert [u.exc_value for u in reported] == [other]
