"""Feature map variance: how much the patch tokens of one image differ over the grid.

Attention averages over positions and lowers it, MLPs raise it (Park and Kim 2022, "How
do vision transformers work?").
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
    taps,
)
from clvsmim.metrics.smoothing import centre, centred_patches, check_patches

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
    return _variance(centre(tokens.astype(jnp.float32)[prefix:]))


def make(*, prefix: int) -> Metric:
    """The variance at every tap."""

    def kernel(image: Image) -> dict[str, jax.Array]:
        check_patches(len(image["tokens"]), prefix, least=2)
        return {"variance": _variance(centred_patches(image, prefix)[0])}

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

    return of_each("residual", kernel, compute)


def _variance(x: jax.Array) -> jax.Array:
    return jnp.square(x).sum(axis=0).mean() / (len(x) - 1)  # centred (N, D) -> ()
