"""Soft labels, mixup, CutMix and erasing against their formulas and literal numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim import mixing

B, SIZE, K = 4, (20, 30), 10
IMAGES = np.random.default_rng(0).normal(size=(B, *SIZE, 3)).astype("f4")
TARGETS = np.eye(K, dtype="f4")[:B]


def test_smoothing_keeps_nine_tenths_and_spreads_the_rest():
    got = np.asarray(mixing.smooth(jnp.array([2, 0]), 1000, 0.1))
    assert got.shape == (2, 1000)
    np.testing.assert_allclose(got[0, 2], 0.9 + 0.1 / 1000, rtol=1e-6)
    np.testing.assert_allclose(got[0, :2], 0.1 / 1000, rtol=1e-6)
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)
    hard = mixing.smooth(jnp.array([2, 0]), 4, 0.0)
    np.testing.assert_array_equal(hard, [[0, 0, 1, 0], [1, 0, 0, 0]])


@jax.jit
def mixes(keys, switch_p):
    def mix(key):
        return mixing.mix(
            key, IMAGES, TARGETS, mixup=0.8, cutmix=1.0, switch_p=switch_p
        )

    return jax.vmap(mix)(keys)


@functools.cache
def mixed(switch_p):
    """(images, targets) of 200 draws, each (draws, B, ...), float64."""
    found = mixes(jax.random.split(jax.random.key(1), 200), switch_p)
    return [np.asarray(x, np.float64) for x in found]


def shares(images):
    """Own share of every pixel (draws, B, h, w), read off the mixed images."""
    difference = (IMAGES - IMAGES[::-1])[None].astype("f8")
    channel = np.abs(difference).argmax(-1)[..., None]  # the best conditioned one

    def pick(x):
        index = np.broadcast_to(channel, (*x.shape[:-1], 1))
        return np.take_along_axis(x, index, -1)[..., 0]

    return pick(images - IMAGES[::-1]) / pick(np.broadcast_to(difference, images.shape))


def kept(targets):
    """What the targets say the own share is (draws, B)."""
    return np.stack([targets[:, i, i] for i in range(B)], 1)


def test_mixup_blends_images_and_targets_alike_with_the_flipped_batch():
    images, targets = mixed(0.0)
    share, lam = shares(images), kept(targets)
    assert np.ptp(lam, axis=1).max() < 1e-6  # one lambda for the batch
    np.testing.assert_allclose(
        share, np.broadcast_to(lam[:, :, None, None], share.shape), atol=1e-4
    )
    for i in range(B):
        np.testing.assert_allclose(targets[:, i, B - 1 - i], 1 - lam[:, i], atol=1e-6)
    # Beta(.8, .8) has mean 1/2 and variance 1 / (4 (2 * .8 + 1)).
    assert lam[:, 0].mean() == pytest.approx(0.5, abs=0.08)
    assert lam[:, 0].var() == pytest.approx(1 / (4 * 2.6), abs=0.02)


def test_cutmix_pastes_a_box_and_counts_its_pixels():
    images, targets = mixed(1.0)
    share, lam = shares(images), kept(targets)
    assert set(np.unique(share.round(6))) == {0.0, 1.0}
    np.testing.assert_allclose(share.mean((2, 3)), lam, atol=1e-5)  # corrected
    assert np.ptp(share.round(6), axis=1).max() == 0  # one box for the batch
    for draw in share[:, 0].round(6):
        rows, columns = np.where((draw == 0).any(1))[0], np.where((draw == 0).any(0))[0]
        if len(rows):
            box = draw[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert (box == 0).all()
    # Cut off at the border, a box is smaller than 1 - lambda, whose mean is 1/2.
    assert 0.55 < lam.mean() < 0.75


def test_the_box_has_the_side_and_the_centre_that_are_asked_for():
    keys = jax.random.split(jax.random.key(0), 500)
    lam = 0.75  # a side of half
    boxes = np.asarray(jax.vmap(lambda k: mixing.cut_box(k, lam, SIZE))(keys))
    heights, widths = boxes.any(2).sum(1), boxes.any(1).sum(1)
    assert heights.max() == 10 and widths.max() == 14  # 2 * (15 // 2)
    assert heights.min() == 5  # centre in the first row: cut off above
    whole = (heights == 10) & (widths == 14)
    top = boxes.any(2).argmax(1)[whole]
    assert top.min() == 0 and top.max() == 10  # each side of the image is reached
    assert not np.asarray(mixing.cut_box(keys[0], 1.0, SIZE)).any()


def test_one_or_the_other_by_the_switch():
    share = shares(mixed(0.5)[0])
    cut = ((share.round(4) == 0) | (share.round(4) == 1)).all((1, 2, 3))
    assert cut.mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("mixup, cutmix, cut", [(0.8, 0.0, False), (0.0, 1.0, True)])
def test_zero_leaves_one_of_the_two_out(monkeypatch, mixup, cutmix, cut):
    asked = []
    monkeypatch.setattr(
        jax.random, "beta", lambda key, a, b: asked.append(a) or jnp.float32(0.6)
    )
    key = jax.random.key(0)
    settings = {"mixup": mixup, "cutmix": cutmix, "switch_p": 0.5}
    images, _ = mixing.mix(key, IMAGES, TARGETS, **settings)
    whole = (np.asarray(images) == IMAGES).all(-1)
    assert asked == [mixup or cutmix] and whole.any() == cut


ERASING = {"p": 1.0, "area": (0.02, 1 / 3), "aspect": (0.3, 1 / 0.3)}


@jax.jit
def erasures(keys, p, low, high):
    image = jnp.full((*SIZE, 3), 7.0)
    settings = ERASING | {"p": p, "area": (low, high)}
    return jax.vmap(lambda key: mixing.erase(key, image, **settings))(keys)


@functools.cache
def erased(p, area=ERASING["area"]):
    """Where (draws, h, w) and what (draws, h, w, 3) of an image of 7 was replaced."""
    found = np.asarray(erasures(jax.random.split(jax.random.key(2), 400), p, *area))
    return (found != 7).all(-1), found


def test_erasing_fills_one_rectangle_with_standard_noise():
    where, found = erased(1.0)
    heights, widths = where.any(2).sum(1), where.any(1).sum(1)
    np.testing.assert_array_equal(where.sum((1, 2)), heights * widths)  # full boxes
    assert where.any((1, 2)).all()
    assert heights.max() < SIZE[0] and widths.max() < SIZE[1]
    share = where.mean((1, 2))
    assert 0.012 < share.min() < 0.04 and 0.25 < share.max() < 0.37
    noise = found[where]
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    assert np.ptp(noise, axis=1).min() > 0  # a value per channel
    reached = where.any(0)
    assert reached.any(0).all() and reached.any(1).all()


def test_erasing_happens_with_its_probability():
    where, _ = erased(0.25)
    assert where.any((1, 2)).mean() == pytest.approx(0.25, abs=0.06)
    assert not erased(0.0)[0].any()


def test_an_area_that_never_fits_erases_nothing():
    assert not erased(1.0, area=(1.0, 1.0))[0].any()


def test_draws_are_a_function_of_the_key():
    keys = jax.random.split(jax.random.key(2), 400)
    again = np.asarray(erasures(keys, 1.0, *ERASING["area"]))
    np.testing.assert_array_equal(again, erased(1.0)[1])
    assert (again[0] != again[1]).any()
