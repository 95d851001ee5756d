"""timm's VisionTransformer: flat names, with a classifier, layer scale, registers."""

import itertools

from clvsmim.formats._configs import timm_config
from clvsmim.formats._evaluation import HALVES, Evaluation
from clvsmim.formats._family import CORE, Family, Look
from clvsmim.formats._positions import unfold_positions, zero_key_bias
from clvsmim.formats._rules import SAME, Leaves, Rule
from clvsmim.formats._tables import HEAD, layer_scale, timm_encoder, timm_head


def make() -> Family:
    """What `VisionTransformer.state_dict()` holds, packed SwiGLU included."""
    return Family(
        title="timm ViT",
        looks_for="timm's names with head.weight, ls1.gamma or reg_token, flat",
        recognise=recognise,
        branches={},
        rules=(
            *timm_encoder(),
            Rule("reg_token", ("encoder/registers",), SAME),
            *layer_scale("blocks.{i}.ls1.gamma", "blocks.{i}.ls2.gamma"),
            *timm_head(),
        ),
        needs=(
            *CORE[1:],
            "encoder/pos_embed",
            f"encoder/ln_final/scale|{HEAD}/fc_norm/scale",
        ),
        fields={"layer_scale": 1e-5},
        unfold=unfold,
        config=config,
        can={"mlp": ("gelu", "gelu_tanh", "swiglu"), "norm_eps": (1e-6,)},
        classifiers=tuple(
            itertools.product(("cls", "patches", "tokens"), ("none", "layer"))
        ),
        evaluation=Evaluation(HALVES, share=0.9, whole=384),
        checked="timm",
    )


def recognise(look: Look) -> str:
    """A classifier, registers or layer scale in a flat file."""
    if not look.timm or look.has(r"(^|[/.])(mask_token|register_tokens|dist_token)"):
        return ""
    flat = look.has(r"^(state_dict/)?(module\.)?blocks\.0\.attn\.qkv\.weight")
    if look.has(r"(^|[/.])reg_token|.*ls1\.gamma"):
        return "it has reg_token or ls1.gamma"
    head = look.has(r"(^|[/.])(head|fc_norm)\.weight")
    if flat and head and look.table == "learned":
        return "timm's names, learned positions, a classifier"
    return ""


def unfold(leaves: Leaves, folded: tuple[str, ...]) -> Leaves:
    """Positions as timm has them behind registers, and zero biases of keys."""
    return unfold_positions(zero_key_bias(leaves), folded)


def config(leaves: Leaves, encoder: dict, decoder_heads: int, pool: str) -> dict:
    """Of timm's VisionTransformer."""
    del decoder_heads
    kind = "timm.models.vision_transformer.VisionTransformer"
    found = timm_config(leaves, encoder, kind, pool)
    registers = leaves.get("encoder/registers")
    table, cls = leaves["encoder/pos_embed"], "encoder/cls_token" in leaves
    patches = (encoder["image"][0] // encoder["patch"]) * (
        encoder["image"][1] // encoder["patch"]
    )
    return found | {
        "arguments": found["arguments"]
        | {
            "class_token": cls,
            "reg_tokens": 0 if registers is None else registers.shape[1],
            "no_embed_class": cls and table.shape[1] == patches,
            "qkv_bias": encoder["qkv_bias"] != "none",
            "final_norm": encoder["final_norm"] or f"{HEAD}/fc_norm/scale" in leaves,
            "fc_norm": f"{HEAD}/fc_norm/scale" in leaves,
        }
    }
