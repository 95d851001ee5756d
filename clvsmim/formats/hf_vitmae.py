"""Hugging Face's ViTMAE: with and without its decoder."""

from clvsmim.formats._configs import hf_config, intermediate
from clvsmim.formats._evaluation import Evaluation
from clvsmim.formats._family import CORE, PATH, Family, Look, under
from clvsmim.formats._rules import SAME, Given, Leaves, Rule
from clvsmim.formats._tables import (
    HF_ALIASES,
    HF_MLP,
    HF_MLP_ALIASES,
    hf_attention,
    hf_norms,
    linear,
    mlp,
    norm,
)
from clvsmim.formats.hf_vit import STARTS, is_hf, vit_encoder
from clvsmim.formats.mae import decoder_table


def make() -> Family:
    """ViTMAEForPreTraining and ViTMAEModel."""
    return Family(
        title="Hugging Face ViTMAE",
        looks_for="decoder.decoder_embed, or ViT's names with MAE's sin-cos table",
        recognise=recognise,
        branches={"": ((PATH + r"vit\.", "vit."), (PATH + STARTS, "vit."))},
        rules=(*under("vit.", vit_encoder()), *under("decoder.", decoder())),
        givens=(
            Given(
                "decoder.decoder_pos_embed",
                "the decoder's sin-cos table is a constant here; it is the same",
                decoder_table,
                "heads/decoder/proj/kernel",
            ),
        ),
        aliases=(*HF_ALIASES, *HF_MLP_ALIASES),
        needs=(*CORE, "encoder/pos_embed", "encoder/ln_final/scale"),
        fields={"init": "mae", "position": "mae_sincos", "norm_eps": 1e-12},
        can={"mlp": ("gelu", "gelu_tanh")},
        evaluation=Evaluation(filter="bilinear", share=1.0, squeeze=True, floor=True),
        config=config,
        checked="transformers",
    )


def recognise(look: Look) -> str:
    """A decoder, or ViT's names with MAE's positions."""
    if look.has(r"decoder\.decoder_embed\.weight") and is_hf(look):
        return "it has decoder.decoder_embed"
    if is_hf(look) and look.table == "mae_sincos":
        return "ViT's names and MAE's sin-cos table"
    return ""


def decoder() -> tuple[Rule, ...]:
    """Blocks of its own width, named as those of the encoder."""
    layer, ours = "decoder_layers.{i}", "heads/decoder/block_{i}"
    return (
        Rule("mask_token", ("heads/mask_token",), SAME),
        *linear("decoder_embed", "heads/decoder/proj"),
        *hf_attention(layer, ours),
        *hf_norms(layer, ours),
        *mlp(f"{layer}.", ours, HF_MLP),
        *norm("decoder_norm", "heads/decoder/ln_final"),
        *linear("decoder_pred", "heads/decoder/pixels"),
    )


def config(leaves: Leaves, encoder: dict, decoder_heads: int, pool: str) -> dict:
    """config.json of ViTMAEForPreTraining, or of ViTMAEModel without a decoder."""
    del pool
    found = {
        **hf_config("vit_mae", "ViTMAEModel", encoder),
        **intermediate(encoder),
        "qkv_bias": encoder["qkv_bias"] != "none",
        "norm_pix_loss": True,
    }
    proj = leaves.get("heads/decoder/proj/kernel")
    if proj is None:
        return found
    depth = len([n for n in leaves if n.startswith("heads/decoder") and "ln1/sc" in n])
    return found | {
        "architectures": ["ViTMAEForPreTraining"],
        "decoder_hidden_size": proj.shape[1],
        "decoder_num_hidden_layers": depth,
        "decoder_num_attention_heads": decoder_heads,
        "decoder_intermediate_size": 4 * proj.shape[1],
    }
