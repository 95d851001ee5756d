"""How each family prepares an image for evaluation: its own code, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def _list(x: Any) -> bool:
    return isinstance(x, list | tuple)


def _number(x: Any) -> bool:
    """A finite one of a plausible size; True and False are none."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e5


def _side(x: Any) -> bool:
    return isinstance(x, int) and _number(x) and x > 0


# Least values of what weights cannot do without; resizing can be as is usual.
_COLOURS = {"mean": 0.0, "std": 1e-5, "image_mean": 0.0, "image_std": 1e-5}


def checked(said: Any) -> dict[str, Any]:
    """The settings of a JSON file without nulls, mean and std with three numbers.

    One number is of all channels. Sizes and filters are looked at where they are read.

    Raises:
      ValueError: no JSON object, or a mean or std that cannot be.
    """
    if not isinstance(said, dict):
        raise ValueError(f"a preprocessing config that is no object: {said!r:.80}")
    said = without_nulls(said)
    for key, least in _COLOURS.items():
        row = said.get(key, 0.5)
        row = tuple(row) if _list(row) else (row,)
        good = len(row) in (1, 3) and all(_number(c) and c >= least for c in row)
        if not good:
            raise _cannot_be(key, said[key])
        if key in said:
            said[key] = row * (3 // len(row))
    if not _number(said.get("rescale_factor", 1)):
        raise _cannot_be("rescale_factor", said["rescale_factor"])
    return said


def without_nulls(said: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object, and those in it, without what is null: it says nothing."""
    return {
        key: {k: y for k, y in x.items() if y is not None} if isinstance(x, dict) else x
        for key, x in said.items()
        if x is not None
    }


def _cannot_be(key: str, got: Any) -> ValueError:
    return ValueError(f"{key}={got!r:.80} in a preprocessing config, which cannot be")


def from_timm(said: dict[str, Any]) -> Transform:
    """The transform of a timm model by the `pretrained_cfg` in its `config.json`.

    Args:
      said: as of `checked`.

    Raises:
      ValueError: it lacks the size of the input, or wants what is not done here.
    """
    size = said.get("input_size")
    if size is None:
        raise ValueError(
            "a timm config without input_size=(channels, rows, columns); got "
            f"{sorted(said)}"
        )
    if not (_list(size) and len(size) == 3 and all(map(_side, size))):
        raise _cannot_be("input_size", size)
    share = said.get("crop_pct", 0.875)
    if not (_number(share) and share >= 0.01):
        raise _cannot_be("crop_pct", share)
    mode = said.get("crop_mode", "center")
    if mode not in ("center", "squash"):
        raise ValueError(
            f"crop_mode={mode!r} of a timm config; known: 'center', 'squash'"
        )
    crop = tuple(size[1:])
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

    Args:
      said: as of `checked`.

    Raises:
      ValueError: a processor, or a setting of it, that is not known here.
    """
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
    colour = hf_colour(said)
    if not (colour and said.get("do_resize", True)):
        steps = ("do_resize", "do_rescale", "rescale_factor")
        found = {k: said[k] for k in steps if k in said}
        raise ValueError(
            f"{found} in a preprocessor_config.json; expected to resize, and to divide "
            "by 255"
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
    return Transform(
        crop=crop,
        resize=resize,
        filter=_known_filter(said["resample"]),
        floor=True,
        **colour,
    )


def hf_colour(said: dict[str, Any]) -> dict[str, tuple]:
    """What a `preprocessor_config.json` says of "mean" and "std", of any processor.

    {} where they are of other pixels than ours, which are in [0, 1].
    """
    scale = said.get("rescale_factor", 1 / 255)
    if not said.get("do_rescale", True) or abs(255 * scale - 1) > 1e-6:
        return {}
    if not said.get("do_normalize", True):
        return {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return {k: said[f"image_{k}"] for k in ("mean", "std") if f"image_{k}" in said}


def timm_colour(said: dict[str, Any]) -> dict[str, tuple]:
    """The same of timm's."""
    return {k: said[k] for k in ("mean", "std") if k in said}


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


def _known_filter(given: Any) -> str:
    """Its name, also of Pillow's number."""
    for name, number in FILTERS.items():
        if given in (name, number):
            return name
    raise ValueError(
        f"resampling {given!r:.80} of a preprocessing config; known: "
        + ", ".join(FILTERS)
    )


def _sides(size: Any, key: str, short: bool = False) -> int | tuple[int, int]:
    """An int for the shorter side, or (height, width)."""
    if _side(size):
        return size if short else (size, size)
    named = size if isinstance(size, dict) else {}
    if _list(size) and len(size) == 2:
        named = dict(zip(("height", "width"), size, strict=True))
    if all(map(_side, named.values())):
        if set(named) == {"shortest_edge"}:
            return named["shortest_edge"]
        if set(named) == {"height", "width"}:
            return named["height"], named["width"]
    raise ValueError(
        f"{key}={size!r:.80} in a preprocessor_config.json; expected height and "
        "width, or shortest_edge"
    )
