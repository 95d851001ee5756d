"""Masks and patches against vectors worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim import masks


def test_mae_vector():
    noise = jnp.asarray([0.5, 0.1, 0.9, 0.3])
    ids_keep, ids_restore, mask = masks.mask_from_noise(noise, 2)
    np.testing.assert_array_equal(ids_keep, [1, 3])
    np.testing.assert_array_equal(ids_restore, [2, 0, 3, 1])
    np.testing.assert_array_equal(mask, [1, 0, 1, 0])


def test_restore_puts_patches_back():
    x = jnp.arange(12.0) + 1
    ids_keep, ids_restore, mask = masks.random_mask(jax.random.key(0), 12, 5)
    full = jnp.concatenate([x[ids_keep], jnp.zeros(7)])  # 0 is the mask token
    np.testing.assert_array_equal(full[ids_restore], x * (1 - mask))


def test_mask_from_noise_takes_a_batch():
    noise = jax.random.uniform(jax.random.key(0), (3, 10))
    together = masks.mask_from_noise(noise, 4)
    for i in range(3):
        alone = masks.mask_from_noise(noise[i], 4)
        jax.tree.map(np.testing.assert_array_equal, [t[i] for t in together], [*alone])


def test_random_mask_is_uniform():
    keys = jax.random.split(jax.random.key(2), 4000)
    mask = jax.jit(jax.vmap(lambda k: masks.random_mask(k, 16, 4)[2]))(keys)
    np.testing.assert_array_equal(mask.sum(1), np.full(4000, 12.0))
    sigma = math.sqrt(0.25 * 0.75 / 4000)
    assert np.abs(np.asarray(mask.mean(0)) - 0.75).max() <= 4 * sigma


@pytest.mark.parametrize("keep", [0, 5])
def test_random_mask_needs_a_sensible_count(keep):
    with pytest.raises(ValueError, match=f"keep is {keep}, expected 1 to 4"):
        masks.random_mask(jax.random.key(0), 4, keep)


def test_simmim_count():
    """30 of 49 cells, 120 of 196 tokens, 30,720 of 50,176 pixels, in every image."""
    assert masks.masked_cells((14, 14), 2, 0.6) == 30
    keys = jax.random.split(jax.random.key(0), 300)
    mask = jax.jit(jax.vmap(lambda k: masks.block_mask(k, (14, 14), 2, 0.6)))(keys)
    assert mask.shape == (300, 14, 14)
    np.testing.assert_array_equal(mask.sum((1, 2)), np.full(300, 120.0))
    cells = np.asarray(mask).reshape(300, 7, 2, 7, 2)
    corner = cells[:, :, :1, :, :1]
    np.testing.assert_array_equal(cells, np.broadcast_to(corner, cells.shape))
    assert set(np.unique(cells)) == {0.0, 1.0}
    often = cells[:, :, 0, :, 0].mean(0)  # (7, 7), every cell in 30 of 49 images
    sigma = math.sqrt(30 / 49 * 19 / 49 / 300)
    assert np.abs(often - 30 / 49).max() <= 4 * sigma


@pytest.mark.parametrize(
    "grid, unit, ratio, count",
    [((4, 6), 2, 0.5, 3), ((6, 6), 1, 0.6, 22), ((5, 5), 1, 0.56, 14)],
)
def test_block_mask_of_other_grids(grid, unit, ratio, count):
    mask = masks.block_mask(jax.random.key(0), grid, unit, ratio)
    assert mask.shape == grid and mask.sum() == count * unit**2


def test_block_mask_errors():
    with pytest.raises(ValueError, match="14 x 15 patches cannot be cut into cells"):
        masks.block_mask(jax.random.key(0), (14, 15), 2, 0.6)
    with pytest.raises(ValueError, match="ratio is 60"):
        masks.block_mask(jax.random.key(0), (14, 14), 2, 60)


def test_simmim_decoder_channels():
    """Channel k of the 768 of SimMIM's decoder, in the patch at row 1, column 2."""
    where = {
        0: (0, 0, 0),
        1: (0, 0, 1),
        16: (0, 1, 0),
        255: (0, 15, 15),
        256: (1, 0, 0),
        767: (2, 15, 15),
    }
    for k, (channel, dy, dx) in where.items():
        z = jnp.zeros((6, 768)).at[5, k].set(1.0)
        image = masks.unpatchify(z, (2, 3), 16, "cdyx")
        assert image.shape == (32, 48, 3)
        hit = np.argwhere(np.asarray(image))
        np.testing.assert_array_equal(hit, [[16 + dy, 32 + dx, channel]])


def test_mae_order():
    """Patch (1, 0) of a 4 x 4 image, pixel by pixel, channel fastest."""
    image = jnp.arange(48.0).reshape(4, 4, 3)
    patch = masks.patchify(image, 2, "dyxc")[2]
    np.testing.assert_array_equal(patch, image[2:4, 0:2].reshape(-1))
    planes = masks.patchify(image, 2, "cdyx")[2]
    by_plane = image[2:4, 0:2].transpose(2, 0, 1)
    np.testing.assert_array_equal(planes, by_plane.reshape(-1))


@pytest.mark.parametrize("order", masks.ORDERS)
def test_unpatchify_inverts(order):
    image = jax.random.normal(jax.random.key(0), (6, 9, 2))
    patches = masks.patchify(image, 3, order)
    assert patches.shape == (6, 18)
    back = masks.unpatchify(patches, (2, 3), 3, order)
    np.testing.assert_array_equal(back, image)


def test_patchify_errors():
    image = jnp.zeros((6, 8, 3))
    with pytest.raises(ValueError, match="6 x 8 cannot be cut into patches of 4"):
        masks.patchify(image, 4, "dyxc")
    with pytest.raises(ValueError, match="unknown patch order 'cxy'.*dyxc, cdyx"):
        masks.patchify(image, 2, "cxy")
    with pytest.raises(ValueError, match="6 patches of 12 values do not fill"):
        masks.unpatchify(jnp.zeros((6, 12)), (2, 2), 2, "dyxc")
