"""Crops of the photographs inside the scikit-image and scikit-learn wheels.

Sixteen scenes, one label each, no download: enough for a method to learn something
real in minutes, and for a test to see it learn. A crop is one item; the crops of the
two splits come from two parts of each photograph, with a gap between them.

Left out of the wheels' images: drawings (logo, phantom, chessboards, colour wheel,
horse, text), a scanned page and a retina detail too small to hold two parts, and a cell
and a moving clock that are one blob in an empty frame, so that most crops show nothing.

Six photographs are grey, as the wheels have them, so colour against grey is a cue that
no normalisation of means removes; `color=False` makes all of them grey.
"""

import functools
import importlib.util
import pathlib
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from clvsmim.data import Source
from clvsmim.data.crops import Box, read_image

SKIMAGE, SKLEARN = "skimage/data", "sklearn/datasets/images"
# Scene -> (files, where the test strip lies). The strips are where both parts show the
# scene. The motorcycle is a rectified stereo pair: the same point lies up to 60 columns
# apart in the two files but in the same row, so only a strip of rows keeps them apart.
SCENES = {
    "astronaut": ((f"{SKIMAGE}/astronaut.png",), "bottom"),
    "brick": ((f"{SKIMAGE}/brick.png",), "right"),
    "camera": ((f"{SKIMAGE}/camera.png",), "bottom"),
    "cat": ((f"{SKIMAGE}/chelsea.png",), "left"),
    "china": ((f"{SKLEARN}/china.jpg",), "left"),
    "coffee": ((f"{SKIMAGE}/coffee.png",), "left"),
    "coins": ((f"{SKIMAGE}/coins.png",), "right"),
    "flower": ((f"{SKLEARN}/flower.jpg",), "bottom"),
    "galaxies": ((f"{SKIMAGE}/hubble_deep_field.jpg",), "right"),
    "grass": ((f"{SKIMAGE}/grass.png",), "right"),
    "gravel": ((f"{SKIMAGE}/gravel.png",), "right"),
    "moon": ((f"{SKIMAGE}/moon.png",), "bottom"),
    "motorcycle": (
        (f"{SKIMAGE}/motorcycle_left.png", f"{SKIMAGE}/motorcycle_right.png"),
        "bottom",
    ),
    "retina": ((f"{SKIMAGE}/retina.jpg",), "right"),
    "rocket": ((f"{SKIMAGE}/rocket.jpg",), "right"),
    "tissue": ((f"{SKIMAGE}/ihc.png",), "bottom"),
}
TEST_SHARE, GAP_SHARE = 0.3, 0.04  # of the side that the strip is cut from
SMALLEST = 0.6  # of the largest crop, which is as wide as the test strip
SPLITS = ("train", "test")
MEAN = np.array([123.675, 116.28, 103.53])  # of ImageNet, in [0, 255]


@dataclass(frozen=True)
class Photos:
    """See `make`."""

    split: str
    length: int
    side: int
    seed: int
    color: bool
    selection: bool
    name: str = "photos"

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(SCENES)

    @property
    def num_classes(self) -> int:
        return len(SCENES)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")  # ends a for loop
        index = int(index)
        label = index % self.num_classes
        file, box = self.place(index)
        photo = read_photo(file).crop(box).resize((self.side, self.side), BILINEAR)
        photo = photo if self.color else photo.convert("L").convert("RGB")
        return {"image": even_colour(photo), "label": label, "index": index}

    def place(self, index: int) -> tuple[str, Box]:
        """The file of item `index` and the square cut from it, in pixels."""
        files, strip = SCENES[self.class_names[index % self.num_classes]]
        rng = np.random.default_rng((self.seed, zlib.crc32(self.split.encode()), index))
        file = files[rng.integers(len(files))]
        size = read_photo(file).size
        whole = (0, 0, *size)
        if self.selection:  # what is held out stays unseen
            whole = region(whole, strip, "train")
        return file, random_square(
            region(whole, strip, self.split), largest(whole, strip), rng
        )


BILINEAR = Image.Resampling.BILINEAR


def make(
    *,
    split: str,
    length: int,
    side: int,
    seed: int = 0,
    color: bool = True,
    selection: bool = False,
    test_length: int = 0,
) -> Photos:
    """Square crops of 16 photographed scenes, item i of scene i % 16.

    Args:
      split: "train" or "test"; no pixel is in both.
      length: how many crops; item i is the same whatever the length.
      test_length: of the split "test", where it is not that of both (0).
      side: of the images returned, in pixels. The photographs hold 120 to 420 pixels
        per crop.
      seed: of the places of the crops.
      color: False makes every photograph grey.
      selection: True divides the training parts once more and leaves the test parts
        out of everything: to choose settings on, before "test" is looked at.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of: train, test")
    if split == "test" and test_length:
        length = test_length
    if length < 1 or side < 1:
        raise ValueError(f"length {length} and side {side} must be at least 1")
    return Photos(split, length, side, seed, color, selection)


@functools.cache
def read_photo(file: str) -> Image.Image:
    """RGB image of "package/path/in/it", decoded once per process."""
    package, _, rest = file.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(
            f"the photograph {file} comes with a package that is not installed; "
            f"install scikit-image and scikit-learn"
        )
    return read_image(pathlib.Path(found.origin).parent / rest)


def region(box: Box, strip: str, split: str) -> Box:
    """The part of a box of pixels that a split may crop from."""
    left, upper, right, lower = box
    near, far = (left, right) if strip in ("left", "right") else (upper, lower)
    test, gap = (round((far - near) * share) for share in (TEST_SHARE, GAP_SHARE))
    if strip in ("left", "top"):
        edges = (near, near + test) if split == "test" else (near + test + gap, far)
    else:
        edges = (far - test, far) if split == "test" else (near, far - test - gap)
    if strip in ("left", "right"):
        return edges[0], upper, edges[1], lower
    return left, edges[0], right, edges[1]


def largest(box: Box, strip: str) -> int:
    """Side of the largest crop, the same for both splits so that scales agree."""
    left, upper, right, lower = region(box, strip, "test")
    return min(right - left, lower - upper)


def random_square(inside: Box, most: int, rng: np.random.Generator) -> Box:
    """A square of side SMALLEST * most to most, anywhere inside the box."""
    left, upper, right, lower = inside
    side = int(rng.integers(round(SMALLEST * most), most + 1))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(upper, lower - side + 1))
    return x, y, x + side, y + side


def even_colour(image: Image.Image) -> np.ndarray:
    """uint8 (h, w, 3) with the mean colour of ImageNet: a new level for each old one.

    Each channel is shifted. Contrast is scaled down, by at most 0.7, where the shift
    would push levels out of range, for what is cut off moves the mean again; a few
    more rounds of shifting make up for the rest.
    """
    counts = np.array(image.histogram(), np.float64).reshape(3, 256)
    counts /= counts[0].sum()
    levels = np.arange(256.0) - (counts @ np.arange(256.0))[:, None]  # (3, 256)
    used = np.where(counts > 0, levels, 0.0)
    low, high = np.minimum(used.min(1), -1), np.maximum(used.max(1), 1)
    room = np.minimum(MEAN / -low, (255 - MEAN) / high).min()
    levels *= np.clip(room, 0.7, 1.0)
    shift = MEAN
    for _ in range(6):
        table = np.clip(levels + shift[:, None], 0, 255)
        shift = shift + MEAN - (counts * table).sum(1)
    return np.rint(table).astype(np.uint8)[np.arange(3), np.asarray(image)]


def mean_rgb_ridge_floor(train: Source, test: Source) -> float:
    """Test accuracy of a ridge classifier that sees three numbers, the mean colour.

    What a probe of learned features has to beat: a source on which this is far above
    chance (1 / num_classes) is solved by looking at the tint.
    """
    return ridge_accuracy(*mean_colours(train), *mean_colours(test))


def mean_colours(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each channel (n, 3) and labels (n,) of a whole source."""
    items = [source[i] for i in range(len(source))]
    colours = np.array([np.asarray(item["image"]).mean((0, 1)) for item in items])
    return colours, np.array([item["label"] for item in items])


def ridge_accuracy(
    x: np.ndarray,
    labels: np.ndarray,
    test_x: np.ndarray,
    test_labels: np.ndarray,
    penalty: float = 1e-3,
) -> float:
    """Ridge regression to one-hot labels in closed form, on standardised features.

    Args:
      x, test_x: (n, features).
      labels, test_labels: (n,) integers.
      penalty: relative to the number of training rows.
    """
    mean, std = x.mean(0), x.std(0) + 1e-12
    x, test_x = (x - mean) / std, (test_x - mean) / std
    targets = np.eye(labels.max() + 1)[labels]
    gram = x.T @ x + penalty * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (targets - targets.mean(0)))
    predicted = (test_x @ weights + targets.mean(0)).argmax(1)
    return float((predicted == test_labels).mean())
