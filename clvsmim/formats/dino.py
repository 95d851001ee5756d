"""DINO (Caron et al. 2021): backbones and full checkpoints of student and teacher."""

from clvsmim.formats._family import CORE, Family, Look
from clvsmim.formats._rules import Drop
from clvsmim.formats._tables import timm_encoder


def make() -> Family:
    """timm's names; in full checkpoints behind teacher/ and student/."""
    return Family(
        title="DINO backbone (or a DeiT or timm ViT without its classifier)",
        looks_for="timm's names, learned positions, no head; or teacher/backbone",
        recognise=recognise,
        branches=two_networks(),
        rules=timm_encoder(),
        drops=(Drop(r"head\..*", "the projection head of DINO: no objective here"),),
        needs=(*CORE, "encoder/pos_embed", "encoder/ln_final/scale"),
    )


def two_networks() -> dict[str, tuple[tuple[str, str], ...]]:
    """The teacher, which is evaluated, and the student."""
    start = r"(?:\w+/)*{}/(?:module\.)?{}\."
    return {
        name: (
            (start.format(name, "backbone"), ""),
            (start.format(name, "head"), "head."),
        )
        for name in ("teacher", "student")
    }


def recognise(look: Look) -> str:
    """Two networks, or a backbone alone."""
    if not look.timm or look.has(r"masked_embed|.*gamma.*|.*register.*|dist_token"):
        return ""
    if look.has(r"teacher/(module\.)?backbone\.cls_token"):
        return "it has teacher/backbone.*"
    flat = look.has(r"^(module\.)?blocks\.0\.attn\.qkv\.weight")
    headless = not look.has(r"(^|[/.])(head|head_dist|fc_norm)\.(weight|bias)")
    if flat and headless and look.table == "learned":
        return "timm's names, learned positions, no classifier"
    return ""
