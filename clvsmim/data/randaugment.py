"""RandAugment (Cubuk et al. 2020) as the recipes of DeiT, MAE and SimMIM have it.

That is timm's "rand-m9-mstd0.5-inc1": fifteen operations of Pillow, each stronger for
a larger magnitude.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from clvsmim.data import HostView
from clvsmim.data.crops import to_array

Fill = tuple[int, int, int]
MOST = 10.0  # magnitude; the strongest that an operation knows


@dataclass(frozen=True, kw_only=True)
class RandAugmentCrop:
    """A crop, mirrored or not, then `ops` random operations on it.

    Mirrored here and not on the device, because the order matters: a vertical shear
    leaves the left edge where it is, so mirroring afterwards is another distribution.

    Attributes:
      crop: the view that is distorted; its name seeds the operations too.
      flip_p: probability of a horizontal flip.
      ops: how many operations are drawn, with replacement.
      p: probability that a drawn one is applied.
      magnitude, spread: mean and standard deviation of the strength, which is cut to
        0 ... 10 and drawn anew for each operation.
      fill: colour of what a geometric operation brings in from outside.
    """

    crop: HostView
    flip_p: float
    ops: int
    p: float
    magnitude: float
    spread: float
    fill: Fill

    def __post_init__(self) -> None:
        if self.ops < 1 or not 0.0 <= self.p <= 1.0:
            raise ValueError(
                f"rand_augment has ops={self.ops} and p={self.p}, expected at least "
                "one operation and a probability"
            )
        if not 0.0 <= self.magnitude <= MOST or self.spread < 0.0:
            raise ValueError(
                f"rand_augment has magnitude={self.magnitude} and spread={self.spread}"
                f", expected 0 to {MOST:g} and at least 0"
            )

    @property
    def name(self) -> str:
        return self.crop.name

    @property
    def size(self) -> tuple[int, int]:
        return self.crop.size

    def __call__(
        self, image: Image.Image, generator: np.random.Generator
    ) -> np.ndarray:
        image = Image.fromarray(self.crop(image, generator))
        if generator.random() < self.flip_p:
            image = ImageOps.mirror(image)
        for number in generator.integers(0, len(OPERATIONS), self.ops):
            applied = generator.random() < self.p
            strength = generator.normal(self.magnitude, self.spread)
            sign = 1 if generator.random() < 0.5 else -1
            if applied:
                operation = OPERATIONS[NAMES[number]]
                strength = float(np.clip(strength, 0.0, MOST))
                image = operation(image, strength, sign, self.fill)
        return to_array(image)


# Operations: (image, strength, sign, fill) -> image


def plain(function: Callable) -> Callable:
    """An operation without a strength."""
    return lambda image, strength, sign, fill: function(image)


def rotate(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
    """By 3 degrees per unit, about the centre."""
    return image.rotate(sign * 3.0 * strength, BICUBIC, fillcolor=fill)


def posterize(
    image: Image.Image, strength: float, sign: int, fill: Fill
) -> Image.Image:
    """Keep the highest 4 to 0 bits of a channel; Pillow's own refuses 0, all black."""
    kept = 256 - 2 ** (4 + int(0.4 * strength))
    return image.point([i & kept for i in range(256)] * 3)


def solarize(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
    """Invert what is at least so bright."""
    return ImageOps.solarize(image, 256 - min(256, int(25.6 * strength)))


def solarize_add(
    image: Image.Image, strength: float, sign: int, fill: Fill
) -> Image.Image:
    """Brighten what is darker than the middle."""
    more = min(128, int(11.0 * strength))
    return image.point([min(255, i + more) if i < 128 else i for i in range(256)] * 3)


def enhance(
    kind: type, image: Image.Image, strength: float, sign: int, fill: Fill
) -> Image.Image:
    """Pillow's blend with a version without colour, contrast, light or sharpness."""
    return kind(image).enhance(max(0.1, 1.0 + sign * 0.09 * strength))


def shear(
    axis: int, image: Image.Image, strength: float, sign: int, fill: Fill
) -> Image.Image:
    """Shift rows (axis 0) or columns by 0.03 of their place per unit."""
    slope = sign * 0.03 * strength
    return affine(
        image, (1, slope, 0, 0, 1, 0) if axis == 0 else (1, 0, 0, slope, 1, 0), fill
    )


def translate(
    axis: int, image: Image.Image, strength: float, sign: int, fill: Fill
) -> Image.Image:
    """Shift along x (axis 0) or y by 0.045 of the image per unit."""
    by = sign * 0.045 * strength * image.size[axis]
    return affine(
        image, (1, 0, by, 0, 1, 0) if axis == 0 else (1, 0, 0, 0, 1, by), fill
    )


def affine(image: Image.Image, matrix: tuple, fill: Fill) -> Image.Image:
    """`matrix` maps places of the result to places of the image."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=fill
    )


BICUBIC = Image.Resampling.BICUBIC
OPERATIONS = {
    "auto_contrast": plain(ImageOps.autocontrast),
    "equalize": plain(ImageOps.equalize),
    "invert": plain(ImageOps.invert),
    "rotate": rotate,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": partial(enhance, ImageEnhance.Color),
    "contrast": partial(enhance, ImageEnhance.Contrast),
    "brightness": partial(enhance, ImageEnhance.Brightness),
    "sharpness": partial(enhance, ImageEnhance.Sharpness),
    "shear_x": partial(shear, 0),
    "shear_y": partial(shear, 1),
    "translate_x": partial(translate, 0),
    "translate_y": partial(translate, 1),
}
NAMES = tuple(OPERATIONS)
