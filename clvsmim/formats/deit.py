"""DeiT (Touvron et al. 2021, 2022) as its own code saves it, distilled or not."""

from clvsmim.formats._configs import timm_config
from clvsmim.formats._family import CORE, Family, Look
from clvsmim.formats._positions import (
    unfold_positions,
    with_distillation_row,
    zero_key_bias,
)
from clvsmim.formats._rules import SAME, Drop, Leaves, Rule
from clvsmim.formats._tables import HEAD, layer_scale, timm_encoder, timm_head


def make() -> Family:
    """timm's names under model/, with the distillation token as our register."""
    return Family(
        title="DeiT checkpoint",
        looks_for="dist_token, or model/ with timm's names and head",
        recognise=recognise,
        branches={},
        rules=(
            *timm_encoder(),
            Rule("dist_token", ("encoder/registers",), SAME),
            *layer_scale("blocks.{i}.gamma_1", "blocks.{i}.gamma_2"),
            *timm_head(),
        ),
        drops=(
            Drop(
                r"head_dist\..*",
                "the classifier of the distillation token, with whose logits DeiT "
                "averages those of head",
                warn=True,
            ),
        ),
        needs=(
            *CORE,
            "encoder/pos_embed",
            f"encoder/ln_final/scale|{HEAD}/fc_norm/scale",
        ),
        unfold=unfold,
        config=config,
        can={"mlp": ("gelu", "gelu_tanh"), "norm_eps": (1e-6,)},
        checked="timm's VisionTransformerDistilled",
    )


def recognise(look: Look) -> str:
    """The distillation token, or a classifier under the key "model"."""
    if not look.timm or look.table != "learned":
        return ""
    if look.has(r"(^|[/.])dist_token"):
        return "it has dist_token"
    head = look.has(r"^model/(module\.)?head\.weight")
    if head and not look.has(r".*ls1\.gamma|.*reg_token|.*fc_norm\.weight"):
        return "timm's names under model/, learned positions, a classifier"
    return ""


def unfold(leaves: Leaves, folded: tuple[str, ...]) -> Leaves:
    """With a position for the distillation token: zeros, it is in the token itself."""
    if "encoder/registers" in leaves:
        return with_distillation_row(zero_key_bias(leaves))
    return unfold_positions(zero_key_bias(leaves), folded)


def config(leaves: Leaves, encoder: dict, decoder_heads: int, pool: str) -> dict:
    """Of timm's distilled or plain class."""
    del decoder_heads
    kind = "deit.VisionTransformerDistilled"
    if "encoder/registers" not in leaves:
        kind = "vision_transformer.VisionTransformer"
    return timm_config(leaves, encoder, f"timm.models.{kind}", pool)
