"""BEiT (Bao et al. 2022), as its own code and timm name it."""

from clvsmim.formats._configs import timm_config
from clvsmim.formats._evaluation import HALVES, Evaluation
from clvsmim.formats._family import CORE, Family, Look
from clvsmim.formats._rules import Drop, Leaves
from clvsmim.formats._tables import beit_encoder, beit_indices, timm_head


def make() -> Family:
    """Pre-trained, fine-tuned, and what timm's Beit class saves."""
    return Family(
        title="BEiT checkpoint",
        looks_for="blocks.0.attn.q_bias with lm_head.*",
        recognise=recognise,
        branches={},
        rules=(*beit_encoder(), *timm_head()),
        givens=tuple(g._replace(where="") for g in beit_indices()),
        drops=(
            Drop("mask_token", "the token of hidden patches, which timm's class lacks"),
            Drop(r"lm_head\..*", "the classifier of visual tokens: no objective here"),
        ),
        needs=CORE,
        fields={"layer_scale": 0.1},
        evaluation=Evaluation(HALVES, whole=384),
        config=config,
        checked="timm's Beit",
    )


def recognise(look: Look) -> str:
    """Visual tokens; fine-tuned files look like SimMIM's."""
    if not look.has(r"(^|/)(module\.)?blocks\.0\.attn\.q_bias"):
        return ""
    if look.has(r"lm_head\.weight"):
        return "it has lm_head and q and v biases"
    return "q and v biases as in fine-tuned BEiT"


def config(leaves: Leaves, encoder: dict, decoder_heads: int, pool: str) -> dict:
    """Of timm's Beit."""
    del decoder_heads
    found = timm_config(leaves, encoder, "timm.models.beit.Beit", pool)
    found["arguments"] |= {
        "use_abs_pos_emb": encoder["position"] != "none",
        "use_rel_pos_bias": encoder["relative"] == "per_block",
        "use_shared_rel_pos_bias": encoder["relative"] == "shared",
        "qkv_bias": encoder["qkv_bias"] == "qv",
    }
    return found
