"""A run that is stopped again and again ends bit for bit as one left alone."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import runs

from clvsmim import checkpoint, log

SAVE, STEPS = 10, 320  # steps between two checkpoints, and in all
CHANGES = {"epochs": STEPS / 4, "log__save": SAVE, "log__keep": 2}
# The run in a process of its own; a step takes long enough to be hit.
RUN = f"""
import sys, time
import runs
from clvsmim import train
put = train.meshes.put
def slow_put(*args):
    time.sleep(float(sys.argv[2]))
    return put(*args)
train.meshes.put = slow_put
runs.run(sys.argv[1], **{CHANGES})
"""


def start(workdir, seconds=0.04):
    env = os.environ | {
        "PYTHONPATH": str(runs.ROOT / "tests"),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(workdir), str(seconds)],
        stderr=subprocess.PIPE,
        env=env,
        text=True,
    )


def lines(workdir):
    path = workdir / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def uncommitted(workdir):
    """Folders of checkpoints that are being written."""
    folder = workdir / "checkpoints"
    found = folder.iterdir() if folder.exists() else ()
    return sorted(p.name for p in found if not p.name.isdigit())


def wait(process, ready):
    """Poll until `ready()` is true or the process has ended; what it was at last."""
    while process.poll() is None:
        found = ready()
        if found:
            return found
        time.sleep(0.002)
    return None


def repeated(workdir):
    """Steps that were logged and have to be done again."""
    saved = checkpoint.saved_steps(workdir)
    done = [r["step"] for r in log.read(workdir / "log.jsonl")] or [0]
    return done[-1] - (saved[-1] if saved else 0)


def interrupt(workdir, how, after):
    """Start the run, end it `after` so many new lines of its log.

    Returns its exit status, the checkpoint it was writing, and what it said.
    """
    path = workdir / "log.jsonl"
    stamp = path.stat().st_mtime_ns if path.exists() else None
    process = start(workdir)

    def rewound():  # to the checkpoint, which is the first thing done to the log
        return path.exists() and path.stat().st_mtime_ns != stamp

    assert wait(process, rewound), process.stderr.read()
    begin = lines(workdir)

    def ready():
        return lines(workdir) >= begin + after and (
            uncommitted(workdir) if how == "writing" else [None]
        )

    found = wait(process, ready)
    assert found, process.stderr.read()
    process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    return process.returncode, found[0], said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.run(folder, **CHANGES)
    return folder


def test_sigterm_saves_the_step_it_came_at_and_ends_without_a_traceback(tmp_path):
    status, _, said = interrupt(tmp_path, "SIGTERM", 3)
    assert status == 143
    (step,) = checkpoint.saved_steps(tmp_path)
    assert step % SAVE, "it came between two saves"
    assert f"SIGTERM: step {step} is saved; start it again to go on" in said
    assert "Traceback" not in said
    assert repeated(tmp_path) == 0


@pytest.mark.slow
def test_twenty_five_interruptions_change_nothing(whole, tmp_path, capsys):
    """20 SIGKILLs, 5 of them while a checkpoint is being written, and 5 SIGTERMs."""
    rng = np.random.default_rng(0)
    kinds = rng.permutation(["SIGKILL"] * 15 + ["writing"] * 5 + ["SIGTERM"] * 5)
    for how in kinds:
        status, name, said = interrupt(tmp_path, how, int(rng.integers(1, 2 * SAVE)))
        again = repeated(tmp_path)
        with capsys.disabled():
            print(f"\n{how}: {name or ''} {again} steps to repeat", end="")
        if how == "SIGTERM":
            assert (status, again) == (143, 0), said
            continue
        assert status == -signal.SIGKILL, said
        # Beyond one interval: the steps done while the last save was being written.
        assert again <= SAVE + (SAVE if uncommitted(tmp_path) else 0)
        if how == "writing":
            assert re.fullmatch(r"\d+\.orbax-checkpoint-tmp.*", name)
    process = start(tmp_path, 0.0)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert "unreadable" not in said
    assert runs.trace(tmp_path) == runs.trace(whole)
    runs.assert_identical(runs.state(tmp_path, STEPS), runs.state(whole, STEPS))
    assert not uncommitted(tmp_path)
