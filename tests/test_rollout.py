"""Rollout against hand-made cases and a plain product, and what is reported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import attention_rollout
from clvsmim.plugin import load

BELOW = [[0.5, 0.5], [0, 1]]
ABOVE = [[1, 0], [0.5, 0.5]]


@functools.cache
def jitted(**static):
    return jax.jit(functools.partial(attention_rollout, **static))


def random_attention(key: int, *shape: int) -> jax.Array:
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(key), shape), axis=-1)


def by_hand(maps, fuse=np.mean, lowest=0) -> np.ndarray:
    """The definition, in float64."""
    tokens = np.shape(maps)[-1]
    product = np.eye(tokens)
    for heads in np.asarray(maps, float):
        fused = fuse(heads, axis=0)
        for row in fused:
            row[np.argsort(row)[:lowest]] = 0
        mixed = (fused + np.eye(tokens)) / 2
        product = mixed / mixed.sum(axis=1, keepdims=True) @ product
    return product


def test_hand_made_case_and_the_order_of_blocks():
    maps = jnp.array([[BELOW], [ABOVE]])  # (L=2, H=1, T=2, T)
    want = [[0.75, 0.25], [0.1875, 0.8125]]
    np.testing.assert_allclose(jitted()(maps), want, rtol=1e-6)
    np.testing.assert_allclose(jitted()(tuple(maps)), want, rtol=1e-6)
    assert abs(jitted()(maps[::-1]) - np.array(want)).max() > 0.02


def test_identity_stays_identity():
    maps = jnp.broadcast_to(jnp.eye(5), (3, 2, 5, 5))
    np.testing.assert_array_equal(jitted()(maps), np.eye(5))


@pytest.mark.parametrize("depth", [1, 4])
def test_uniform_attention(depth):
    """Each block keeps half of a token in place and spreads the other half evenly."""
    got = jitted()(jnp.full((depth, 2, 17, 17), 1 / 17))
    spread = (1 - 2.0**-depth) / 17
    want = np.full((17, 17), spread) + 2.0**-depth * np.eye(17)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_agrees_with_the_definition():
    maps = random_attention(0, 4, 3, 9, 9)
    np.testing.assert_allclose(jitted()(maps), by_hand(maps), rtol=1e-5)
    np.testing.assert_allclose(jitted()(maps).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("fusion, fuse", [("max", np.max), ("min", np.min)])
@pytest.mark.parametrize("discard, lowest", [(0.0, 0), (0.5, 4), (0.9, 8)])
def test_other_fusions_and_discarding_the_lowest(fusion, fuse, discard, lowest):
    maps = random_attention(1, 3, 2, 9, 9)
    got = jitted(fusion=fusion, discard=discard)(maps)
    np.testing.assert_allclose(got, by_hand(maps, fuse, lowest), rtol=1e-5)
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-5)
    assert abs(got - jitted()(maps)).max() > 1e-3


def test_equal_entries_are_kept_or_discarded_together():
    maps = jnp.full((2, 1, 4, 4), 0.25)
    got = jitted(discard=0.5)(maps)
    np.testing.assert_allclose(got, jitted()(maps), rtol=1e-6)


def test_heads_that_never_meet_leave_each_token_alone():
    """The minimum over heads is 0 everywhere; no division by it."""
    maps = jnp.stack([jnp.eye(4), jnp.roll(jnp.eye(4), 1, axis=1)])[None]
    got = jitted(fusion="min")(maps)
    np.testing.assert_array_equal(got, np.eye(4))


def test_what_is_not_known_is_explained():
    with pytest.raises(ValueError, match="fusion of heads 'men': did you mean 'me"):
        attention_rollout(jnp.ones((1, 1, 2, 2)), fusion="men")
    for discard in (-0.1, 1, 90):
        with pytest.raises(ValueError, match=f"got discard {discard}, expected"):
            attention_rollout(jnp.ones((1, 1, 2, 2)), discard=discard)


def report(maps, **options):
    metric = load("metrics", "rollout", **options)
    weights = jnp.ones(len(maps[0]))
    rows = jax.jit(metric.update)({"attention": maps}, weights)
    (series,) = metric.compute(metric.to_state(rows))
    return series


def test_the_series_is_the_row_of_cls_over_the_grid():
    maps = tuple(random_attention(i, 3, 2, 13, 13) for i in range(4))
    series = report(maps, grid=(3, 4), prefix=1)
    assert series.name == "attention rollout of CLS" and series.kind == "matrix"
    assert [(a.name, len(a.values)) for a in series.axes] == [("row", 3), ("column", 4)]
    each = np.stack([by_hand(image)[0, 1:] for image in np.stack(maps, axis=1)])
    want = each.mean(axis=0).reshape(3, 4)
    np.testing.assert_allclose(series.values, want, rtol=1e-5)
    error = each.std(axis=0, ddof=1).reshape(3, 4) / 3**0.5
    np.testing.assert_allclose(series.stderr, error, rtol=1e-3)
    assert series.count == 3 and not series.notes and series.values.sum() < 1


def test_registers_are_left_out_of_the_map():
    maps = tuple(random_attention(i, 2, 2, 7, 7) for i in range(2))
    series = report(maps, grid=(2, 2), prefix=3)
    each = [by_hand(image)[0, 3:] for image in np.stack(maps, axis=1)]
    want = np.mean(each, axis=0).reshape(2, 2)
    np.testing.assert_allclose(series.values, want, rtol=1e-5)


def test_without_cls_it_is_the_mean_over_patches():
    maps = tuple(random_attention(i, 2, 2, 4, 4) for i in range(2))
    series = report(maps, grid=(2, 2), prefix=0)
    each = [by_hand(image).mean(axis=0) for image in np.stack(maps, axis=1)]
    want = np.mean(each, axis=0).reshape(2, 2)
    np.testing.assert_allclose(series.values, want, rtol=1e-5)
    assert series.notes == ("there is no CLS token: mean over all patches",)


def test_options_are_reported():
    maps = (random_attention(0, 2, 2, 5, 5),)
    series = report(maps, grid=(2, 2), prefix=1, fusion="max", discard=0.9)
    assert series.notes == ("max over heads, lowest 90% of a row discarded",)
    each = [by_hand(image, np.max, 4)[0, 1:] for image in np.stack(maps, axis=1)]
    want = np.mean(each, axis=0).reshape(2, 2)
    np.testing.assert_allclose(series.values, want, rtol=1e-5)


def test_a_wrong_grid_is_explained():
    maps = (jnp.ones((2, 2, 5, 5)),)
    with pytest.raises(ValueError, match="got 5 tokens, expected 10"):
        report(maps, grid=(3, 3), prefix=1)
