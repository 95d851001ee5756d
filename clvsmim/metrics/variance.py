"""Feature map variance: how much the patch tokens of one image differ over the grid.

Attention averages over positions and lowers it, MLPs raise it (Park and Kim 2022, "How
do vision transformers work?").
"""

from typing import Any

import jax
import jax.numpy as jnp

from clvsmim.metrics import (
    Axis,
    Features,
    Metric,
    Series,
    State,
    mean_series,
    over_blocks,
    taps,
)
from clvsmim.metrics.smoothing import centre, check_patches

__all__ = ["map_variance"]


def map_variance(tokens: jax.Array, *, prefix: int) -> jax.Array:
    """Unbiased variance over the N patches of each channel, mean over channels.

    Args:
      tokens: (T, D) of one image at one tap.
      prefix: number of tokens before the patches, dropped.

    Returns:
      Scalar float32 in squared units of the tokens; exactly 0 for a constant map.

    Raises:
      ValueError: there are fewer than 2 patches.
    """
    check_patches(len(tokens), prefix, least=2)
    x = centre(tokens.astype(jnp.float32)[prefix:])  # (T, D) -> (N, D)
    return jnp.square(x).sum(axis=0).mean() / (len(x) - 1)


def make(*, prefix: int) -> Metric:
    """The variance at every tap."""

    def kernel(tokens: jax.Array) -> dict[str, jax.Array]:
        return {"variance": map_variance(tokens, prefix=prefix)}

    def update(features: Features, weights: jax.Array) -> dict[str, Any]:
        values = over_blocks(kernel, features["residual"], 1)  # (B, 2L+1)
        return {"weight": weights, "values": values}

    def compute(state: State) -> list[Series]:
        sites = taps(len(state["sum"]["variance"]) // 2)
        return [
            mean_series(
                state,
                "variance",
                name="feature map variance",
                axes=(Axis("depth", sites),),
                kind="depth",
                unit="",
                source="",
            )
        ]

    return Metric(needs=("residual",), update=update, compute=compute)
