"""Two real steps of a run, saved and restored, and what they say about the whole."""

import collections
import contextlib
import hashlib
import time
import uuid
from typing import Any

import jax
import numpy as np
from etils import epath

from clvsmim import build, inspect_data, machine, train, tree
from clvsmim import mesh as meshes
from clvsmim.checkpoint import Checkpoints, saved_steps
from clvsmim.machine import FIX, OK, WARNING, Finding, gigabytes
from clvsmim.rollcall import Roll

Facts = dict[str, Any]


def rehearse(
    program: build.Program,
    settings: Facts,
    roll: Roll,
    *,
    workdir: str | None,
    speed: Facts,
) -> Finding:
    """Compile the step, take two on real batches, save the state and restore it.

    Every process must call it.

    Args:
      workdir: where to save, in a folder that is deleted again; None does not save.
      speed: of the input of this host, as `inspect_data.speed` tells.

    Raises:
      ValueError: an image cannot be read, a device is too small, nothing can be saved.
    """
    data = two_batches(program, settings, roll)
    path = "" if saved_steps(workdir or "") else build.init_section(**settings["init"])
    given = train.given_encoder(program, path, settings["input"])
    try:
        begun = time.monotonic()
        init = program.init.lower(given).compile()
        step = program.step.lower(program.state, program.batch).compile()
        compiling = time.monotonic() - begun
        roll.gather("the compiled step", "")  # collectives do not wait for ever
        state, _ = step(init(given), meshes.put(data[0], program.mesh))
        batch = jax.block_until_ready((state, meshes.put(data[1], program.mesh)))[1]
        begun = time.monotonic()
        state, logs = jax.block_until_ready(step(state, batch))
        seconds = time.monotonic() - begun
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Finding(FIX, too_large(program, error))
    found = {k: float(logs[k]) for k in ("loss", "gradient_norm")}
    for name, value in found.items():
        if not np.isfinite(value):
            return Finding(
                FIX, f"{name} is {value} at step 2; lower optim.schedule.base"
            )
    done = (saved_steps(workdir) if workdir else []) or [0]
    left, rate = program.total - done[-1], settings["batch"] / seconds
    told = [
        f"compiled in {compiling:.1f} s; the second step took {seconds:.3g} s, "
        f"{rate:.0f} images/s; loss {found['loss']:.4g}; {peak(step)}",
        f"{left} steps at that speed take {left * seconds / 3600:.3g} hours",
        save_and_restore(program, state, workdir, roll)
        if workdir
        else "not saved, without --workdir",
    ]
    facts = {"splits": {}, "steps_per_epoch": program.steps_per_epoch}
    facts["speed"] = speed | {"asked": rate / len(roll.hosts)}
    slow = inspect_data.find_problems(facts, settings)
    if slow:
        fed = speed["images_per_second"] * len(roll.hosts)
        hours = left * settings["batch"] / fed / 3600
        slow = [*slow, f"with the input as it is, the steps take {hours:.3g} hours"]
    return Finding(WARNING if slow else OK, "; ".join([*told, *slow]))


def two_batches(program: build.Program, settings: Facts, roll: Roll) -> list[Facts]:
    """This process's rows of the first two batches; all processes have theirs then.

    Raises:
      ValueError: one of them has not.
    """
    problem, found = "", []
    stream = train.load(program, settings, 0)
    with contextlib.closing(stream):
        try:
            found = [next(stream) for _ in range(2)]
        except Exception as error:  # a source may raise anything
            problem = str(error) or type(error).__name__
    problems = roll.gather("the first batches", problem)
    if any(problems):
        raise ValueError(problem or "another process has no batch")
    return found


def too_large(program: build.Program, error: Exception) -> str:
    """What to do where the memory of a device is too small."""
    encoder = program.objective.encoder.spec
    ways = [] if encoder.remat else ["--config.encoder.remat=True"]
    devices = program.mesh.devices.flat
    most = min(collections.Counter(map(meshes.slice_of, devices)).values())
    if program.mesh.shape["fsdp"] < most:
        ways.append(f"--config.mesh.fsdp={most}")
    first = str(error).strip().splitlines()[0][:200]
    return f"out of memory: {first}; try {', '.join([*ways, 'a smaller batch'])}"


def peak(step: jax.stages.Compiled) -> str:
    """The most memory that a device needed, in words."""
    told = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if told:
        return f"peak memory {gigabytes(told)} of {gigabytes_or_unknown()}"
    analysis = step.memory_analysis()
    if analysis is None:
        return "peak memory not known"
    return f"peak memory {gigabytes(analysis.peak_memory_in_bytes)} by the compiler"


def gigabytes_or_unknown() -> str:
    """The memory of a device in words."""
    most = machine.limit(jax.local_devices()[0])
    return gigabytes(most) if most else "an unknown size"


def save_and_restore(
    program: build.Program, state: tree.Tree, workdir: str, roll: Roll
) -> str:
    """Write the state to a folder in the workdir and read it back; in words.

    The state is deleted in between, so that no device holds two.

    Raises:
      ValueError: it cannot be written, or is not the same bit for bit.
    """
    token = roll.gather("the name of the rehearsal", uuid.uuid4().hex[:12])[0]
    folder = epath.Path(workdir) / f".doctor_{token}"
    try:
        before, begun = digests(state), time.monotonic()
        with Checkpoints(str(folder), keep=1) as checkpoints:
            checkpoints.save(2, state)
            checkpoints.wait()
            saving = time.monotonic() - begun
            jax.tree.map(lambda x: x.delete(), state)
            begun = time.monotonic()
            after = digests(checkpoints.restore(program.state)[0])
            restoring = time.monotonic() - begun
    finally:
        roll.gather("the end of the rehearsal", "")
        if roll.index == 0:
            folder.rmtree(missing_ok=True)
    other = [name for name, digest in before.items() if after[name] != digest]
    if other:
        raise ValueError(
            f"{len(other)} of {len(before)} arrays came back other than they were "
            f"saved, such as {other[0]}: the storage of {workdir} is not to be trusted"
        )
    return f"saved in {saving:.1f} s, restored in {restoring:.1f} s, bit for bit"


def digests(state: tree.Tree) -> dict[str, tuple]:
    """SHA-256 of what this process has of every leaf, by name and place."""
    return {name: _digest(x) for name, x in tree.named(state).items()}


def _digest(x: jax.Array) -> tuple:
    shards = {str(shard.index): shard.data for shard in x.addressable_shards}
    return tuple(
        (index, hashlib.sha256(np.asarray(data).tobytes()).hexdigest())
        for index, data in sorted(shards.items())
    )
