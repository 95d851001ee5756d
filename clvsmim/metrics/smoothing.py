"""Over-smoothing: how alike the patch tokens of one image are at each tap.

The mean cosine between two different tokens is 1 once they all point the same way. The
common part of a token map often makes it large early, so it is reported a second time
for tokens with their mean taken out. Those of equal length have -1 / (N - 1) whatever
their directions; it rises where a few tokens are very long.
"""

import jax
import jax.numpy as jnp

from clvsmim.metrics import (
    Axis,
    Image,
    Metric,
    Series,
    State,
    mean_series,
    of_each,
    shared,
    stored,
    taps,
)

__all__ = ["token_cosine"]


def token_cosine(tokens: jax.Array, *, prefix: int, centred: bool = False) -> jax.Array:
    """Cosine between two different patch tokens, mean over all pairs.

    Args:
      tokens: (T, D) of one image at one tap.
      prefix: number of tokens before the patches, dropped.
      centred: take the mean over patches out first.

    Returns:
      Scalar float32 from -1 / (N - 1) to 1. A token of zeros has cosine 0 with every
      other one, so a constant map is 1, and 0 if centred.

    Raises:
      ValueError: there are fewer than 2 patches, and so no pair.
    """
    check_patches(len(tokens), prefix, least=2)
    x = tokens.astype(jnp.float32)[prefix:]  # (T, D) -> (N, D)
    return _cosine(centre(x) if centred else x)


def make(*, prefix: int) -> Metric:
    """Both cosines at every tap."""

    def kernel(image: Image) -> dict[str, jax.Array]:
        return {
            "cosine": token_cosine(image["tokens"], prefix=prefix),  # checks patches
            "centred": _cosine(centred_patches(image, prefix)[0]),
        }

    def compute(state: State) -> list[Series]:
        return [
            mean_series(
                state,
                key,
                name=name,
                axes=(Axis("depth", taps(len(state["sum"][key]) // 2)),),
                kind="depth",
                unit="",
                source="",
            )
            for key, name in (
                ("cosine", "cosine between tokens"),
                ("centred", "cosine between centred tokens"),
            )
        ]

    return of_each("residual", kernel, compute)


def centred_patches(image: Image, prefix: int) -> tuple[jax.Array, jax.Array]:
    """Patch tokens minus their mean (N, D), and the mean (D,), which metrics share."""

    def derive(image: Image) -> tuple[jax.Array, jax.Array]:
        x = image["tokens"].astype(jnp.float32)[prefix:]
        first = x[:1]
        mean = (x - first).mean(axis=0, keepdims=True)  # (1, D)
        return stored(_without, x, first, mean), (first + mean)[0]

    return shared(image, f"centred patches {prefix}", derive)


def _without(x: jax.Array, first: jax.Array, mean: jax.Array) -> jax.Array:
    return x - first - mean  # as `centre` does


def check_patches(tokens: int, prefix: int, *, least: int) -> None:
    """Raise ValueError unless `least` of the tokens come after the prefix."""
    if tokens - prefix < least:
        raise ValueError(
            f"got {tokens} tokens with a prefix of {prefix}, expected at least {least} "
            "after the prefix; use smaller patches or a larger image"
        )


def _cosine(x: jax.Array) -> jax.Array:
    """Cosine between two different rows of (N, D), mean over all pairs."""
    square = jnp.square(x).sum(axis=1)  # (N,)
    zero = square == 0
    weight = jnp.where(zero, 0.0, jax.lax.rsqrt(jnp.where(zero, 1.0, square)))
    common = jnp.matmul(weight, x, precision=jax.lax.Precision.HIGHEST)  # (D,)
    # The squared length of the sum of directions: all pairs, and each with itself.
    pairs = jnp.square(common).sum() - jnp.sum(~zero)
    return pairs / (len(x) * (len(x) - 1))


def centre(x: jax.Array) -> jax.Array:
    """(N, D) minus its mean over N.

    The first row goes before the mean does: what is left is then as exact as the input
    however large the mean, and exactly 0 where all rows are equal.
    """
    x = x - x[:1]
    return x - x.mean(axis=0, keepdims=True)
