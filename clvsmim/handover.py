"""What another library reads: a .safetensors file, and the JSON files beside it."""

import json
import math
from typing import Any

import numpy as np

from clvsmim.data.crops import FILTERS
from clvsmim.foreign import Transform

# Of safetensors, by numpy's names.
DTYPES = {
    **{f"float{n}": f"F{n}" for n in (16, 32, 64)},
    **{f"int{n}": f"I{n}" for n in (8, 16, 32, 64)},
    **{"uint8": "U8", "bool": "BOOL", "bfloat16": "BF16"},
}
# Models of timm by the class that they are of; their sizes stand in `model_args`.
ARCHITECTURES = {
    "VisionTransformer": "vit_base_patch16_224",
    "VisionTransformerDistilled": "deit_base_distilled_patch16_224",
    "Beit": "beit_base_patch16_224",
}
GATED = "vit_giant_patch14_dinov2"  # whose MLP is a SwiGLU


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """The bytes of a .safetensors file: a JSON header, then the arrays.

    Raises:
      ValueError: a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks
    parts, at = [], 0
    for name, x in tensors.items():
        if x.dtype.name not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}, which safetensors does not have")
        data = x.tobytes()  # in C order, whatever the strides
        header[name] = {
            "dtype": DTYPES[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the library aligns it
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def beside(
    config: dict[str, Any], encoder: dict[str, Any], view: Transform, to: str
) -> dict[str, dict]:
    """{name: content} of the JSON files that a library wants beside the tensors.

    Args:
      config: as of `formats.Exported`; {} wants none.
      encoder: every field of `vit.Spec`.
      view: how images are prepared.
      to: the family that is written.
    """
    if not config:
        return {}
    if not to.startswith("hf_") and to != "ours":
        return {"config.json": for_timm(config, encoder, view)}
    both = isinstance(view.resize, tuple)
    sides = dict(zip(("height", "width"), view.crop, strict=True))
    return {
        "config.json": config,
        "preprocessor_config.json": {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": sides if both else {"shortest_edge": view.resize},
            "resample": FILTERS[view.filter],
            "do_center_crop": True,
            "crop_size": sides,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(view.mean),
            "image_std": list(view.std),
            "do_convert_rgb": True,
        },
    }


def for_timm(
    about: dict[str, Any], encoder: dict[str, Any], view: Transform
) -> dict[str, Any]:
    """config.json for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    colour = {"mean": list(view.mean), "std": list(view.std)}
    if "class" not in about:  # of the file that it came from
        said = about.get("pretrained_cfg")
        more = {"pretrained_cfg": said | colour} if isinstance(said, dict) else colour
        return about | more
    rows, columns = view.crop
    side = max(view.resize) if isinstance(view.resize, tuple) else view.resize
    more = {"act_layer": "gelu_tanh"} if about["mlp"] == "gelu_tanh" else {}
    plain = ARCHITECTURES[about["class"].rsplit(".", 1)[-1]]
    return {
        "architecture": GATED if about["mlp"] == "swiglu" else plain,
        "num_classes": about["arguments"]["num_classes"],
        "num_features": encoder["width"],
        "num_attention_heads": encoder["heads"],
        "model_args": about["arguments"] | more,
        "pretrained_cfg": {
            "input_size": [3, rows, columns],
            "interpolation": view.filter,
            "crop_pct": share(max(view.crop), side),
            "crop_mode": "squash" if isinstance(view.resize, tuple) else "center",
            **colour,
            "num_classes": about["arguments"]["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def share(crop: int, side: int) -> float:
    """crop / side, such that crop divided by it and rounded down is the side again."""
    ratio = crop / side
    return ratio if math.floor(crop / ratio) == side else math.nextafter(ratio, 0.0)
