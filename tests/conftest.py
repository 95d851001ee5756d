"""Eight virtual CPU devices; rank promotion raises; see pyproject for warnings."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command does; see cli.py
# LLVM's optimisations are half of the time that compiling takes; XLA's own stay. Flags
# from outside come later, so they win.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)

import pathlib

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


# The files that take longest, first: with a file per process, one of them at the end
# would keep a single process busy.
LONG = ("train", "notebooks", "pretrain_notebook", "processes", "analysis", "measure")
LONG += ("parallel", "transfer", "sweep", "demo", "xray", "classify", "decoder", "mae")


def pytest_collection_modifyitems(items):
    names = [f"test_{name}.py" for name in LONG]
    items.sort(
        key=lambda item: (
            names.index(item.path.name) if item.path.name in names else len(names)
        )
    )


class Golden(dict):
    """A recording as a flat mapping; `group("params")` gives one group of it."""

    def group(self, name: str) -> dict[str, np.ndarray]:
        start = name + "/"
        return {k[len(start) :]: v for k, v in self.items() if k.startswith(start)}


@pytest.fixture(scope="session")
def golden():
    """`golden("moco_v3")` -> the arrays of tests/golden/moco_v3.npz."""
    folder = pathlib.Path(__file__).parent / "golden"

    def load(name: str) -> Golden:
        with np.load(folder / f"{name}.npz") as file:
            return Golden({k: file[k] for k in file.files})

    return load
