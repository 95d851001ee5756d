"""What a trained model sees, as arrays: attention maps and reconstructions."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from clvsmim import views
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
