"""The scripts in benchmarks/ can be started; what they measure is not tested."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_make_runs_scripts_and_not_their_parts():
    said = subprocess.run(
        ["make", "--dry-run", "bench"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    scripts = {p.name for p in (ROOT / "benchmarks").glob("[!_]*.py")}
    assert {"train_step.py", "metrics.py", "labels.py"} <= scripts
    assert all(f"benchmarks/{name}" in said for name in scripts)
    assert "benchmarks/_" not in said


@pytest.mark.slow  # compiles a step of each kind
def test_a_training_step_is_timed_without_a_peer():
    command = "benchmarks/train_step.py --quick --rounds=1 --no-compile --only=simmim"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "SimMIM" in done.stdout and "ours" in done.stdout
