"""iBOT (Zhou et al. 2022): backbones and full checkpoints of student and teacher."""

from clvsmim.formats._family import CORE, Family, Look
from clvsmim.formats._rules import Drop
from clvsmim.formats._tables import layer_scale, timm_encoder
from clvsmim.formats.dino import two_networks


def make() -> Family:
    """timm's names with an optional token for hidden patches and layer scale."""
    return Family(
        title="iBOT backbone",
        looks_for="masked_embed, or state_dict/ with timm's names and no head",
        recognise=recognise,
        branches=two_networks(),
        rules=(
            *timm_encoder(),
            *layer_scale("blocks.{i}.gamma_1", "blocks.{i}.gamma_2"),
        ),
        drops=(
            Drop("masked_embed", "the token of hidden patches: no objective here"),
            Drop(r"(head|fc_norm)\..*", "a head of iBOT: no objective here"),
        ),
        needs=(*CORE, "encoder/pos_embed"),
    )


def recognise(look: Look) -> str:
    """Its token, or a backbone as it is released."""
    if look.timm and look.has(r"masked_embed"):
        return "it has masked_embed"
    wrapped = look.has(r"^state_dict/(module\.)?blocks\.0\.attn\.qkv\.weight")
    headless = not look.has(r"(^|[/.])head\.(weight|bias)")
    if look.timm and wrapped and headless and look.table == "learned":
        return "timm's names under state_dict/, learned positions, no classifier"
    return ""
