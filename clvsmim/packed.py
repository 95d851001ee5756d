"""A trained run as a few files: its encoder, its config, its logs.

It lies where a workdir may: it is analyzed, probed and fine-tuned like one. It cannot
be trained on, for the optimizer and what only training needs are gone. The members of
the mini zoo are packed runs inside the package, as float16; "zoo:NAME" stands for their
folders. `clvsmim convert` makes one of a foreign checkpoint, as float32.
"""

import gzip
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from clvsmim import log, meta, tree
from clvsmim.files import load_arrays, save_arrays, write_whole

Tree = Any

PREFIX = "zoo:"
ZOO = epath.Path(__file__).parent / "zoo"
WEIGHTS = "weights.npz"
LOGS = ("log.jsonl", "xray.jsonl")
# Contrastive learning's heads and its teacher: no measurement or picture uses them.
DROPPED = ("projector", "predictor", "teacher", "teacher_stats")


def pack(
    trained: Any, workdir: str, folder: str, dtype: type[np.floating] = np.float16
) -> None:
    """Write what `analyze.load` read of a workdir, and its logs, to `folder`.

    Its meta.json has what that of the workdir has, and what `write` adds.
    """
    about = {
        "step": trained.step,
        "seconds": round(seconds(log.read(f"{workdir}/log.jsonl"))),
    }
    write(
        folder,
        kept({"params": trained.params, "extra": trained.extra}),
        (meta.read_meta(workdir) or {}) | about,
        {name: _log(workdir, name) for name in LOGS},
        dtype,
    )


def write(
    folder: str,
    whole: Tree,
    about: dict[str, Any],
    logs: dict[str, bytes],
    dtype: type[np.floating] = np.float32,
) -> None:
    """A packed run of {"params", "extra"}, of facts, and of the text of its logs.

    Its meta.json has the facts and the SHA-256 of every other file.
    """
    arrays = {name: np.asarray(x, dtype) for name, x in tree.named(whole).items()}
    # What is shipped in halves is made as small as it gets.
    save_arrays(f"{folder}/{WEIGHTS}", arrays, small=dtype is np.float16)
    for name, text in logs.items():
        # No time of writing inside: the same log makes the same file.
        write_whole(f"{folder}/{name}.gz", gzip.compress(text, mtime=0))
    files = (WEIGHTS, *(f"{name}.gz" for name in logs))
    sums = {name: sha256(f"{folder}/{name}") for name in files}
    meta.write_meta(folder, about | {"sha256": sums})


def _log(workdir: str, name: str) -> bytes:
    """The text of a log, also of one that is packed already; b"" without it."""
    path = epath.Path(workdir) / name
    small = path.with_name(f"{name}.gz")
    if path.exists():
        return path.read_bytes()
    return gzip.decompress(small.read_bytes()) if small.exists() else b""


def names() -> list[str]:
    """The members that are installed."""
    return sorted(p.name for p in ZOO.iterdir() if is_packed(p))


def place(run: str) -> str:
    """The folder of "zoo:NAME"; any other `run` as it is.

    Raises:
      ValueError: there is no such member.
    """
    if not run.startswith(PREFIX):
        return run
    name, known = run.removeprefix(PREFIX), names()
    if name in known:
        return str(ZOO / name)
    if known:
        raise ValueError(f"no {name!r} in the zoo; known: {', '.join(known)}")
    raise ValueError(
        f"{run}: this installation has none of the zoo's files; install clvsmim from "
        "its repository, or train one: clvsmim train --config=configs/mini_zoo.py:..."
    )


def is_packed(folder: str) -> bool:
    """Whether `folder` holds a packed run."""
    return (epath.Path(folder) / WEIGHTS).exists()


def read(
    folder: str,
    *,
    fields: Sequence[str] = ("params", "extra"),
    sharding: jax.sharding.Sharding | None = None,
) -> tuple[dict[str, Any], int]:
    """As `checkpoint.restore_params`, in float32.

    Raises:
      ValueError: the weights are not those that were packed.
    """
    about = meta.read_meta(folder) or {}
    want = about.get("sha256", {}).get(WEIGHTS)
    path = f"{folder}/{WEIGHTS}"
    if sha256(path) != want:
        raise ValueError(f"{path} is damaged: another SHA-256 than in meta.json")
    arrays = load_arrays(path, tuple(f"{field}/" for field in fields))
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    placed = {name: jax.device_put(x, sharding) for name, x in arrays.items()}
    return {field: {} for field in fields} | tree.nest(placed), about["step"]


def only(saved: Tree, wanted: Tree) -> Tree:
    """{"params", "extra"} without heads that are not wanted.

    A converted file keeps all that it had, also what no objective here reads.
    """
    return {
        field: {
            "encoder": saved[field].get("encoder", {}),
            "heads": _shared(saved[field].get("heads", {}), wanted[field]["heads"]),
        }
        for field in wanted
    }


def _shared(saved: Tree, wanted: Tree) -> Tree:
    names = tree.named(wanted)
    return tree.nest({n: x for n, x in tree.named(saved).items() if n in names})


def kept(whole: Tree) -> Tree:
    """{"params", "extra"} without what packing leaves out."""
    return {
        field: {"encoder": part["encoder"], "heads": _used(part["heads"])}
        for field, part in whole.items()
    }


def _used(heads: Tree) -> Tree:
    return {
        name: _used(x) if isinstance(x, dict) else x
        for name, x in heads.items()
        if name not in DROPPED
    }


def seconds(records: Sequence[log.Record]) -> float:
    """Of training, over all its starts, each of which counts from its own 0.

    The first record of a start has no speed, for there is none before it.
    """
    known = [r for r in records if "seconds" in r]
    ends = [
        a["seconds"]
        for a, b in zip(known, known[1:], strict=False)
        if "images_per_second" not in b
    ]
    return sum(ends) + (known[-1]["seconds"] if known else 0.0)


def sha256(path: str) -> str:
    """Of a file, in hex; by and by, for it may be larger than the memory."""
    found = hashlib.sha256()
    with epath.Path(path).open("rb") as file:  # one in a bucket has no `readinto`
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()
