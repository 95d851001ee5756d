"""Devices as a mesh with the axes `data` and `fsdp`; what is split over which."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
SMALL = 2**16  # elements; below it a leaf is cheaper to replicate than to gather

Tree = Any


def make(devices: Sequence[jax.Device] | None = None, *, fsdp: int = 1) -> Mesh:
    """A (data, fsdp) mesh. The batch is split over both axes, big leaves over fsdp.

    The devices of a process are neighbours, and those of a slice are: a parameter is
    shared within a slice, and within a host if it has enough devices, so that only
    gradients cross the slower network between slices.

    Args:
      devices: all by default; also those of an AOT topology.

    Raises:
      ValueError: fsdp does not divide the number of devices, or of those of a slice.
    """
    devices = ordered(jax.devices() if devices is None else devices)
    slices = collections.Counter(map(slice_of, devices))
    each = math.gcd(*slices.values())
    if fsdp < 1 or each % fsdp:
        which = f"the {len(devices)} devices"
        if len(slices) > 1:
            which = f"the {each} devices of each of the {len(slices)} slices"
        raise ValueError(
            f"mesh.fsdp={fsdp} does not divide {which}; use one of "
            f"{[n for n in range(1, each + 1) if each % n == 0]}"
        )
    grid = np.asarray(devices).reshape(-1, fsdp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def ordered(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Devices by slice, then by process, else as they are.

    Process i reads the i-th part of every global batch, so its devices must be the
    i-th part of the mesh: the devices of a topology go by rows of the whole slice, and
    `mesh_utils.create_device_mesh` by its axes. Processes are numbered along the axes
    of a slice, so a group of 2^k of them is a block of chips that are linked directly.
    """
    return sorted(devices, key=lambda d: (slice_of(d), d.process_index))


def slice_of(device: jax.Device) -> int:
    """The slice of a TPU; other devices have no such hierarchy that matters here."""
    tpu = device.platform == "tpu"
    return (getattr(device, "slice_index", None) or 0) if tpu else 0


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract: Tree, mesh: Mesh) -> Tree:
    """FSDP rule: a big leaf is split on the first dimension that the axis divides.

    But on its longest one only if it must be, where there are three: q, k and v have
    (width, heads, head width). A TPU stores the longest innermost there, and makes a
    reduce-scatter of a gradient only if the outermost is split; else it sums whole
    gradients on every device (docs/performance.md).

    Moments and teachers have their parameter's shape, so they follow it.
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, _spec(x.shape, mesh)), abstract)


def _spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    ways = mesh.shape["fsdp"]
    order = list(range(len(shape)))
    if len(shape) == 3:
        order.sort(key=lambda i: shape[i] == max(shape))
    fits = [i for i in order if shape[i] % ways == 0]
    if ways == 1 or math.prod(shape) < SMALL or not fits:
        return PartitionSpec()
    return PartitionSpec(*("fsdp" if i == fits[0] else None for i in range(len(shape))))


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raise ValueError unless every device gets the same number of images."""
    if batch < 1 or batch % mesh.size:
        below = max(batch // mesh.size, 1) * mesh.size
        raise ValueError(
            f"batch {batch} does not divide over {mesh.size} devices; use {below} "
            f"or {below + mesh.size}"
        )


def put(batch: Tree, mesh: Mesh) -> Tree:
    """Host arrays of this process's rows -> global arrays, split over all devices."""
    sharding = batch_sharding(mesh)
    # With several processes JAX counts this transfer, which is asked for, as implicit.
    with jax.transfer_guard("allow"):
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
            batch,
        )
