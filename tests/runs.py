"""Tiny runs of the demo's recipes: twelve steps of milliseconds each.

Compiling takes seconds and running does not, so a test shares its config with others
where it can: in one process an equal config on equal devices is the same program.
"""

import atexit
import os
import pathlib
import re
import shutil
import tempfile

import jax
import numpy as np
from models import recipe

from clvsmim import log, train, tree
from clvsmim.checkpoint import restore_params

ROOT = pathlib.Path(__file__).parent.parent
OBJECTIVES = ("moco_v3", "simmim", "hybrid", "mae", "classify")
CHANGES = {
    "encoder.image": (16, 16),
    "encoder.width": 16,
    "encoder.depth": 2,
    "encoder.heads": 2,
    "batch": 16,
    "epochs": 3.0,  # 64 / 16 steps each
    "data.source.length": 64,
    "data.source.side": 24,
    "log.every": 1,
    "log.save": 5,
    "log.keep": 9,
    "xray.share": 0.0,  # it compiles for seconds; its own tests switch it on
}
TIMES = ("seconds", "images_per_second", "data_wait", "mfu")
TOTAL = 12


def flags(devices: int) -> str:
    """XLA_FLAGS of a process that has so many virtual devices."""
    return re.sub(r"(_device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])


def share_compilations() -> None:
    """One cache for this process and the ones that it starts, as `make test` has it."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="clvsmim-jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


share_compilations()


def config(name="simmim", **changes):
    """The demo's recipe `name`, tiny; a dot in a key is written as two underscores."""
    found = recipe(name)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    found.update_from_flattened_dict(CHANGES | changes)
    return found


def overrides(**changes):
    """The same changes as flags of the command."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return [
        f"--config.{k}={v}".replace(" ", "") for k, v in (CHANGES | changes).items()
    ]


def run(workdir, name="simmim", devices=1, **changes):
    """Train `name` in `workdir`, from where it is."""
    train.train(config(name, **changes), str(workdir), devices=jax.devices()[:devices])


def state(workdir, step=None):
    """The newest checkpoint by the names of its leaves, on the host."""
    found, at = restore_params(workdir, fields=("step", "params", "extra", "opt"))
    assert step in (None, at)
    return {name: np.asarray(x) for name, x in tree.named(found).items()}


def trace(workdir):
    """The log without what differs between two runs of the same numbers."""
    records = log.read(f"{workdir}/log.jsonl")
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def assert_identical(got, want):
    """Two sets of named arrays, bit for bit."""
    assert list(got) == list(want)
    for name, x in want.items():
        y = got[name]
        assert (x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes()), name


def snapshot(folder):
    """Every path under a folder, with its bytes if it is a file."""
    paths = sorted(pathlib.Path(folder).rglob("*"))
    return {p: p.read_bytes() if p.is_file() else None for p in paths}
