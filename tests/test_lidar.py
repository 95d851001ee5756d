"""LiDAR against closed forms and a float64 reference, streamed and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import Series, lidar_rank
from clvsmim.plugin import load

VIEWS = 3
DELTA = 0.5  # large, so that it matters
lidar = load("metrics", "lidar", prefix=1, views=VIEWS, objects=20, delta=DELTA)
step = jax.jit(lidar.update)


def noise(*shape: int, key: int = 0) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


def reference(x: np.ndarray, delta: float) -> float:
    """(n, q, D): the definition by an inverse square root, object by object."""
    n, q, width = x.shape
    mu = x.mean(axis=1)
    between = np.cov(mu, rowvar=False)
    within = delta * np.eye(width)
    for i in range(n):
        within += (x[i] - mu[i]).T @ (x[i] - mu[i]) / (n * (q - 1))
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.linalg.eigvalsh(root @ between @ root)
    p = np.maximum(spectrum, 0) / spectrum.sum() + 1e-8
    return np.exp(-np.sum(p * np.log(p)))


def isotropic(rank: int, width: int = 12) -> np.ndarray:
    """Object means along `rank` axes, the same spread within objects along all."""
    means = np.zeros((2 * rank, width))
    means[: 2 * rank : 2, :rank] = 3 * np.eye(rank)
    means[1 : 2 * rank : 2, :rank] = -3 * np.eye(rank)
    spread = np.concatenate([np.eye(width), -np.eye(width)])  # the views, 2 * width
    return means[:, None] + spread + noise(width)


def as_taps(x: np.ndarray) -> tuple[jax.Array, ...]:
    """(n, q, L+1, D) -> 2L+1 taps (n * q, 1 CLS + 2 patches, D)."""
    flat = x.reshape(-1, *x.shape[2:])
    taps = []
    for i in range(x.shape[2]):
        off = noise(len(flat), 1, x.shape[3], key=i)
        patches = flat[:, i, None] + np.concatenate([off, -off], axis=1)
        taps += [np.concatenate([off, patches], axis=1), noise(*flat[:, :1].shape)]
    return tuple(jnp.asarray(t, jnp.float32) for t in taps[:-1])


def state_of(x: np.ndarray, weights=None):
    weights = np.ones(x.shape[0] * x.shape[1]) if weights is None else weights
    rows = step({"residual": as_taps(x)}, jnp.asarray(weights, "f4"))
    assert all(len(leaf) == len(x) for leaf in jax.tree.leaves(rows))
    return lidar.to_state(jax.device_get(rows))


def measure(x: np.ndarray, weights=None) -> Series:
    (series,) = lidar.compute(state_of(x, weights))
    return series


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_isotropic_scatters_have_the_rank_of_the_means(rank):
    x = isotropic(rank)
    np.testing.assert_allclose(lidar_rank(x), rank, rtol=1e-5)
    got = jax.jit(lidar_rank)(jnp.asarray(x))
    np.testing.assert_allclose(got, rank, rtol=1e-4)


def test_equals_the_definition_for_every_delta():
    x = noise(9, 4, 6) + 2 * noise(9, 1, 6, key=1) * np.arange(1, 7)
    for delta in (1e-4, 0.1, 10):
        want = reference(x, delta)
        np.testing.assert_allclose(lidar_rank(x, delta=delta), want, rtol=1e-9)
        got = lidar_rank(jnp.asarray(x), delta=delta)
        np.testing.assert_allclose(got, want, rtol=1e-3)
    assert abs(reference(x, 10) / reference(x, 1e-4) - 1) > 0.05


def test_range_and_invariances():
    x = noise(5, 4, 16) + 2 * noise(5, 1, 16, key=1)
    base = lidar_rank(x)
    assert 1 < base < 4 + 1e-5  # n - 1
    turn = np.linalg.qr(noise(16, 16))[0]
    for same in (x[::-1], x[:, ::-1], x + noise(16), x @ turn):
        np.testing.assert_allclose(lidar_rank(same), base, rtol=1e-8)
    stretch = lidar_rank(x * np.linspace(1, 3, 16), delta=1e-12)
    many = noise(40, 4, 6) + noise(40, 1, 6, key=1)
    np.testing.assert_allclose(  # unlike RankMe it is blind to any change of basis
        lidar_rank(many @ noise(6, 6), delta=1e-12), lidar_rank(many, delta=1e-12)
    )
    assert np.isfinite(stretch)


def test_no_difference_within_or_between_objects_is_defined():
    same_views = np.repeat(noise(6, 1, 4), 3, axis=1)
    assert 1 < lidar_rank(same_views) < 4 + 1e-6
    np.testing.assert_allclose(lidar_rank(np.ones((6, 3, 4))), 1, atol=1e-5)
    np.testing.assert_allclose(lidar_rank(jnp.ones((6, 3, 4))), 1, atol=1e-5)


def test_too_little_data_is_explained():
    for shape in ((1, 3, 4), (3, 1, 4)):
        with pytest.raises(ValueError, match="expected at least 2 of 2"):
            lidar_rank(np.ones(shape))
    with pytest.raises(ValueError, match="got 1 views"):
        load("metrics", "lidar", prefix=1, views=1)


def test_streams_to_the_kernel_at_every_block():
    x = (noise(8, VIEWS, 3, 5) + 2 * noise(8, 1, 3, 5, key=1)).astype("f4")
    series = measure(x)
    want = [lidar_rank(x[:, :, i], delta=DELTA) for i in range(3)]
    np.testing.assert_allclose(series.values, want, rtol=1e-5)
    assert series.name == "LiDAR" and series.kind == "depth" and series.count == 8
    assert (
        series.axes[0].labels == ("embed", "1 mlp", "2 mlp") and series.stderr is None
    )
    assert series.notes == (
        "3 random crops of each image, delta 0.5",
        "of 8 images together; compare only with equally many",
    )
    assert lidar.parts == ("views",) and lidar.group == VIEWS and lidar.limit == 60


def test_without_two_objects_there_is_no_number():
    x = noise(2, VIEWS, 2, 4)
    for real, note in ((0, "no image to average"), (1, "one image has no covariance")):
        got = measure(x, np.arange(2 * VIEWS) < real * VIEWS)
        assert np.isnan(got.values).all() and got.notes == (note,)


def test_float32_products_are_exact_on_any_machine():
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(lidar_rank).lower(jnp.ones((3, 2, 4), jnp.bfloat16)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
