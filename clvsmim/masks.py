"""Which patches a masked image model sees, and images as rows of patches.

Masks are float32: 0 is keep, 1 is remove (or: replace by the mask token). All
functions take one example; batch them with `jax.vmap`. Counts are static, so every
example of a batch has the same number of visible patches.
"""

import math

import jax
import jax.numpy as jnp


def random_mask(
    key: jax.Array, n: int, keep: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keep `keep` of `n` patches, uniformly; see `mask_from_noise` (MAE, section 3)."""
    return mask_from_noise(jax.random.uniform(key, (n,)), keep)


def mask_from_noise(
    noise: jax.Array, keep: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keep the patches with the `keep` smallest noise values.

    Args:
      noise: (..., N), one value per patch.
      keep: how many patches stay.

    Returns:
      ids_keep (..., keep): the patches to gather, in order of their noise.
      ids_restore (..., N): gather with it to undo the shuffle: kept patches first,
        then mask tokens, becomes image order.
      mask (..., N) in image order, 0 is keep, 1 is remove.
    """
    n = noise.shape[-1]
    if not 0 < keep <= n:
        raise ValueError(f"keep is {keep}, expected 1 to {n}, the number of patches")
    ids_shuffle = jnp.argsort(noise, axis=-1)
    ids_restore = jnp.argsort(ids_shuffle, axis=-1)
    return ids_shuffle[..., :keep], ids_restore, (ids_restore >= keep).astype("float32")


def masked_cells(grid: tuple[int, int], unit: int, ratio: float) -> int:
    """How many cells `block_mask` masks: ceil(ratio * cells) (SimMIM, section 3.2)."""
    if grid[0] % unit or grid[1] % unit:
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} patches cannot be cut into cells of "
            f"{unit} x {unit} patches; choose an image size that is a multiple of the "
            "mask unit"
        )
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"the mask ratio is {ratio}, expected 0 to 1")
    cells = (grid[0] // unit) * (grid[1] // unit)
    return math.ceil(round(ratio * cells, 6))  # 0.56 * 25 is 14.000000000000002


def block_mask(
    key: jax.Array, grid: tuple[int, int], unit: int, ratio: float
) -> jax.Array:
    """Mask square cells of `unit` x `unit` patches, uniformly without replacement.

    SimMIM masks cells of 32 pixels, which is `unit` 2 with patches of 16.

    Returns:
      (grid rows, grid columns) float32, 0 is keep, 1 is masked; exactly
      `masked_cells(grid, unit, ratio) * unit**2` ones.

    Raises:
      ValueError: the grid does not divide into cells, or the ratio is not in [0, 1].
    """
    count = masked_cells(grid, unit, ratio)
    rows, columns = grid[0] // unit, grid[1] // unit
    rank = jax.random.permutation(key, rows * columns)
    cells = (rank < count).astype(jnp.float32).reshape(rows, columns)
    return jnp.repeat(jnp.repeat(cells, unit, axis=0), unit, axis=1)  # (grid)


# Order of the P * P * C values of a patch, slowest first.
ORDERS = {
    "dyxc": (0, 2, 1, 3, 4),  # MAE: dy, dx, channel; also a flattened HWIO kernel
    "cdyx": (0, 2, 4, 1, 3),  # SimMIM's pixel shuffle: channel, dy, dx
}


def patchify(image: jax.Array, patch: int, order: str) -> jax.Array:
    """(h, w, C) -> (N, P * P * C), patches row by row.

    Args:
      image: one image or one map of C channels.
      patch: side of a patch in pixels.
      order: "dyxc" (channel fastest, MAE) or "cdyx" (channel slowest, SimMIM).
    """
    axes = _axes(order)
    height, width, channels = image.shape
    if height % patch or width % patch:
        raise ValueError(
            f"an image of {height} x {width} cannot be cut into patches of {patch}; "
            "both sides must be multiples of it"
        )
    rows, columns = height // patch, width // patch
    x = image.reshape(rows, patch, columns, patch, channels)
    return x.transpose(axes).reshape(rows * columns, patch * patch * channels)


def unpatchify(
    patches: jax.Array, grid: tuple[int, int], patch: int, order: str
) -> jax.Array:
    """(N, P * P * C) -> (h, w, C), the inverse of `patchify`; `grid` in patches."""
    axes = _axes(order)
    n, size = patches.shape
    if n != grid[0] * grid[1] or size % patch**2:
        raise ValueError(
            f"{n} patches of {size} values do not fill a grid of {grid[0]} x "
            f"{grid[1]} with patches of {patch} x {patch} pixels"
        )
    shape = (grid[0], patch, grid[1], patch, size // patch**2)
    x = patches.reshape([shape[a] for a in axes])
    x = x.transpose([axes.index(a) for a in range(5)])
    return x.reshape(grid[0] * patch, grid[1] * patch, shape[-1])


def _axes(order: str) -> tuple[int, ...]:
    if order not in ORDERS:
        raise ValueError(
            f"unknown patch order {order!r}, expected one of: {', '.join(ORDERS)}"
        )
    return ORDERS[order]
