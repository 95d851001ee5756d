"""What a trained model sees in a few images, as arrays to draw.

Attention maps of two queries, masked reconstructions, and the tokens of some images of
some classes, embedded by t-SNE and judged by how they cluster.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.manifold import TSNE

from clvsmim import views
from clvsmim.metrics import Axis, Series, block_axis, neighbour_purity, silhouette
from clvsmim.objectives import Objective
from clvsmim.vit import ViT

Tree = Any


def queries(grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Two patches, a quarter in from the top left and from the bottom right."""
    rows, columns = grid
    return (rows // 4, columns // 4), (rows - 1 - rows // 4, columns - 1 - columns // 4)


def attention_maps(
    encoder: ViT,
    variables: Tree,
    image: np.ndarray,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    places: Sequence[tuple[int, int]],
) -> np.ndarray:
    """Where the patches at `places` look: (L, H, queries, rows, columns) (Fig. 2).

    Args:
      image: uint8 (rows, columns, 3) in pixels.
      places: (row, column) of each query on the grid.
    """
    rows, columns = encoder.spec.grid
    at = [encoder.spec.prefix + r * columns + c for r, c in places]

    @jax.jit
    def maps(image: jax.Array) -> list[jax.Array]:
        _, taps = encoder.apply(variables, views.normalise(image, mean, std)[None])
        # (1, H, T, T) -> (H, queries, N)
        return [a[0][:, np.array(at), encoder.spec.prefix :] for a in taps["attention"]]

    found = np.stack(maps(image))
    return found.reshape(*found.shape[:-1], rows, columns)


def reconstructions(
    objective: Objective,
    params: Tree,
    extra: Tree,
    images: np.ndarray,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, masks, reconstructions), float32 in [0, 1], of one batch.

    Visible pixels are those of the image: no loss was ever asked for them.

    Args:
      images: uint8 (B, rows, columns, 3).
    """
    batch = {"views": (images,) * len(objective.views)}

    @jax.jit
    def run(batch: Tree) -> tuple[jax.Array, jax.Array, jax.Array]:
        inputs = objective.prepare(jax.random.key(seed), batch, train=False)
        image, mask, found = objective.reconstruct(params, extra, inputs)
        whole = image * (1 - mask) + found * mask
        back = jax.vmap(lambda x: views.denormalise(x, mean, std) / 255)
        return back(image), mask[..., 0], back(whole)

    return tuple(np.asarray(x) for x in run(batch))


def choose(labels: Sequence[int], *, classes: int = 3, each: int = 6) -> list[int]:
    """Places of `each` images of each of `classes` classes, the first that have them.

    With fewer images than that, those of the classes that have most.
    """
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(int(label), []).append(place)
    first = sorted(places.values(), key=lambda p: (-min(len(p), each), p[0]))
    return [place for found in first[:classes] for place in found[:each]]


def patch_tokens(
    encoder: ViT,
    variables: Tree,
    images: np.ndarray,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> list[np.ndarray]:
    """Tokens (B, N, D) of the embedding and after each block, before the final norm."""

    @jax.jit
    def run(images: jax.Array) -> list[jax.Array]:
        x = jax.vmap(lambda image: views.normalise(image, mean, std))(images)
        _, taps = encoder.apply(variables, x)
        return [tap[:, encoder.spec.prefix :] for tap in taps["residual"][::2]]

    return [np.asarray(x, np.float32) for x in run(images)]


def token_map(tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE of tokens (n, D) -> (n, 2) (the paper's token plots).

    Perplexity 20 from a random start, 1000 iterations, no PCA before.
    """
    method = TSNE(
        perplexity=min(20.0, (len(tokens) - 1) / 3),
        init="random",
        learning_rate="auto",
        max_iter=1000,
        random_state=seed,
    )
    return method.fit_transform(tokens)


def clusters(tokens: Sequence[np.ndarray], labels: np.ndarray) -> list[Series]:
    """Do tokens (B, N, D), of each depth, cluster by image, and by class?

    Measured in the space of the tokens, not in the picture of it.
    """
    images, count, _ = tokens[0].shape
    of_image = np.repeat(np.arange(images), count)
    _, numbers = np.unique(labels, return_inverse=True)
    groups = {"same image": of_image, "same class": np.repeat(numbers, count)}
    note = f"{count} tokens of each of {images} images of {numbers.max() + 1} classes"

    def purity(x: jax.Array, group: np.ndarray) -> float:
        return _purity(x, jnp.asarray(group))

    def silhouette(x: jax.Array, group: np.ndarray) -> float:
        return _silhouette(x, jnp.asarray(group), count=int(group.max()) + 1)

    def series(name: str, judge: Callable) -> Series:
        flat = [jnp.asarray(x.reshape(-1, x.shape[-1])) for x in tokens]
        values = [[float(judge(x, g)) for g in groups.values()] for x in flat]
        return Series(
            name=name,
            axes=(block_axis(len(tokens)), Axis("group", tuple(groups))),
            values=np.array(values),
            stderr=None,
            kind="depth",
            unit="",
            source="",
            count=images,
            notes=(note,),
        )

    return [series("token purity", purity), series("token silhouette", silhouette)]


_purity = jax.jit(neighbour_purity)
_silhouette = jax.jit(silhouette, static_argnames="count")
