"""MoCo v3 (Chen, Xie, He 2021): pre-training files, linear-probe files, backbones."""

import numpy as np

from clvsmim.formats._evaluation import Evaluation
from clvsmim.formats._family import CORE, PATH, Family, Look, under
from clvsmim.formats._rules import CONV, CONV_1X1, LINEAR, SAME, Given, Rule
from clvsmim.formats._tables import linear, timm_encoder, timm_head

PLAIN = PATH + r"(?=(?:cls_token|pos_embed|patch_embed\.|blocks\.|norm\.|head\.))"


def make() -> Family:
    """Base encoder, momentum encoder and predictor; or an encoder alone."""
    base = "base_encoder."
    return Family(
        title="MoCo v3 checkpoint",
        looks_for="base_encoder.* or timm's names with MoCo v3's sin-cos table",
        recognise=recognise,
        branches={
            "base": (
                (PATH + r"base_encoder\.", base),
                (PATH + r"predictor\.", "predictor."),
                (PLAIN, base),
            ),
            "momentum": ((PATH + r"momentum_encoder\.", base),),
        },
        rules=(
            *under(base, (*timm_encoder(), *conv_stem(), *timm_head())),
            *mlp_head(f"{base}head.", "projector", 3),
            *mlp_head("predictor.", "predictor", 2),
        ),
        givens=counters(base),
        needs=(*CORE[:1], *CORE[3:], "encoder/pos_embed", "encoder/ln_final/scale"),
        alone="an encoder without the projector and predictor of pre-training",
        fields={"init": "moco_v3", "position": "moco_sincos"},
        classifiers=(("cls", "none"),),
        heads_of_s=12,
        evaluation=Evaluation(filter="bilinear"),
        checked="recordings of the original code (tests/golden)",
    )


def recognise(look: Look) -> str:
    """Two encoders, or the table of sines whose first half is the row."""
    if look.has(r"(^|[/.])base_encoder\.blocks\.0\.attn\.qkv\.weight"):
        return "it has base_encoder.*"
    if look.timm and look.table == "moco_sincos":
        return "timm's names and MoCo v3's sin-cos table"
    return ""


def mlp_head(theirs: str, ours: str, layers: int) -> tuple[Rule, ...]:
    """Linear, BatchNorm, ReLU, ... : numbers 0, 1, 2, 3, 4, ... there."""
    rules = []
    for i in range(layers):
        rules.append(
            Rule(f"{theirs}{3 * i}.weight", (f"heads/{ours}/fc_{i}/kernel",), LINEAR)
        )
        rules += batch_norm(f"{theirs}{3 * i + 1}", f"heads/{ours}/bn_{i}")
    return tuple(rules)


def batch_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Parameters and running statistics; the variance is the unbiased one on both."""
    return (
        Rule(f"{theirs}.weight", (f"{ours}/scale",), SAME),
        Rule(f"{theirs}.bias", (f"{ours}/bias",), SAME),
        Rule(f"{theirs}.running_mean", (f"stats/{ours}/mean",), SAME),
        Rule(f"{theirs}.running_var", (f"stats/{ours}/var",), SAME),
    )


def conv_stem() -> tuple[Rule, ...]:
    """Four convolutions with BatchNorm, and a 1x1 one: patches of 16 pixels."""
    rules = []
    for i in range(4):
        leaf = f"encoder/patch_embed/conv_{i}/kernel"
        rules.append(Rule(f"patch_embed.proj.{3 * i}.weight", (leaf,), CONV))
        rules += batch_norm(
            f"patch_embed.proj.{3 * i + 1}", f"encoder/patch_embed/bn_{i}"
        )
    weight, bias = linear("patch_embed.proj.12", "encoder/patch_embed/proj")
    return (*rules, weight._replace(op=CONV_1X1), bias)


def counters(base: str) -> tuple[Given, ...]:
    """PyTorch's count of the batches that a BatchNorm saw."""
    why = "a counter of batches, which nothing reads"

    def given(theirs: str, where: str) -> Given:
        name = f"{theirs}.num_batches_tracked"
        zero = np.zeros((), np.int64)
        return Given(name, why, lambda leaves, numbers: zero, where, compare=False)

    heads = ((f"{base}head.", "projector", 3), ("predictor.", "predictor", 2))
    return (
        *(
            given(f"{theirs}{3 * i + 1}", f"stats/heads/{ours}/bn_{i}/mean")
            for theirs, ours, layers in heads
            for i in range(layers)
        ),
        *(
            given(
                f"{base}patch_embed.proj.{3 * i + 1}",
                f"stats/encoder/patch_embed/bn_{i}/mean",
            )
            for i in range(4)
        ),
    )
