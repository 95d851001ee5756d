"""Purity and silhouette against a plain loop and against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from clvsmim.metrics import clusters, neighbour_purity, silhouette

purity = jax.jit(neighbour_purity, static_argnames="k")
coefficient = jax.jit(silhouette, static_argnames="count")


def tokens(n: int, seed: int = 0, apart: float = 1.0, count: int = 4):
    """Tokens (n, 5) in `count` groups of unequal size, and their groups."""
    rng = np.random.default_rng(seed)
    groups = np.minimum(rng.geometric(0.4, n) - 1, count - 1)
    centre = apart * rng.standard_normal((count, 5))
    return rng.standard_normal((n, 5)) + centre[groups], groups


def distances(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x[:, None] - x[None], axis=-1)


def purity_by_hand(x: np.ndarray, groups: np.ndarray, k: int) -> float:
    far, shares = distances(x), []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        near = sorted(others, key=lambda j, i=i: (far[i, j], j))[:k]
        shares.append(np.mean(groups[near] == groups[i]))
    return np.mean(shares)


@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0])
def test_purity_is_that_of_a_plain_loop(apart):
    x, groups = tokens(60, apart=apart)
    got = purity(jnp.asarray(x), jnp.asarray(groups))
    np.testing.assert_allclose(got, purity_by_hand(x, groups, 10), rtol=1e-6)


@pytest.mark.parametrize("apart", [0.0, 1.0, 3.0])
def test_silhouette_is_that_of_scikit_learn(apart):
    x, groups = tokens(60, 1, apart)
    groups[0] = 4  # alone in its group
    assert (np.bincount(groups) > 1).sum() == 4
    got = coefficient(jnp.asarray(x), jnp.asarray(groups), count=5)
    want = silhouette_score(x, groups)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert abs(want) > 0.005


def test_chunks_do_not_matter(monkeypatch):
    x, groups = map(jnp.asarray, tokens(60))
    want = purity(x, groups), coefficient(x, groups, count=5)
    monkeypatch.setattr(clusters, "ROWS", 16)

    @jax.jit
    def both(x, groups):
        return neighbour_purity(x, groups), silhouette(x, groups, count=5)

    np.testing.assert_allclose(both(x, groups), want, rtol=1e-5)


def test_hand_made_case():
    """On a line: 0 and 1 in one group, 3 and 7 in another."""
    x, groups = jnp.array([[0.0], [1], [3], [7]]), jnp.array([0, 0, 1, 1])
    # b - a over the larger: a 1 1 4 4, b 5 4 2.5 6.5
    want = np.mean([4 / 5, 3 / 4, -1.5 / 4, 2.5 / 6.5])
    np.testing.assert_allclose(coefficient(x, groups, count=2), want, rtol=1e-6)
    np.testing.assert_allclose(purity(x, groups, k=1), 3 / 4)  # 3 is nearest to 1
    np.testing.assert_allclose(purity(x, groups, k=2), (1 + 1 + 0 + 1) / 8)
    np.testing.assert_allclose(purity(x, groups, k=10), 1 / 3)  # only 3 others


def test_groups_far_apart_and_groups_that_are_mixed():
    rng = np.random.default_rng(0)
    groups = jnp.asarray(np.arange(60) % 4)
    x = jnp.asarray(rng.standard_normal((60, 5)))
    mixed = purity(x, groups), coefficient(x, groups, count=5)
    np.testing.assert_allclose(mixed, [14 / 59, 0], atol=0.1)
    apart = x + 1000 * jnp.eye(5)[groups]
    assert purity(apart, groups) == 1
    np.testing.assert_allclose(coefficient(apart, groups, count=5), 1, atol=0.01)


def test_neither_a_common_shift_nor_scale_nor_turn_matters():
    x, groups = tokens(60)
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((5, 5)))[0]
    want = purity(jnp.asarray(x), groups), coefficient(jnp.asarray(x), groups, count=5)
    for moved in (x + np.array([1e4, -1e4, 0, 0, 0]), 0.01 * x, x @ turn):
        y = jnp.asarray(moved)
        got = purity(y, groups), coefficient(y, groups, count=5)
        np.testing.assert_allclose(got, want, atol=4e-3)  # 1e4 + x is rounded to 1e-3


def test_equal_distances_go_to_lower_numbers():
    """All four others are equally far from the token in the middle, the first."""
    x = np.array([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    found = []
    for order in ([0, 0, 0, 1, 1], [0, 1, 1, 0, 0]):
        groups = np.array(order)
        found.append(purity(jnp.asarray(x), jnp.asarray(groups), k=2))
        np.testing.assert_allclose(found[-1], purity_by_hand(x, groups, 2), rtol=1e-6)
    assert found[0] > found[1]


def test_degenerate_tokens_give_defined_values():
    same, groups = jnp.ones((6, 3)), jnp.array([0, 0, 1, 1, 2, 2])
    assert coefficient(same, groups, count=6) == 0
    # Of equal tokens the first two others are taken: 0 and 1 see one of theirs.
    np.testing.assert_allclose(purity(same, groups, k=2), (1 + 1) / 12)
    one = jnp.zeros(6, int)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3)))
    assert coefficient(x, one, count=6) == 0 and purity(x, one, k=2) == 1
    alone = jnp.arange(6)
    assert coefficient(x, alone, count=6) == 0 and purity(x, alone, k=2) == 0
    with pytest.raises(ValueError, match="got 1 tokens, expected at least 2"):
        neighbour_purity(x[:1], one[:1])


def test_bfloat16_tokens_are_compared_in_full_float32():
    x, groups = tokens(60)
    rounded = jnp.asarray(x, jnp.bfloat16)
    exact = rounded.astype(jnp.float32)
    assert purity(rounded, groups) == purity(exact, groups)
    got = coefficient(rounded, groups, count=5)
    assert got == coefficient(exact, groups, count=5) and got.dtype == jnp.float32
    with jax.default_matmul_precision("bfloat16"):
        text = purity.lower(rounded, groups).as_text()
        text += coefficient.lower(rounded, groups, count=5).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 3
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
