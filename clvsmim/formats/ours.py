"""Our own names, as in the checkpoints that `clvsmim` writes."""

import itertools

from clvsmim.formats import dinov2, mae, moco_v3, simmim
from clvsmim.formats._configs import hf_config, timm_pool
from clvsmim.formats._family import CORE, Family, Look
from clvsmim.formats._rules import SAME, Leaves, Rule
from clvsmim.formats._tables import HEAD

STARTS = (
    (r"params/", ""),
    (r"extra/", "stats/"),
    (r"(?=encoder/|heads/|stats/)", ""),
)


def make() -> Family:
    """Every leaf that another family's table knows, as it is."""
    tables = (moco_v3, simmim, mae, dinov2)
    names = dict.fromkeys(
        leaf for table in tables for rule in table.make().rules for leaf in rule.ours
    )
    return Family(
        title="clvsmim network",
        looks_for="encoder/block_0/attn/q/kernel",
        recognise=recognise,
        branches={"": STARTS},
        rules=tuple(Rule(name, (name,), SAME) for name in names),
        needs=(*CORE[:1], *CORE[3:]),
        can={},
        classifiers=tuple(
            itertools.product(("cls", "patches", "tokens"), ("none", "layer", "both"))
        ),
        config=config,
        evaluation=None,
        checked="itself",
    )


def recognise(look: Look) -> str:
    """Our leaves."""
    if look.has(r"(^|/)encoder/block_0/attn/q/kernel"):
        return "it has encoder/block_0/attn/q/kernel"
    return ""


def config(leaves: Leaves, encoder: dict, decoder_heads: int, pool: str) -> dict:
    """What the tensors do not tell, in Hugging Face's and timm's words."""
    del decoder_heads
    words = hf_config("", "", encoder)
    found = {k: words[k] for k in ("image_size", "hidden_act", "layer_norm_eps")}
    return found | (
        {"global_pool": timm_pool(pool)} if f"{HEAD}/kernel" in leaves else {}
    )
