"""What timm and Hugging Face need beside the tensors to build a network."""

import math
from collections.abc import Mapping
from typing import Any

from clvsmim.formats._rules import Leaves
from clvsmim.formats._tables import HEAD


def hf_config(
    model_type: str, architecture: str, encoder: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json of transformers for an encoder; sizes are lists if not square."""
    rows, columns = encoder["image"]
    tanh = encoder["mlp"] == "gelu_tanh"
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": encoder["width"],
        "num_hidden_layers": encoder["depth"],
        "num_attention_heads": encoder["heads"],
        "image_size": rows if rows == columns else [rows, columns],
        "patch_size": encoder["patch"],
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": encoder["norm_eps"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def intermediate(encoder: Mapping[str, Any]) -> dict[str, int]:
    """The hidden width of the MLP, where the library wants it in units."""
    return {"intermediate_size": round(encoder["mlp_ratio"] * encoder["width"])}


def labels(leaves: Leaves) -> dict[str, Any]:
    """The number of classes of a classifier that comes along."""
    kernel = leaves.get(f"{HEAD}/kernel")
    if kernel is None:
        return {}
    return {"id2label": {str(i): f"LABEL_{i}" for i in range(kernel.shape[1])}}


def timm_config(
    leaves: Leaves, encoder: Mapping[str, Any], class_name: str, pool: str
) -> dict[str, Any]:
    """Which class of timm, and its keyword arguments.

    `norm_eps` and `act` stand beside them: timm wants a class there, as in
    `norm_layer=partial(LayerNorm, eps=norm_eps)`.
    """
    kernel = leaves.get(f"{HEAD}/kernel")
    hidden = encoder["mlp_ratio"] * (2 if encoder["mlp"] == "swiglu" else 1)
    arguments = {
        "img_size": tuple(encoder["image"]),
        "patch_size": encoder["patch"],
        "embed_dim": encoder["width"],
        "depth": encoder["depth"],
        "num_heads": encoder["heads"],
        "mlp_ratio": hidden,
        "num_classes": 0 if kernel is None else kernel.shape[1],
        "init_values": encoder["layer_scale"] or None,
        "global_pool": timm_pool(pool),
    }
    return {
        "class": class_name,
        "arguments": arguments,
        "mlp": encoder["mlp"],
        "norm_eps": encoder["norm_eps"],
        "parameters": sum(math.prod(x.shape) for x in leaves.values()),
    }


def timm_pool(pool: str) -> str:
    """What a classifier reads, in timm's word."""
    return "token" if pool == "cls" else "avg"
