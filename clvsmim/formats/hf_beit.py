"""Hugging Face's BEiT: encoder, masked image modelling, classifier."""

from clvsmim.formats._configs import hf_config, intermediate, labels
from clvsmim.formats._evaluation import HALVES, Evaluation
from clvsmim.formats._family import CORE, PATH, Family, Look, under
from clvsmim.formats._rules import SAME, Drop, Given, Leaves, Rule
from clvsmim.formats._tables import (
    HEAD,
    HF_ALIASES,
    HF_MLP,
    HF_MLP_ALIASES,
    LAYER,
    hf_encoder,
    hf_norms,
    index,
    layer_scale,
    linear,
    mlp,
    norm,
)
from clvsmim.formats.hf_vit import STARTS, is_hf

TABLE = "relative_position_bias_table"
SHARED = "encoder.relative_position_bias"
OWN = f"{LAYER}.attention.attention.relative_position_bias"


def make() -> Family:
    """Relative positions, no bias of the keys; the last norm may stand outside."""
    return Family(
        title="Hugging Face BEiT",
        looks_for="encoder.layer.0.lambda_1 or relative_position_bias",
        recognise=recognise,
        branches={
            "": (
                (PATH + r"beit\.", "beit."),
                (PATH + r"(?=encoder\.relative|shared_position_bias\.)", "beit."),
                (PATH + STARTS, "beit."),
            )
        },
        rules=(
            *under("beit.", beit_encoder()),
            *norm("beit.pooler.layernorm", f"{HEAD}/fc_norm"),
            *linear("classifier", HEAD),
        ),
        givens=under("beit.", indices()),
        drops=(
            Drop(r"lm_head\..*", "the classifier of visual tokens: no objective here"),
        ),
        aliases=(
            *HF_ALIASES,
            *HF_MLP_ALIASES,
            (r"^beit\.shared_position_bias\.", f"beit.{SHARED}."),
            (
                r"(layer\.\d+)\.relative_position_bias\.",
                r"\1.attention.attention.relative_position_bias.",
            ),
        ),
        needs=CORE,
        fields={"layer_scale": 0.1, "norm_eps": 1e-12},
        can={"mlp": ("gelu", "gelu_tanh")},
        evaluation=Evaluation(HALVES, share=1.0, squeeze=True, floor=True),
        config=config,
        checked="transformers",
    )


def beit_encoder() -> tuple[Rule, ...]:
    """Under beit."""
    return (
        *hf_encoder(),
        *hf_norms(LAYER, "encoder/block_{i}"),
        *mlp(f"{LAYER}.", "encoder/block_{i}", HF_MLP),
        *layer_scale(f"{LAYER}.lambda_1", f"{LAYER}.lambda_2"),
        Rule(f"{SHARED}.{TABLE}", ("encoder/rel_table",), SAME),
        Rule(f"{OWN}.{TABLE}", ("encoder/block_{i}/attn/rel_table",), SAME),
        *norm("layernorm", "encoder/ln_final"),
        Rule("embeddings.mask_token", ("heads/mask_token",), SAME),
    )


def indices() -> tuple[Given, ...]:
    """Which transformers stored before version 5."""
    why = "the index into the relative table is computed here; it is the same"
    return (
        Given(f"{SHARED}.relative_position_index", why, index),
        Given(f"{OWN}.relative_position_index", why, index),
    )


def recognise(look: Look) -> str:
    """ViT's names with BEiT's layer scale or positions."""
    if is_hf(look) and look.has(r".*\.lambda_1|.*relative_position_bias_table"):
        return "it has lambda_1 or relative_position_bias_table"
    return ""


def config(leaves: Leaves, encoder: dict, decoder_heads: int, pool: str) -> dict:
    """config.json of BeitModel or BeitForImageClassification."""
    del decoder_heads, pool
    classify = f"{HEAD}/kernel" in leaves
    return {
        **hf_config(
            "beit", "BeitForImageClassification" if classify else "BeitModel", encoder
        ),
        **intermediate(encoder),
        **labels(leaves),
        "use_mask_token": "heads/mask_token" in leaves,
        "use_absolute_position_embeddings": encoder["position"] != "none",
        "use_relative_position_bias": encoder["relative"] == "per_block",
        "use_shared_relative_position_bias": encoder["relative"] == "shared",
        "use_mean_pooling": not encoder["final_norm"],
        "layer_scale_init_value": encoder["layer_scale"],
    }
