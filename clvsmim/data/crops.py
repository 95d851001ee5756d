"""Host views: `(PIL image, numpy Generator) -> uint8 (h, w, 3)`, run by the workers.

Objectives name their views, so Pillow is imported only where an image is touched: what
never decodes one (steps on arrays, compiling ahead of time) runs without it.
"""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clvsmim.data import Unreadable

if TYPE_CHECKING:
    from PIL import Image

FILTERS = {"bilinear": 2, "bicubic": 3}  # as Pillow numbers them (Image.Resampling)
SHRINKS = (1, 2, 4, 8)  # what a JPEG can be decoded at
Box = tuple[int, int, int, int]  # left, upper, right, lower, in pixels


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A random part of the image, resized: the crop of Inception, as in torchvision.

    Attributes:
      name: seeds the generator; one name per view.
      size: (height, width) of the result.
      area: smallest and largest share of the image's area.
      aspect: smallest and largest width / height, log-uniform between.
      filter: "bilinear" or "bicubic", both antialiased.
      once: one draw, whose sides are cut to those of the image, instead of ten tries:
        the crop of BYOL and of MAE's linear probe.
    """

    name: str
    size: tuple[int, int]
    area: tuple[float, float]
    aspect: tuple[float, float]
    filter: str
    once: bool = False

    def __post_init__(self) -> None:
        _check_filter(self.filter)
        _check_range("area", self.area, 1.0)
        _check_range("aspect", self.aspect, math.inf)

    def __call__(
        self,
        image: Image.Image,
        generator: np.random.Generator,
        full: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """The crop of an image, or of its smaller copy: the draws are then those of the
        image, whose size in pixels is `full`."""
        box = self._box(full or image.size, generator)
        if full is None:
            return _resize(image.crop(box), self.size, self.filter)
        part = tuple(x * image.size[i % 2] / full[i % 2] for i, x in enumerate(box))
        size = self.size[1], self.size[0]
        return to_array(image.resize(size, FILTERS[self.filter], box=part))

    def shrink(self, size: tuple[int, int], generator: np.random.Generator) -> int:
        """How many times smaller, 1, 2, 4 or 8, an image may be decoded for this draw,
        so that the box is still no smaller than the result."""
        left, upper, right, lower = self._box(size, generator)
        room = min((right - left) / self.size[1], (lower - upper) / self.size[0])
        return max(k for k in SHRINKS if k <= max(room, 1))

    def _box(self, size: tuple[int, int], generator: np.random.Generator) -> Box:
        return random_box(size, self.area, self.aspect, generator, once=self.once)


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """Evaluation: resize the shorter side to `resize`, cut `size` from the middle.

    Attributes:
      name: as in `RandomResizedCrop`; nothing is random here.
      size: (height, width) of the result, at most `resize`.
      resize: length of the shorter side before the cut; or (height, width) of the whole
        image, whose aspect is then lost.
      filter: "bilinear" or "bicubic", both antialiased.
      floor: where the margins differ by a pixel the first is the smaller one, as in
        Hugging Face's processors; without it that depends, as in torchvision.
    """

    name: str
    size: tuple[int, int]
    resize: int | tuple[int, int]
    filter: str
    floor: bool = False

    def __post_init__(self) -> None:
        _check_filter(self.filter)
        both = isinstance(self.resize, Sequence)
        sides = tuple(self.resize) if both else (self.resize,) * 2
        if any(a > b for a, b in zip(self.size, sides, strict=True)):
            raise ValueError(
                f"cannot cut {self.size} from an image resized to {self.resize}; "
                "resize must be at least as large as the crop"
            )

    def __call__(
        self, image: Image.Image, generator: np.random.Generator | None = None
    ) -> np.ndarray:
        del generator
        wide = self._resized(image.size)
        if wide != image.size:
            image = image.resize(wide, FILTERS[self.filter])
        half = math.floor if self.floor else round  # `round` takes 1.5 and 2.5 to 2
        left, upper = (half((wide[i] - self.size[1 - i]) / 2) for i in range(2))
        image = image.crop((left, upper, left + self.size[1], upper + self.size[0]))
        return to_array(image)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) before the cut, of an image of such a `size`."""
        if isinstance(self.resize, Sequence):
            return self.resize[1], self.resize[0]
        width, height = size
        # The longer side is truncated, not rounded, as in torchvision.
        long = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width < height else (long, self.resize)


def random_box(
    size: tuple[int, int],
    area: tuple[float, float],
    aspect: tuple[float, float],
    generator: np.random.Generator,
    *,
    once: bool = False,
) -> Box:
    """Ten tries to place a box of random area and aspect; then the largest centred one.

    Args:
      size: (width, height) of the image, Pillow's order.
      area, aspect, once: see `RandomResizedCrop`.
      generator: advanced by four draws for a box that fits, by two for another.
    """
    width, height = size
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        target = width * height * generator.uniform(*area)
        ratio = math.exp(generator.uniform(low, high))
        w = round(math.sqrt(target * ratio))
        h = round(math.sqrt(target / ratio))
        if once:
            w, h = max(1, min(w, width)), max(1, min(h, height))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(0, width - w + 1))
            upper = int(generator.integers(0, height - h + 1))
            return left, upper, left + w, upper + h
    return _center_box(size, aspect)


def _center_box(size: tuple[int, int], aspect: tuple[float, float]) -> Box:
    """The largest centred box whose aspect is allowed."""
    width, height = size
    w, h = width, height
    if width / height < aspect[0]:
        h = max(1, round(width / aspect[0]))
    elif width / height > aspect[1]:
        w = max(1, round(height * aspect[1]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def read_image(path: pathlib.Path) -> Image.Image:
    """Decode a file to RGB.

    Raises:
      Unreadable: the file is missing or is no image, with its name.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return to_image(image)
    except OSError as error:
        raise unreadable(path, error) from error


def open_image(name: str, data: bytes) -> Image.Image:
    """An image whose header alone is read so far; `to_image` decodes the rest.

    Raises:
      Unreadable: the bytes are no image, with the name.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:  # each of Pillow's plugins has its own
        raise unreadable(name, error) from error
    image.filename = name  # to be named if the pixels turn out to be broken
    return image


def to_image(image: Image.Image | np.ndarray) -> Image.Image:
    """A decoded RGB image of a Pillow image or of a uint8 array (h, w, 3).

    Of an animation the first frame; transparency is dropped, as PIL's `convert` and
    TensorFlow's decoder do; 16 bits become 8; an orientation tag is left alone.

    Raises:
      Unreadable: the file under a Pillow image cannot be read, with its name.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        image.load()  # Pillow reads the pixels now, and a short file is found out
        return _rgb(image)
    except Exception as error:  # each of Pillow's plugins has its own
        raise unreadable(getattr(image, "filename", "") or "?", error) from error


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip
        grey = np.clip(np.asarray(image) >> 8, 0, 255)
        image = Image.fromarray(grey.astype(np.uint8))
    if "transparency" in image.info:  # it warns unless it goes by way of RGBA
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 (h, w, 3) of any Pillow image."""
    return np.asarray(to_image(image))


def unreadable(name: object, error: Exception) -> Unreadable:
    """The error for an image that cannot be read."""
    from PIL import UnidentifiedImageError

    what = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # whose text names a memory address
        what = "it is no image"
    return Unreadable(
        f"cannot read the image {name}: {what}; replace or remove the file"
    )


def _resize(image: Image.Image, size: tuple[int, int], filter: str) -> np.ndarray:
    return to_array(image.resize((size[1], size[0]), FILTERS[filter]))


def _check_filter(filter: str) -> None:
    if filter not in FILTERS:
        raise ValueError(
            f"unknown filter {filter!r}, expected one of: {', '.join(FILTERS)}"
        )


def _check_range(what: str, bounds: tuple[float, float], most: float) -> None:
    if not 0.0 < bounds[0] <= bounds[1] <= most:
        raise ValueError(
            f"{what} is {bounds}, expected (low, high) with 0 < low <= high <= {most}"
        )
