"""How tokens cluster: what a picture of their t-SNE shows, as numbers.

Groups may be images or classes. Distances are Euclidean, between the tokens as they
are, not between their places in a picture. Tokens of contrastive learning cluster by
image, those of masked image modelling intermingle.
"""

import jax
import jax.numpy as jnp

__all__ = ["neighbour_purity", "silhouette"]

ROWS = 512  # tokens compared with all others at a time


def neighbour_purity(tokens: jax.Array, groups: jax.Array, k: int = 10) -> jax.Array:
    """Share of a token's k nearest others that are of its group, mean over tokens.

    Args:
      tokens: (n, D), n > 1.
      groups: (n,) integers.
      k: number of neighbours; all others if there are fewer. Of tokens equally far,
        those with lower numbers are taken.

    Returns:
      Scalar float32 in [0, 1]; with n tokens drawn alike, the share of a token's group
      among the others.

    Raises:
      ValueError: fewer than two tokens.
    """
    n = len(tokens)
    if n < 2:
        raise ValueError(f"got {n} tokens, expected at least 2: neighbours are others")
    x, groups = _centred(tokens), jnp.asarray(groups)

    def share(token: jax.Array) -> jax.Array:
        far = _square_distances(x, token).at[token].set(jnp.inf)
        _, near = jax.lax.top_k(-far, min(k, n - 1))  # lower numbers first if equal
        return jnp.mean(groups[near] == groups[token], dtype=jnp.float32)

    return jax.lax.map(share, jnp.arange(n), batch_size=ROWS).mean()


def silhouette(tokens: jax.Array, groups: jax.Array, *, count: int) -> jax.Array:
    """Mean silhouette coefficient (Rousseeuw 1987).

    For a token with mean distance a to the others of its group, and b to those of the
    nearest other group, it is (b - a) / max(a, b).

    Args:
      tokens: (n, D).
      groups: (n,) integers from 0 to `count` - 1; groups may be empty.
      count: number of groups.

    Returns:
      Scalar float32 in [-1, 1]: 1 if groups are far apart, 0 if they overlap. A token
      alone in its group counts as 0, and so do all if there is but one group.
    """
    x, groups = _centred(tokens), jnp.asarray(groups)
    member = jax.nn.one_hot(groups, count, dtype=jnp.float32)  # (n, G)
    size = member.sum(axis=0)  # (G,)

    def coefficient(token: jax.Array) -> jax.Array:
        far = jnp.sqrt(_square_distances(x, token)).at[token].set(0)  # (n,)
        total = jnp.matmul(far, member, precision=jax.lax.Precision.HIGHEST)  # (G,)
        own = member[token] > 0
        a = jnp.where(own, total, 0).sum() / jnp.maximum(size[groups[token]] - 1, 1)
        others = ~own & (size > 0)
        b = jnp.where(others, total / jnp.maximum(size, 1), jnp.inf).min()
        defined = (size[groups[token]] > 1) & others.any() & (jnp.maximum(a, b) > 0)
        ratio = (b - a) / jnp.where(defined, jnp.maximum(a, b), 1)
        return jnp.where(defined, ratio, 0)

    return jax.lax.map(coefficient, jnp.arange(len(x)), batch_size=ROWS).mean()


def _centred(tokens: jax.Array) -> jax.Array:
    """Distances do not see the mean, but their rounding error in float32 would."""
    x = jnp.asarray(tokens, jnp.float32)
    return x - x.mean(axis=0, keepdims=True)


def _square_distances(x: jax.Array, token: jax.Array) -> jax.Array:
    """From one token to all: (n, D), () -> (n,), not negative.

    |x|^2 + |y|^2 - 2 xy makes one matrix product of many tokens' distances.
    """
    product = jnp.matmul(x, x[token], precision=jax.lax.Precision.HIGHEST)  # (n,)
    norm = jnp.square(x).sum(axis=1)  # (n,)
    return jnp.maximum(norm + norm[token] - 2 * product, 0)
