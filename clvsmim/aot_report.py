"""Compile one program for a topology and say all that is known of the result."""

import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from clvsmim import hlo, roofline

Tree = Any
Report = dict[str, Any]
UTILISATION = 0.4  # of the peak: an assumption, stated wherever it is used


class Place(NamedTuple):
    """A topology: its devices, and the grid of chips of one slice."""

    name: str
    slices: int
    devices: tuple[jax.Device, ...]
    shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.devices[0].device_kind

    @property
    def chips(self) -> int:
        return self.slices * int(np.prod(self.shape))


def report(
    lower: Callable[[], jax.stages.Lowered],
    place: Place,
    *,
    what: str,
    change: str,
    mesh: jax.sharding.Mesh,
    batch: int,
    parameters: tuple[int, int],
    held: dict[str, int],
    work: float | None,
    steps: int | None = None,
    passes: int = 1,
) -> Report:
    """Compile, and everything that is known of the result, as plain numbers.

    Bytes, operations and seconds are of one device and one step. `held` is what
    the program is given, without the padding of tiles. `work` is in operations per
    image; `steps` are those of a whole training.
    """
    devices = mesh.size
    told = f" with {change}" if change else ""
    print(f"compiling the {what} for {place.name}{told}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    given = sum(held.values())
    compiled, needs, hbm = compile_or_short(lower(), given)
    chip = roofline.CHIPS.get(place.kind)
    found = {
        "topology": place.name,
        "slices": place.slices,
        "device": place.kind,
        "devices": devices,
        "chips": place.chips,
        "what": what,
        "change": change,
        "mesh": dict(mesh.shape),
        "batch": batch,
        "steps": steps,
        "parameters": {"encoder": parameters[0], "all": parameters[1]},
        "compile_seconds": round(time.monotonic() - begun, 1),
        "fits": compiled is not None,
        "hbm": hbm or (chip and chip.hbm),
        "needs": needs,
        "held": held,
        "flops": {"analytic": work and work * batch / devices},
    }
    if compiled is None:
        return found
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    summary = hlo.read(compiled.as_text(), devices=devices)
    found["flops"]["compiler"] = cost["flops"]
    operations = [x for x in found["flops"].values() if x]
    if passes > 1:  # only products take several passes, and only these count by hand
        operations = operations[:1]
    given = memory.argument_size_in_bytes
    # What it reads and writes anyway, where too much counts as on the chip.
    least = given + memory.output_size_in_bytes
    far = max(cost["bytes accessed"] - summary.near, least)
    times = None
    if chip:
        times = roofline.seconds(
            place.kind,
            flops_per_device=max(operations),
            bytes_per_device=far,
            collectives=summary.collectives,
            shape=place.shape,
            slices=place.slices,
            passes=passes,
        )
    return found | {
        "needs": memory.peak_memory_in_bytes,
        "arguments": given,
        "largest": [value._asdict() for value in summary.largest],
        "bytes_moved": {"all": cost["bytes accessed"], "hbm": far},
        "loops": list(summary.loops),
        "collectives": tabled(summary.collectives),
        "roofline": times and bounded(times, batch),
        "hours": times and steps and hours(times, steps, operations),
    }


def compile_or_short(
    lowered: jax.stages.Lowered, given: int
) -> tuple[jax.stages.Compiled | None, int | None, int | None]:
    """(compiled, None, None), or (None, bytes needed, bytes there) if it cannot fit.

    Args:
      given: bytes of its arguments.

    Raises:
      ValueError: the compiler refuses for another reason.
    """
    try:
        return lowered.compile(), None, None
    except jax.errors.JaxRuntimeError as error:
        short = shortage(str(error), given)
        if short is None:
            why = str(error).strip().split("\n")[0]
            raise ValueError(f"the TPU compiler refuses: {why}") from error
        return None, *short


def shortage(message: str, given: int) -> tuple[int, int] | None:
    """(bytes needed, bytes there) of a message that memory is exhausted, else None.

    One of the two messages is about temporaries alone, without the `given` arguments.
    """
    size = r"\(?([\d.]+)([KMGT]?)\)?"
    for pattern in (
        rf"required for .*?{size} exceeds available HBM {size}",
        rf"Used {size} of {size} hbm",
    ):
        match = re.search(pattern, message)
        if "RESOURCE_EXHAUSTED" in message and match:
            scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            need, need_unit, have, have_unit = match.groups()
            needed = round(float(need) * scale[need_unit])
            if "temporaries" in match[0]:
                needed += given
            return needed, round(float(have) * scale[have_unit])
    return None


def tabled(collectives: Sequence[hlo.Collective]) -> list[dict[str, Any]]:
    """[{"kind", "origin", "count", "bytes", "group"}], largest first.

    The compiler joins small ones. One of several origins counts where most of its
    bytes come from; "bytes" are those of each origin in any, so some have no count.
    """
    rows: dict[tuple, list[int]] = {}
    for one in collectives:
        _, main = max(one.parts, default=(0, "unnamed"))
        rows.setdefault((one.kind, main, one.group), [0, 0])[0] += one.times
        for size, origin in one.parts:
            row = rows.setdefault((one.kind, origin, one.group), [0, 0])
            row[1] += size * one.times
    names = ("kind", "origin", "group", "count", "bytes")
    table = [dict(zip(names, (*key, *row), strict=True)) for key, row in rows.items()]
    return sorted(table, key=lambda row: -row["bytes"])


def bounded(times: dict[str, float], batch: int) -> dict[str, Any]:
    """Times, the longest of them, and the images per second at that."""
    binds, least = roofline.bound(times)
    speed = batch / least
    return {**times, "binds": binds, "seconds": least, "images_per_second": speed}


def hours(
    times: dict[str, float], steps: int, operations: Sequence[float]
) -> dict[str, float]:
    """Of a whole training: at the roofline, and with `UTILISATION` of the peak, or at
    the roofline where that is longer.

    Args:
      operations: those that count for utilisation, then, if any, those of the compiler,
        which computes some a second time to save memory.
    """
    _, least = roofline.bound(times)
    useful = times["compute"] * operations[0] / max(operations)
    usual = max(least, useful / UTILISATION)
    return {"roofline": steps * least / 3600, "usual": steps * usual / 3600}


def nbytes(tree: Tree) -> int:
    """Bytes on one device, each leaf as it is split, without padding."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
