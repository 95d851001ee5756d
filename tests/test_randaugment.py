"""Every operation against Pillow's own function on a photograph; how they are drawn."""

import pickle

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from clvsmim.data import photos, randaugment
from clvsmim.data.crops import CenterCrop, RandomResizedCrop

FILL = (124, 116, 104)
SETTINGS = {"ops": 2, "p": 0.5, "magnitude": 9.0, "spread": 0.5, "fill": FILL}
PHOTO = Image.fromarray(
    np.asarray(photos.read_photo("skimage/data/chelsea.png"))[::4, ::4][:60, :80]
)
CROP = CenterCrop(name="x", size=(60, 60), resize=60, filter="bicubic")


def affine(*matrix):
    return PHOTO.transform(
        PHOTO.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BICUBIC,
        fillcolor=FILL,
    )


def added(more, below):
    pixels = np.asarray(PHOTO).astype(int)
    return Image.fromarray(
        np.where(pixels < below, np.minimum(pixels + more, 255), pixels).astype("u1")
    )


BICUBIC = Image.Resampling.BICUBIC
# At strength 9 with both signs, and at the strongest, 10.
WANT = {
    ("auto_contrast", 9, 1): ImageOps.autocontrast(PHOTO),
    ("equalize", 9, 1): ImageOps.equalize(PHOTO),
    ("invert", 9, 1): ImageOps.invert(PHOTO),
    ("rotate", 9, 1): PHOTO.rotate(27, BICUBIC, fillcolor=FILL),
    ("rotate", 9, -1): PHOTO.rotate(-27, BICUBIC, fillcolor=FILL),
    ("posterize", 9, 1): ImageOps.posterize(PHOTO, 1),
    ("posterize", 4.9, 1): ImageOps.posterize(PHOTO, 3),
    ("posterize", 10, 1): Image.new("RGB", PHOTO.size),
    ("solarize", 9, 1): ImageOps.solarize(PHOTO, 26),
    ("solarize", 10, 1): ImageOps.invert(PHOTO),
    ("solarize_add", 9, 1): added(99, 128),
    ("solarize_add", 10, 1): added(110, 128),
    ("color", 9, 1): ImageEnhance.Color(PHOTO).enhance(1.81),
    ("color", 9, -1): ImageEnhance.Color(PHOTO).enhance(0.19),
    ("contrast", 9, 1): ImageEnhance.Contrast(PHOTO).enhance(1.81),
    ("contrast", 10, -1): ImageEnhance.Contrast(PHOTO).enhance(0.1),
    ("brightness", 9, 1): ImageEnhance.Brightness(PHOTO).enhance(1.81),
    ("brightness", 9, -1): ImageEnhance.Brightness(PHOTO).enhance(0.19),
    ("sharpness", 9, 1): ImageEnhance.Sharpness(PHOTO).enhance(1.81),
    ("sharpness", 9, -1): ImageEnhance.Sharpness(PHOTO).enhance(0.19),
    ("shear_x", 9, 1): affine(1, 0.27, 0, 0, 1, 0),
    ("shear_x", 9, -1): affine(1, -0.27, 0, 0, 1, 0),
    ("shear_y", 9, 1): affine(1, 0, 0, 0.27, 1, 0),
    ("shear_y", 9, -1): affine(1, 0, 0, -0.27, 1, 0),
    ("translate_x", 9, 1): affine(1, 0, 0.045 * 9 * 80, 0, 1, 0),
    ("translate_x", 9, -1): affine(1, 0, -0.045 * 9 * 80, 0, 1, 0),
    ("translate_y", 9, 1): affine(1, 0, 0, 0, 1, 0.045 * 9 * 60),
    ("translate_y", 9, -1): affine(1, 0, 0, 0, 1, -0.045 * 9 * 60),
}


@pytest.mark.parametrize("name, strength, sign", WANT)
def test_an_operation_is_pillows(name, strength, sign):
    got = randaugment.OPERATIONS[name](PHOTO, float(strength), sign, FILL)
    want = np.asarray(WANT[name, strength, sign])
    assert got.mode == "RGB" and got.size == PHOTO.size
    np.testing.assert_array_equal(np.asarray(got), want)
    assert (want != np.asarray(PHOTO)).any()


def test_there_are_fifteen_and_all_are_tested():
    assert len(randaugment.OPERATIONS) == 15
    assert {name for name, *_ in WANT} == set(randaugment.OPERATIONS)


@pytest.fixture
def spy(monkeypatch):
    """The calls of operations, as (name, strength, sign, fill)."""
    calls = []

    def noted(name):
        def operation(image, strength, sign, fill):
            calls.append((name, strength, sign, fill))
            return image

        return operation

    for name in randaugment.NAMES:
        monkeypatch.setitem(randaugment.OPERATIONS, name, noted(name))
    return calls


def view(**changes):
    return randaugment.RandAugmentCrop(
        crop=CROP, **{"flip_p": 0.0} | SETTINGS | changes
    )


def test_how_often_and_how_strongly(spy):
    images = 2000
    per_image = []
    augment = view()
    for i in range(images):
        before = len(spy)
        augment(PHOTO, np.random.default_rng(i))
        per_image.append(len(spy) - before)
    # Two draws of probability one half each.
    np.testing.assert_allclose(
        np.bincount(per_image) / images, [0.25, 0.5, 0.25], atol=0.04
    )
    names, strengths, signs, fills = zip(*spy, strict=True)
    counts = np.array([names.count(name) for name in randaugment.NAMES])
    assert counts.min() > 0.6 * len(spy) / 15 and counts.max() < 1.4 * len(spy) / 15
    strengths = np.array(strengths)
    assert strengths.mean() == pytest.approx(9, abs=0.05)
    assert strengths.std() == pytest.approx(0.5, abs=0.05)
    assert strengths.max() == 10  # cut, two sigma above the mean
    assert np.mean(np.array(signs) == 1) == pytest.approx(0.5, abs=0.05)
    assert set(fills) == {FILL}


def test_an_operation_may_be_drawn_twice(spy):
    augment = view(p=1.0)
    for i in range(200):
        augment(PHOTO, np.random.default_rng(i))
    pairs = [a[0] == b[0] for a, b in zip(spy[::2], spy[1::2], strict=True)]
    assert 0 < np.mean(pairs) < 0.2
    assert spy[0][1] != spy[1][1]  # each has a strength of its own


def test_it_is_mirrored_after_the_crop_and_before_the_operations(monkeypatch):
    plain = CROP(PHOTO)
    generator = np.random.default_rng
    flipped = view(flip_p=1.0, p=0.0)(PHOTO, generator(0))
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
    np.testing.assert_array_equal(view(p=0.0)(PHOTO, generator(0)), plain)
    half = view(flip_p=0.5, p=0.0)
    count = sum((half(PHOTO, generator(i)) != plain).any() for i in range(300))
    assert count / 300 == pytest.approx(0.5, abs=0.1)
    sheared = view(flip_p=1.0, p=1.0, ops=1, spread=0.0)
    monkeypatch.setattr(randaugment, "NAMES", ("shear_y",) * 15)
    got = sheared(PHOTO, generator(0))
    want = [
        randaugment.shear(1, Image.fromarray(plain[:, ::-1]), 9.0, sign, FILL)
        for sign in (1, -1)
    ]
    assert any((got == np.asarray(x)).all() for x in want)


def test_it_is_a_host_view():
    crop = RandomResizedCrop(
        name="seed", size=(16, 24), area=(0.1, 1.0), aspect=(0.7, 1.4), filter="bicubic"
    )
    augment = randaugment.RandAugmentCrop(crop=crop, flip_p=0.5, **SETTINGS)
    assert (augment.name, augment.size) == ("seed", (16, 24))
    copy = pickle.loads(pickle.dumps(augment))
    assert copy == augment
    got = [x(PHOTO, np.random.default_rng(3)) for x in (augment, augment, copy)]
    assert got[0].dtype == np.uint8 and got[0].shape == (16, 24, 3)
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[0], got[2])
    other = augment(PHOTO, np.random.default_rng(4))
    assert (other != got[0]).any()


@pytest.mark.parametrize(
    "change", [{"ops": 0}, {"p": 1.5}, {"magnitude": 11.0}, {"spread": -1.0}]
)
def test_what_cannot_be_is_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}={change[name]}"):
        view(**change)


def byol(image, generator, area=(0.08, 1.0)):
    return RandomResizedCrop(
        name="x",
        size=(8, 8),
        area=area,
        aspect=(3 / 4, 4 / 3),
        filter="bicubic",
        once=True,
    )(image, generator)


def test_the_crop_of_byol_draws_once_and_cuts_its_sides(monkeypatch):
    from clvsmim.data import crops

    boxes = []
    real = crops.random_box
    monkeypatch.setattr(
        crops, "random_box", lambda *a, **k: boxes.append(real(*a, **k)) or boxes[-1]
    )
    long = Image.new("RGB", (100, 20))  # an aspect of 5: no whole box of area 1 fits
    for i in range(200):
        byol(long, np.random.default_rng(i))
    boxes = np.array(boxes)
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # Ten tries would have found a box that fits, or the centred one of 27 columns.
    assert heights.max() == 20 and (heights == 20).mean() > 0.5
    assert (widths[heights == 20] > 27).mean() > 0.3
    for i, (w, h) in enumerate(zip(widths, heights, strict=True)):
        draw = np.random.default_rng(i)
        target = 2000 * draw.uniform(0.08, 1.0)
        ratio = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        assert w == min(100, round(np.sqrt(target * ratio)))
        assert h == min(20, round(np.sqrt(target / ratio)))
