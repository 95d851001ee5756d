"""How each family prepares an image for evaluation: its own code, in numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clvsmim import plugin
from clvsmim.data.crops import FILTERS, CenterCrop
from clvsmim.formats._evaluation import HALVES, IMAGENET

if TYPE_CHECKING:
    from PIL import Image


class Transform(NamedTuple):
    """From any image to what a network was evaluated on.

    Attributes:
      crop: (height, width) of the network's input, cut from the middle.
      resize: the shorter side before that, or (height, width).
      filter: "bilinear" or "bicubic", both antialiased as in Pillow.
      floor: how the middle is rounded, see `CenterCrop`.
      mean, std: per channel, of pixels in [0, 1]; as in `config.input`.
    """

    crop: tuple[int, int]
    resize: int | tuple[int, int]
    filter: str
    floor: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        to = self.resize
        how = f"shorter side to {to}" if isinstance(to, int) else f"{to[0]}x{to[1]}"
        cut = f", middle {self.crop[0]}x{self.crop[1]}" if to != self.crop else ""
        return f"{how} ({self.filter}){cut}, mean {self.mean}, std {self.std}"


def transform(family: str, image: Sequence[int]) -> Transform:
    """The evaluation transform of a family for a network's input (rows, columns).

    If that is not square, the longer side counts.

    Raises:
      ValueError: an unknown family, or one of ours.
    """
    rule = plugin.load("formats", family).evaluation
    if rule is None:
        raise ValueError(f"files of {family!r} have no transform of their own")
    share = 1.0 if max(image) >= rule.whole else rule.share
    sides = tuple(math.floor(side / share) for side in image)
    return Transform(
        crop=tuple(image),
        resize=sides if rule.squeeze else max(sides),
        filter=rule.filter,
        floor=rule.floor,
        **rule.colour,
    )


def _colour(x: Any, least: float) -> bool:
    return _list(x) and len(x) == 3 and all(_number(c) and c >= least for c in x)


def _list(x: Any) -> bool:
    return isinstance(x, list | tuple)


def _number(x: Any) -> bool:
    """A finite one of a plausible size; True and False are none."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e5


def _side(x: Any) -> bool:
    return isinstance(x, int) and _number(x) and x > 0


def _side_or_sides(x: Any) -> bool:
    return _side(x) or (isinstance(x, dict) and x != {} and all(map(_side, x.values())))


# What is read of the JSON files of both libraries, and what it can be.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "pretrained_cfg": lambda x: isinstance(x, dict),
    "input_size": lambda x: _list(x) and len(x) == 3 and all(map(_side, x)),
    "crop_pct": lambda x: _number(x) and x >= 0.01,
    "mean": lambda x: _colour(x, 0.0),
    "std": lambda x: _colour(x, 1e-5),
    "image_mean": lambda x: _colour(x, 0.0),
    "image_std": lambda x: _colour(x, 1e-5),
    "size": _side_or_sides,
    "crop_size": _side_or_sides,
    "rescale_factor": _number,
    "resample": lambda x: isinstance(x, int | str),
    "interpolation": lambda x: isinstance(x, str),
    "crop_mode": lambda x: isinstance(x, str),
}


def checked(said: Any) -> dict[str, Any]:
    """The settings of a JSON file that are not null, if what is read of them can be.

    Raises:
      ValueError: no JSON object, or a value of another kind.
    """
    if not isinstance(said, dict):
        raise ValueError(f"a preprocessing config that is no object: {said!r:.80}")
    for key, good in _KINDS.items():
        if said.get(key) is not None and not good(said[key]):
            raise ValueError(
                f"{key}={said[key]!r:.80} in a preprocessing config, which cannot be"
            )
    return {key: x for key, x in said.items() if x is not None}


def from_timm(said: dict[str, Any]) -> Transform:
    """The transform of a timm model by its `config.json` (or its `pretrained_cfg`).

    Raises:
      ValueError: it lacks the size of the input, or wants what is not done here.
    """
    said = checked(checked(said).get("pretrained_cfg", said))
    if "input_size" not in said:
        raise ValueError(
            "a timm config without input_size=(channels, rows, columns); got "
            f"{sorted(said)}"
        )
    mode = said.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ValueError(
            f"crop_mode={mode!r} of a timm config; known: 'center', 'squash'"
        )
    crop = tuple(said["input_size"][1:])
    share = said.get("crop_pct") or 0.875
    sides = tuple(math.floor(side / share) for side in crop)
    return Transform(
        crop=crop,
        resize=sides if mode == "squash" else max(sides),
        filter=_known_filter(said.get("interpolation", "bicubic")),
        floor=False,
        mean=tuple(said.get("mean", IMAGENET["mean"])),
        std=tuple(said.get("std", IMAGENET["std"])),
    )


# What `preprocessor_config.json` leaves out, by the start of the processor's name.
_PROCESSORS = {
    "ViT": {"size": 224, "resample": 2, "do_center_crop": False},
    "Beit": {"size": 224, "resample": 3, "do_center_crop": False},
    "DeiT": {"size": 256, "resample": 3, "do_center_crop": True},
    "Bit": {
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),  # of CLIP
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
}


def from_hf(said: dict[str, Any]) -> Transform:
    """The transform of a Hugging Face model by its `preprocessor_config.json`.

    Old files, of feature extractors, have a number for `size` and `crop_size`.

    Raises:
      ValueError: a processor, or a setting of it, that is not known here.
    """
    said = checked(said)
    name = said.get("image_processor_type") or said.get("feature_extractor_type")
    known = [k for k in _PROCESSORS if str(name).startswith(k)]
    if not known:
        raise ValueError(
            f"image_processor_type={name!r}; known are those that begin with "
            + ", ".join(_PROCESSORS)
        )
    said = {
        "image_mean": HALVES["mean"],
        "image_std": HALVES["std"],
        "crop_size": 224,
        **_PROCESSORS[known[0]],
        **said,
    }
    if not _usual_steps(said):
        found = {k: said[k] for k in (*_STEPS, "rescale_factor") if k in said}
        raise ValueError(
            f"{found} in a preprocessor_config.json; expected to resize, to divide by "
            "255 and to normalise"
        )
    resize = crop = _sides(said["size"], "size", short=known == ["Bit"])
    if said["do_center_crop"]:
        crop = _sides(said["crop_size"], "crop_size")
    if isinstance(crop, int):
        raise ValueError(
            f"size={said['size']} and crop_size={said['crop_size']} in a "
            f"preprocessor_config.json, do_center_crop={said['do_center_crop']}, "
            "make images of different sizes; expected height and width"
        )
    filters = {number: name for name, number in FILTERS.items()}
    return Transform(
        crop=crop,
        resize=resize,
        filter=_known_filter(filters.get(said["resample"], said["resample"])),
        floor=True,
        mean=tuple(said["image_mean"]),
        std=tuple(said["image_std"]),
    )


_STEPS = ("do_resize", "do_rescale", "do_normalize")


def _usual_steps(said: dict[str, Any]) -> bool:
    """Whether mean and std are of pixels in [0, 1], as ours."""
    scale = said.get("rescale_factor", 1 / 255)
    return all(said.get(step, True) for step in _STEPS) and abs(255 * scale - 1) <= 1e-6


def hf_colour(said: dict[str, Any]) -> dict[str, tuple]:
    """What a `preprocessor_config.json` says of "mean" and "std", of any processor."""
    keys = ("mean", "std") if _usual_steps(said) else ()
    return {k: tuple(said[f"image_{k}"]) for k in keys if f"image_{k}" in said}


def timm_colour(said: dict[str, Any]) -> dict[str, tuple]:
    """The same of timm's."""
    return {k: tuple(said[k]) for k in ("mean", "std") if k in said}


def view(given: Transform) -> CenterCrop:
    """The host view that makes the pixels of a transform."""
    return CenterCrop(
        name="eval",
        size=given.crop,
        resize=given.resize,
        filter=given.filter,
        floor=given.floor,
    )


def pixels(image: Image.Image, given: Transform) -> np.ndarray:
    """uint8 (rows, columns, 3) of an RGB image."""
    return view(given)(image)


def normalised(pixels: np.ndarray, given: Transform) -> np.ndarray:
    """uint8 (..., 3) -> float32, each step rounded as in torchvision."""
    mean, std = (np.asarray(x, np.float32) for x in (given.mean, given.std))
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def _known_filter(name: Any) -> str:
    if name not in FILTERS:
        raise ValueError(
            f"resampling {name!r} of a preprocessing config; known: "
            + ", ".join(FILTERS)
        )
    return name


def _sides(size: Any, key: str, short: bool = False) -> int | tuple[int, int]:
    """An int for the shorter side, or (height, width)."""
    if isinstance(size, int):
        return size if short else (size, size)
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    raise ValueError(
        f"{key}={size} in a preprocessor_config.json; expected height and width, or "
        "shortest_edge"
    )
