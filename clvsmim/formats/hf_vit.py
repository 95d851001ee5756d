"""Hugging Face's ViT and DeiT: encoder, classifier, masked image modelling."""

from clvsmim.formats._configs import hf_config, intermediate, labels
from clvsmim.formats._evaluation import HALVES, Evaluation
from clvsmim.formats._family import CORE, PATH, Family, Look, under
from clvsmim.formats._positions import with_distillation_row, zero_key_bias
from clvsmim.formats._rules import CONV_1X1, SAME, Drop, Leaves, Rule
from clvsmim.formats._tables import (
    HEAD,
    HF_ALIASES,
    HF_MLP,
    HF_MLP_ALIASES,
    LAYER,
    hf_encoder,
    hf_norms,
    linear,
    mlp,
    norm,
)

STARTS = r"(?=(?:embeddings|encoder\.layer|layers|layernorm|pooler)\.)"


def make() -> Family:
    """ViTModel, ViTForImageClassification, ViTForMaskedImageModeling, DeiT's."""
    weight, bias = linear("decoder.0", "heads/decoder")
    return Family(
        title="Hugging Face ViT",
        looks_for="embeddings.patch_embeddings with layernorm_before",
        recognise=recognise,
        branches={"": ((PATH + r"(?:vit|deit)\.", "vit."), (PATH + STARTS, "vit."))},
        rules=(
            *under("vit.", vit_encoder()),
            Rule("vit.embeddings.mask_token", ("heads/mask_token",), SAME),
            Rule("vit.embeddings.distillation_token", ("encoder/registers",), SAME),
            weight._replace(op=CONV_1X1),
            bias,
            *linear("classifier", HEAD),
        ),
        drops=(
            Drop(
                r"vit\.pooler\..*", "the pooler, a tanh layer that nothing here reads"
            ),
            Drop(
                r"(cls|distillation)_classifier\..*",
                "the two classifiers of a distilled DeiT, whose logits it averages",
            ),
        ),
        aliases=(*HF_ALIASES, *HF_MLP_ALIASES),
        needs=(*CORE, "encoder/pos_embed", "encoder/ln_final/scale"),
        fields={"norm_eps": 1e-12},
        can={"mlp": ("gelu", "gelu_tanh")},
        classifiers=(("cls", "none"),),
        evaluation=Evaluation(HALVES, "bilinear", 1.0, squeeze=True, floor=True),
        unfold=unfold,
        config=config,
        checked="transformers",
    )


def vit_encoder() -> tuple[Rule, ...]:
    """The encoder of ViT, DeiT and ViTMAE."""
    return (
        *hf_encoder(),
        *hf_norms(LAYER, "encoder/block_{i}"),
        *mlp(f"{LAYER}.", "encoder/block_{i}", HF_MLP),
        *norm("layernorm", "encoder/ln_final"),
    )


def recognise(look: Look) -> str:
    """Its embeddings and norms, without the marks of its other families."""
    other = r".*lambda_1|.*layer_scale1.*|.*decoder_embed\.weight|.*relative_position.*"
    if not is_hf(look) or look.has(other) or look.table == "mae_sincos":
        return ""
    return "it has embeddings.patch_embeddings and layernorm_before"


def is_hf(look: Look) -> bool:
    """Names of transformers' ViT, ViTMAE and BEiT."""
    return look.has(r"embeddings\.patch_embeddings\.projection\.weight") and look.has(
        r"\.0\.layernorm_before\.weight"
    )


def unfold(leaves: Leaves, folded: tuple[str, ...]) -> Leaves:
    """Zero biases of keys; a table row for DeiT's token."""
    del folded
    return with_distillation_row(zero_key_bias(leaves))


def config(leaves: Leaves, encoder: dict, decoder_heads: int, pool: str) -> dict:
    """config.json of ViTModel and its relatives."""
    del decoder_heads, pool
    kind, model = "Model", ("vit", "ViT")
    if "encoder/registers" in leaves:
        model = ("deit", "DeiT")
    if f"{HEAD}/kernel" in leaves:
        kind = "ForImageClassification"
    elif "heads/decoder/kernel" in leaves:
        kind = "ForMaskedImageModeling"
    return {
        **hf_config(model[0], model[1] + kind, encoder),
        **intermediate(encoder),
        **labels(leaves),
        "qkv_bias": encoder["qkv_bias"] != "none",
        "encoder_stride": encoder["patch"],
    }
