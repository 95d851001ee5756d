"""Pictures of a report: reconstructions, attention maps of a query, scatter plots.

Arrays come in as uint8, or as floats in [0, 1]; they leave as uint8 (h, w, 3).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image

from clvsmim.report import canvas

GREY = 190  # a masked patch; no photograph has large areas of exactly this
SIDE = 224  # pictures are enlarged to about this many pixels, by a whole factor


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures that belong side by side.

    Attributes:
      title, caption: what it is and what to look for.
      columns: the name of each picture of a row.
      images: rows of arrays, each (h, w, 3) or (h, w).
      rows: the name of each row, or nothing.
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    images: tuple[tuple[np.ndarray, ...], ...]
    rows: tuple[str, ...] = ()

    def __post_init__(self):
        for i, row in enumerate(self.images):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"gallery {self.title!r}: row {i} has {len(row)} images for "
                    f"{len(self.columns)} columns {self.columns}; give one each"
                )
        if self.rows and len(self.rows) != len(self.images):
            raise ValueError(
                f"gallery {self.title!r}: {len(self.rows)} row names for "
                f"{len(self.images)} rows; give one each, or none"
            )


def reconstruction_gallery(
    title: str,
    triplets: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    caption: str = "",
    rows: Sequence[str] = (),
) -> Gallery:
    """Original, masked and reconstructed images.

    Args:
      triplets: (image (h, w, 3), mask, reconstruction (h, w, 3)). The mask is
        (h, w), or one value per patch (h / p, w / p); 1 is removed, 0 is kept.
    """
    images = tuple(
        (enlarge(a), enlarge(masked(a, mask)), enlarge(b)) for a, mask, b in triplets
    )
    columns = ("original", "masked", "reconstruction")
    return Gallery(title, caption, columns, images, tuple(rows))


def attention_gallery(
    title: str,
    image: np.ndarray,
    maps: np.ndarray,
    queries: Sequence[tuple[int, int]],
    *,
    rows: Sequence[str],
    caption: str = "",
) -> Gallery:
    """Where queries look: one column per query, one row per map (figure 2).

    Args:
      image: (h, w, 3); its patches are the cells of the maps.
      maps: attention of each query, (rows, queries, grid height, grid width).
      queries: (row, column) on the grid, counted from 0.
      rows: the name of each row, such as "MoCo v3, block 11, head 1".

    Raises:
      ValueError: the shapes do not fit together.
    """
    maps, image = np.asarray(maps), to_uint8(image)
    expected = (len(rows), len(queries))
    if maps.ndim != 4 or maps.shape[:2] != expected:
        raise ValueError(
            f"attention maps of shape {maps.shape} for {len(rows)} rows and "
            f"{len(queries)} queries; expected {expected} + (height, width)"
        )
    height, width = maps.shape[2:]
    patch = image.shape[0] // height
    if (height * patch, width * patch) != image.shape[:2]:
        raise ValueError(
            f"an image of {image.shape[:2]} pixels has no grid of {(height, width)} "
            "patches; pass the image as the model saw it"
        )
    factor = _factor(image.shape)
    cell = patch * factor
    top = tuple(mark(enlarge(image), query, cell) for query in queries)
    rest = tuple(
        tuple(attention_map(m, q, cell) for m, q in zip(row, queries, strict=True))
        for row in maps
    )
    columns = tuple(f"query ({r}, {c})" for r, c in queries)
    return Gallery(title, caption, columns, (top, *rest), ("the image", *rows))


def attention_map(values: np.ndarray, query: tuple[int, int], cell: int) -> np.ndarray:
    """One map (h, w) in plasma, scaled to its own range, `cell` pixels per key."""
    values = np.asarray(values, np.float64)
    low, high = values.min(), values.max()
    unit = (values - low) / (high - low) if high > low else np.zeros_like(values)
    rgb = matplotlib.colormaps["plasma"](unit, bytes=True)[..., :3]
    return mark(_repeat(rgb, cell), query, cell)


def mark(image: np.ndarray, query: tuple[int, int], cell: int) -> np.ndarray:
    """A frame, black in white, around the patch at (row, column) of the grid."""
    (row, column), image = query, image.copy()
    height, width = image.shape[0] // cell, image.shape[1] // cell
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"query {query} is outside the grid {(height, width)}")
    patch = image[cell * row : cell * (row + 1), cell * column : cell * (column + 1)]
    line = max(1, cell // 8)
    inside = patch[2 * line : -2 * line, 2 * line : -2 * line].copy()
    patch[:] = 255
    patch[line:-line, line:-line] = 0
    patch[2 * line : -2 * line, 2 * line : -2 * line] = inside
    return image


def scatter(points: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Points (n, 2) coloured by group, as an image (tokens by t-SNE)."""
    points, groups = np.asarray(points), np.asarray(groups)
    names = list(dict.fromkeys(groups.tolist()))
    shades = matplotlib.colormaps["plasma"](np.linspace(0.05, 0.85, len(names)))
    with canvas.figure((4.0, 4.2)) as (figure, axes):
        figure.set_dpi(120)
        for name, shade in zip(names, shades, strict=True):
            xy = points[groups == name]
            axes.scatter(*xy.T, s=6, color=shade, linewidths=0, label=str(name))
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_visible(False)
        columns = min(3, len(names))
        figure.legend(loc="outside lower center", ncols=columns, markerscale=3)
    return canvas.to_array(figure)


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with its removed patches in grey. 1 is removed, 0 is kept."""
    image, mask = to_uint8(image).copy(), np.asarray(mask)
    factor = image.shape[0] // mask.shape[0]
    full = _repeat(mask, factor)
    if full.shape != image.shape[:2]:
        raise ValueError(
            f"a mask of {mask.shape} does not divide an image of {image.shape[:2]}; "
            "give one value per pixel, or one per square patch"
        )
    image[full > 0.5] = GREY
    return image


def to_uint8(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) or (h, w), uint8 or float in [0, 1], as uint8 (h, w, 3)."""
    image = np.asarray(image)
    if image.ndim == 2:
        image = np.stack([image] * 3, -1)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an image of shape {image.shape}; expected (h, w, 3)")
    if image.dtype == np.uint8:
        return image
    return np.round(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8)


def enlarge(image: np.ndarray) -> np.ndarray:
    """By the whole factor that brings it to about `SIDE` pixels: pixels stay square."""
    return _repeat(to_uint8(image), _factor(np.shape(image)))


def to_png(image: np.ndarray) -> bytes:
    """The bytes of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(out, "PNG", optimize=True)
    return out.getvalue()


def sheet(gallery: Gallery, gap: int = 8) -> np.ndarray:
    """All pictures of a gallery on one white sheet."""
    rows = [[to_uint8(x) for x in row] for row in gallery.images]
    height = max(x.shape[0] for row in rows for x in row)
    width = max(x.shape[1] for row in rows for x in row)
    down, across = height + gap, width + gap
    size = (down * len(rows) + gap, across * len(gallery.columns) + gap, 3)
    page = np.full(size, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, x in enumerate(row):
            y0, x0 = gap + i * down, gap + j * across
            page[y0 : y0 + x.shape[0], x0 : x0 + x.shape[1]] = x
    return page


def _factor(shape: tuple[int, ...]) -> int:
    return max(1, round(SIDE / max(shape[:2])))


def _repeat(image: np.ndarray, factor: int) -> np.ndarray:
    return image.repeat(factor, 0).repeat(factor, 1)
