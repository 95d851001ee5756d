"""Weights for another input: more patches, another patch size, other channels.

Every resize here is linear in the weights and works on one axis at a time, so it is a
small matrix per axis, made in float64 by `axis`; the result has the dtype it came in.
"""

import math
from typing import Any

import numpy as np

from clvsmim import plugin, tree
from clvsmim.inits import sincos_table
from clvsmim.vit import Spec

Tree = Any
Grid = tuple[int, int]  # patches as (rows, columns)

HOW = {
    "bicubic": "bicubic, a = -0.75, to a given size, as MAE, DeiT and Hugging Face",
    "dino": "bicubic by the factor (new + 0.1) / old, as DINO, iBOT and DINOv2",
    "antialias": "bicubic, antialiased, as timm and DINOv2 with registers",
    "linear": "linear between the corners, as big_vision and vision_transformer",
    "sincos": "computed anew for the grid, as for training from scratch",
}
RGB = 3  # channels of an encoder's input
EXTRA = 3  # rows of a relative table that belong to the prefix


def reference(family: str, registers: bool = False) -> str:
    """How the code of a family resizes its own position tables, a key of `HOW`.

    MoCo v3 is fine-tuned by DeiT's code; SimMIM and BEiT have no such table. A family
    that is not named here gets "bicubic", the most common way.
    """
    if registers and "dinov2" in family:  # its own code, and Hugging Face's
        return "antialias"
    ways = {"dino": "dino", "ibot": "dino", "dinov2": "dino"}
    ways |= {"timm": "antialias", "google": "linear"}
    return ways.get(family, "bicubic")


def fit_encoder(
    params: Tree, there: Spec, here: Spec, how: str
) -> tuple[Tree, list[str]]:
    """An encoder's parameters for images, patches and channels of another one.

    Args:
      params: of the encoder `there`, canonical names, numpy arrays; not changed.
      there, here: what it is, and what it is to be. Only image, patch and prefix are
        looked at; for all that a resize cannot mend, compare the result with what is
        wanted (`tree.strict`).
      how: to resize the position table, a key of `HOW`; see `reference`.

    Returns:
      The parameters, and a line for each kind of leaf that was resized. What fits
      already comes back untouched.

    Raises:
      ValueError: an unknown `how`, a table that is not of `there`, or a stem of
        convolutions for another patch size.
    """
    _check_how(how)
    leaves, lines = dict(tree.named(params)), []
    kernel = "patch_embed/" + ("conv_0/kernel" if there.stem == "conv" else "kernel")
    depth = leaves[kernel].shape[2]
    if depth != RGB:
        leaves[kernel] = channels(leaves[kernel], RGB)
        lines.append(f"{kernel}: {depth} -> {RGB} input channels")
    if there.patch != here.patch:
        if there.stem == "conv":
            raise ValueError(
                f"a conv stem for patch {there.patch} cannot be resized to patch "
                f"{here.patch}; use encoder.patch={there.patch}"
            )
        leaves[kernel] = patch_kernel(leaves[kernel], here.patch)
        lines.append(f"{kernel}: patch {there.patch} -> {here.patch}, pseudo-inverse")
    if there.grid != here.grid:
        lines += _fit_grid(leaves, there, here, how)
    return tree.nest(leaves), lines


def _fit_grid(leaves: Tree, there: Spec, here: Spec, how: str) -> list[str]:
    """Replace the tables among the leaves; a line for each kind."""
    own, lines = min(there.prefix, 1), []
    change = "{}x{} -> {}x{} patches".format(*there.grid, *here.grid)
    if "pos_embed" in leaves:
        table = leaves["pos_embed"]
        leaves["pos_embed"] = (
            new_sincos(table, here, own)
            if how == "sincos"
            else position_table(table, here.grid, prefix=own, how=how, old=there.grid)
        )
        lines.append(f"pos_embed: {change}, {HOW[how]}")
    tables = [name for name in leaves if name.split("/")[-1] == "rel_table"]
    for name in tables:
        leaves[name] = relative_table(leaves[name], there.grid, here.grid)
    if tables:
        lines.append(
            f"rel_table ({len(tables)}): {change}, geometric sampling, as BEiT and "
            "SimMIM"
        )
    return lines


# Positions


def position_table(
    table: np.ndarray, grid: Grid, *, prefix: int, how: str, old: Grid | None = None
) -> np.ndarray:
    """An absolute position table for another number of patches.

    Args:
      table: (1, prefix + N, D), patches in row-major order.
      grid: (rows, columns) wanted.
      prefix: how many rows at the front belong to no patch; they are kept.
      how: a key of `HOW` but "sincos", for which see `new_sincos`.
      old: (rows, columns) of the table; by default it is square.

    Returns:
      (1, prefix + rows * columns, D). For the grid that it has, the table itself.

    Raises:
      ValueError: an unknown `how`, or a table without this prefix and grid.
    """
    _check_how(how)
    side = math.isqrt(max(table.shape[1] - prefix, 0))
    old = old or (side, side)
    if table.shape[:2] != (1, prefix + math.prod(old)) or not math.prod(old):
        raise ValueError(
            f"a position table of shape {table.shape} is not for {prefix} prefix rows "
            f"and {old[0]}x{old[1]} patches; expected (1, {prefix + math.prod(old)}, D)"
        )
    if grid == old:
        return table
    rows, columns = (axis(o, n, how) for o, n in zip(old, grid, strict=True))
    patches = table[0, prefix:].reshape(*old, -1).astype(np.float64)
    patches = np.einsum("ri,cj,ijd->rcd", rows, columns, patches, optimize=True)
    patches = patches.reshape(1, math.prod(grid), -1).astype(table.dtype)
    return np.concatenate([table[:, :prefix], patches], axis=1)


def new_sincos(table: np.ndarray, spec: Spec, prefix: int) -> np.ndarray:
    """The sin-cos table of `spec.position` for its grid, under the old prefix rows.

    Raises:
      ValueError: the positions are learned.
    """
    if not spec.position.endswith("sincos"):
        raise ValueError(
            f"positions that are {spec.position} cannot be computed anew; use one of: "
            + ", ".join(name for name in HOW if name != "sincos")
        )
    new = sincos_table(spec.grid, spec.width, spec.position == "moco_sincos")
    return np.concatenate([table[:, :prefix], new[None].astype(table.dtype)], axis=1)


def relative_table(table: np.ndarray, old: Grid, new: Grid) -> np.ndarray:
    """A relative position table for another grid, by geometric sampling.

    As the fine-tuning code of BEiT and SimMIM: the offsets of the old grid are spread
    geometrically (see `spread`) over those of the new one, which are read off the cubic
    spline through them. Differs from it in what it cannot do: each axis of a grid that
    is not square has its own ratio, one of equal length stays, and grids of less than
    three patches have a spline of lower degree.

    Args:
      table: ((2 rows - 1)(2 columns - 1) + 3, H) of the grid `old`.
      old, new: (rows, columns) in patches.

    Returns:
      The table of the grid `new`. The last three rows, of the prefix, are kept.

    Raises:
      ValueError: the table is of another grid.
    """
    from scipy.interpolate import make_interp_spline

    sides = [2 * side - 1 for side in old]
    if table.ndim != 2 or len(table) != math.prod(sides) + EXTRA:
        raise ValueError(
            f"a relative table of shape {table.shape} is not for {old[0]}x{old[1]} "
            f"patches; expected ({math.prod(sides) + EXTRA}, heads)"
        )
    if new == old:
        return table
    field = table[:-EXTRA].reshape(*sides, -1).astype(np.float64)
    for dim, (o, n) in enumerate(zip(old, new, strict=True)):
        if o == n:
            continue
        places = spread(o, n)
        # What lies outside gets the value at the border, as from FITPACK.
        wanted = np.clip(np.arange(1.0 - n, n), places[0], places[-1])
        degree = min(3, len(places) - 1)
        field = make_interp_spline(places, field, degree, axis=dim)(wanted)
    field = field.reshape(-1, table.shape[1]).astype(table.dtype)
    return np.concatenate([field, table[-EXTRA:]])


def spread(old: int, new: int) -> np.ndarray:
    """Where the 2 * old - 1 offsets lie among -(new - 1) ... new - 1.

    At 0, +-1, +-(1 + q), +-(1 + q + q^2) ...; see `ratio`.
    """
    steps = np.cumsum(ratio(old, new) ** np.arange(old - 1))
    return np.concatenate([-steps[::-1], [0.0], steps])


def ratio(old: int, new: int) -> float:
    """q from 1.01 to 1.5 with 1 + q + ... + q^(old - 2) = new - 1, to 1e-6."""
    low, high, q = 1.01, 1.5, 1.01
    while high - low > 1e-6:
        q = (low + high) / 2
        reach = (1 - q ** (old - 1)) / (1 - q)
        low, high = (low, q) if reach > new - 1 else (q, high)
    return q


# Patches and channels


def patch_kernel(kernel: np.ndarray, patch: int) -> np.ndarray:
    """A patch embedding (P, P, C, D) for patches of `patch` x `patch` pixels.

    The pseudo-inverse of resizing an image: a patch that was enlarged gives the same
    embedding as before; of one that was reduced, the best that is left (FlexiViT,
    Beyer et al. 2023, section 3.4). Images are resized bicubically with antialiasing,
    as in timm.
    """
    if kernel.shape[:2] == (patch, patch):
        return kernel
    rows, columns = (
        np.linalg.pinv(axis(size, patch, "antialias").T) for size in kernel.shape[:2]
    )
    new = np.einsum("ri,sj,ijcd->rscd", rows, columns, kernel, optimize=True)
    return new.astype(kernel.dtype)


def channels(kernel: np.ndarray, count: int) -> np.ndarray:
    """A kernel (P, P, C, D) for images of `count` channels, C = 1 or 3 (as in timm).

    To one channel the others are added up, so that a grey image gives what it gave as
    RGB. To more, they are repeated in turn and scaled by C / count.

    Raises:
      ValueError: C is neither 1 nor 3, whose meaning nobody knows.
    """
    there = kernel.shape[2]
    if there == count:
        return kernel
    if there not in (1, RGB) or count < 1:
        raise ValueError(
            f"a kernel for {there} input channels cannot be fitted to {count}; "
            "expected one for 1 (grey) or 3 (RGB)"
        )
    if count == 1:
        return kernel.sum(axis=2, keepdims=True, dtype=kernel.dtype)
    return kernel[:, :, np.arange(count) % there] * kernel.dtype.type(there / count)


# One axis


def axis(old: int, new: int, how: str) -> np.ndarray:
    """(new, old) matrix that resizes a signal of `old` samples to `new`; float64.

    "antialias" has a = -0.5 and a filter as wide as the output's pixels, as Pillow and
    PyTorch; beyond a border there is nothing. The others repeat the border.
    """
    if how == "linear":
        places = np.arange(new) * ((old - 1) / max(new - 1, 1))
        return np.clip(1 - np.abs(np.arange(old) - places[:, None]), 0, None)
    step = old / (new + 0.1 if how == "dino" else new)
    places = (np.arange(new)[:, None] + 0.5) * step - 0.5
    if how == "antialias":
        matrix = cubic((np.arange(old) - places) / max(step, 1.0), -0.5)
        return matrix / matrix.sum(axis=1, keepdims=True)
    taps = np.floor(places) + np.arange(-1, 3)  # (new, 4)
    matrix = np.zeros((new, old))
    into = np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)
    np.add.at(matrix, into, cubic(taps - places, -0.75))
    return matrix


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' interpolation kernel (1981) at distance x, zero beyond 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _check_how(how: str) -> None:
    if how not in HOW:
        raise ValueError(plugin.unknown("way to resize positions", how, HOW))
