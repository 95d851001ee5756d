"""k-NN accuracy: classes of the nearest training images, without learning anything.

Features after the final norm, the CLS token and the mean over patch tokens, are scaled
to length 1. The k training images of highest cosine vote for their class with weight
exp(cosine / temperature) (Wu et al. 2018; the protocol of DINO).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim.metrics import Axis, Features, Metric, Series, State, join, keep
from clvsmim.metrics.probe import check_labels, image_notes, percent_error

__all__ = ["Nearest", "knn_predict", "knn_scores", "merge_nearest", "nearest"]

POOLS = ("cls", "patches")
QUERIES, BANK = 1024, 8192  # images compared at a time: a table of 32 MB


class Nearest(NamedTuple):
    """The most similar images of one query, best first.

    `similarity` (k,) float32, `ids` (k,) int32. Of images equally similar, those with
    lower ids come first, so the choice does not depend on how the images were split.
    """

    similarity: jax.Array
    ids: jax.Array


def nearest(similarity: jax.Array, ids: jax.Array, k: int) -> Nearest:
    """The k most similar of n images, or all n if there are fewer.

    Args:
      similarity: (n,), of one query.
      ids: (n,) int32, ascending.
    """
    s = similarity.astype(jnp.float32)
    s = jnp.where(s == 0, 0.0, s)  # `top_k` takes -0 as less than 0
    top, where = jax.lax.top_k(s, min(k, len(s)))  # lower positions first if equal
    return Nearest(top, ids[where])


def merge_nearest(a: Nearest, b: Nearest, k: int) -> Nearest:
    """The k nearest of both; associative and commutative if they share no image."""
    away, ids = jax.tree.map(lambda *x: jnp.concatenate(x), a, b)
    away, ids = jax.lax.sort((-away, ids), num_keys=2)
    return Nearest(-away[:k], ids[:k])


def knn_scores(
    similarity: jax.Array, labels: jax.Array, *, classes: int, temperature: float
) -> jax.Array:
    """Sum of exp(similarity / temperature) over the neighbours of each class.

    Relative to the weight of the most similar neighbour, which is 1: so no temperature
    overflows.

    Args:
      similarity, labels: (k,), of the neighbours of one query.
      classes: number of classes of the data.
      temperature: > 0; towards infinity this becomes a count of votes.

    Returns:
      (classes,) float32, 0 for a class without neighbours.
    """
    s = similarity.astype(jnp.float32)
    weights = jnp.exp((s - s.max(keepdims=True)) / temperature)  # (k,)
    own = labels[:, None] == jnp.arange(classes)[None]  # (k, classes)
    return jnp.where(own, weights[:, None], 0).sum(axis=0)


def knn_predict(scores: jax.Array, top: int = 1) -> jax.Array:
    """The `top` best classes, best first: (classes,) -> (min(top, classes),) int32.

    The lower of two equal classes comes first; -1 where no neighbour votes for any
    further class, so k neighbours never name more than k classes.
    """
    found, where = jax.lax.top_k(scores, min(top, len(scores)))
    return jnp.where(found > 0, where, -1)


def make(
    *,
    prefix: int,
    classes: int,
    neighbours: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> Metric:
    """Accuracy of k-NN on the images measured, with the training images as bank."""
    if not neighbours or min(neighbours) < 1:
        raise ValueError(f"got neighbours {neighbours}, expected numbers of 1 or more")
    if not temperature > 0:
        raise ValueError(f"got temperature {temperature}, expected one above 0")
    pools = POOLS if prefix else ("patches",)

    def update(features: Features, weights: jax.Array) -> dict[str, Any]:
        x = features["output"].astype(jnp.float32)  # (B, T, D)
        pooled = {"cls": x[:, 0], "patches": x[:, prefix:].mean(axis=1)}
        return {
            "weight": weights,
            "index": features["index"],
            "label": features["label"],
            **{pool: _unit(pooled[pool]) for pool in pools},  # (B, D) each
        }

    def compute(train: State, test: State) -> list[Series]:
        for state in (train, test):
            check_labels(state["label"], classes)
        bank, n = len(train["label"]), len(test["label"])
        ks = tuple(k for k in neighbours if k <= bank or not bank) or (bank,)
        right = np.full((2, len(pools), len(ks)), np.nan)  # of top 1, of top 5
        for i in range(len(pools) if bank and n else 0):
            found = _search(test[pools[i]], train[pools[i]], max(ks))
            labels = train["label"][found.ids]  # (n, k)
            for j, k in enumerate(ks):
                near = found.similarity[:, :k], labels[:, :k]
                named = np.asarray(_classify(*near, classes, temperature))
                hit = named == test["label"][:, None]  # (n, up to 5)
                right[:, i, j] = hit[:, 0].mean(), hit.any(axis=1).mean()
        notes = _notes(train, test, classes, [k for k in neighbours if k not in ks])
        return [
            Series(
                name=name,
                axes=(Axis("pool", pools), Axis("neighbours", ks)),
                values=100 * fraction,
                stderr=percent_error(fraction, n),
                kind="curve",
                unit="%",
                source="",
                count=n,
                notes=notes,
            )
            for name, fraction in zip(
                ("k-NN accuracy", "k-NN accuracy, top 5"), right, strict=True
            )
        ]

    return Metric(
        needs=("output", "label", "index"),
        update=update,
        compute=compute,
        to_state=keep,
        merge=join,
        parts=("train", "test"),
    )


def _unit(x: jax.Array) -> jax.Array:
    """Vectors (B, D) scaled to length 1; zeros stay zeros."""
    norm = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


def _search(queries: np.ndarray, bank: np.ndarray, k: int) -> Nearest:
    """The k nearest of `bank` (m, D) for each of `queries` (n, D): (n, k) each.

    Ids are positions in the bank, which is sorted by image number.
    """
    found = []
    for q in range(0, len(queries), QUERIES):
        chunk = queries[q : q + QUERIES]
        none = np.zeros((len(chunk), 0))
        best = Nearest(none.astype(np.float32), none.astype(np.int32))
        for start in range(0, len(bank), BANK):
            cosine = chunk @ bank[start : start + BANK].T  # (n, m), float32
            best = _closer(best, cosine, start, k)
        found.append(jax.tree.map(np.asarray, best))
    return jax.tree.map(lambda *x: np.concatenate(x), *found)


@functools.partial(jax.jit, static_argnames="k")
def _closer(best: Nearest, cosine: jax.Array, start: int, k: int) -> Nearest:
    """`best` or what is nearer in the images from number `start` on."""
    ids = start + jnp.arange(cosine.shape[1], dtype=jnp.int32)
    new = jax.vmap(lambda s: nearest(s, ids, k))(cosine)
    return jax.vmap(lambda a, b: merge_nearest(a, b, k))(best, new)


@functools.partial(jax.jit, static_argnames=("classes", "temperature"))
def _classify(
    similarity: jax.Array, labels: jax.Array, classes: int, temperature: float
) -> jax.Array:
    """The five best classes of each query: (n, k) and (n, k) -> (n, 5 or fewer)."""

    def one(s: jax.Array, label: jax.Array) -> jax.Array:
        scores = knn_scores(s, label, classes=classes, temperature=temperature)
        return knn_predict(scores, top=5)

    return jax.vmap(one)(similarity, labels)


def _notes(
    train: State, test: State, classes: int, left_out: Sequence[int]
) -> tuple[str, ...]:
    n = len(train["label"])
    notes = (f"{n} training images; chance is {100 / classes:.3g}%",)
    notes += image_notes(n, train["nonfinite"], "training images")
    if n and left_out:
        ks = ", ".join(map(str, left_out))
        notes += (f"k = {ks} left out: more than there are training images",)
    return notes + image_notes(len(test["label"]), test["nonfinite"])
