"""Absolute position tables of files: which kind, and rows for which tokens."""

import math

import numpy as np

from clvsmim.formats._rules import Leaves, as_numbers
from clvsmim.inits import sincos_table

EQUAL = 1e-5  # a sin-cos table saved in float32
NEARLY = 5e-3  # in half precision: bfloat16 has 8 bits


def kind_of_table(table: np.ndarray, half: bool = False) -> tuple[str, float]:
    """("moco_sincos", "mae_sincos" or "learned", largest difference from sin-cos).

    Args:
      table: (1, N or 1 + N, D) of a square grid; other tables are "learned".
      half: it was saved in half precision.
    """
    table = as_numbers(table)
    if table.ndim != 3 or table.dtype.kind not in "fV":  # bfloat16 is "V"
        return "learned", math.inf
    _, rows, width = table.shape
    side = math.isqrt(rows)
    if side * side not in (rows, rows - 1) or width % 4 or rows < 4:
        return "learned", math.inf
    rest = rows - side * side
    allowed = NEARLY if half or table.dtype.itemsize < 4 else EQUAL
    best = ("learned", math.inf)
    for name in ("moco_sincos", "mae_sincos"):
        want = sincos_table((side, side), width, name == "moco_sincos")
        want = np.concatenate([np.zeros((rest, width)), want])
        far = float(np.abs(table[0].astype(np.float64) - want).max())
        if far < best[1]:
            best = (name if far <= allowed else "learned", far)
    return best


def split_rows(rows: int, tokens: int, patches: int) -> int:
    """How many of the tokens before the patches a table of so many rows has one for.

    Args:
      rows: of the table.
      tokens: before the patches, registers included.
      patches: N if it is known, else 0: a square number is looked for.

    Raises:
      ValueError: no such number.
    """
    for own in dict.fromkeys((min(tokens, 1), 0, tokens)):
        n = rows - own
        if n == patches or (not patches and n > 0 and math.isqrt(n) ** 2 == n):
            return own
    raise ValueError(
        f"a position table of {rows} rows fits no square grid behind {tokens} tokens; "
        "say its rows and columns in pixels with image="
    )


def fold_positions(leaves: Leaves, patches: int) -> tuple[list[str], list[str]]:
    """Give CLS a row of the table and registers none: (what was folded, notes).

    A missing row of CLS becomes zeros; rows of registers are added to the registers.
    Both compute the same.
    """
    table, cls = leaves.get("encoder/pos_embed"), leaves.get("encoder/cls_token")
    if table is None or table.ndim != 3 or cls is None:
        return [], []
    registers = leaves.get("encoder/registers")
    tokens = 1 + (0 if registers is None else registers.shape[1])
    own = split_rows(table.shape[1], tokens, patches)
    if own == 0:
        zeros = np.zeros((1, 1, table.shape[2]), np.float32)
        leaves["encoder/pos_embed"] = np.concatenate([zeros, table], axis=1)
        return ["no_embed_class"], ["the position table has no row for CLS: zeros here"]
    if own == 1:
        return [], []
    leaves["encoder/registers"] = registers + table[:, 1:own]
    leaves["encoder/pos_embed"] = np.concatenate([table[:, :1], table[:, own:]], axis=1)
    return ["register_rows"], [
        f"the positions of {own - 1} tokens after CLS are added to the tokens"
    ]


def unfold_positions(leaves: Leaves, folded: tuple[str, ...]) -> Leaves:
    """The table without a row for CLS, its row in the token itself, where it was so.

    Registers have no row here; with them timm has none for CLS either.
    """
    table = leaves.get("encoder/pos_embed")
    if table is None or "encoder/cls_token" not in leaves:
        return leaves
    if "no_embed_class" not in folded and "encoder/registers" not in leaves:
        return leaves
    moved = {"encoder/cls_token": leaves["encoder/cls_token"] + table[:, :1]}
    return leaves | moved | {"encoder/pos_embed": table[:, 1:]}


def with_distillation_row(leaves: Leaves) -> Leaves:
    """A row of zeros for the one register, if there is one: its place is in itself.

    Raises:
      ValueError: several registers, of which DeiT has none.
    """
    table, registers = (leaves.get(f"encoder/{n}") for n in ("pos_embed", "registers"))
    if table is None or registers is None:
        return leaves
    if registers.shape[1] != 1:
        raise ValueError("DeiT has one token beside CLS; timm and dinov2 take more")
    zeros = np.zeros_like(table[:, :1])
    rows = np.concatenate([table[:, :1], zeros, table[:, 1:]], axis=1)
    return leaves | {"encoder/pos_embed": rows}


def zero_key_bias(leaves: Leaves) -> Leaves:
    """Zeros for the biases of keys, where q and v have one and k has not."""
    new = {}
    for name, x in leaves.items():
        key = name.replace("/attn/q/bias", "/attn/k/bias")
        if name.endswith("/attn/q/bias") and key not in leaves:
            new[key] = np.zeros_like(x)
    return leaves | new
