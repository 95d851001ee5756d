"""What both sides of `train_step.py` share: sizes, images, and what a row is."""

import dataclasses
import math
import os
from collections.abc import Callable

import numpy as np

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ADAMW = {"base": 1.5e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.05}
MASKED = 0.6  # of SimMIM's cells of 2 x 2 patches
REMOVED = 0.75  # of MAE's patches
MOMENTUM, TAU = 0.99, 0.2  # of MoCo v3's teacher and loss


def cores() -> int:
    """Those that this process may use, which are what XLA takes."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Of the model and the batch, for both sides; the image is a square."""

    name: str
    width: int
    depth: int
    heads: int
    image: int
    patch: int
    batch: int
    dtype: str
    decoder: dict[str, int]  # MAE's
    projector: tuple[int, ...]  # MoCo v3's, and the next
    predictor: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """A row: what runs a number of steps and gives the last loss, when it is done.

    `first` is the loss of the first step; `trained` counts the trained parameters;
    `compile_s` and `memory` (bytes) are None where there is none or nobody knows.
    """

    label: str
    run: Callable[[int], float]
    first: float
    trained: int
    compile_s: float | None
    memory: int | None


FULL = {
    "decoder": {"width": 512, "depth": 8, "heads": 16},
    "projector": (4096, 4096, 256),
    "predictor": (4096, 256),
}
PLAIN = {"image": 224, "patch": 16, **FULL}
SHAPES = {
    "cpu": Shape(
        name="ViT-S/16", width=384, depth=12, heads=6, batch=8, dtype="float32", **PLAIN
    ),
    "gpu": Shape(
        name="ViT-B/16",
        width=768,
        depth=12,
        heads=12,
        batch=256,
        dtype="bfloat16",
        **PLAIN,
    ),
}
QUICK = {
    "name": "a tiny ViT",
    "width": 64,
    "depth": 2,
    "heads": 2,
    "image": 64,
    "batch": 4,
    "decoder": {"width": 32, "depth": 1, "heads": 2},
    "projector": (64, 64, 32),
    "predictor": (64, 32),
}


def pictures(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise, uint8 (2, B, rows, columns, 3); the same normalised, float32; and the
    patches that SimMIM hides, bool (B, N)."""
    rng, side = np.random.default_rng(0), shape.image // shape.patch
    size = (2, shape.batch, shape.image, shape.image, 3)
    images = rng.integers(0, 256, size, np.uint8)
    views = (images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    cells = (side // 2) ** 2
    rank = rng.permuted(np.tile(np.arange(cells), (shape.batch, 1)), axis=1)
    cell = (rank < math.ceil(MASKED * cells)).reshape(-1, side // 2, side // 2)
    return images, views, cell.repeat(2, 1).repeat(2, 2).reshape(shape.batch, -1)
