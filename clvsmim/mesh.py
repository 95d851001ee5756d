"""Devices as a mesh with the axes `data` and `fsdp`; what is split over which."""

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

    Raises:
      ValueError: fsdp does not divide the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    if fsdp < 1 or devices.size % fsdp:
        raise ValueError(
            f"mesh.fsdp={fsdp} does not divide the {devices.size} devices; use one of "
            f"{[n for n in range(1, devices.size + 1) if devices.size % n == 0]}"
        )
    grid = devices.reshape(-1, fsdp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract: Tree, mesh: Mesh) -> Tree:
    """FSDP rule: a big leaf is split on its largest dimension that the axis divides.

    Moments and teachers have their parameter's shape, so they follow it.
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, _spec(x.shape, mesh)), abstract)


def _spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    ways = mesh.shape["fsdp"]
    fits = [i for i, n in enumerate(shape) if n % ways == 0]
    if ways == 1 or math.prod(shape) < SMALL or not fits:
        return PartitionSpec()
    axis = max(fits, key=lambda i: shape[i])
    return PartitionSpec(*(("fsdp" if i == axis else None) for i in range(len(shape))))


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
