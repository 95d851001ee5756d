"""The mesh, and the rule of what is split over which axis (design, law 9)."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import small

from clvsmim import build, mesh, tree


@pytest.fixture(scope="module")
def grid():
    """Eight devices as data 2 x fsdp 4."""
    return mesh.make(fsdp=4)


def test_a_mesh_has_a_data_and_an_fsdp_axis(grid):
    assert grid.shape == {"data": 2, "fsdp": 4}
    assert mesh.make().shape == {"data": 8, "fsdp": 1}
    some = mesh.make(jax.devices()[:2], fsdp=2)
    assert some.shape == {"data": 1, "fsdp": 2}
    assert list(some.devices.ravel()) == jax.devices()[:2]


def test_neighbouring_devices_share_a_parameter(grid):
    assert [list(row) for row in grid.devices] == [jax.devices()[:4], jax.devices()[4:]]


@pytest.mark.parametrize("fsdp", [3, 16, 0, -1])
def test_fsdp_must_divide_the_devices(fsdp):
    message = rf"fsdp={fsdp} does not divide the 8 devices; use one of \[1, 2, 4, 8\]"
    with pytest.raises(ValueError, match=message):
        mesh.make(fsdp=fsdp)


@dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device."""

    id: int
    slice_index: int | None
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def pod(slices):
    """As `jax.devices()` of v5e:4x4, or of several 2x4: chips by rows, 2 x 2 a host."""
    if slices == 1:
        hosts = [2 * (y // 2) + x // 2 for y in range(4) for x in range(4)]
        return [Chip(i, None, host) for i, host in enumerate(hosts)]
    return [
        Chip(100000 * s + i, s, 2 * s + i % 4 // 2)
        for i in range(8)
        for s in range(slices)
    ]


@pytest.mark.parametrize("fsdp", [1, 4, 8, 16])
def test_the_devices_of_a_host_are_neighbours(fsdp):
    """They get neighbouring rows of the batch, which that host alone reads."""
    grid = mesh.make(pod(1), fsdp=fsdp)
    found = [d.process_index for d in grid.devices.ravel()]
    assert found == sorted(found) and set(found) == {0, 1, 2, 3}
    for row in grid.devices:
        assert len({d.process_index for d in row}) == max(1, fsdp // 4)


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_a_parameter_is_shared_within_a_slice(fsdp):
    grid = mesh.make(pod(3), fsdp=fsdp)
    assert grid.shape == {"data": 24 // fsdp, "fsdp": fsdp}
    assert [len({d.slice_index for d in row}) for row in grid.devices] == [1] * (
        24 // fsdp
    )
    found = [d.process_index for d in grid.devices.ravel()]
    assert found == sorted(found)


def test_fsdp_must_fit_into_a_slice():
    message = "fsdp=16 does not divide the 8 devices of each of the 2 slices; use one"
    with pytest.raises(ValueError, match=message):
        mesh.make(pod(2), fsdp=16)


def test_no_device_ever_holds_the_whole_of_a_big_leaf(monkeypatch):
    """Neither does a host, if there are as many: a state is born in its parts."""
    monkeypatch.setattr(mesh, "SMALL", 1024)
    program = build.build(small("simmim", **{"mesh.fsdp": 8}))
    state = program.init.lower().compile()()
    big = {n: x for n, x in tree.named(state).items() if x.size >= 1024}
    assert len(big) > 20
    for name, x in big.items():
        parts = x.addressable_shards
        assert [part.data.size for part in parts] == [x.size // 8] * 8, name
        assert len({part.device for part in parts}) == 8


SPECS = [
    ((256, 256), P("fsdp", None)),  # 2^16 elements: just big enough
    ((255, 256), P()),  # one row less
    ((768, 3072), P("fsdp", None)),
    ((3072, 768), P("fsdp", None)),
    ((768, 12, 64), P(None, "fsdp", None)),  # heads
    ((768, 6, 128), P(None, None, "fsdp")),  # too few of them
    ((768, 6, 126), P("fsdp", None, None)),  # the longest as a last resort
    ((12, 64, 768), P("fsdp", None, None)),
    ((16, 16, 3, 768), P("fsdp", None, None, None)),
    ((14, 14, 3, 768), P(None, None, None, "fsdp")),
    ((1, 197, 768), P(None, None, "fsdp")),
    ((1025, 64), P(None, "fsdp")),  # what 4 divides
    ((257, 257), P()),  # nothing that 4 divides
    ((2**16,), P("fsdp")),
    ((2**16 + 1,), P()),
    ((), P()),
    ((768,), P()),
]


@pytest.mark.parametrize(("shape", "spec"), SPECS)
def test_law_a_big_leaf_is_split_where_a_tpu_stores_it_outermost(grid, shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, "float32")
    sharding = mesh.state_shardings({"x": leaf}, grid)["x"]
    assert sharding.mesh == grid and sharding.spec == spec


def test_nothing_is_split_without_an_fsdp_axis():
    leaf = jax.ShapeDtypeStruct((1024, 1024), "float32")
    assert mesh.state_shardings(leaf, mesh.make()).spec == P()


def test_the_batch_is_split_over_every_device_in_order(grid):
    rows = np.arange(16, dtype=np.int32)
    batch = mesh.put({"a": rows, "b": rows.reshape(16, 1)}, grid)
    assert batch["b"].sharding.is_equivalent_to(mesh.batch_sharding(grid), 2)
    np.testing.assert_array_equal(batch["a"], rows)
    shards = {s.device: s.data.tolist() for s in batch["a"].addressable_shards}
    assert [shards[d] for d in jax.devices()] == rows.reshape(8, 2).tolist()


def test_a_replicated_leaf_is_whole_everywhere(grid):
    x = jax.device_put(np.arange(3), mesh.replicated(grid))
    assert [s.data.shape for s in x.addressable_shards] == [(3,)] * 8


@pytest.mark.parametrize(
    ("batch", "use"),
    [(12, "8 or 16"), (20, "16 or 24"), (7, "8 or 16"), (0, "8 or 16")],
)
def test_a_batch_must_divide_over_the_devices(grid, batch, use):
    message = f"batch {batch} does not divide over 8 devices; use {use}$"
    with pytest.raises(ValueError, match=message):
        mesh.check_batch(batch, grid)


def test_a_batch_that_divides_is_accepted(grid):
    for batch in (8, 16, 24):
        mesh.check_batch(batch, grid)
