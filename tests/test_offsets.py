"""The aligned canvas against a plain loop, and what is read from it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import (
    aligned_attention,
    attention_distance,
    distance_histogram,
    distinct_distances,
    grid_distances,
    mean_offset,
    offset_heads,
    offset_visits,
)
from clvsmim.plugin import load

G14 = (14, 14)


@functools.cache
def jitted(kernel, **static):
    return jax.jit(functools.partial(kernel, **static))


def canvas(attention, grid, prefix=0) -> jax.Array:
    return jitted(aligned_attention, grid=grid, prefix=prefix)(jnp.asarray(attention))


def histogram(canvas, grid) -> jax.Array:
    return jitted(distance_histogram, grid=grid)(jnp.asarray(canvas))


def random_attention(key: int, *shape: int) -> jax.Array:
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(key), shape), axis=-1)


def by_hand(attention: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Every query's map added at its place, in float64."""
    rows, columns = grid
    total = np.zeros((2 * rows - 1, 2 * columns - 1))
    for (i, j), row in zip(np.ndindex(grid), attention, strict=True):
        at = np.s_[rows - 1 - i : 2 * rows - 1 - i, columns - 1 - j :][:2]
        total[at][:, :columns] += row.reshape(grid)
    return total


def looking(down: int, right: int, grid=G14) -> np.ndarray:
    """Every query attends one offset; where the grid ends, the last patch there is."""
    i, j = np.indices(grid).reshape(2, -1)
    keys = np.clip(i + down, 0, grid[0] - 1) * grid[1]
    return np.eye(i.size)[keys + np.clip(j + right, 0, grid[1] - 1)]


def blurred(down: float, right: float, sigma: float) -> np.ndarray:
    """A Gaussian of `sigma` patches around an offset."""
    i, j = np.indices(G14).reshape(2, -1)
    off = np.hypot(i[None] - i[:, None] - down, j[None] - j[:, None] - right)
    near = np.exp(-((off / sigma) ** 2) / 2)
    return near / near.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (1, 5), (5, 1), (1, 1), (4, 4)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_agrees_with_a_plain_loop(grid, prefix):
    tokens = prefix + grid[0] * grid[1]
    attention = random_attention(0, tokens, tokens)
    inner = np.asarray(attention, float)[prefix:, prefix:]
    want = by_hand(inner / inner.sum(axis=1, keepdims=True), grid)
    got = canvas(attention, grid, prefix)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_an_identity_is_a_point_at_the_centre():
    got = np.asarray(canvas(np.eye(196), G14))
    assert np.argwhere(got).tolist() == [[13, 13]] and got[13, 13] == 196


def test_a_key_to_the_right_is_right_of_the_centre_and_one_below_is_below():
    right = np.asarray(canvas(looking(0, 1), G14))
    assert right[13, 14] == 182 and right[13, 13] == 14 and right.sum() == 196
    below = np.asarray(canvas(looking(2, 0), G14))
    assert below[15, 13] == 168 and below[14, 13] == below[13, 13] == 14


def test_uniform_attention_visits_each_offset_as_often_as_it_occurs():
    for grid in (G14, (3, 5)):
        n = grid[0] * grid[1]
        got = canvas(np.full((n, n), 1 / n), grid) * n
        np.testing.assert_allclose(got, offset_visits(grid), rtol=1e-5)
    visits = offset_visits((2, 3))
    np.testing.assert_array_equal(
        visits, [[1, 2, 3, 2, 1], [2, 4, 6, 4, 2]] + [visits[0]]
    )


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_canvas_holds_the_attention_distance(grid):
    n = grid[0] * grid[1]
    attention = random_attention(1, n + 1, n + 1)
    far = attention_distance(attention, grid=grid, patch=4, prefix=1)
    total = canvas(attention, grid, prefix=1)
    down, right = np.indices(total.shape)
    radius = 4 * np.hypot(down - grid[0] + 1, right - grid[1] + 1)
    np.testing.assert_allclose((total * radius).sum() / n, far, rtol=1e-5)
    share = np.asarray(histogram(total, grid), float)
    np.testing.assert_allclose(share.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(share @ distinct_distances(grid, 4), far, rtol=1e-5)


def test_uniform_attention_has_the_histogram_of_pairs_of_patches():
    between = grid_distances(G14, 16)
    want = [np.isclose(between, d).mean() for d in distinct_distances(G14, 16)]
    assert len(want) == len(np.unique(between.round(2))) == 94
    np.testing.assert_allclose(sum(want), 1, rtol=1e-12)
    share = histogram(canvas(np.full((196, 196), 1 / 196), G14), G14)
    np.testing.assert_allclose(share, want, rtol=1e-4)
    mean = np.asarray(share, float) @ distinct_distances(G14, 16)
    np.testing.assert_allclose(mean, 116.4922, rtol=1e-5)


def test_distances_are_distinct_and_in_pixels():
    np.testing.assert_allclose(
        distinct_distances((2, 3), 10), [0, 10, 200**0.5, 20, 500**0.5]
    )
    assert distinct_distances((1, 1), 16).tolist() == [0]


@pytest.mark.parametrize(
    "attention, want",
    [
        (np.eye(196), (0, 0)),
        (np.full((196, 196), 1 / 196), (0, 0)),
        (looking(0, 1), (0, 13 / 14)),
        (looking(-1, 0), (-13 / 14, 0)),
        (looking(3, -2), (3 - 6 / 14, -(2 - 3 / 14))),
        (0.5 * np.eye(196) + 0.5 * looking(0, 1), (0, 13 / 28)),
    ],
)
def test_mean_offset(attention, want):
    got = jitted(mean_offset)(canvas(attention, G14))
    np.testing.assert_allclose(got, want, atol=2e-5)
    turned = jitted(mean_offset)(canvas(attention[::-1, ::-1], G14))  # by 180 degrees
    np.testing.assert_allclose(turned, -np.array(want), atol=2e-5)


OFFSET = {
    "right": looking(0, 1),
    "far up left": looking(-4, -3),
    "with a uniform background": 0.5 * looking(0, 1) + 0.5 / 196,
    "blurred, right": blurred(0, 1, 0.7),
}
NO_OFFSET = {
    "itself": np.eye(196),
    "uniform": np.full((196, 196), 1 / 196),
    "around itself": blurred(0, 0, 0.7),
    "broadly to the right": blurred(0, 1, 4),
    "both sides": 0.5 * looking(0, 2) + 0.5 * looking(0, -2),
    "one key in a corner": np.eye(196)[np.zeros(196, int)],
    "one key on the border": np.eye(196)[np.full(196, 7)],
    "one key inside": np.eye(196)[np.full(196, 60)],
    "random": np.asarray(random_attention(2, 196, 196)),
}


def test_offset_heads_are_told_from_others():
    cases = {**OFFSET, **NO_OFFSET}
    canvases = np.stack([canvas(a, G14) for a in cases.values()])
    flags = offset_heads(canvases, grid=G14)
    assert {k for k, flag in zip(cases, flags, strict=True) if flag} == set(OFFSET)
    again = offset_heads(100 * canvases[:2], grid=G14)  # a sum over images will do
    np.testing.assert_array_equal(again, flags[:2])
    assert offset_heads(canvases[0], grid=G14).shape == ()


def test_it_may_be_batched_and_takes_bfloat16():
    maps = random_attention(3, 2, 3, 13, 13).astype(jnp.bfloat16)
    kernel = jax.vmap(jax.vmap(lambda a: aligned_attention(a, grid=(3, 4), prefix=1)))
    got = jax.jit(kernel)(maps)
    assert got.shape == (2, 3, 5, 7) and got.dtype == jnp.float32
    np.testing.assert_allclose(got.sum(axis=(2, 3)), 12, rtol=1e-5)
    with pytest.raises(ValueError, match="got 13 tokens, expected 17"):
        aligned_attention(maps[0, 0], grid=(4, 4), prefix=1)


@pytest.fixture(scope="module")
def reported():
    """Maps of a model on a 3 x 5 grid, one head of which looks to the right."""
    metric = load("metrics", "offsets", grid=(3, 5), patch=8, prefix=1)
    maps = [random_attention(i, 4, 2, 16, 16) for i in range(3)]
    right = np.pad(looking(0, 1, (3, 5)), ((1, 0), (1, 0)), constant_values=1 / 16)
    maps[2] = maps[2].at[:, 1].set(0.8 * right + 0.2 / 16)
    rows = jax.jit(metric.update)({"attention": tuple(maps)}, jnp.ones(4))
    state = metric.to_state(rows)
    return maps, state, {s.name: s for s in metric.compute(state)}


def test_series_have_their_axes(reported):
    _, _, found = reported
    assert {k: s.values.shape for k, s in found.items()} == {
        "mean attention offset": (3, 2),
        "attention by distance": (3, len(distinct_distances((3, 5), 8))),
        "aligned attention": (3, 5, 9),
    }
    kinds = ["depth", "curve", "matrix"]
    assert [s.kind for s in found.values()] == kinds
    names = [[a.name for a in s.axes] for s in found.values()]
    assert names[0] == ["block", "head"] and names[1][1] == "distance (px)"
    assert found["aligned attention"].axes[2].values == tuple(range(-4, 5))
    assert len(json.dumps(found["aligned attention"].to_json())) < 10_000


def test_the_offset_is_that_of_the_mean_over_images(reported):
    maps, _, found = reported
    vectors = [mean_offset(canvas(a, (3, 5), prefix=1)) for a in maps[1][:, 0]]
    offset = found["mean attention offset"]
    mean, spread = np.mean(vectors, axis=0), np.std(vectors, axis=0, ddof=1)
    np.testing.assert_allclose(offset.values[1, 0], 8 * np.hypot(*mean), rtol=1e-4)
    np.testing.assert_allclose(offset.stderr[1, 0], 4 * np.hypot(*spread), rtol=1e-4)
    assert offset.unit == "px" and offset.count == 4


def test_offset_heads_are_named(reported):
    assert reported[2]["mean attention offset"].notes == (
        "offset heads (block.head): 3.2",
    )


def test_the_other_series_are_means_over_heads_and_images(reported):
    maps, state, found = reported
    each = [[canvas(a, (3, 5), prefix=1) for a in image] for image in maps[1]]
    np.testing.assert_allclose(
        state["sum"]["canvas"][1], np.sum(each, axis=0), rtol=1e-5
    )
    aligned = found["aligned attention"]
    np.testing.assert_allclose(
        aligned.values[1], np.mean(each, axis=(0, 1)) / 15, rtol=1e-5
    )
    np.testing.assert_allclose(aligned.values.sum(axis=(1, 2)), 1, rtol=1e-6)
    assert "visits" in aligned.notes[0]
    shares = [histogram(np.mean(image, axis=0), (3, 5)) for image in each]
    curve = found["attention by distance"]
    np.testing.assert_allclose(curve.values[1], np.mean(shares, axis=0), rtol=1e-5)
    far = attention_distance_of(maps[1])
    np.testing.assert_allclose(curve.values[1] @ curve.axes[1].values, far, rtol=1e-5)


def attention_distance_of(maps: jax.Array) -> jax.Array:
    far = functools.partial(attention_distance, grid=(3, 5), patch=8, prefix=1)
    return jax.vmap(jax.vmap(far))(maps).mean()
