"""Two processes, as two hosts: they train as one, and one goes on where two stopped."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs

from clvsmim import analysis, checkpoint, log, mesh, train
from clvsmim.build import build

PROGRAM = """
import sys
import jax
port, process, root = sys.argv[1:4]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
jax.config.update("jax_default_matmul_precision", "highest")
import test_processes
for job in sys.argv[4:]:
    test_processes.JOBS[job](root)
"""
TESTS = pathlib.Path(__file__).parent
METHODS = ("hybrid", "simmim", "mae", "classify", "moco_v3")
# Law 8: relative, float32 at highest precision.
FIRST, THIRD = 1e-6, {"moco_v3": 1e-3, "hybrid": 1e-3}
# Weights that are not tiny: else BatchNorm over nearly equal CLS tokens amplifies
# rounding, whoever computes it.
WEIGHTS = {"encoder__init": "moco_v3", "encoder__layer_scale": 1.0}
FSDP = {"mesh__fsdp": 8}
FOUND = ("one", "two")
STOP = 6  # the step after the checkpoint of step 5


class Stopped(Exception):
    """Instead of a kill."""


def whole(name, workdir, devices=None):
    """Four steps, or one with an evaluation."""
    train.train(runs.config(name, epochs=1.0, **WEIGHTS), str(workdir), devices=devices)


def begin(workdir, devices=None, **changes):
    """Up to step 6; step 5 is saved. Leaves of 1024 elements count as big."""
    check = train.check_finite

    def stop(step, logs, checkpoints):
        check(step, logs, checkpoints)
        if step == STOP:
            checkpoints.wait()
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(mesh, "SMALL", 1024)
        patch.setattr(train, "check_finite", stop)
        config = runs.config("simmim", **WEIGHTS | changes)
        splits = [
            x.sharding.spec for x in jax.tree.leaves(build(config, devices).state)
        ]
        assert any("fsdp" in spec for spec in splits) == bool(changes)
        train.train(config, str(workdir), devices=devices)


def measure(root):
    """The analysis of what one device has trained."""
    from clvsmim import analyze
    from clvsmim.measure import Settings

    settings = Settings(
        images=36,
        train_images=16,
        batch=8,
        group=4,
        every=1,
        metrics=(*analysis.METRICS, "lidar"),
    )
    out = "two" if jax.process_count() > 1 else "one"
    analyze.analyze(f"{root}/hybrid_one", f"{root}/analysis_{out}", settings)


def log_from_one(root):
    """Records go to a file from the first process alone."""
    names = {"tensorboard": False}
    made = train.open_writers(f"{root}/logs", names, total=4, batch=8, start=0)
    for writer in made:
        writer.close()
    assert bool(made) == (jax.process_index() == 0)


def fall_back(workdir):
    """One of two processes cannot read its part of the newest step: both take the one
    before."""
    state = {"params": {"w": jnp.arange(8.0)}}
    everywhere = mesh.replicated(mesh.make())
    shape = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=everywhere)
    read = ocp.PyTreeCheckpointHandler.restore

    def broken(self, path, *args, **kwargs):
        if path.parent.name == "2" and jax.process_index() == 1:
            raise OSError("the network")
        return read(self, path, *args, **kwargs)

    with checkpoint.Checkpoints(workdir, keep=5) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, jax.device_put(state, everywhere))
        checkpoints.wait()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ocp.PyTreeCheckpointHandler, "restore", broken)
            got, step = checkpoints.restore({"params": {"w": shape}})
    assert step == 1 and (np.asarray(got["params"]["w"]) == np.arange(8)).all()


# What a pair of processes does, by name; each gets the folder for all results.
JOBS = {name: lambda root, n=name: whole(n, f"{root}/{n}_two") for name in METHODS}
JOBS["measure"] = measure
JOBS["begin"] = lambda root: begin(f"{root}/begun_two", **FSDP)
JOBS["log"] = log_from_one
JOBS["fall back"] = lambda root: fall_back(f"{root}/unreadable")
JOBS["go on"] = lambda root: begin(f"{root}/one_two", **FSDP)


def pair(root, *jobs):
    """Do the jobs in two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": runs.flags(devices=4)}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-c", PROGRAM, str(port)]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(
            [*command, str(i), str(root), *jobs],
            env=env,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for i in (0, 1)
    ]
    outputs = [p.communicate(timeout=500) for p in both]
    for process, (_, errors) in zip(both, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process has done first, and then two, each in its own folders."""
    root = tmp_path_factory.mktemp("processes")
    whole("hybrid", root / "hybrid_one", jax.devices())
    begin(root / "begun_one", jax.devices(), **FSDP)
    shutil.copytree(root / "begun_one", root / "one_two")
    pair(root, "hybrid", "begin", "go on", "fall back", "log")
    return root


def losses(workdir):
    records = log.read(f"{workdir}/log.jsonl")
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def assert_losses_agree(got, want, name):
    assert list(got) == list(want) == [1, 2, 3, 4]
    assert got[1] == pytest.approx(want[1], rel=FIRST)
    assert got[3] == pytest.approx(want[3], rel=THIRD.get(name, 1e-5))


def test_law_two_processes_train_as_one(results):
    one, two = (losses(results / f"hybrid_{n}") for n in ("one", "two"))
    assert_losses_agree(two, one, "hybrid")


@pytest.mark.slow
def test_law_one_device_eight_and_two_processes_train_alike(tmp_path):
    pair(tmp_path, *METHODS)
    for name in METHODS:
        whole(name, tmp_path / f"{name}_eight", jax.devices())
        whole(name, tmp_path / f"{name}_one", jax.devices()[:1])
        want = losses(tmp_path / f"{name}_one")
        for other in ("eight", "two"):
            assert_losses_agree(losses(tmp_path / f"{name}_{other}"), want, name)
    one, two = (log.read(tmp_path / f"classify_{n}/log.jsonl")[-1] for n in FOUND)
    assert one.keys() == two.keys() and one["eval/images"] == 64
    for key in filter(lambda key: key.startswith("eval/"), one):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key


@pytest.mark.slow
def test_two_processes_measure_as_one(results):
    measure(results)
    pair(results, "measure")
    one, two = (analysis.read_series(results / f"analysis_{n}") for n in FOUND)
    assert one["stamp"] == two["stamp"]
    assert_agree(two["series"], one["series"])
    files = {p.name for p in (results / "analysis_two").iterdir()}
    assert files == {"series.json", "state.npz", "pictures.npz"}


def assert_agree(got: list, want: list) -> None:
    """Every number of every Series to 1e-6 of the largest of its Series, or of 1."""
    assert len(want) > 40 and [s.name for s in got] == [s.name for s in want]
    for a, b in zip(got, want, strict=True):
        assert (a.count, a.notes) == (b.count, b.notes), a.name
        scale = np.nanmax(np.abs(b.values), initial=1.0)
        np.testing.assert_allclose(
            a.values, b.values, rtol=0, atol=1e-6 * scale, err_msg=a.name
        )


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_back(results):
    """The first step after the restore; each side splits its parameters in eight."""
    want = losses(results / "begun_one")[STOP]
    two = losses(results / "begun_two")
    assert two[STOP] == pytest.approx(want, rel=1e-5) and len(two) == STOP
    assert len(losses(results / "one_two")) == STOP
    assert losses(results / "one_two")[STOP] == pytest.approx(want, rel=1e-5)
    for devices, changes in ((8, FSDP), (1, {})):
        workdir = shutil.copytree(results / "begun_two", results / f"two_{devices}")
        begin(workdir, jax.devices()[:devices], **changes)
        assert losses(workdir)[STOP] == pytest.approx(two[STOP], rel=1e-5)


def test_what_one_process_cannot_read_none_takes(results):
    assert checkpoint.saved_steps(results / "unreadable") == [1, 2]  # and see the job


def test_one_process_writes(results):
    files = {p.name for p in (results / "hybrid_two").iterdir()}
    assert files == {"checkpoints", "log.jsonl", "meta.json"}
