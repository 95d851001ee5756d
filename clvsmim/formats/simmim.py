"""SimMIM (Xie et al. 2022) with a ViT: pre-training and fine-tuned files."""

from clvsmim.formats._family import CORE, PATH, Family, Look, under
from clvsmim.formats._rules import CONV_1X1, SAME, Rule
from clvsmim.formats._tables import beit_encoder, beit_indices, linear, timm_head

PLAIN = r"(?=(?:cls_token|mask_token|patch_embed\.|rel_pos_bias\.|blocks\.|norm\.))"


def make() -> Family:
    """encoder.* and decoder.0; fine-tuned, the names of the encoder alone."""
    weight, bias = linear("decoder.0", "heads/decoder")
    return Family(
        title="SimMIM checkpoint",
        looks_for="encoder.blocks.0.attn.q_bias",
        recognise=recognise,
        branches={
            "": ((PATH + r"encoder\.", "encoder."), (PATH + PLAIN, "encoder.")),
        },
        rules=(
            *under("encoder.", beit_encoder()),
            Rule("encoder.mask_token", ("heads/mask_token",), SAME),
            weight._replace(op=CONV_1X1),
            bias,
            *timm_head(),
        ),
        givens=under("encoder.", beit_indices()),
        aliases=((r"^encoder\.(fc_norm|head)\.", r"\1."),),
        needs=(*CORE, "encoder/rel_table|encoder/block_0/attn/rel_table"),
        alone="an encoder alone: the decoder is in the pre-training file",
        fields={"init": "simmim", "layer_scale": 0.1},
        checked="recordings of the original code (tests/golden)",
    )


def recognise(look: Look) -> str:
    """The encoder under its own name; fine-tuned files look like BEiT's."""
    if look.has(r"(^|/)(module\.)?encoder\.blocks\.0\.attn\.q_bias"):
        return "it has encoder.blocks.0.attn.q_bias"
    if look.has(r"(^|/)blocks\.0\.attn\.q_bias") and not look.has("lm_head.*"):
        return "q and v biases as in fine-tuned SimMIM"
    return ""
