"""Attention distance against closed forms, hand-made cases and recorded numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import (
    attention_distance,
    cls_attention,
    cls_mass,
    grid_distances,
    null_rows,
)
from clvsmim.plugin import load

G14 = {"grid": (14, 14), "patch": 16, "prefix": 0}
ROWS = [[7, 1, 1, 1], [1, 7, 1, 1], [2, 2, 5, 1], [2.5, 2.5, 2.5, 2.5]]


def gaussian(sigma: float) -> np.ndarray:
    """Attention falling off with the distance in pixels, 14 x 14 patches of 16."""
    near = np.exp(-((grid_distances((14, 14), 16).astype(float) / sigma) ** 2) / 2)
    return near / near.sum(axis=1, keepdims=True)


def one_hot(keys: np.ndarray) -> np.ndarray:
    return np.eye(len(keys))[keys]


def with_cls(inner: np.ndarray, mass: list[float]) -> np.ndarray:
    """A row of CLS on top, and `mass` of every patch query moved to the CLS column."""
    column = np.asarray(mass)[:, None]
    rows = np.concatenate([column, inner * (1 - column)], axis=1)
    return np.concatenate([np.full((1, len(inner) + 1), 0.2), rows])


def random_attention(key: int, *shape: int) -> jax.Array:
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(key), shape), axis=-1)


@pytest.mark.parametrize(
    "grid, patch, pixels",
    [
        ((14, 14), 16, 116.4922),
        ((16, 16), 14, 116.565),
        ((7, 7), 32, 115.503),
        ((8, 8), 4, 16.5459),
        ((4, 4), 4, 8.0321),
        ((2, 2), 16, 16 * (2 + np.sqrt(2)) / 4),
        ((1, 3), 1, 8 / 9),
    ],
)
def test_uniform_attention(grid, patch, pixels):
    uniform = jnp.full((grid[0] * grid[1],) * 2, 1 / (grid[0] * grid[1]))
    far = attention_distance(uniform, grid=grid, patch=patch, prefix=0)
    np.testing.assert_allclose(far, pixels, rtol=1e-5)


@pytest.mark.parametrize(
    "sigma, pixels", [(16, 18.431), (32, 36.680), (64, 67.156), (128, 98.604)]
)
def test_gaussian_attention(sigma, pixels):
    far = attention_distance(jnp.asarray(gaussian(sigma)), **G14)
    np.testing.assert_allclose(far, pixels, atol=1e-3)


def test_one_key_per_query():
    right = np.arange(196) + (np.arange(196) % 14 != 13)
    farthest = grid_distances((14, 14), 16).argmax(axis=1)
    for keys, pixels in ((np.arange(196), 0), (right, 14.8571), (farthest, 228.528)):
        far = attention_distance(jnp.asarray(one_hot(keys)), **G14)
        np.testing.assert_allclose(far, pixels, atol=1e-3)


def test_distances_between_patches_are_in_pixels_and_row_major():
    far = grid_distances((2, 3), 10)
    np.testing.assert_allclose(far[0], [0, 10, 20, 10, 10 * 2**0.5, 10 * 5**0.5])
    uniform = grid_distances((14, 14), 16).mean(axis=1)
    np.testing.assert_allclose(uniform[[0, 7 * 14 + 7]], [161.030, 86.019], atol=1e-3)


def test_hand_made_case_with_and_without_cls():
    inner = np.array(ROWS) / 10
    embedded = with_cls(inner, [0.5, 0.2, 0, 0.9])
    for attention, prefix in ((inner, 0), (embedded, 1)):
        far = attention_distance(
            jnp.asarray(attention), grid=(2, 2), patch=1, prefix=prefix
        )
        np.testing.assert_allclose(far, 0.5298097, rtol=1e-6)
    np.testing.assert_allclose(cls_mass(jnp.asarray(embedded), prefix=1), 0.4)


def test_registers_are_dropped_with_cls():
    inner = np.array(ROWS) / 10
    twice = with_cls(with_cls(inner, [0.5, 0.2, 0, 0.9]), [0.1, 0, 0.3, 0.2, 0.6])
    far = attention_distance(jnp.asarray(twice), grid=(2, 2), patch=1, prefix=2)
    np.testing.assert_allclose(far, 0.5298097, rtol=1e-6)
    want = 1 - np.mean([0.5 * 1, 0.8 * 0.7, 1 * 0.8, 0.1 * 0.4])
    np.testing.assert_allclose(cls_mass(jnp.asarray(twice), prefix=2), want, rtol=1e-6)


def test_attention_of_cls_is_the_mean_over_patches():
    attention = np.full((5, 5), 0.2)
    attention[0] = 0.4, 0.3, 0.1, 0.1, 0.1  # CLS to CLS, to a register, to 3 patches
    given = jnp.asarray(attention)
    np.testing.assert_allclose(cls_attention(given, prefix=1), 0.15, rtol=1e-6)
    np.testing.assert_allclose(cls_attention(given, prefix=2), 0.1, rtol=1e-6)
    with pytest.raises(ValueError, match="got prefix 0, expected at least 1"):
        cls_attention(given, prefix=0)


def test_rows_with_all_mass_on_cls_count_as_uniform():
    attention = jnp.asarray(with_cls(np.eye(16), [1.0, 1.0] + 14 * [0.5]))
    far = attention_distance(attention, grid=(4, 4), patch=4, prefix=1)
    np.testing.assert_allclose(
        far, grid_distances((4, 4), 4)[:2].mean(axis=1).sum() / 16, rtol=1e-6
    )
    assert null_rows(attention, prefix=1) == 2


def test_a_tiny_mass_on_patches_is_not_lost():
    """Subnormal numbers are zero on some devices; 1e-30 must still be attention."""
    attention = with_cls(np.eye(16), 16 * [0.0])
    attention[1:, 1:] *= 1e-30
    far = attention_distance(jnp.asarray(attention), grid=(4, 4), patch=4, prefix=1)
    assert far == 0
    assert null_rows(jnp.asarray(attention), prefix=1) == 0


def test_symmetries_of_the_grid():
    """Turning or mirroring queries and keys together changes nothing."""
    attention = random_attention(0, 12, 12)
    place = np.arange(12).reshape(3, 4)

    def far(order: np.ndarray) -> float:
        moved = attention[order.reshape(-1)][:, order.reshape(-1)]
        return attention_distance(moved, grid=order.shape, patch=5, prefix=0)

    for moved in (place.T, place[::-1], place[:, ::-1], np.rot90(place)):
        np.testing.assert_allclose(far(moved), far(place), rtol=1e-6)
    wrong = attention_distance(attention, grid=(4, 3), patch=5, prefix=0)
    assert abs(wrong - far(place)) > 1e-3


def test_distance_moves_linearly_to_uniform():
    start, uniform = random_attention(1, 16, 16), jnp.full((16, 16), 1 / 16)
    steps = np.linspace(0, 1, 5)
    far = [
        attention_distance(
            (1 - t) * start + t * uniform, grid=(4, 4), patch=4, prefix=0
        )
        for t in steps
    ]
    np.testing.assert_allclose(far, far[0] + steps * (far[-1] - far[0]), rtol=1e-6)
    np.testing.assert_allclose(far[-1], 8.0321, rtol=1e-5)


@pytest.mark.parametrize("recording", ["metrics", "metrics_on_analysis_moco_vit"])
def test_agrees_with_the_recorded_original(golden, recording):
    record = golden(recording)
    taps = record if "attns" in record else golden("analysis_moco_vit")
    metric = load("metrics", "distance", grid=(4, 4), patch=8, prefix=1)
    patch = int(record.get("patch_size", 8))
    maps = tuple(map(jnp.asarray, taps["attns"]))
    rows = jax.jit(metric.update)({"attention": maps}, jnp.ones(8))
    got = np.stack([block["distance"] for block in rows["values"]]) * patch / 8
    np.testing.assert_allclose(got, record["attention_distance"], rtol=1e-5)


def test_series_are_per_block_and_head_with_what_was_left_out():
    metric = load("metrics", "distance", grid=(4, 4), patch=4, prefix=1)
    maps = tuple(random_attention(i, 3, 2, 17, 17) for i in range(4))
    null = maps[3].at[:, 1, 1:3].set(jnp.eye(17)[0])
    rows = metric.update({"attention": (*maps[:3], null)}, jnp.ones(3))
    far, given, cls, nulls = metric.compute(metric.to_state(rows))
    assert [(a.name, a.values) for a in far.axes] == [
        ("block", (1, 2, 3, 4)),
        ("head", (1, 2)),
    ]
    want = jax.vmap(lambda a: attention_distance(a, grid=(4, 4), patch=4, prefix=1))(
        maps[2][:, 1]
    )
    np.testing.assert_allclose(far.values[2, 1], want.mean(), rtol=1e-6)
    np.testing.assert_allclose(far.stderr[2, 1], want.std(ddof=1) / 3**0.5, rtol=1e-4)
    assert (far.name, far.unit, far.kind) == ("attention distance", "px", "depth")
    assert (given.name, given.kind) == ("attention of CLS on patches", "depth")
    assert given.axes == far.axes and given.unit == "per patch"
    want = maps[1][:, 0, 0, 1:].mean(axis=1)
    np.testing.assert_allclose(given.values[1, 0], want.mean(), rtol=1e-6)
    np.testing.assert_allclose(given.stderr[1, 0], want.std(ddof=1) / 3**0.5, rtol=1e-4)
    np.testing.assert_allclose(cls.values[0, 0], maps[0][:, 0, 1:, 0].mean(), rtol=1e-6)
    np.testing.assert_array_equal(nulls.values, [[0, 0], [0, 0], [0, 0], [0, 2]])
    assert "uniform" in nulls.notes[0]


def test_without_a_cls_token_its_attention_is_not_reported():
    metric = load("metrics", "distance", grid=(4, 4), patch=4, prefix=0)
    rows = metric.update({"attention": (random_attention(0, 3, 2, 16, 16),)}, [1] * 3)
    names = [s.name for s in metric.compute(metric.to_state(rows))]
    assert names == [
        "attention distance",
        "attention mass on CLS",
        "null attention rows",
    ]


def test_a_wrong_grid_is_explained():
    with pytest.raises(
        ValueError, match="got 17 tokens, expected 21 = prefix 1 .* 4 x"
    ):
        attention_distance(jnp.ones((17, 17)), grid=(4, 5), patch=4, prefix=1)
