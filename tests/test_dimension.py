"""Effective ranks against closed forms, on the host and in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import (
    alpha_req,
    effective_rank,
    normalised_std,
    numerical_rank,
    participation_ratio,
    rank_me,
    stable_rank,
)

FAMILY = (rank_me, effective_rank, participation_ratio, stable_rank)
both = pytest.mark.parametrize("array, rtol", [(np.asarray, 1e-9), (jnp.asarray, 1e-4)])


def noise(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


def singular_values(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.linalg.eigvalsh(x.T @ x))


@both
def test_hand_made_cases(array, rtol):
    s = array(np.array([4.0, 3, 2, 1]))
    np.testing.assert_allclose(rank_me(s), 3.5961162, rtol=max(rtol, 1e-7))
    p = np.array([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(effective_rank(s), np.prod(p**-p), rtol=rtol)
    np.testing.assert_allclose(participation_ratio(s), 10 / 3, rtol=rtol)
    np.testing.assert_allclose(stable_rank(s), 2.5, rtol=rtol)
    assert numerical_rank(s, threshold=0.3) == 3


@both
def test_the_eps_of_rank_me_is_not_normalised_away(array, rtol):
    flat, one = array(np.full(768, 2.0)), array(np.eye(1, 768)[0])
    got = [rank_me(s, eps=eps) for s in (flat, one) for eps in (1e-7, 1e-5, 0)]
    want = [768.33, 802.0, 768, 1.00124, 1.0923, 1]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    np.testing.assert_allclose(effective_rank(flat), 768, rtol=rtol)


@both
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_directions_count_as_one_each(array, rtol, rank):
    s = array(np.r_[np.full(rank, 0.2), np.zeros(8 - rank)])
    for kernel in FAMILY:
        np.testing.assert_allclose(kernel(s), rank, rtol=max(rtol, 3e-5))
        np.testing.assert_allclose(kernel(1e-9 * s), rank, rtol=max(rtol, 3e-5))
    assert numerical_rank(s, threshold=1e-6) == rank


@both
def test_zeros_count_as_one_and_a_flat_spectrum_does_not_decay(array, rtol):
    zeros = array(np.zeros(120))
    for kernel in FAMILY:
        np.testing.assert_allclose(kernel(zeros), 1, atol=3e-4)
    assert numerical_rank(zeros, threshold=1e-6) == 1
    for flat in (zeros, zeros + 1):
        np.testing.assert_allclose(alpha_req(flat), (0, 1), atol=1e-6)


def test_a_mean_lowers_the_uncentred_rank():
    x = noise(512, 256)
    np.testing.assert_allclose(rank_me(singular_values(x)), 237.3, rtol=5e-3)
    np.testing.assert_allclose(rank_me(singular_values(x + 5)), 104.8, rtol=1e-2)
    centred = [singular_values(y - y.mean(axis=0)) for y in (x, x + 5)]
    np.testing.assert_allclose(rank_me(centred[0]), rank_me(centred[1]), rtol=1e-9)
    np.testing.assert_allclose(rank_me(centred[0]), 237.3, rtol=5e-3)


@both
@pytest.mark.parametrize("power", [0.3, 1.0, 2.0])
def test_alpha_of_a_power_law_is_its_power(array, rtol, power):
    s = 7 * np.arange(1, 151.0) ** -power
    alpha, fit = alpha_req(array(s))
    np.testing.assert_allclose([alpha, fit], [power, 1], rtol=rtol)
    s[:3], s[100:] = 50, 1e-9  # outside ranks 4 to 100
    np.testing.assert_allclose(alpha_req(array(s)).alpha, power, rtol=rtol)


def test_alpha_is_the_weighted_fit():
    """numpy's polyfit, whose weights are those of the residuals, not their squares."""
    s = np.sort(noise(120) ** 2)[::-1]
    rank = np.arange(4, 101)
    x, y, w = np.log(rank), np.log(s[3:100]), 1 / rank
    slope, at = np.polyfit(x, y, 1, w=np.sqrt(w))
    off = np.sum(w * (y - slope * x - at) ** 2)
    fit = 1 - off / np.sum(w * (y - np.average(y, weights=w)) ** 2)
    np.testing.assert_allclose(alpha_req(s), (-slope, fit), rtol=1e-9)
    assert np.abs(np.polyfit(x, y, 1)[0] / slope - 1) > 0.05
    alpha_again = alpha_req(s).alpha  # no state from one call to the next
    np.testing.assert_array_equal(alpha_again, alpha_req(s).alpha)


def test_alpha_needs_a_hundred_eigenvalues():
    with pytest.raises(ValueError, match="got 99 eigenvalues, expected at least 100"):
        alpha_req(np.ones(99))
    assert np.isfinite(alpha_req(np.r_[np.ones(50), np.zeros(50)])).all()


@both
def test_spread_of_normalised_features(array, rtol):
    isotropic = noise(4000, 16) * 10 ** noise(4000, 1)  # lengths do not matter
    np.testing.assert_allclose(normalised_std(array(isotropic)), 1 / 4, rtol=0.01)
    equal = np.outer(1 + np.arange(5), noise(8))
    np.testing.assert_allclose(normalised_std(array(equal)), 0, atol=1e-7)
    got = normalised_std(array(np.array([[3.0, 0], [0, 2], [0, 0]])))
    np.testing.assert_allclose(got, 1 / np.sqrt(3), rtol=rtol)


def test_kernels_trace_and_batch():
    batch = jnp.asarray(np.sort(noise(3, 110) ** 2)[:, ::-1], jnp.bfloat16)
    for kernel in (*FAMILY, lambda s: numerical_rank(s, threshold=1e-3), alpha_req):
        got = jax.jit(jax.vmap(kernel))(batch)
        want = kernel(np.asarray(batch, "f8"))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == jnp.float32 and b.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-4)
    x = jnp.asarray(noise(5, 6))
    np.testing.assert_allclose(
        jax.jit(normalised_std)(x), normalised_std(np.asarray(x)), rtol=1e-5
    )
