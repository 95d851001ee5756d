"""Drawn images with two independent labels: an outline and the pattern that fills it.

Every outline comes with every pattern equally often, in random colours, sizes, places
and orientations, so neither label says anything about the other, nor does the colour.
What a classifier trained on one of them reads from the image is then known.
"""

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Everything below is a map over a grid of points: x to the right, y down.
Map = np.ndarray


def polygon(x: Map, y: Map, points: int, inner: float) -> Map:
    """Signed distance to a star: `points` tips at radius 1, notches at `inner`.

    A notch at cos(pi / points) is on the line between two tips: a plain polygon.
    """
    half = math.pi / points
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)  # 0 at a tip
    radius = np.hypot(x, y)
    u, v = radius * np.cos(angle), radius * np.sin(angle)
    dx, dy = inner * math.cos(half) - 1.0, inner * math.sin(half)
    return (u - 1.0) * dy / math.hypot(dx, dy) - v * dx / math.hypot(dx, dy)


def disc(x: Map, y: Map) -> Map:
    return np.hypot(x, y) - 1.0


def ring(x: Map, y: Map) -> Map:
    return np.abs(np.hypot(x, y) - 0.76) - 0.24


def cross(x: Map, y: Map) -> Map:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - 0.36), np.maximum(x - 0.36, y - 1))


# Outline -> (signed distance, negative inside; radius, chosen so that areas are alike).
SHAPES: dict[str, tuple[Callable[[Map, Map], Map], float]] = {
    "disc": (disc, 0.80),
    "triangle": (functools.partial(polygon, points=3, inner=0.5), 1.15),
    "square": (functools.partial(polygon, points=4, inner=math.sqrt(0.5)), 1.0),
    "star": (functools.partial(polygon, points=5, inner=0.45), 1.15),
    "cross": (cross, 0.93),
    "ring": (ring, 0.95),
}


def stripes(u: Map, v: Map) -> Map:
    return wave(u)


def checks(u: Map, v: Map) -> Map:
    return wave(u / 1.4) * wave(v / 1.4) * 1.6


def dots(u: Map, v: Map) -> Map:
    return 0.9 * (wave(u) + wave(v)) - 0.75


def net(u: Map, v: Map) -> Map:
    return np.maximum(wave(u / 1.3), wave(v / 1.3)) - 0.75


def zigzag(u: Map, v: Map) -> Map:
    return wave(u + 0.8 * np.abs((v / 1.6) % 1.0 - 0.5) * 2.0)


def arcs(u: Map, v: Map) -> Map:
    """Fish scales: rows of overlapping arcs, every second row shifted by a half."""
    u, v = u / 1.9, v / 0.95
    row = np.floor(v)
    across = (u + 0.5 * (row % 2)) % 1.0 - 0.5
    return np.cos(2 * math.pi * (np.hypot(across, 0.5 * (v - row)) * 2.0))


def wave(phase: Map) -> Map:
    return np.cos(2 * math.pi * phase)


# Pattern -> function of two coordinates in periods; above 0 is one colour, below the
# other.
TEXTURES: dict[str, Callable[[Map, Map], Map]] = {
    "stripes": stripes,
    "checks": checks,
    "dots": dots,
    "net": net,
    "zigzag": zigzag,
    "arcs": arcs,
}
LABELS = {"shape": tuple(SHAPES), "texture": tuple(TEXTURES)}


@dataclass(frozen=True)
class ShapeTexture:
    """See `make`."""

    split: str
    length: int
    side: int
    label: str
    seed: int
    name: str = "shape_texture"

    @property
    def class_names(self) -> tuple[str, ...]:
        return LABELS[self.label]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")  # ends a for loop
        index = int(index)
        shape, texture = index % len(SHAPES), index // len(SHAPES) % len(TEXTURES)
        rng = np.random.default_rng((self.seed, zlib.crc32(self.split.encode()), index))
        return {
            "image": draw(shape, texture, self.side, rng),
            "label": shape if self.label == "shape" else texture,
            "shape_label": shape,
            "texture_label": texture,
            "index": index,
        }


def make(
    *,
    split: str,
    length: int,
    side: int,
    label: str,
    seed: int = 0,
    test_length: int = 0,
) -> ShapeTexture:
    """Drawings with a shape and a texture; 36 items in a row hold every pair once.

    Args:
      split: "train" or "test": other random draws of the same kind.
      length: how many items; item i is the same whatever the length.
      side: of the images, in pixels; below 24 the patterns are hard to tell apart.
      label: "shape" or "texture", which of the two is `label`. Both are always there
        as `shape_label` and `texture_label`.
      seed: of everything that is drawn.
      test_length: of the split "test", where it is not that of both (0).
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}, expected one of: train, test")
    if label not in LABELS:
        raise ValueError(f"unknown label {label!r}, expected one of: shape, texture")
    if split == "test" and test_length:
        length = test_length
    if length < 1 or side < 8:
        raise ValueError(f"length {length} must be at least 1, side {side} at least 8")
    return ShapeTexture(split, length, side, label, seed)


def draw(shape: int, texture: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 (side, side, 3); edges are a pixel wide, so there is no aliasing."""
    outline, size = list(SHAPES.values())[shape]
    radius = size * rng.uniform(0.28, 0.4) * side
    centre = rng.uniform(0.42, 0.58, 2) * side
    x, y = turned(side, centre, rng.uniform(0, 2 * math.pi))
    inside = edge(-outline(x / radius, y / radius) * radius)  # (side, side) 0 to 1
    period = rng.uniform(0.11, 0.15) * side
    u, v = turned(side, rng.uniform(0, side, 2), rng.uniform(0, 2 * math.pi))
    pattern = list(TEXTURES.values())[texture](u / period, v / period)
    pattern = edge(pattern * period / (2 * math.pi))
    back, first, second = palette(rng)
    fill = first + (second - first) * pattern[..., None]  # (side, side, 3)
    image = back + (fill - back) * inside[..., None]
    return np.rint(image).astype(np.uint8)


def turned(side: int, centre: np.ndarray, angle: float) -> tuple[Map, Map]:
    """Pixel coordinates (side, side) around a centre, in a frame turned by `angle`."""
    y, x = np.mgrid[:side, :side] + 0.5
    x, y = x - centre[0], y - centre[1]
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def edge(distance: Map) -> Map:
    """0 outside, 1 inside, linear over one pixel: the share of a pixel covered."""
    return np.clip(distance + 0.5, 0.0, 1.0)


def palette(rng: np.random.Generator) -> np.ndarray:
    """Three random colours (3, 3), any two of them at least 40 apart in grey value."""
    while True:
        colours = rng.uniform(0, 255, (3, 3))
        grey = np.sort(colours @ (0.299, 0.587, 0.114))
        if np.diff(grey).min() >= 40:
            return colours
