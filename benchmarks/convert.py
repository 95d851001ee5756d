"""How fast a file of weights is read: ours against the library that wrote it.

    python benchmarks/convert.py                # a few minutes; needs 1 GB of disk
    python benchmarks/convert.py --rounds=9

A ViT-B/16 with its classifier, of random numbers, 346 MB, is written by torch.save,
safetensors and np.savez, and read again, with every tensor touched (summed up, by one
thread). The file is in the page cache. Each round is a process of its own for each
reader, in turns: its first load is what a user waits for; later ones write over memory
that the process has already, which helps a reader that copies. The peak is what the
first load adds to the process, in sizes of the file: a mapped file counts in it,
although the system can take these pages back. All numbers are medians of the rounds. Of
the three readers beside ours, only numpy's compares the checksums. "opened" is the same
file all the way to a network of ours, against the same reading of theirs.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from clvsmim import formats
from clvsmim.formats._read import read

WIDTH, DEPTH = 768, 12
BLOCK = {
    "norm1.weight": (WIDTH,),
    "norm1.bias": (WIDTH,),
    "attn.qkv.weight": (3 * WIDTH, WIDTH),
    "attn.qkv.bias": (3 * WIDTH,),
    "attn.proj.weight": (WIDTH, WIDTH),
    "attn.proj.bias": (WIDTH,),
    "norm2.weight": (WIDTH,),
    "norm2.bias": (WIDTH,),
    "mlp.fc1.weight": (4 * WIDTH, WIDTH),
    "mlp.fc1.bias": (4 * WIDTH,),
    "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
    "mlp.fc2.bias": (WIDTH,),
}
SHAPES = {
    "cls_token": (1, 1, WIDTH),
    "pos_embed": (1, 197, WIDTH),
    "patch_embed.proj.weight": (WIDTH, 3, 16, 16),
    "patch_embed.proj.bias": (WIDTH,),
    **{f"blocks.{i}.{k}": shape for i in range(DEPTH) for k, shape in BLOCK.items()},
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
    "head.weight": (1000, WIDTH),
    "head.bias": (1000,),
}


def ours(path: str) -> float:
    return sum(float(x.sum()) for x in read(path).tensors.values())


def opened(path: str) -> float:
    """Recognised, mapped, checked: what `init.path` and `clvsmim analyze` wait for."""
    params = formats.open_file(path).params
    return sum(float(x.sum()) for x in jax.tree.leaves(params))


def torch_load(path: str) -> float:
    import torch

    tensors = torch.load(path, weights_only=True, mmap=False)["model"]
    return sum(float(x.sum()) for x in tensors.values())


def safetensors_numpy(path: str) -> float:
    from safetensors.numpy import load_file

    return sum(float(x.sum()) for x in load_file(path).values())


def np_load(path: str) -> float:
    with np.load(path) as file:
        return sum(float(x.sum()) for x in dict(file).values())


FILES = {
    "model.pth": torch_load,
    "model.safetensors": safetensors_numpy,
    "model.npz": np_load,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(*one(*args.one))
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?"
    print(f"{platform.machine()}, {cores} of {os.cpu_count()} cores")
    for name in ("numpy", "safetensors", "torch"):
        if importlib.util.find_spec(name):
            print(f"{name} {importlib.metadata.version(name)}")
    print(f"\n  {'':18}{'first load, s':>26}{'again, s':>26}{'peak, files':>18}")
    print(f"  {'':18}" + f"{'ours':>9}{'theirs':>9}{'ratio':>8}" * 2, end="")
    print(f"{'ours':>9}{'theirs':>9}")
    with tempfile.TemporaryDirectory() as where:
        for path in write(pathlib.Path(where)):
            compare(path, args.rounds)


def write(where: pathlib.Path) -> list[pathlib.Path]:
    """One file of each kind whose library is installed, by that library."""
    rng = np.random.default_rng(0)
    arrays = {k: rng.standard_normal(s, np.float32) for k, s in SHAPES.items()}
    np.savez(where / "model.npz", **arrays)
    if importlib.util.find_spec("safetensors"):
        from safetensors.numpy import save_file

        save_file(arrays, where / "model.safetensors")
    if importlib.util.find_spec("torch"):
        import torch

        tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
        torch.save({"model": tensors}, where / "model.pth")
    return [where / name for name in FILES if (where / name).exists()]


def compare(path: pathlib.Path, rounds: int) -> None:
    """Print the rows of one file: read, and opened as a network."""
    readers = (ours, opened, FILES[path.name])
    rows = {reader: [] for reader in readers}
    for _ in range(rounds):
        for reader in readers:
            rows[reader].append(in_a_process(reader.__name__, path))
    read_, open_, theirs = (np.median(rows[reader], axis=0) for reader in readers)
    for name, a in ((path.name, read_), ("  opened", open_)):
        print(f"  {name:18}", end="")
        for i in range(2):
            print(f"{a[i]:9.3f}{theirs[i]:9.3f}{a[i] / theirs[i]:8.2f}", end="")
        print("".join(f"{x[2] / path.stat().st_size:9.2f}" for x in (a, theirs)))


def in_a_process(reader: str, path: pathlib.Path) -> list[float]:
    command = [sys.executable, __file__, "--one", reader, str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(x) for x in said.split()]


def one(reader: str, path: str) -> tuple[float, float, float]:
    """(seconds of the first load, of a later one, bytes that the first one adds)."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
    if importlib.util.find_spec("safetensors"):
        import safetensors.numpy  # noqa: F401
    before = highest()
    seconds = [timed(globals()[reader], path)]
    added = highest() - before
    seconds += [timed(globals()[reader], path) for _ in range(3)]
    return seconds[0], statistics.median(seconds[1:]), added


def timed(read_and_touch: Callable, path: str) -> float:
    start = time.perf_counter()
    read_and_touch(path)
    return time.perf_counter() - start


def highest() -> float:
    """Most memory that this process has had, in bytes; nan where there is no /proc."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return 1024 * float(sizes[0]) if sizes else math.nan


if __name__ == "__main__":
    main()
