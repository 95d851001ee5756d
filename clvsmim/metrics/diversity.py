"""Do queries differ, do heads differ? Two cheap companions of NMI.

`row_deviation` is 0 when all queries attend alike (attention collapse), as NMI is, but
in units of attention. `head_cosine` is 1 when all heads of a block attend alike.
"""

import jax
import jax.numpy as jnp

from clvsmim.metrics import Metric, Series, State, mean_series, of_each_map
from clvsmim.metrics.distance import blocks_and_heads, patch_attention

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
    return jnp.std(patch_attention(attention, prefix=prefix), axis=0).mean()


def head_cosine(attention: jax.Array, *, prefix: int) -> jax.Array:
    """Cosine between the flattened patch attention of two heads, mean over all pairs.

    Args:
      attention: (H, T, T) of the heads of one block and image, rows = queries.
      prefix: number of tokens before the patches.

    Returns:
      Scalar float32 from 0 (no two heads share a key) to 1 (all heads alike, or one
      head only).
    """
    heads = len(attention)
    if heads == 1:
        return jnp.float32(1)
    inner = jax.vmap(lambda a: patch_attention(a, prefix=prefix))(attention)
    length = jnp.sqrt(jnp.square(inner).sum(axis=(1, 2)))  # (H,)
    # All pairs at once: the squared length of the sum of unit vectors is the sum of all
    # their cosines, the H of a head with itself among them.
    flat = inner.reshape(heads, -1)  # (H, N, N) -> (H, N N)
    common = jnp.matmul(1 / length, flat, precision=jax.lax.Precision.HIGHEST)
    return (jnp.square(common).sum() - heads) / (heads * (heads - 1))


def make(*, prefix: int) -> Metric:
    """Deviation over queries per block and head, and cosine between heads per block."""

    def kernel(attention: jax.Array) -> dict[str, jax.Array]:
        rows = jax.vmap(lambda a: row_deviation(a, prefix=prefix))(attention)  # (H,)
        return {"rows": rows, "heads": head_cosine(attention, prefix=prefix)}

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

    return of_each_map(kernel, compute)
