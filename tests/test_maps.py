"""Attention maps to look at: which query, which key, which part of the mass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import (
    attention_information,
    cls_mass,
    key_map,
    mass_mask,
    query_map,
)

GRID = (3, 4)


def random_attention(key: int, *shape: int) -> jax.Array:
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(key), shape), axis=-1)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_the_map_of_a_query_is_its_row_over_the_grid(prefix):
    attention = random_attention(0, prefix + 12, prefix + 12)
    got = query_map(attention, (2, 1), grid=GRID, prefix=prefix)
    row = np.asarray(attention, float)[prefix + 2 * 4 + 1, prefix:]
    np.testing.assert_allclose(got, (row / row.sum()).reshape(GRID), rtol=1e-5)


def test_a_query_that_looks_at_one_patch_lights_that_patch():
    attention = jnp.eye(13)[
        np.r_[0, np.roll(np.arange(1, 13), -1)]
    ]  # to the next patch
    got = query_map(attention, (1, 2), grid=GRID, prefix=1)
    assert np.argwhere(got).tolist() == [[1, 3]] and got.sum() == 1


def test_a_query_that_looks_at_cls_alone_has_a_uniform_map():
    attention = jnp.zeros((13, 13)).at[:, 0].set(1)
    got = query_map(attention, (0, 0), grid=GRID, prefix=1)
    np.testing.assert_allclose(got, np.full(GRID, 1 / 12), rtol=1e-6)


def test_the_key_map_is_the_mean_of_the_query_maps():
    attention = random_attention(1, 13, 13)
    assert cls_mass(attention, prefix=1) > 0.01  # so scaling the rows matters
    maps = [query_map(attention, q, grid=GRID, prefix=1) for q in np.ndindex(GRID)]
    got = key_map(attention, grid=GRID, prefix=1)
    np.testing.assert_allclose(got, np.mean(maps, axis=0), rtol=1e-5)
    entropy = -np.sum(got * np.log(got))
    parts = attention_information(attention, prefix=1)
    np.testing.assert_allclose(entropy, parts.key_entropy, rtol=1e-5)


def test_the_mask_keeps_the_largest_until_the_mass_is_held():
    weights = jnp.array([[5.0, 30.0, 10.0], [20.0, 25.0, 10.0]])  # sum 100
    kept = {
        0.29: [[0, 1, 0], [0, 0, 0]],
        0.5: [[0, 1, 0], [0, 1, 0]],
        0.6: [[0, 1, 0], [1, 1, 0]],
        0.8: [[0, 1, 1], [1, 1, 0]],  # of two equal entries the first
        1.0: [[1, 1, 1], [1, 1, 1]],
    }
    for mass, want in kept.items():
        np.testing.assert_array_equal(mass_mask(weights, mass=mass), want)
    np.testing.assert_array_equal(mass_mask(weights), kept[0.6])
    np.testing.assert_array_equal(mass_mask(weights * 0), np.zeros((2, 3)))


def test_the_mask_agrees_with_a_plain_search():
    weights = np.asarray(random_attention(2, 14, 14))
    got = np.asarray(mass_mask(jnp.asarray(weights)))
    held, total = weights[got].sum(dtype=float), weights.sum(dtype=float)
    assert held >= 0.6 * total > held - weights[got].min()
    assert weights[got].min() >= weights[~got].max()


def test_kernels_may_be_batched_and_take_bfloat16():
    heads = random_attention(3, 2, 13, 13).astype(jnp.bfloat16)

    def kernel(attention):
        seen = query_map(attention, (0, 3), grid=GRID, prefix=1)
        return seen, mass_mask(key_map(attention, grid=GRID, prefix=1))

    maps, masks = jax.jit(jax.vmap(kernel))(heads)
    assert maps.shape == masks.shape == (2, *GRID)
    assert maps.dtype == jnp.float32 and masks.dtype == bool
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1, rtol=1e-6)


@pytest.mark.parametrize("query", [(3, 0), (0, 4), (-1, 0)])
def test_a_query_outside_the_grid_is_explained(query):
    with pytest.raises(ValueError, match=r"got query .*grid of 3 x 4"):
        query_map(jnp.ones((13, 13)), query, grid=GRID, prefix=1)


def test_a_wrong_grid_or_mass_is_explained():
    with pytest.raises(ValueError, match="got 12 tokens, expected 13"):
        query_map(jnp.ones((12, 12)), (0, 0), grid=GRID, prefix=1)
    with pytest.raises(ValueError, match="got 12 tokens, expected 13"):
        key_map(jnp.ones((12, 12)), grid=GRID, prefix=1)
    for mass in (0, 1.5, 60):
        with pytest.raises(ValueError, match=f"got mass {mass}, expected"):
            mass_mask(jnp.ones(4), mass=mass)
