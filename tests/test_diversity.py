"""Deviation over queries and cosine between heads, against plain definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import head_cosine, row_deviation
from clvsmim.plugin import load

ONE_KEY_EACH = np.sqrt(195) / 196  # 0.0712


def random_attention(key: int, *shape: int) -> jax.Array:
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(key), shape), axis=-1)


def patches(attention: np.ndarray, prefix: int) -> np.ndarray:
    inner = np.asarray(attention, float)[..., prefix:, prefix:]
    return inner / inner.sum(axis=-1, keepdims=True)


def cosine_of_pairs(inner: np.ndarray) -> float:
    """Mean over all pairs of heads, each pair by itself, in float64."""
    flat = inner.reshape(len(inner), -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return np.mean([a @ b for a, b in itertools.combinations(unit, 2)])


def test_queries_that_attend_alike_do_not_deviate():
    row = np.random.default_rng(0).dirichlet(np.ones(196))
    for attention in (np.full((196, 196), 1 / 196), np.tile(row, (196, 1))):
        deviation = row_deviation(jnp.asarray(attention), prefix=0)
        np.testing.assert_allclose(deviation, 0, atol=1e-8)
    one_key = jnp.eye(196)[np.zeros(196, int)]
    assert row_deviation(one_key, prefix=0) == 0


def test_a_key_for_each_query_deviates_most():
    order = np.random.default_rng(0).permutation(196)
    for attention in (jnp.eye(196), jnp.eye(196)[order]):
        deviation = row_deviation(attention, prefix=0)
        np.testing.assert_allclose(deviation, ONE_KEY_EACH, rtol=1e-5)
    halves = jnp.eye(196)[np.arange(196) % 2]  # two keys, half of the queries each
    np.testing.assert_allclose(row_deviation(halves, prefix=0), 1 / 196, rtol=1e-5)


def test_deviation_falls_linearly_towards_the_mean_row():
    attention = random_attention(0, 16, 16)
    mean = jnp.broadcast_to(attention.mean(axis=0), (16, 16))
    start = row_deviation(attention, prefix=0)
    for t in (0.25, 0.5, 1.0):
        moved = row_deviation((1 - t) * attention + t * mean, prefix=0)
        np.testing.assert_allclose(moved, (1 - t) * start, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_deviation_is_that_of_rows_scaled_to_one(prefix):
    attention = random_attention(1, prefix + 16, prefix + 16)
    want = patches(attention, prefix).std(axis=0).mean()
    got = row_deviation(attention, prefix=prefix)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_deviation_ignores_the_order_of_queries_and_of_keys():
    attention, rng = random_attention(2, 16, 16), np.random.default_rng(1)
    moved = attention[rng.permutation(16)][:, rng.permutation(16)]
    got, want = (row_deviation(a, prefix=0) for a in (moved, attention))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_heads_alike_have_cosine_one_and_heads_apart_zero():
    same = jnp.broadcast_to(random_attention(3, 17, 17), (5, 17, 17))
    np.testing.assert_allclose(head_cosine(same, prefix=1), 1, rtol=1e-6)
    apart = jnp.stack([jnp.roll(jnp.eye(16), i, axis=1) for i in range(6)])
    np.testing.assert_allclose(head_cosine(apart, prefix=0), 0, atol=1e-7)
    half = jnp.stack([apart[0], (apart[0] + apart[1]) / 2])
    np.testing.assert_allclose(head_cosine(half, prefix=0), 0.5**0.5, rtol=1e-6)


@pytest.mark.parametrize("heads", [2, 3, 12])
def test_the_cosine_is_the_mean_over_pairs(heads):
    attention = random_attention(4, heads, 17, 17)
    want = cosine_of_pairs(patches(attention, 1))
    got = jax.jit(lambda a: head_cosine(a, prefix=1))(attention)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    turned = head_cosine(attention[::-1], prefix=1)
    np.testing.assert_allclose(turned, want, rtol=1e-5)


def test_heads_that_differ_in_their_mass_on_cls_alone_are_alike():
    inner = random_attention(5, 16, 16)
    mass = jax.random.uniform(jax.random.key(0), (3, 16, 1))
    heads = jnp.concatenate([mass, inner[None] * (1 - mass)], axis=2)  # (3, 16, 17)
    heads = jnp.pad(heads, ((0, 0), (1, 0), (0, 0)))
    np.testing.assert_allclose(head_cosine(heads, prefix=1), 1, rtol=1e-5)


def test_attention_on_cls_alone_is_no_diversity():
    attention = jnp.zeros((3, 17, 17)).at[..., 0].set(1.0)
    assert row_deviation(attention[0], prefix=1) == 0
    np.testing.assert_allclose(head_cosine(attention, prefix=1), 1, rtol=1e-6)


def report(maps):
    metric = load("metrics", "diversity", prefix=1)
    rows = jax.jit(metric.update)({"attention": maps}, jnp.ones(len(maps[0])))
    return metric.compute(metric.to_state(rows))


def test_series_are_per_block_and_head_and_per_block():
    maps = tuple(random_attention(i, 3, 2, 17, 17) for i in range(4))
    deviation, cosine = report(maps)
    assert (deviation.name, cosine.name) == (
        "deviation over queries",
        "cosine between heads",
    )
    assert deviation.kind == cosine.kind == "depth"
    assert [a.name for a in deviation.axes] == ["block", "head"]
    assert [(a.name, a.values) for a in cosine.axes] == [("block", (1, 2, 3, 4))]
    inner = patches(np.stack(maps, axis=1), 1)  # (B, L, H, N, N)
    want = inner.std(axis=-2).mean(axis=-1)  # (B, L, H)
    np.testing.assert_allclose(deviation.values, want.mean(axis=0), rtol=1e-5)
    want = np.array([[cosine_of_pairs(block) for block in image] for image in inner])
    np.testing.assert_allclose(cosine.values, want.mean(axis=0), rtol=1e-5)
    error = want.std(axis=0, ddof=1) / 3**0.5
    np.testing.assert_allclose(cosine.stderr, error, rtol=1e-3)


def test_one_head_has_a_defined_cosine_and_a_note():
    deviation, cosine = report((random_attention(0, 3, 1, 17, 17),))
    assert deviation.values.shape == (1, 1) and not deviation.notes
    assert cosine.values == [1] and "one head" in cosine.notes[0]
