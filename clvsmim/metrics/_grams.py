"""Gram matrices of mini-batches on the device, as CKA compares them."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from clvsmim.metrics._contract import Features, shared

# A centred Gram matrix smaller than this, relative to the squared length of its
# features, is what float32 rounding leaves of features that are the same everywhere.
ROUNDING = 1e-5
CHUNK = 16  # tokens centred at once: few enough to stay in a cache


def block_grams(
    features: Features, *, group: int, prefix: int
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """`head_grams` of every mini-batch, block by block: (G, H, n, n), (G, N, n, n)."""
    grams = jax.vmap(functools.partial(head_grams, prefix=prefix))

    def derive(features: Features) -> tuple:
        return tuple(map(grams, cut_groups(features["head_outputs"], group)))

    return shared(features, f"head grams {group} {prefix}", derive)


def cut_groups(maps: tuple[jax.Array, ...], group: int) -> tuple[jax.Array, ...]:
    """Consecutive images into mini-batches: (B, ...) -> (B / group, group, ...)."""
    return tuple(x.reshape(-1, group, *x.shape[1:]) for x in maps)


def first_images(features: Features, group: int) -> jax.Array:
    """The number in the data of the first image of each mini-batch: (B / group,)."""
    return features["index"].reshape(-1, group)[:, 0]


def centred(x: jax.Array) -> jax.Array:
    """Minus the mean over the first axis, float32. A product is the fastest mean."""
    x = x.astype(jnp.float32)
    weights = jnp.full(len(x), 1 / len(x), jnp.float32)
    mean = jnp.einsum("i,i...->...", weights, x, precision=lax.Precision.HIGHEST)
    return x - mean[None]


def u_centred(gram: jax.Array) -> jax.Array:
    """Zero the diagonals, then what all pairs of an example share: (..., n, n)."""
    n = check_group(gram.shape[-1])
    off = jnp.broadcast_to(1 - jnp.eye(n, dtype=jnp.float32), gram.shape)
    k = gram * off
    row = k.sum(axis=-1) / (n - 2)
    row -= k.sum(axis=(-2, -1))[..., None] / (2 * (n - 1) * (n - 2))
    kc = (k - row[..., :, None] - row[..., None, :]) * off
    length = jnp.diagonal(gram, axis1=-2, axis2=-1).max(axis=-1)
    nothing = jnp.abs(kc).max(axis=(-2, -1)) <= ROUNDING * length  # False for NaN
    return jnp.where(nothing[..., None, None], 0.0, kc)


def token_gram(x: jax.Array, *, prefix: int) -> jax.Array:
    """Gram matrix of centred patch tokens, flattened: (n, ..., T, d) -> (n, n).

    A few tokens at a time, so that no centred copy of the whole is made.
    """
    tokens = x.shape[-2] - prefix
    step = next(s for s in range(min(CHUNK, tokens), 0, -1) if tokens % s == 0)

    def body(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        part = lax.dynamic_slice_in_dim(x, start, step, axis=x.ndim - 2)
        part = centred(part).reshape(len(x), -1)
        return total + dot(part, part.T), None

    starts = prefix + step * jnp.arange(tokens // step)
    return lax.scan(body, jnp.zeros((len(x), len(x))), starts)[0]


def head_grams(x: jax.Array, *, prefix: int) -> tuple[jax.Array, jax.Array]:
    """Gram matrices of head outputs (n, H, T, d): of each head (H, n, n), over all its
    patches, and of each patch (N, n, n), over all its heads.

    Both are sums of the same products, those of one patch of one head.
    """
    n, heads, tokens, _ = x.shape

    def body(total: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = lax.dynamic_index_in_dim(x, head, axis=1, keepdims=False)[:, prefix:]
        own = centred(own).transpose(1, 0, 2)  # (n, N, d) -> (N, n, d)
        grams = dot(own, own.transpose(0, 2, 1))  # (N, n, n)
        return total + grams, grams.sum(axis=0)

    start = jnp.zeros((tokens - prefix, n, n))
    by_position, by_head = lax.scan(body, start, jnp.arange(heads))
    return by_head, by_position


def hsic_matrix(kc: jax.Array) -> jax.Array:
    """`hsic` of every two of k matrices: (k, n, n) -> (k, k)."""
    k, n, _ = kc.shape
    flat = kc.reshape(k, n * n)
    return dot(flat, flat.T) / (n * (n - 3))


def check_group(n: int) -> int:
    """n, unless it is too small for the unbiased estimator."""
    if n < 4:
        raise ValueError(f"got {n} images in a mini-batch of CKA, expected at least 4")
    return n


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product at full float32 precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
