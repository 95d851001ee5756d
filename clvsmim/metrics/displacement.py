"""How far each half of a block moves the patch tokens, and whether it moves them alike.

Self-attention and the MLP each add an update to the residual stream. Its length against
the stream's is the displacement; the MAE analysis reads which of the two dominates
(Fig. 11). The part of it that all tokens share is a translation of the whole map: the
paper finds that contrastive models translate all tokens alike, masked ones each token
its own way (Fig. 6).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim.metrics import (
    Axis,
    Image,
    Metric,
    Series,
    State,
    mean_series,
    moments,
    of_each,
)
from clvsmim.metrics.smoothing import check_patches

__all__ = ["TokenDisplacement", "token_displacement", "translation_share"]


class TokenDisplacement(NamedTuple):
    """An update of the patch tokens of one image, by size and direction.

    `relative` is its length over the token's, mean over tokens; `absolute` its length,
    mean over tokens; `rms` the root mean square over tokens and channels; `cosine` that
    of a token and its update, mean over tokens, in [-1, 1].
    """

    relative: jax.Array
    absolute: jax.Array
    rms: jax.Array
    cosine: jax.Array


def token_displacement(
    before: jax.Array, after: jax.Array, *, prefix: int
) -> TokenDisplacement:
    """What happened to the patch tokens between two taps.

    Args:
      before, after: (T, D) of one image.
      prefix: number of tokens before the patches, dropped.

    Returns:
      Four float32 scalars. A token that stays has relative displacement and cosine 0;
      one that leaves zero has cosine 0 and an infinite relative displacement.

    Raises:
      ValueError: there are no patches.

    Source: Fig. 11, which has no public code; the definitions are ours.
    """
    x, update = _update(before, after, prefix)  # (T, D) each
    # Every token is reduced and the prefix cut off then: a slice would be copied first.
    length, moved, along = (
        part.sum(axis=1)[prefix:]  # (T, D) -> (N,)
        for part in (jnp.square(x), jnp.square(update), x * update)
    )
    rms = jnp.sqrt(moved.mean() / x.shape[1])
    length, moved = jnp.sqrt(length), jnp.sqrt(moved)
    return TokenDisplacement(
        relative=jnp.where(moved == 0, 0.0, moved / length).mean(),
        absolute=moved.mean(),
        rms=rms,
        cosine=_ratio(along, length * moved).mean(),
    )


def translation_share(before: jax.Array, after: jax.Array, *, prefix: int) -> jax.Array:
    """The share of an update that all patches have in common.

    N |mean of u|^2 / (sum of |u|^2) over the N patches, with u = after - before.

    Args:
      before, after: (T, D) of one image.
      prefix: number of tokens before the patches, dropped.

    Returns:
      Scalar float32 in [0, 1]: 1 if all tokens move alike, 1 / N on average if they
      move independently, and 0 if none moves.

    Raises:
      ValueError: there are no patches.

    Source: a number for what Fig. 6 shows.
    """
    _, update = _update(before, after, prefix)  # (T, D)
    whole = jnp.square(update).sum(axis=1)[prefix:].sum()
    common = jnp.square(update[prefix:].sum(axis=0)).sum()
    return _ratio(common, whole * (len(update) - prefix))


def make(*, prefix: int) -> Metric:
    """Displacement and translation share of both updates of every block."""

    def kernel(image: Image) -> dict[str, jax.Array]:
        if "before" not in image:  # the embedding
            return {}
        pair = image["before"], image["tokens"]
        share = translation_share(*pair, prefix=prefix)
        moved = token_displacement(*pair, prefix=prefix)
        return {**moved._asdict(), "translation": share}

    return of_each("residual", kernel, _compute, _to_state)


def _to_state(rows: dict[str, Any]) -> State:
    """Sums of both updates of each block, and of attention's share in them."""
    values = {k: v.reshape(len(v), -1, 2) for k, v in rows["values"].items()}
    with np.errstate(invalid="ignore", over="ignore"):  # a token may leave zero
        attn, both = values["relative"][..., 0], values["relative"].sum(axis=2)
        still = both == 0  # (B, L)
        values["attn"] = np.where(still, 0.5, attn / np.where(still, 1, both))
    return moments({**rows, "values": values})


def _compute(state: State) -> list[Series]:
    block = Axis("block", (*range(1, len(state["sum"]["attn"]) + 1),))
    one, both = (block,), (block, Axis("site", ("attn", "mlp")))
    note = ("of each image, attn / (attn + mlp) of its relative displacements",)
    return [
        mean_series(
            state,
            key,
            at=at,
            name=name,
            axes=axes,
            kind="depth",
            unit="",
            source=source,
            notes=note if key == "attn" else (),
        )
        for key, at, axes, name, source in (
            ("relative", ..., both, "relative displacement", "Fig. 11"),
            ("absolute", ..., both, "displacement", "Fig. 11"),
            ("rms", ..., both, "per-channel RMS displacement", "Fig. 11"),
            ("cosine", ..., both, "cosine of update and stream", ""),
            ("attn", ..., one, "share of attention in displacement", "Fig. 11"),
            (
                "translation",
                np.s_[:, 0],
                one,
                "translation share of attention updates",
                "Fig. 6",
            ),
            ("translation", np.s_[:, 1], one, "translation share of MLP updates", ""),
        )
    ]


def _update(
    before: jax.Array, after: jax.Array, prefix: int
) -> tuple[jax.Array, jax.Array]:
    """The tokens before, and what was added to them: float32 (T, D) each."""
    check_patches(len(before), prefix, least=1)
    before = before.astype(jnp.float32)
    return before, after.astype(jnp.float32) - before


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole, and 0 where the whole is 0."""
    return jnp.where(whole == 0, 0.0, part / whole)
