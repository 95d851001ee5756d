"""Two processes, as two hosts: they train as one and resume as one."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from clvsmim import log

PROGRAM = """
import sys
import jax
port, process, workdir = sys.argv[1:]
if port != "0":
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
jax.config.update("jax_default_matmul_precision", "highest")
from runs import config
from clvsmim import analyze, train
# Weights that are not tiny: else BatchNorm over nearly equal CLS tokens amplifies
# rounding, whoever computes it.
weights = {"encoder__init": "moco_v3", "encoder__layer_scale": 1.0}
settings = config("hybrid", epochs=1.0, **weights)
train.train(settings, workdir)
found = analyze.analyze(
    workdir, workdir + "/analysis", split="test", images=20, batch=8,
    metrics=("distance", "fourier"),
)
print("measured", found[0].count)
"""
TESTS = pathlib.Path(__file__).parent


def start(port: int, process: int, workdir: pathlib.Path) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={2 if port else 4}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-c", PROGRAM, str(port), str(process), str(workdir)]
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
    two = finish([start(port, i, tmp_path / "two") for i in (0, 1)])
    finish([start(0, 0, tmp_path / "one")])
    assert all("measured 20" in out for out in two)
    traces = [log.read(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    one, two = ([r["loss"] for r in t] for t in traces)
    assert len(one) == len(two) == 4
    np.testing.assert_allclose(two[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(two, one, rtol=1e-3)
    states = [tmp_path / "two" / "analysis" / f"state_{i}.npz" for i in (0, 1)]
    assert all(path.exists() for path in states)  # each host wrote its own
