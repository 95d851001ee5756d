"""What a run will meet, before it starts: folder, config, data, memory and space.

Every check returns a `Finding`, or raises what is to be fixed. Nothing stays behind.
"""

import contextlib
import itertools
import json
import math
import pathlib
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from clvsmim import build, inspect_data, meta, train, transfer, tree
from clvsmim.checkpoint import saved_steps
from clvsmim.machine import FIX, OK, WARNING, Finding, gigabytes, limit
from clvsmim.rollcall import Roll

Facts = dict[str, Any]
IMAGES, SECONDS = 64, 2.0  # opened of each split; of timing the input, twice
PATIENCE = 10.0  # seconds until what another host wrote must be seen


@contextlib.contextmanager
def as_it_was(workdir: str | None) -> Iterator[None]:
    """Afterwards no folder is there that was not, if it is empty."""
    absent = _absent(epath.Path(workdir)) if workdir else []
    try:
        yield
    finally:
        for folder in absent:
            _problem(folder.rmdir)


def _absent(path: epath.Path) -> list[epath.Path]:
    """The folders of a path that are not there, the innermost first.

    Of a gs:// path the last alone: what is above it is a bucket or no folder at all.
    """
    folders = (path,) if "://" in str(path) else (path, *path.parents)
    try:
        return list(itertools.takewhile(lambda folder: not folder.exists(), folders))
    except Exception:  # no rights to look: check_workdir says so
        return []


def check_workdir(workdir: str, roll: Roll) -> Finding:
    """Whether every host can write, read and delete there, in one and the same folder.

    Every process must call it.
    """
    token = roll.gather("the workdir's name", uuid.uuid4().hex[:12])[0]
    names = [f".doctor_{token}_{i}" for i in range(len(roll.hosts))]
    files = [epath.Path(workdir) / name for name in names]
    mine = files[roll.index]

    def write() -> None:
        meta.check_writable(workdir)
        mine.write_text(mine.name)

    problem = _problem(write)
    try:
        problems = roll.gather("writing to the workdir", problem)
        unseen = [] if any(problems) else [i for i, f in enumerate(files) if _unseen(f)]
        roll.gather("reading the workdir", "")
    finally:
        stuck = _problem(lambda: mine.unlink(missing_ok=True))
    if problem:
        return Finding(FIX, problem)
    if unseen:
        others = ", ".join(f"{i} ({roll.hosts[i]})" for i in unseen)
        return Finding(
            FIX,
            f"hosts see different folders: what process {others} wrote to {workdir} is "
            "not there; use a folder that all hosts share, NFS or gs://",
        )
    if stuck:
        return Finding(
            FIX, f"files in {workdir} cannot be deleted ({stuck}); grant that too"
        )
    return Finding(OK, f"{workdir} can be written, read and deleted in")


def _unseen(path: epath.Path) -> bool:
    """Whether a file does not say its own name, even after some seconds of network."""
    until = time.monotonic() + PATIENCE

    def says() -> None:
        if path.read_text() != path.name:
            raise ValueError("another text")

    while _problem(says):
        if time.monotonic() > until:
            return True
        time.sleep(0.2)
    return False


def _problem(action: Callable[[], Any]) -> str:
    """What goes wrong in an action, "" if nothing."""
    try:
        action()
    except Exception as error:  # gs:// raises its own classes
        return str(error) or type(error).__name__
    return ""


def check_config(program: Callable[[], build.Program], settings: Facts) -> Finding:
    """Whether the config can be built on these devices, and what it comes to.

    The text ends with a number of the config, without folders of data: hosts that do
    not train by the same one show it.
    """
    made = program()
    text = re.sub(r'"(dir|path)": "[^"]*"', "", json.dumps(settings, sort_keys=True))
    axes = " x ".join(f"{name} {ways}" for name, ways in made.mesh.shape.items())
    return Finding(
        OK,
        f"{settings['objective']['name']}, {made.total} steps of {settings['batch']} "
        f"images, mesh {axes}, {build.count(made.state.params) / 1e6:.3g} M parameters "
        f"(config {zlib.crc32(text.encode()):08x})",
    )


def check_init(settings: Facts, workdir: str | None) -> Finding:
    """Whether this host sees the encoder that the run starts from.

    Where one does not, the others would wait for it while they read.
    """
    path = build.init_section(**settings["init"])
    if workdir and saved_steps(workdir):
        return Finding(OK, f"{path} is not needed again")
    transfer.check_there(path)
    return Finding(OK, f"{path} is there")


def check_run(program: build.Program, settings: Facts, workdir: str) -> Finding:
    """Whether the workdir is free, or holds the beginning of this same run.

    Raises:
      ValueError: it holds another run, or the encoder to start from is no such.
    """
    found = meta.read_meta(workdir)
    if found is not None:
        here = {"images": train.images(program)}
        there = {key: found[key] for key in here if key in found}
        here = {key: here[key] for key in there}
        meta.check_same(workdir, found["config"] | there, settings | here, train.FREE)
    steps = saved_steps(workdir)
    if steps:
        return Finding(OK, f"goes on at step {steps[-1]} of {program.total}")
    path = build.init_section(**settings["init"])
    train.given_encoder(program, path, settings["input"])
    return Finding(OK, f"starts at step 0{f' from {path}' if path else ''}")


def check_data(program: build.Program, settings: Facts, speed: Facts) -> Finding:
    """Whether the images can be read, and how fast, which is put into `speed`.

    Raises:
      ValueError: more of them are unreadable than training would bear.
    """
    splits = {"train": program.source, "test": program.held_out}
    splits = {k: source for k, source in splits.items() if source is not None}
    found = {k: inspect_data.describe(x, k, IMAGES) for k, x in splits.items()}
    for name, it in found.items():
        if it["opened"] == len(it["unreadable"]):
            raise ValueError(
                f"none of {it['opened']} images of the {name} split can be read, such "
                f"as: {it['unreadable'][0]}"
            )
    views = program.objective.views
    speed.update(inspect_data.speed(program.source, views, settings, SECONDS))
    counts = ", ".join(
        f"{it['images']} {k} images of {it['classes']} classes"
        for k, it in found.items()
    )
    text = f"{counts}; this host makes {speed['images_per_second']:.0f} images/s"
    facts = {"splits": found, "steps_per_epoch": program.steps_per_epoch}
    facts["speed"] = speed | {"asked": 0.0}
    wrong = inspect_data.find_problems(facts, settings)
    return Finding(WARNING if wrong else OK, "; ".join([text, *wrong]))


def check_memory(program: build.Program) -> Finding:
    """Whether the state fits into a device, and what this host saves of it into its
    memory."""
    device = jax.local_devices()[0]
    each, here = bytes_of(program.state)
    most, host = limit(device), available()
    text = f"the state takes {gigabytes(each)} of each device"
    if most is not None and each > most:
        return Finding(
            FIX,
            f"{text}, which has {gigabytes(most)}; split it with --config.mesh.fsdp",
        )
    if host is None:
        return Finding(OK, f"{text}; the memory of this host is not known")
    need = here * (2 if device.platform == "cpu" else 1)  # the state itself, its copy
    text += f"; saving it, {gigabytes(need)} of this host's {gigabytes(host)} free"
    if need > host:
        return Finding(FIX, f"{text}: use a larger host, or split it over more of them")
    scarce = 2 * need > host
    return Finding(WARNING if scarce else OK, text + (": scarce" if scarce else ""))


def bytes_of(state: tree.Tree) -> tuple[int, int]:
    """(on each device, on all devices of this process without what is there twice)."""
    each = here = 0
    for x in jax.tree.leaves(state):
        shard = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        places = x.sharding.addressable_devices_indices_map(x.shape).values()
        each += shard
        here += shard * len({str(place) for place in places})
    return each, here


def available() -> int | None:
    """Bytes of this host's memory that are free for programs; None if not Linux."""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/meminfo").read_text()
        if found := re.search(r"MemAvailable:\s*(\d+) kB", text):
            return int(found[1]) * 1024
    return None


def check_space(program: build.Program, *, settings: Facts, workdir: str) -> Finding:
    """Whether the checkpoints that stay, and the one being written, have room."""
    log = settings["log"]
    kept = build.log_section(**log)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state))
    count = min(kept["keep"], math.ceil(program.total / log["save"])) + 1
    if kept["keep_every"]:
        count += program.total // kept["keep_every"]
    count = max(1, count - len(saved_steps(workdir)))
    text = f"{count} more checkpoints take up to {gigabytes(count * whole)}"
    if "://" in workdir:
        return Finding(OK, f"{text}; how much is free there is not known")
    path = pathlib.Path(workdir).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    text += f", {gigabytes(free)} are free"
    if free < count * whole:
        return Finding(
            FIX, f"{text}: free some, lower log.keep or choose another --workdir"
        )
    return Finding(OK, text)
