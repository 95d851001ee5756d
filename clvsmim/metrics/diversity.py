"""Do queries differ, do heads differ? Two cheap companions of NMI.

`row_deviation` is 0 when all queries attend alike (attention collapse), as NMI is, but
in units of attention. `head_cosine` is 1 when all heads of a block attend alike.
"""

import jax
import jax.numpy as jnp

from clvsmim.metrics import Image, Metric, Series, State, mean_series, of_each
from clvsmim.metrics.distance import blocks_and_heads, patch_attention, patches

__all__ = ["head_cosine", "row_deviation"]


def row_deviation(attention: jax.Array, *, prefix: int) -> jax.Array:
    """Standard deviation over queries of the attention on a key, mean over keys.

    Args:
      attention: (T, T) probabilities after the softmax, rows = queries.
      prefix: number of tokens before the patches, dropped as queries and as keys.

    Returns:
      Scalar float32: 0 if all queries attend alike, at most sqrt(N - 1) / N (0.0712 for
      196 patches), if each has a key of its own.
    """
    return _deviation(patch_attention(attention, prefix=prefix))


def head_cosine(attention: jax.Array, *, prefix: int) -> jax.Array:
    """Cosine between the flattened patch attention of two heads, mean over all pairs.

    Args:
      attention: (H, T, T) of the heads of one block and image, rows = queries.
      prefix: number of tokens before the patches.

    Returns:
      Scalar float32 from 0 (no two heads share a key) to 1 (all heads alike, or one
      head only).
    """
    return _cosine(jax.vmap(lambda a: patch_attention(a, prefix=prefix))(attention))


def make(*, prefix: int) -> Metric:
    """Deviation over queries per block and head, and cosine between heads per block."""

    def kernel(image: Image) -> dict[str, jax.Array]:
        inner = patches(image, prefix)  # (H, N, N)
        return {"rows": jax.vmap(_deviation)(inner), "heads": _cosine(inner)}

    def compute(state: State) -> list[Series]:
        axes = blocks_and_heads(state["sum"]["rows"])
        alone = len(axes[1].values) == 1
        common = {"kind": "depth", "unit": "", "source": ""}
        return [
            mean_series(
                state, "rows", name="deviation over queries", axes=axes, **common
            ),
            mean_series(
                state,
                "heads",
                name="cosine between heads",
                axes=axes[:1],
                notes=("one head has no other: 1 by definition",) if alone else (),
                **common,
            ),
        ]

    return of_each("attention", kernel, compute)


def _deviation(inner: jax.Array) -> jax.Array:
    return jnp.std(inner, axis=0).mean()  # (N, N) -> ()


def _cosine(inner: jax.Array) -> jax.Array:
    """`head_cosine` of (H, N, N) attention of rows that sum to 1."""
    heads = len(inner)
    if heads == 1:
        return jnp.float32(1)
    length = jnp.sqrt(jnp.square(inner).sum(axis=(1, 2)))  # (H,)
    # All pairs at once: the squared length of the sum of unit vectors is the sum of all
    # their cosines, the H of a head with itself among them.
    flat = inner.reshape(heads, -1)  # (H, N, N) -> (H, N N)
    common = jnp.matmul(1 / length, flat, precision=jax.lax.Precision.HIGHEST)
    return (jnp.square(common).sum() - heads) / (heads * (heads - 1))
