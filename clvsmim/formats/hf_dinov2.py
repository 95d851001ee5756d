"""Hugging Face's Dinov2 and Dinov2WithRegisters."""

import numpy as np

from clvsmim.formats._configs import hf_config
from clvsmim.formats._evaluation import Evaluation
from clvsmim.formats._family import CORE, PATH, Family, Look, under
from clvsmim.formats._positions import zero_key_bias
from clvsmim.formats._rules import SAME, TOKEN, Drop, Leaves, Rule
from clvsmim.formats._tables import (
    HF_ALIASES,
    LAYER,
    either_mlp,
    hf_encoder,
    layer_scale,
    norm,
)
from clvsmim.formats.dinov2 import unfold as with_mask_token
from clvsmim.formats.hf_vit import STARTS


def make() -> Family:
    """Layer scale under lambda1, registers, SwiGLU under weights_in."""
    block = "encoder/block_{i}"
    return Family(
        title="Hugging Face Dinov2",
        looks_for="encoder.layer.0.layer_scale1.lambda1",
        recognise=recognise,
        branches={
            "": (
                (PATH + r"dinov2(?:_with_registers)?\.", "dinov2."),
                (PATH + STARTS, "dinov2."),
            )
        },
        rules=under(
            "dinov2.",
            (
                *hf_encoder(),
                *norm(f"{LAYER}.norm1", f"{block}/ln1"),
                *norm(f"{LAYER}.norm2", f"{block}/ln2"),
                *either_mlp(
                    f"{LAYER}.mlp.", ("fc1", "fc2"), ("weights_in", "weights_out")
                ),
                *layer_scale(
                    f"{LAYER}.layer_scale1.lambda1", f"{LAYER}.layer_scale2.lambda1"
                ),
                *norm("layernorm", "encoder/ln_final"),
                Rule("embeddings.register_tokens", ("encoder/registers",), SAME),
                Rule("embeddings.mask_token", ("heads/mask_token",), TOKEN),
            ),
        ),
        drops=(
            Drop(
                r"classifier\..*",
                "a classifier of CLS and the mean of the patches, side by side: no "
                "objective here",
            ),
        ),
        aliases=HF_ALIASES,
        needs=(*CORE, "encoder/pos_embed", "encoder/ln_final/scale"),
        fields={"layer_scale": 1.0},
        can={},
        unfold=unfold,
        config=config,
        evaluation=Evaluation(floor=True),
        checked="transformers",
    )


def recognise(look: Look) -> str:
    """Its layer scale."""
    if look.has(r"\.0\.layer_scale1\.lambda1"):
        return "it has layer_scale1.lambda1"
    return ""


def unfold(leaves: Leaves, folded: tuple[str, ...]) -> Leaves:
    """With what its code always has: a mask token, biases of keys, layer scale."""
    return with_mask_token(with_layer_scale(zero_key_bias(leaves)), folded)


def with_layer_scale(leaves: Leaves) -> Leaves:
    """Ones, which change nothing, in the blocks that have no layer scale."""
    ones = {}
    for name, x in leaves.items():
        block, _, leaf = name.partition("/ln1/")
        if name.startswith("encoder/block_") and leaf == "scale":
            ones |= {f"{block}/gamma_{i}": np.ones_like(x) for i in (1, 2)}
    return ones | leaves


def config(leaves: Leaves, encoder: dict, decoder_heads: int, pool: str) -> dict:
    """config.json of Dinov2Model or Dinov2WithRegistersModel."""
    del decoder_heads, pool
    registers = leaves.get("encoder/registers")
    kind = ("dinov2", "Dinov2Model")
    more = {}
    if registers is not None:
        kind = ("dinov2_with_registers", "Dinov2WithRegistersModel")
        more = {"num_register_tokens": registers.shape[1]}
    gated = encoder["mlp"] == "swiglu"
    return {
        **hf_config(*kind, encoder),
        **more,
        # The hidden width of its SwiGLU is 2/3 of this, rounded up to a multiple of 8.
        "mlp_ratio": round(encoder["mlp_ratio"] * 3 / 2)
        if gated
        else (round(encoder["mlp_ratio"])),
        "use_swiglu_ffn": gated,
        "qkv_bias": encoder["qkv_bias"] != "none",
        "layerscale_value": encoder["layer_scale"] or 1.0,
    }
