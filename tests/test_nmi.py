"""NMI and attention entropy against closed forms and the recorded original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim.metrics import attention_information, attention_nmi, grid_distances
from clvsmim.plugin import load

LOG_N = np.log(196)


def gaussian(sigma: float) -> np.ndarray:
    near = np.exp(-((grid_distances((14, 14), 16).astype(float) / sigma) ** 2) / 2)
    return near / near.sum(axis=1, keepdims=True)


def blocks(sizes: int) -> np.ndarray:
    """`sizes` equal groups of patches, each query uniform over its own group."""
    own = np.arange(196) * sizes // 196
    same = (own[:, None] == own[None]).astype(float)
    return same / same.sum(axis=1, keepdims=True)


def mixed(a: float) -> np.ndarray:
    return a * np.eye(196) + (1 - a) / 196


def one_hot(keys: np.ndarray) -> np.ndarray:
    return np.eye(196)[keys]


def random_attention(key: int, *shape: int) -> jax.Array:
    return jax.nn.softmax(3 * jax.random.normal(jax.random.key(key), shape), axis=-1)


CLOSED = {
    "uniform": (blocks(1), 0.0),
    "identity": (np.eye(196), 1.0),
    "permutation": (one_hot(np.random.default_rng(0).permutation(196)), 1.0),
    "grid rows": (blocks(14), 0.5),
    "two halves": (blocks(2), 0.131325),
    "one key": (one_hot(np.zeros(196, int)), 0.0),
    "two keys": (one_hot((np.arange(196) < 98).astype(int)), 0.362388),
    "mixed 0.1": (mixed(0.1), 0.041979),
    "mixed 0.5": (mixed(0.5), 0.371711),
    "mixed 0.9": (mixed(0.9), 0.839229),
    "sigma 8": (gaussian(8), 0.762559),
    "sigma 16": (gaussian(16), 0.499330),
    "sigma 32": (gaussian(32), 0.275235),
    "sigma 64": (gaussian(64), 0.090523),
    "sigma 128": (gaussian(128), 0.010602),
}


@pytest.mark.parametrize("case", CLOSED)
def test_closed_forms(case):
    attention, want = CLOSED[case]
    nmi = attention_nmi(jnp.asarray(attention), prefix=0)
    np.testing.assert_allclose(nmi, want, atol=2e-6)


@pytest.mark.parametrize("case", [c for c in CLOSED if c != "one key"])
def test_the_compatible_number_agrees_where_eps_is_irrelevant(case):
    attention, want = CLOSED[case]
    nmi = attention_nmi(jnp.asarray(attention), prefix=0, compat_eps=1e-8)
    np.testing.assert_allclose(nmi, want, atol=1.6e-5)


def test_the_compatible_number_is_not_the_exact_one():
    for attention, with_eps in ((np.eye(196), 0.9999928), (gaussian(8), 0.7625525)):
        exact = attention_nmi(jnp.asarray(attention), prefix=0)
        nmi = attention_nmi(jnp.asarray(attention), prefix=0, compat_eps=1e-8)
        np.testing.assert_allclose(nmi, with_eps, atol=3e-6)
        assert nmi < exact - 3e-6


@pytest.mark.parametrize(
    "sigma, nats", [(8, 1.2532), (32, 3.8186), (64, 4.7832), (128, 5.2152)]
)
def test_entropy_of_gaussian_attention(sigma, nats):
    parts = attention_information(jnp.asarray(gaussian(sigma)), prefix=0)
    np.testing.assert_allclose(parts.row_entropy, nats, atol=1e-4)


def test_entropies_of_uniform_and_one_hot_attention():
    uniform = attention_information(jnp.asarray(blocks(1)), prefix=0)
    np.testing.assert_allclose(
        [uniform.row_entropy, uniform.key_entropy, uniform.information],
        [LOG_N, LOG_N, 0],
        atol=2e-6,
    )
    identity = attention_information(jnp.eye(196), prefix=0)
    np.testing.assert_allclose(
        [identity.row_entropy, identity.key_entropy, identity.information],
        [0, LOG_N, LOG_N],
        atol=2e-6,
    )


def test_with_uniform_keys_nmi_is_one_minus_relative_row_entropy():
    circulant = np.stack([np.roll(np.arange(1.0, 197) ** 3, i) for i in range(196)])
    circulant /= circulant.sum(axis=1, keepdims=True)
    parts = attention_information(jnp.asarray(circulant), prefix=0)
    np.testing.assert_allclose(parts.nmi, 1 - parts.row_entropy / LOG_N, atol=1e-6)
    assert 0.01 < parts.nmi < 0.9


@pytest.mark.parametrize("prefix", [0, 1])
def test_hand_made_case_with_and_without_cls(prefix):
    rows = np.array([[7, 1, 1, 1], [1, 7, 1, 1], [2, 2, 5, 1], [2.5] * 4]) / 10
    if prefix:
        cls = np.array([[0.5], [0.2], [0], [0.9]])
        rows = np.concatenate([cls, rows * (1 - cls)], axis=1)
        rows = np.concatenate([np.full((1, 5), 0.2), rows])
    parts = attention_information(jnp.asarray(rows), prefix=prefix)
    want = (0.1608024, 0.2192650, 1.3412144, 1.1219494)
    np.testing.assert_allclose(parts, want, rtol=1e-5)


def test_queries_and_keys_may_be_permuted_apart():
    attention = random_attention(0, 16, 16)
    rng = np.random.default_rng(1)
    moved = attention[rng.permutation(16)][:, rng.permutation(16)]
    nmi = attention_nmi(attention, prefix=0)
    np.testing.assert_allclose(attention_nmi(moved, prefix=0), nmi, rtol=1e-5)
    merged = attention.at[:, 0].add(attention[:, 1]).at[:, 1].set(0)
    assert abs(attention_nmi(merged, prefix=0) - nmi) > 1e-3


def test_nmi_falls_and_entropy_rises_towards_uniform():
    start, uniform = random_attention(2, 16, 16), jnp.full((16, 16), 1 / 16)
    parts = [
        attention_information((1 - t) * start + t * uniform, prefix=0)
        for t in np.linspace(0, 1, 8)
    ]
    nmi, entropy = [float(p.nmi) for p in parts], [float(p.row_entropy) for p in parts]
    assert nmi == sorted(nmi, reverse=True)
    assert entropy == sorted(entropy)
    assert nmi[0] > 0.3 and nmi[-1] < 1e-6


def test_nmi_stays_in_range_on_sharp_and_on_flat_attention():
    for scale in (1e-6, 1e-3, 1.0, 30.0, 1e3):
        logits = scale * jax.random.normal(jax.random.key(3), (64, 17, 17))
        nmi = jax.vmap(lambda a: attention_nmi(a, prefix=1))(jax.nn.softmax(logits))
        assert np.all((nmi >= 0) & (nmi <= 1 + 1e-6))


def test_attention_on_cls_alone_is_no_information():
    attention = jnp.zeros((17, 17)).at[:, 0].set(1.0)
    parts = attention_information(attention, prefix=1)
    np.testing.assert_allclose(parts, (0, 0, np.log(16), np.log(16)), atol=1e-6)


def test_the_mean_is_over_images_not_over_maps():
    """Two permutations have NMI 1 each; their average map does not."""
    metric = load("metrics", "nmi", prefix=0)
    orders = np.stack([np.arange(196), np.random.default_rng(0).permutation(196)])
    maps = jnp.asarray(np.eye(196, dtype="f4")[orders])[:, None]  # (B=2, H=1, T, T)
    nmi = metric.compute(metric.to_state(metric.update({"attention": (maps,)}, [1, 1])))
    np.testing.assert_allclose(nmi[0].values, [[1]], atol=1e-6)
    averaged = attention_nmi(maps.mean(axis=(0, 1)), prefix=0)
    np.testing.assert_allclose(averaged, 0.869, atol=2e-3)


@pytest.mark.parametrize("recording", ["metrics", "metrics_on_analysis_moco_vit"])
@pytest.mark.parametrize("compat_eps", [1e-8, 0.0])
def test_agrees_with_the_recorded_original(golden, recording, compat_eps):
    """Without eps too, but for the sharpest level, where rows leave patches nothing."""
    record = golden(recording)
    taps = record if "attns" in record else golden("analysis_moco_vit")
    maps = tuple(map(jnp.asarray, taps["attns"]))
    metric = load("metrics", "nmi", prefix=1, compat_eps=compat_eps)
    rows = jax.jit(metric.update)({"attention": maps}, jnp.ones(8))
    got = np.stack([block["nmi"] for block in rows["values"]])  # (L, B, H)
    off = np.abs(got - record["nmi"])
    sharpest = recording == "metrics" and compat_eps == 0
    assert off[:3].max() < 1e-5 and np.median(off) < 2e-6
    assert 0.04 < off[3].max() < 0.06 if sharpest else off.max() < 1e-5


def test_series_name_the_parts():
    metric = load("metrics", "nmi", prefix=1, compat_eps=1e-8)
    maps = tuple(random_attention(i, 3, 2, 17, 17) for i in range(2))
    series = metric.compute(
        metric.to_state(metric.update({"attention": maps}, [1] * 3))
    )
    by_name = {s.name: s for s in series}
    assert list(by_name) == [
        "normalized mutual information",
        "mutual information",
        "key entropy",
        "attention entropy",
        "attention mass on CLS",
        "null attention rows",
    ]
    nmi = by_name["normalized mutual information"]
    assert nmi.values.shape == (2, 2) and nmi.source == "Fig. 4"
    assert "1e-08" in nmi.notes[0]
    difference = by_name["key entropy"].values - by_name["attention entropy"].values
    np.testing.assert_allclose(
        by_name["mutual information"].values, difference, atol=1e-6
    )
