"""How a family prepares an image for evaluation: its own code, in numbers."""

import math
from typing import NamedTuple

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


class Evaluation(NamedTuple):
    """A family's transform for any size of input; see `_preprocess.transform`.

    The shorter side, or with `squeeze` each, becomes the input's divided by `share`,
    rounded down; from `whole` pixels on the share is 1.
    """

    colour: dict[str, tuple[float, ...]] = IMAGENET
    filter: str = "bicubic"
    share: float = 224 / 256
    whole: float = math.inf
    squeeze: bool = False
    floor: bool = False
