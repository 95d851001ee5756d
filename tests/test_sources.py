"""Sources: what they hold, what they must not give away, and that they differ."""

import itertools
import math
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from clvsmim import plugin
from clvsmim.data import photos, shape_texture


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# ----------------------------------------------------------------------- photos


def test_photos_load_by_name_and_are_deterministic():
    source = plugin.load("data", "photos", split="train", length=40, side=16)
    again = photos.make(split="train", length=99, side=16)
    for i in (0, 7, 39):
        item = source[i]
        assert item["image"].shape == (16, 16, 3) and item["image"].dtype == np.uint8
        assert item["label"] == i % 16 and item["index"] == i
        assert same(item, again[i]) and same(
            item, pickle.loads(pickle.dumps(source))[i]
        )
    assert len(source.class_names) == source.num_classes == 16
    for other in (
        photos.make(split="train", length=40, side=16, seed=1),
        photos.make(split="test", length=40, side=16),
    ):
        assert not same(source[7]["image"], other[7]["image"])
    with pytest.raises(ValueError, match="unknown split 'val'"):
        photos.make(split="val", length=1, side=8)


def apart(a, b):
    """Pixels between two boxes along the axis on which they lie apart; < 0: overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


@pytest.mark.parametrize("scene", photos.SCENES)
def test_train_and_test_regions_are_disjoint(scene):
    files, strip = photos.SCENES[scene]
    for file in files:
        size = photos.read_photo(file).size
        train, test = (photos.region((0, 0, *size), strip, s) for s in photos.SPLITS)
        across = size[0] if strip in ("left", "right") else size[1]
        assert apart(train, test) >= 0.03 * across
        area = [(b[2] - b[0]) * (b[3] - b[1]) for b in (train, test)]
        assert abs(area[1] / (size[0] * size[1]) - 0.3) < 0.01
        assert abs(sum(area) / (size[0] * size[1]) - 0.96) < 0.01


def test_no_pixel_is_in_both_splits():
    """What 8,000 crops really cover, photograph by photograph."""
    seen = {}
    for split in photos.SPLITS:
        source = photos.make(split=split, length=4000, side=8)
        for i in range(len(source)):
            file, (left, upper, right, lower) = source.place(i)
            if file not in seen:
                width, height = photos.read_photo(file).size
                seen[file] = {s: np.zeros((height, width), bool) for s in photos.SPLITS}
            seen[file][split][upper:lower, left:right] = True
    assert len(seen) == 17
    for file, covered in seen.items():
        assert not (covered["train"] & covered["test"]).any(), file
        assert covered["train"].mean() > 0.55 and covered["test"].mean() > 0.25, file


def test_stereo_pair_shares_rows_only():
    """The pair is rectified: rows agree, columns do not, so the strip must be rows."""
    (left_file, right_file), strip = photos.SCENES["motorcycle"]
    assert strip in ("top", "bottom")
    left, right = (
        np.asarray(photos.read_photo(f).convert("L"), float)
        for f in (left_file, right_file)
    )
    left = left - np.asarray(Image.fromarray(left).resize((1, 500)).resize((741, 500)))

    def best_match(dy):
        """Mean over blocks of the smallest difference at any disparity up to 60."""
        found = []
        for y, x in itertools.product(range(40, 440, 60), range(100, 640, 60)):
            block = left[y : y + 32, x : x + 32]
            rows = right[y + dy : y + dy + 32]
            pieces = np.stack([rows[:, x - d : x - d + 32] for d in range(61)])
            pieces = pieces - pieces.mean((1, 2), keepdims=True)
            gap = np.abs(pieces - (block - block.mean())).mean((1, 2))
            found.append(gap.min())
        return np.mean(found)

    errors = [best_match(dy) for dy in (-4, -2, 0, 2, 4)]
    assert np.argmin(errors) == 2
    # And both files are cut at the same row.
    regions = {
        photos.region((0, 0, *photos.read_photo(f).size), strip, "test")
        for f in (left_file, right_file)
    }
    assert len(regions) == 1


def test_scales_agree_between_splits():
    for files, strip in photos.SCENES.values():
        size = photos.read_photo(files[0]).size
        most = photos.largest((0, 0, *size), strip)
        for split in photos.SPLITS:
            box = photos.region((0, 0, *size), strip, split)
            assert min(box[2] - box[0], box[3] - box[1]) >= most >= 80


def test_mean_colour_is_that_of_imagenet():
    source = photos.make(split="train", length=160, side=24)
    colours, _ = photos.mean_colours(source)
    assert np.abs(colours - photos.MEAN).max() <= 1.0


def raw_colours(source):
    """Mean colours before they are evened out, in the form of `mean_colours`."""
    colours = []
    for i in range(len(source)):
        file, box = source.place(i)
        crop = photos.read_photo(file).crop(box).resize((1, 1), Image.Resampling.BOX)
        colours.append(np.asarray(crop, float)[0, 0])
    return np.array(colours), np.arange(len(source)) % source.num_classes


def structure(source):
    """Energies of differences over 1 to 8 pixels in four directions, and labels."""
    rows, labels = [], []
    for item in (source[i] for i in range(len(source))):
        grey = item["image"].astype(float).mean(-1)
        pairs = [
            (grey[a:, b:], grey[: grey.shape[0] - a, : grey.shape[1] - b])
            for k in (1, 2, 4, 8)
            for a, b in ((k, 0), (0, k), (k, k))
        ]
        energy = [[((x - y) ** p).mean() for x, y in pairs] for p in (2, 4)]
        rows.append(np.log1p(np.ravel(energy)))
        labels.append(item["label"])
    return np.array(rows), np.array(labels)


def test_photos_are_learnable_but_not_from_the_mean_colour():
    train = photos.make(split="train", length=960, side=32)
    test = photos.make(split="test", length=640, side=32)
    floor = photos.mean_rgb_ridge_floor(train, test)
    chance, sigma = 1 / 16, math.sqrt(1 / 16 * 15 / 16 / 640)
    assert floor <= chance + 4 * sigma
    assert photos.ridge_accuracy(*structure(train), *structure(test)) >= 0.35
    # The colours the photographs come with would give a third of the labels away.
    assert photos.ridge_accuracy(*raw_colours(train), *raw_colours(test)) >= 0.25


def test_grey_photos():
    image = photos.make(split="test", length=16, side=16, color=False)[3]["image"]
    spread = image.astype(int) - image.mean((0, 1))
    assert np.abs(spread - spread.mean(-1, keepdims=True)).max() <= 1.5


def test_a_broken_photograph_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_wheel").mkdir()
    (tmp_path / "broken_wheel" / "__init__.py").touch()
    (tmp_path / "broken_wheel" / "cat.png").write_text("no image")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="cannot read the image .*cat.png"):
        photos.read_photo("broken_wheel/cat.png")
    with pytest.raises(ValueError, match="not_a_wheel/cat.png comes with a package"):
        photos.read_photo("not_a_wheel/cat.png")


# ---------------------------------------------------------------- shape_texture


def outline_features(source):
    """Of the pixels that differ from the corner: distances from their centre."""
    rows = []
    for item in (source[i] for i in range(len(source))):
        image = item["image"].astype(int)
        inside = np.abs(image - image[0, 0]).sum(-1) > 0
        y, x = np.nonzero(inside)
        radius = np.hypot(y - y.mean(), x - x.mean())
        quantiles = np.quantile(radius, [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
        rows.append([*quantiles / math.sqrt(len(y)), *np.log(quantiles + 1)])
    return np.array(rows)


def labels_of(source, name):
    return np.array([source[i][name] for i in range(len(source))])


def test_shape_and_texture_are_crossed():
    source = shape_texture.make(split="train", length=72, side=16, label="texture")
    shapes, textures = (labels_of(source, f"{n}_label") for n in ("shape", "texture"))
    pairs = np.unique(np.stack([shapes, textures]), axis=1, return_counts=True)
    assert pairs[0].shape == (2, 36) and (pairs[1] == 2).all()
    np.testing.assert_array_equal(labels_of(source, "label"), textures)
    assert source.class_names == tuple(shape_texture.TEXTURES)
    other = shape_texture.make(split="train", length=99, side=16, label="shape")
    assert same(source[40]["image"], other[40]["image"])
    assert other[40]["label"] == shapes[40]
    test = shape_texture.make(split="test", length=72, side=16, label="texture")
    assert not same(source[40]["image"], test[40]["image"])
    assert pickle.loads(pickle.dumps(source)) == source
    with pytest.raises(ValueError, match="unknown label 'colour'"):
        shape_texture.make(split="test", length=1, side=16, label="colour")


def test_outline_tells_the_shape_and_nothing_of_the_texture():
    train, test = (
        shape_texture.make(split=s, length=n, side=32, label="shape")
        for s, n in (("train", 720), ("test", 360))
    )
    chance, sigma = 1 / 6, math.sqrt(1 / 6 * 5 / 6 / 360)
    features = outline_features(train), outline_features(test)
    accuracy = {
        name: photos.ridge_accuracy(
            features[0], labels_of(train, name), features[1], labels_of(test, name)
        )
        for name in ("shape_label", "texture_label")
    }
    assert accuracy["shape_label"] >= 0.7
    assert accuracy["texture_label"] <= chance + 4 * sigma
    assert photos.mean_rgb_ridge_floor(train, test) <= chance + 4 * sigma


def test_texture_can_be_seen():
    train, test = (
        shape_texture.make(split=s, length=n, side=48, label="texture")
        for s, n in (("train", 720), ("test", 360))
    )
    assert photos.ridge_accuracy(*structure(train), *structure(test)) >= 0.3


@pytest.mark.parametrize("shape", shape_texture.SHAPES)
def test_outlines_are_alike_in_area_and_smooth(shape):
    function, size = shape_texture.SHAPES[shape]
    y, x = (np.mgrid[:400, :400] - 199.5) / 100
    area = (function(x / size, y / size) < 0).sum() / 100**2
    assert 1.3 <= area <= 2.3
    # The distance never changes faster than one pixel per pixel: edges are smooth.
    distance = size * function(x / size, y / size)
    assert max(np.abs(np.diff(distance, axis=a)).max() for a in (0, 1)) <= 0.0101
