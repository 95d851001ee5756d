"""Normalised mutual information of query and key: does attention depend on the query?

1 if every query attends to a key of its own, 0 if all queries attend alike, which the
paper calls attention collapse (Fig. 4). Its parts are reported with it, since uniform
attention and a single key for all queries both give 0; so is the row entropy, a monitor
of entropy collapse (Zhai et al. 2023).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr

from clvsmim.metrics import Image, Metric, Series, State, mean_series, of_each
from clvsmim.metrics.distance import (
    blocks_and_heads,
    left_out,
    left_out_series,
    patch_attention,
    patches,
)

__all__ = ["AttentionInformation", "attention_information", "attention_nmi"]

# With less key entropy than this (one key for all queries), float32 has no digits left
# for the ratio; NMI is 0 there.
ONE_KEY = 1e-6


class AttentionInformation(NamedTuple):
    """NMI and its parts, of one head of one image; entropies in nats.

    `nmi` is in [0, 1]; `information` I(q, k) <= min(log N, key_entropy);
    `key_entropy` H(k) of the mean over queries; `row_entropy` the mean over queries of
    one query's entropy, from 0 (one key) to log N (uniform).
    """

    nmi: jax.Array
    information: jax.Array
    key_entropy: jax.Array
    row_entropy: jax.Array


def attention_information(
    attention: jax.Array, *, prefix: int, compat_eps: float = 0.0
) -> AttentionInformation:
    """I(q, k) / sqrt(H(q) H(k)) with uniform queries, and its parts.

    Args:
      attention: (T, T) probabilities after the softmax, rows = queries.
      prefix: number of tokens before the patches, dropped as queries and as keys.
      compat_eps: added to each entry before rows are scaled; 1e-8 gives the number of
        the paper's released code, 0 the exact one. They differ where a query leaves
        almost nothing to patches.

    Returns:
      Four float32 scalars.

    Source: Fig. 4.
    """
    return _information(patch_attention(attention, prefix=prefix, eps=compat_eps))


def attention_nmi(
    attention: jax.Array, *, prefix: int, compat_eps: float = 0.0
) -> jax.Array:
    """The `nmi` of `attention_information`: (T, T) -> scalar in [0, 1] (Fig. 4)."""
    return attention_information(attention, prefix=prefix, compat_eps=compat_eps).nmi


def make(*, prefix: int, compat_eps: float = 0.0) -> Metric:
    """NMI per block and head (the mean of each image's own), with its parts."""

    def inner(image: Image) -> jax.Array:  # (H, N, N)
        if not compat_eps:
            return patches(image, prefix)
        one = functools.partial(patch_attention, prefix=prefix, eps=compat_eps)
        return jax.vmap(one)(image["attention"])

    def kernel(image: Image) -> dict[str, jax.Array]:
        parts = jax.vmap(_information)(inner(image))
        return {**parts._asdict(), **left_out(image, prefix)}

    def compute(state: State) -> list[Series]:
        axes = blocks_and_heads(state["sum"]["nmi"])
        notes = (f"with {compat_eps:g} added to every entry",) if compat_eps else ()
        series = [
            mean_series(
                state,
                key,
                name=name,
                axes=axes,
                kind="depth",
                unit=unit,
                source=source,
                notes=notes,
            )
            for key, name, unit, source in (
                ("nmi", "normalized mutual information", "", "Fig. 4"),
                ("information", "mutual information", "nats", ""),
                ("key_entropy", "key entropy", "nats", ""),
                ("row_entropy", "attention entropy", "nats", ""),
            )
        ]
        return [*series, *left_out_series(state)]

    return of_each("attention", kernel, compute)


def _information(inner: jax.Array) -> AttentionInformation:
    """Of (N, N) attention of rows that sum to 1."""
    row_entropy = entr(inner).sum(axis=1).mean()  # (N, N) -> ()
    key_entropy = entr(inner.mean(axis=0)).sum()
    information = jnp.maximum(key_entropy - row_entropy, 0.0)
    one_key = key_entropy < ONE_KEY
    scale = jnp.where(one_key, 1.0, key_entropy * np.float32(np.log(len(inner))))
    nmi = jnp.where(one_key, 0.0, information / jnp.sqrt(scale))
    return AttentionInformation(nmi, information, key_entropy, row_entropy)
