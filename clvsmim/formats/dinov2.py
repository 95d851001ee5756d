"""DINOv2 (Oquab et al. 2023), with and without registers, as its own code names it."""

import numpy as np

from clvsmim.formats._family import CORE, Family, Look
from clvsmim.formats._rules import SAME, TOKEN, Drop, Leaves, Rule
from clvsmim.formats._tables import either_mlp, layer_scale, timm_encoder
from clvsmim.formats.dino import two_networks


def make() -> Family:
    """timm's names, layer scale, registers after CLS, SwiGLU in the giant."""
    return Family(
        title="DINOv2 backbone",
        looks_for="blocks.0.ls1.gamma with mask_token or register_tokens",
        recognise=recognise,
        branches=two_networks(),
        rules=(
            *(rule for rule in timm_encoder() if ".mlp." not in rule.theirs),
            *either_mlp("blocks.{i}.mlp.", ("fc1", "fc2"), ("w12", "w3")),
            *layer_scale("blocks.{i}.ls1.gamma", "blocks.{i}.ls2.gamma"),
            Rule("register_tokens", ("encoder/registers",), SAME),
            Rule("mask_token", ("heads/mask_token",), TOKEN),
        ),
        drops=(Drop(r"(head|dino_head|ibot_head)\..*", "a head: no objective here"),),
        aliases=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),
        needs=(*CORE, "encoder/pos_embed", "encoder/ln_final/scale"),
        fields={"layer_scale": 1e-5},
        can={"mlp": ("gelu", "swiglu"), "norm_eps": (1e-6,)},
        unfold=unfold,
        checked="timm's converter of its files",
    )


def recognise(look: Look) -> str:
    """Layer scale and a token that timm's own files lack."""
    scaled = look.has(r"(^|[/.])ls1\.gamma")
    if look.timm and scaled and look.has(r"(^|[/.])(mask_token|register_tokens)"):
        return "it has ls1.gamma and mask_token or register_tokens"
    return ""


def unfold(leaves: Leaves, folded: tuple[str, ...]) -> Leaves:
    """With a mask token, which its code always has: zeros where there is none."""
    del folded
    width = leaves["encoder/cls_token"].shape[-1]
    return {"heads/mask_token": np.zeros((1, 1, width), np.float32)} | leaves
