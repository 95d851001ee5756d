"""Google's .npz files: vision_transformer (AugReg) and big_vision."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from clvsmim.formats._evaluation import HALVES, Evaluation
from clvsmim.formats._family import CORE, Family, Look
from clvsmim.formats._rules import SAME, Drop, Leaves, Rule
from clvsmim.formats._tables import HEAD

BLOCK = "Transformer/encoderblock_{i}"
ROOT = r"(?:opt/target/|params/)?(?:img/)?"
STARTS = r"(?=embedding/|cls|pos_embedding|Transformer/|head/|pre_logits/|MAPHead_0/)"


def make() -> Family:
    """Flax layouts, which are ours; blocks of big_vision may be stacked."""
    return Family(
        title="Google ViT (.npz)",
        looks_for="embedding/kernel and Transformer/encoderblock_0/*",
        recognise=recognise,
        branches={"": ((ROOT + STARTS, ""),)},
        rules=(
            same("cls", "encoder/cls_token"),
            same("Transformer/posembed_input/pos_embedding", "encoder/pos_embed"),
            *both("embedding", "encoder/patch_embed", ("kernel", "bias")),
            *block("LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3"),
            *both("Transformer/encoder_norm", "encoder/ln_final", ("scale", "bias")),
            *both("head", HEAD, ("kernel", "bias")),
            *both("pre_logits", "heads/pre_logits", ("kernel", "bias")),
        ),
        drops=(
            Drop(r"MAPHead_0/.*", "a pooling head of attention: no objective here"),
            Drop(r"(params/)?(txt/.*|t|b)", "the text tower of a contrastive model"),
        ),
        aliases=(
            (r"(encoderblock_\d+/)LayerNorm_1/", r"\1LayerNorm_2/"),
            (r"(encoderblock_\d+/MultiHeadDotProductAttention)_0/", r"\1_1/"),
            (r"(encoderblock_\d+/MlpBlock)_0/", r"\1_3/"),
            (r"^pos_embedding$", "Transformer/posembed_input/pos_embedding"),
        ),
        needs=(*CORE[1:], "encoder/pos_embed", "encoder/ln_final/scale"),
        fields={"mlp": "gelu_tanh"},
        can={"mlp": ("gelu_tanh",), "norm_eps": (1e-6,)},
        classifiers=(("cls", "none"), ("tokens", "none")),
        evaluation=Evaluation(HALVES, share=0.9, whole=384),
        prepare=unstacked,
        fold=fold,
        checked="timm's loader of these files",
    )


def recognise(look: Look) -> str:
    """Flax names of the first block."""
    if look.has(r"(^|/)embedding/kernel") and look.has(
        r"(^|/)Transformer/encoderblock(_0)?/LayerNorm_0/scale"
    ):
        return "it has embedding/kernel and Transformer/encoderblock"
    return ""


def same(theirs: str, ours: str) -> Rule:
    """One array as it is."""
    return Rule(theirs, (ours,), SAME)


def both(theirs: str, ours: str, kinds: tuple[str, str]) -> tuple[Rule, ...]:
    """Kernel and bias, or scale and bias."""
    return tuple(same(f"{theirs}/{kind}", f"{ours}/{kind}") for kind in kinds)


def block(second: str, attention: str, mlp: str) -> tuple[Rule, ...]:
    """A block, its parts numbered as vision_transformer does; see the aliases."""
    ours, kinds = "encoder/block_{i}", ("kernel", "bias")
    names = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))
    return (
        *both(f"{BLOCK}/LayerNorm_0", f"{ours}/ln1", ("scale", "bias")),
        *both(f"{BLOCK}/{second}", f"{ours}/ln2", ("scale", "bias")),
        *(
            rule
            for theirs, own in names
            for rule in both(
                f"{BLOCK}/{attention}/{theirs}", f"{ours}/attn/{own}", kinds
            )
        ),
        *both(f"{BLOCK}/{mlp}/Dense_0", f"{ours}/mlp/fc1", kinds),
        *both(f"{BLOCK}/{mlp}/Dense_1", f"{ours}/mlp/fc2", kinds),
    )


def unstacked(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Blocks that a scan stacked on axis 0, one by one."""
    out = {}
    for name, x in tensors.items():
        hit = re.fullmatch(r"(.*Transformer/encoderblock)(/.*)", name)
        if hit is None or len(x.shape) < 2:
            out[name] = x
            continue
        whole = np.asarray(x)
        for i in range(len(whole)):
            out[f"{hit[1]}_{i}{hit[2]}"] = whole[i]
    return out


def fold(leaves: Leaves, about: Mapping) -> list[str]:
    """A tanh layer before the classifier makes it none of ours."""
    del about
    if "heads/pre_logits/kernel" not in leaves:
        return []
    for kind in ("kernel", "bias"):
        if f"{HEAD}/{kind}" in leaves:
            leaves[f"heads/after_pre_logits/{kind}"] = leaves.pop(f"{HEAD}/{kind}")
    return ["the classifier stands behind a tanh layer (pre_logits): not opened as one"]
