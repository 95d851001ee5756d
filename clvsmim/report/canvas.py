"""What every figure of the report shares: the paper, ticks, lines, legend, PNG bytes.

Figures are made without pyplot, so nothing here leaves a trace in the caller's plots.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image

from clvsmim.report import style
from clvsmim.report.style import Look

# Inches. At 80 to 120 pixels per inch the text is readable, so a wide panel can be 360
# to 560 pixels on the screen, and two small ones stand side by side on a telephone.
WIDE = (4.6, 3.3)
SMALL = (2.4, 2.2)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
GREY = "#57606A"
OUTLINE = [withStroke(linewidth=3, foreground="white")]  # of text that lies on lines


@contextlib.contextmanager
def figure(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one plot in the style of the report."""
    with matplotlib.rc_context(style.RC):
        result = Figure(figsize=size)
        yield result, result.subplots()


def to_png(figure: Figure) -> bytes:
    """PNG bytes: the same numbers give the same bytes.

    A palette of 256 colours keeps a report of fifty figures under a few megabytes.
    """
    image = Image.fromarray(to_array(figure))
    out = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def to_array(figure: Figure) -> np.ndarray:
    """The drawn figure as uint8 (h, w, 3)."""
    with matplotlib.rc_context(style.RC):  # ticks are made while drawing
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def line(
    ax: Axes,
    axis: Any,
    values: np.ndarray,
    errors: np.ndarray | None,
    look: Look,
    dash: Any = "-",
) -> None:
    """One run over an axis, with a band of plus and minus one standard error."""
    x, color = axis.positions, look.color
    if errors is not None:
        low, high = values - errors, values + errors
        ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    marker = look.marker if len(x) <= 40 else ""
    dash = look.line if dash == "-" else dash
    ax.plot(x, values, color=color, marker=marker, linestyle=dash, zorder=3)


def dots(ax: Axes, x: np.ndarray, values: np.ndarray, look: Look) -> None:
    """(n, m) values as m dots above each x."""
    x = np.broadcast_to(x[:, None], values.shape)
    ax.scatter(x, values, s=7, color=look.color, alpha=0.38, linewidths=0, zorder=2)


def hand_over(ax: Axes, pairs: Sequence[tuple[Any, Any]]) -> None:
    """Shade what is behind the end of an encoder, for each (its axis, the decoder's).

    Between two blocks the border is in the middle; on the residual stream it is where
    the decoder's input is drawn over the encoder's output.
    """
    borders = {(a.positions.max() + b.positions.min()) / 2 for a, b in pairs}
    end = max((b.positions.max() for _, b in pairs), default=0.0)
    for border in sorted(borders):
        ax.axvspan(border, end + 0.5, color=GREY, alpha=0.1, linewidth=0, zorder=0)
        ax.axvline(border, color=GREY, lw=0.9, ls=(0, (2, 2)), zorder=1)
        place = ((border + end) / 2, 1.0)
        name = ax.annotate("decoder", place, xycoords=ax.get_xaxis_transform())
        name.set(color=GREY, fontsize=8, ha="center", va="bottom")


def legend(
    figure: Figure, looks: Mapping[str, Look], dashes: Mapping[str, Any] | None = None
) -> None:
    """Runs, then dash patterns, above the plot in as many columns as fit."""
    handles = [
        Line2D([], [], color=x.color, marker=x.marker, ls=x.line, label=name)
        for name, x in looks.items()
    ]
    handles += [
        Line2D([], [], color=GREY, ls=dash, label=name)
        for name, dash in (dashes or {}).items()
    ]
    lengths = [len(handle.get_label()) for handle in handles]
    columns = next(n for n in range(len(handles), 0, -1) if _fits(lengths, n))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _fits(lengths: Sequence[int], columns: int) -> bool:
    """Whether labels of so many letters fit side by side, filled column by column."""
    split = np.array_split(lengths, columns)
    return columns == 1 or sum(max(x) + 7 for x in split) <= 60


def y_label(series: Any) -> str:
    """The name of the quantity and its unit, in lines that fit beside the plot."""
    text = style.words(series.name)
    text = f"{text} ({series.unit})" if series.unit else text
    return style.wrap(text, 28)


def x_ticks(ax: Axes, axes: Sequence[Any]) -> None:
    """Whole numbers where the axis counts, names where it names."""
    longest = max(axes, key=lambda a: len(a.values))
    if all(isinstance(v, str) for v in longest.values):
        turned = sum(map(len, longest.labels)) > 45
        ax.set_xticks(
            longest.positions,
            longest.labels,
            rotation=90 if turned else 0,
        )
        return
    x = np.unique(np.concatenate([a.positions for a in axes]))
    whole = np.unique(np.round(x))
    if np.allclose(x * 2, np.round(x * 2)):  # blocks, and halves between them
        if len(whole) <= 13:
            ax.set_xticks(whole)
        else:
            ax.xaxis.set_major_locator(MaxNLocator(9, integer=True))


def index_ticks(side: Any, axis: Any, most: int = 5) -> None:
    """At most `most` labels along one side of a matrix, by number where there is one.

    Between two blocks of the residual stream there is nothing to number.
    """
    if all(isinstance(v, str) for v in axis.values):
        turned = side.axis_name == "x" and sum(map(len, axis.labels)) > 16
        names = range(len(axis.labels))
        side.set_ticks(names, axis.labels, rotation=90 if turned else 0)
        return
    whole = [i for i, x in enumerate(axis.positions) if x == round(x)]
    whole = whole or list(range(len(axis.values)))
    step = next(
        n
        for n in (1, 2, 3, 4, 5, 10, 20, 50, len(whole))
        if -(-len(whole) // n) <= most
    )
    kept = whole[::step]
    side.set_ticks(kept, [f"{axis.positions[i]:g}" for i in kept])
