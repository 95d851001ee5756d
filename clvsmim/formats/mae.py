"""MAE (He et al. 2022): encoder, encoder with decoder, fine-tuned."""

import math

import numpy as np

from clvsmim.formats._evaluation import Evaluation
from clvsmim.formats._family import CORE, Family, Look
from clvsmim.formats._rules import SAME, Given, Leaves, Rule
from clvsmim.formats._tables import (
    HEAD,
    linear,
    norm,
    timm_blocks,
    timm_encoder,
    timm_head,
)
from clvsmim.inits import sincos_table


def make() -> Family:
    """The released files and those of its own training code."""
    return Family(
        title="MAE checkpoint",
        looks_for="decoder_embed.*, or timm's names with MAE's sin-cos table",
        recognise=recognise,
        branches={},
        rules=(*timm_encoder(), *decoder(), *timm_head()),
        givens=(
            Given(
                "decoder_pos_embed",
                "the decoder's sin-cos table is a constant here; it is the same",
                decoder_table,
                "heads/decoder/proj/kernel",
            ),
        ),
        needs=(
            *CORE,
            "encoder/pos_embed",
            f"encoder/ln_final/scale|{HEAD}/fc_norm/scale",
        ),
        alone="the encoder-only file: to see reconstructions, get *_full.pth",
        fields={"init": "mae", "position": "mae_sincos"},
        evaluation=Evaluation(whole=225),
        checked="recordings of the original code (tests/golden)",
    )


def recognise(look: Look) -> str:
    """A decoder, or the table of sines whose first half is the column."""
    if look.has(r"(^|[/.])decoder_embed\.weight") and look.timm:
        return "it has decoder_embed.*"
    if look.timm and look.table == "mae_sincos":
        return "timm's names and MAE's sin-cos table"
    fine_tuned = look.has(r"^model/(module\.)?fc_norm\.weight")
    if look.timm and fine_tuned and not look.has(r"gamma|register|dist_token"):
        return "timm's names under model/, and fc_norm: fine-tuned"
    return ""


def decoder() -> tuple[Rule, ...]:
    """Blocks of its own width; pixels of a patch in the order (dy, dx, channel)."""
    own = "heads/decoder"
    return (
        Rule("mask_token", ("heads/mask_token",), SAME),
        *linear("decoder_embed", f"{own}/proj"),
        *timm_blocks("decoder_blocks.{i}", f"{own}/block_{{i}}"),
        *norm("decoder_norm", f"{own}/ln_final"),
        *linear("decoder_pred", f"{own}/pixels"),
    )


def decoder_table(leaves: Leaves, numbers: tuple[str, ...]) -> np.ndarray:
    """(1, 1 + N, width): fixed sin-cos, zeros for CLS."""
    del numbers
    for name in ("heads/decoder/proj/kernel", "encoder/pos_embed"):
        if name not in leaves:
            raise ValueError(f"the decoder's positions, but no {name} in the file")
    width = leaves["heads/decoder/proj/kernel"].shape[1]
    side = math.isqrt(leaves["encoder/pos_embed"].shape[1])
    table = sincos_table((side, side), width, rows_first=False)
    return np.pad(table, ((1, 0), (0, 0)))[None].astype(np.float32)
