"""Two processes, as two hosts: they train as one and resume as one."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from clvsmim import analysis, log

PROGRAM = """
import sys
import jax
port, process, workdir, measured = sys.argv[1:]
if port != "0":
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
jax.config.update("jax_default_matmul_precision", "highest")
from runs import config
from clvsmim import analysis, analyze, train
from clvsmim.measure import Settings
# Weights that are not tiny: else BatchNorm over nearly equal CLS tokens amplifies
# rounding, whoever computes it.
weights = {"encoder__init": "moco_v3", "encoder__layer_scale": 1.0}
settings = config("hybrid", epochs=1.0, **weights)
train.train(settings, workdir)
settings = Settings(
    images=36, train_images=16, batch=8, group=4, every=1,
    metrics=(*analysis.METRICS, "lidar"),
)
found = analyze.analyze(measured, workdir + "/analysis", settings)
print("measured", found[0].count)
"""
TESTS = pathlib.Path(__file__).parent


def start(port: int, process: int, root: pathlib.Path) -> subprocess.Popen:
    """Train in root/one or root/two, and measure what was trained in root/one."""
    flags = f"--xla_force_host_platform_device_count={4 if port else 8}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    folders = [str(root / ("two" if port else "one")), str(root / "one")]
    command = [sys.executable, "-c", PROGRAM, str(port), str(process), *folders]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def finish(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [p.communicate(timeout=300) for p in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [out for out, _ in outputs]


def test_two_processes_train_and_measure_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finish([start(0, 0, tmp_path)])
    two = finish([start(port, i, tmp_path) for i in (0, 1)])
    assert all("measured 36" in out for out in two)
    traces = [log.read(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    one, two = ([r["loss"] for r in t] for t in traces)
    assert len(one) == len(two) == 4
    np.testing.assert_allclose(two[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(two, one, rtol=1e-3)
    one, two = (analysis.read_series(tmp_path / n / "analysis") for n in ("one", "two"))
    assert one["stamp"] == two["stamp"]
    assert_agree(two["series"], one["series"])
    files = {p.name for p in (tmp_path / "two" / "analysis").iterdir()}
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
