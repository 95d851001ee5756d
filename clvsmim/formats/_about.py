"""The JSON files that Hugging Face and timm put beside their weights."""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from clvsmim import plugin
from clvsmim.formats._preprocess import without_nulls
from clvsmim.formats._spec import ACTIVATIONS, activation_of

# What is read of it, and of which kind.
COUNTS = ("num_attention_heads", "decoder_num_attention_heads")
NUMBERS = ("layer_norm_eps", "layer_scale_init_value", "layerscale_value")


def check_about(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same without nulls, if what is read of it can be used.

    Raises:
      ValueError: a value of another kind, or an activation that is not ours.
    """
    about = without_nulls(about)
    for key, good in (
        *((key, _count) for key in COUNTS),
        *((key, _number) for key in NUMBERS),
        ("image_size", _size),
        ("model_args", lambda x: isinstance(x, dict)),
    ):
        if key in about and not good(about[key]):
            raise ValueError(f"config.json has {key}={about[key]!r}, which cannot be")
    got = activation_of(about)
    if got and got not in ACTIVATIONS:
        raise ValueError(plugin.unknown("activation in config.json", got, ACTIVATIONS))
    return about


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and 0 <= x < math.inf


def _count(x: Any) -> bool:
    return isinstance(x, int) and 0 < x < 10000


def _size(x: Any) -> bool:
    return _count(x) or (
        isinstance(x, list | tuple) and len(x) == 2 and all(map(_count, x))
    )


def beside(path: str, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` beside `path`; {} where there is none.

    Raises:
      ValueError: it is no JSON object: cut off, not in UTF-8, or too deep.
    """
    place = epath.Path(path).parent / name
    if not place.exists():
        return {}
    try:
        found = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError):  # OSError: of a folder
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{place} is no JSON object, and is read with {path}; fetch it again, or "
            "remove it"
        )
    return found
