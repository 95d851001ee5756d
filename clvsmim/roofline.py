"""The least time that a program can take on a TPU, by the data sheets of the chips.

A roofline (Williams et al. 2009): products at the peak of the matrix units, bytes at
the bandwidth of the memory, collectives at the bandwidth of the links. The three can
overlap, so the longest is what a perfect program would take. The bytes are the
compiler's count, less what stays on the chip as far as its text tells: an estimate, so
where memory binds a run may do a little better.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from clvsmim import flops
from clvsmim.hlo import Collective

GiB = 2**30


class Chip(NamedTuple):
    """Facts of one device as JAX counts devices: a chip, or half a chip of a TPU7x.

    Attributes:
      hbm: bytes of memory that a program may use; what the TPU compiler (libtpu
        0.0.52) says is available when a program does not fit.
      bandwidth: bytes per second of that memory.
      ici: bytes per second that all links to other chips deliver, one way.
      axes: dimensions of the grid of chips; each has two links.
      dcn: bytes per second of a device's share of the network between slices.
    """

    hbm: float
    bandwidth: float
    ici: float
    axes: int
    dcn: float


# By `device_kind`. From cloud.google.com/tpu/docs, which gives the links as both ways
# together, the network in bits; the dcn of v4 is a host's 200 Gbit/s among its 4 chips.
_V5E = Chip(15.75 * GiB, 819e9, 200e9, 2, 25e9 / 8)
_V5P = Chip(95.73 * GiB, 2765e9, 600e9, 3, 50e9 / 8)
_V6E = Chip(31.24 * GiB, 1638e9, 400e9, 2, 100e9 / 8)
CHIPS = {
    "TPU v4": Chip(30.75 * GiB, 1200e9, 300e9, 3, 50e9 / 8),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": Chip(94.74 * GiB, 7380e9 / 2, 600e9 / 2, 3, 100e9 / 16),
}


def links(chip: Chip, shape: Sequence[int]) -> float:
    """Bytes per second that the least connected device of a slice receives, one way.

    A ring needs two links along an axis; where the axis is open (v5e and v6e close
    those of 16, others those of whole cubes of 4 x 4 x 4), its ends have one.
    """
    whole = len(shape) >= 3 and all(n % 4 == 0 for n in shape)
    closed = [n == 16 if chip.axes == 2 else whole for n in shape]
    used = sum((2 if c else 1) for n, c in zip(shape, closed, strict=True) if n > 1)
    return chip.ici * used / (2 * chip.axes)


def seconds(
    kind: str,
    *,
    flops_per_device: float,
    bytes_per_device: float,
    collectives: Iterable[Collective],
    shape: Sequence[int],
    slices: int = 1,
    passes: int = 1,
) -> dict[str, float]:
    """{"compute", "memory", "interconnect", "network"}: seconds of each alone.

    Args:
      kind: a `device_kind`.
      collectives: those of one step, on one device.
      shape: of the grid of chips of a slice.
      slices: how many slices share the work; "network" is between them.
      passes: how often the matrix units read a product: once in bfloat16, six times
        for float32 at full precision.

    Raises:
      ValueError: there is no data sheet for this kind.
    """
    chip, peak = CHIPS.get(kind), flops.peak(kind)
    if chip is None or peak is None:
        raise ValueError(f"no data sheet for {kind!r}; known: {', '.join(CHIPS)}")
    inside = across = 0.0
    for c in collectives:
        if c.kind == "send":
            across += c.times * c.bytes * 2 * (slices - 1) / slices
        else:
            inside += c.times * c.on_the_wire
    way = links(chip, shape)
    return {
        "compute": passes * flops_per_device / peak,
        "memory": bytes_per_device / chip.bandwidth,
        "interconnect": inside / way if way else 0.0,
        "network": across / chip.dcn,
    }


def bound(times: dict[str, float]) -> tuple[str, float]:
    """What binds, and its seconds."""
    name = max(times, key=times.get)
    return name, times[name]
