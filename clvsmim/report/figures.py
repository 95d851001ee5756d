"""Series -> panels. A panel is one picture; a figure has one, or one per run.

The page lays panels out side by side or below each other, so that each keeps its size
and its text stays readable on a narrow screen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clvsmim.report import canvas, style
from clvsmim.report.canvas import SMALL, WIDE
from clvsmim.report.style import Look
from clvsmim.report.tables import few, mean

STEPS = [1, 2, 5, 10]  # between ticks, where there is room for a few only
MAX_MAPS = 12  # of a stack of matrices


@dataclass(frozen=True)
class Panel:
    """A picture of a figure: the run it shows ("" for all of them) and PNG bytes.

    A small one has room for three others beside it, a wide one for one.
    """

    run: str
    png: bytes
    small: bool


def panels(
    drawn: Mapping[str, Any],
    looks: Mapping[str, Look],
    behind: Mapping[str, Any] | None = None,
) -> list[Panel]:
    """Draw one quantity of several runs, `{run: series}`, all of one kind.

    Of some runs it may go on `behind` the depth of the encoder, in the decoder. A run
    without a finite number is left out; without any there is no panel.

    Raises:
      ValueError: the series have another kind or number of axes than can be drawn.
    """
    drawn = {run: s for run, s in drawn.items() if np.isfinite(s.values).any()}
    if not drawn:
        return []
    kind, axes = _same(drawn)
    if axes == 0:
        return [_panel("", _scalars(drawn, looks))]
    if kind == "matrix":
        limits = _limits(drawn.values())
        return [_panel(run, _matrix(s, limits)) for run, s in drawn.items()]
    if kind == "curve" and axes == 2 and not few(next(iter(drawn.values())).axes[0]):
        low, high = _limits(drawn.values(), pad=0.05)
        return [_panel(run, _family(s, low, high)) for run, s in drawn.items()]
    if kind == "curve" and axes == 1 and _named(next(iter(drawn.values())).axes[0]):
        return [_panel("", _categories(drawn, looks))]
    later = {run: s for run, s in (behind or {}).items() if run in drawn}
    return [_panel("", _lines(drawn, looks, kind, later))]


def log_panels(
    logs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    looks: Mapping[str, Look],
    name: str,
) -> list[Panel]:
    """One panel per run of a logged scalar, `{run: (steps, values)}`.

    Losses of different methods have different units, so each run has its own axis.
    """
    result = []
    for run, (steps, values) in logs.items():
        with canvas.figure(SMALL) as (figure, ax):
            color = looks[run].color
            long = len(values) > 60
            ax.plot(steps, values, color=color, lw=1, alpha=0.35 if long else 1)
            if long:
                ax.plot(*_smooth(steps, values), color=color)
            ax.set(xlabel="step", ylabel=style.wrap(name, 20))
            ax.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=STEPS))
            ax.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
            ax.margins(x=0.02)
        result.append(_panel(run, figure))
    return result


def _lines(
    drawn: Mapping[str, Any],
    looks: Mapping[str, Look],
    kind: str,
    behind: Mapping[str, Any],
) -> Figure:
    """All runs in one panel, with bands for the standard error.

    A second axis of a few names has a dash pattern per name. Any other one (heads) is
    drawn as dots, moved a little aside run by run, under the line of their mean.
    """
    first, at = next(iter(drawn.values())), 0 if kind == "depth" else -1
    dashes = {}
    numbers = {run: i for i, run in enumerate(drawn)}
    with canvas.figure(WIDE) as (figure, ax):
        for run, series in (*drawn.items(), *behind.items()):
            axis, look = series.axes[at], looks[run]
            values = np.moveaxis(series.values, at, 0)  # (n,) or (n, others)
            errors = series.stderr
            errors = None if errors is None else np.moveaxis(errors, at, 0)
            other = next((a for a in series.axes if a is not axis), None)
            if other and few(other):
                for j, name in enumerate(other.labels):
                    dashes[name] = canvas.DASHES[j]
                    error = None if errors is None else errors[:, j]
                    canvas.line(ax, axis, values[:, j], error, look, dashes[name])
                continue
            if other:
                step = min(0.13, 0.8 / len(drawn))  # within their own block
                shift = step * (numbers[run] - (len(drawn) - 1) / 2)
                canvas.dots(ax, axis.positions + shift, values, look)
                values = mean(values, 1)
                errors = None if errors is None else mean(errors, 1)
            canvas.line(ax, axis, values, errors, look)
        ax.set(xlabel=first.axes[at].name, ylabel=canvas.y_label(first))
        canvas.x_ticks(ax, [s.axes[at] for s in (*drawn.values(), *behind.values())])
        pairs = [(drawn[run].axes[at], s.axes[at]) for run, s in behind.items()]
        canvas.hand_over(ax, pairs)
        canvas.legend(figure, {run: looks[run] for run in drawn}, dashes)
    return figure


def _family(series: Any, low: float, high: float) -> Figure:
    """A line per entry of the first axis, from dark (first) to bright (last)."""
    lead, axis = series.axes
    where = lead.positions
    scale = matplotlib.colors.Normalize(where.min(), where.max())
    shades = matplotlib.colormaps["viridis"]
    with canvas.figure(WIDE) as (figure, ax):
        for position, values in zip(where, series.values, strict=True):
            color = shades(0.92 * scale(position))
            ax.plot(axis.positions, values, color=color, lw=1.4)
        ax.set(xlabel=axis.name, ylabel=canvas.y_label(series), ylim=(low, high))
        canvas.x_ticks(ax, [axis])
        shown = matplotlib.colors.ListedColormap(shades(np.linspace(0, 0.92, 64)))
        mappable = matplotlib.cm.ScalarMappable(scale, shown)
        bar = figure.colorbar(mappable, ax=ax, label=lead.name, aspect=28, pad=0.02)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(6, integer=True)
    return figure


def _matrix(series: Any, limits: tuple[float, float]) -> Figure:
    """An image of the last two axes; a stack is thinned to `MAX_MAPS` small ones."""
    *lead, down, across = series.axes
    stack = series.values.reshape(-1, *series.values.shape[-2:])
    chosen = np.unique(np.linspace(0, len(stack) - 1, MAX_MAPS).round().astype(int))
    columns = 1 if len(chosen) == 1 else 4
    rows = -(-len(chosen) // columns)
    # Depth grows upwards; a map of the image lies as the image does.
    origin = "lower" if down.name.startswith(("block", "depth", "head")) else "upper"
    size = (SMALL[0], 2.7) if columns == 1 else (WIDE[0], 1.2 * rows + 0.6)
    time = across.name == "step"  # as wide as there is room, whatever its entries
    size = (WIDE[0], 2.7) if time else size
    with matplotlib.rc_context({**style.RC, "axes.grid": False}):
        figure = Figure(figsize=size)
        grid = figure.subplots(rows, columns, squeeze=False)
        for ax in grid.flat[len(chosen) :]:
            ax.set_axis_off()
        for ax, i in zip(grid.flat, chosen, strict=False):
            image = ax.imshow(stack[i], origin=origin, vmin=limits[0], vmax=limits[1])
            ax.set_aspect("auto" if time else "equal")
            ax.spines[:].set_visible(False)
            for y, x in () if lead else series.marks:
                ax.plot(x, y, "^", color="#E3008C", mec="white", mew=0.8, ms=8)
            if lead:
                ax.set(xticks=[], yticks=[])
                ax.set_title(f"{lead[0].name} {lead[0].labels[i]}", fontsize=8, pad=3)
                continue
            canvas.index_ticks(ax.xaxis, across)
            canvas.index_ticks(ax.yaxis, down)
            ax.set(xlabel=across.name, ylabel=down.name)
        bar = figure.colorbar(image, ax=grid, location="bottom", aspect=28, pad=0.03)
        bar.set_label(series.unit)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(4, steps=STEPS)
    return figure


def _categories(drawn: Mapping[str, Any], looks: Mapping[str, Look]) -> Figure:
    """Named entries from top to bottom, with a vertical line at each run's mean."""
    first = next(iter(drawn.values()))
    names = first.axes[0].labels
    with canvas.figure((WIDE[0], 1.3 + 0.22 * len(names))) as (figure, ax):
        for run, series in drawn.items():
            look, y = looks[run], series.axes[0].positions
            ax.axvline(
                mean(series.values, 0), color=look.color, lw=1.2, ls=look.line, zorder=1
            )
            ax.errorbar(
                series.values,
                y,
                xerr=series.stderr,
                color=look.color,
                fmt=look.marker,
                elinewidth=1,
            )
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set_xlabel(canvas.y_label(first))
        canvas.legend(figure, {run: looks[run] for run in drawn})
    return figure


def _scalars(drawn: Mapping[str, Any], looks: Mapping[str, Look]) -> Figure:
    """A bar per run, with its number at the end."""
    first = next(iter(drawn.values()))
    with canvas.figure((WIDE[0], 0.75 + 0.36 * len(drawn))) as (figure, ax):
        for i, (run, series) in enumerate(drawn.items()):
            value = float(series.values)
            error = None if series.stderr is None else float(series.stderr)
            ax.barh(i, value, 0.62, color=looks[run].color, xerr=error)
            ax.annotate(
                style.number(value, error),
                (max(value + (error or 0), 0), i),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
        ax.set_yticks(range(len(drawn)), list(drawn))
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.3)
        ax.set_xlabel(canvas.y_label(first))
    return figure


def _same(drawn: Mapping[str, Any]) -> tuple[str, int]:
    """The kind and number of axes that all series share, if they can be drawn.

    Lines over depth may have heads in one run and be a mean in another.
    """
    first = next(iter(drawn.values()))
    for run, series in drawn.items():
        got, want = ((s.kind, [a.name for a in s.axes]) for s in (series, first))
        if got[0] == want[0] == "depth" and got[1][:1] == want[1][:1]:
            continue
        if got != want:
            raise ValueError(
                f"{series.name!r} of run {run!r} is a {got[0]} over {got[1]}, of run "
                f"{next(iter(drawn))!r} a {want[0]} over {want[1]}; a figure needs "
                "one kind: give the other series another name"
            )
    kind, axes = first.kind, max(len(s.axes) for s in drawn.values())
    allowed = {"depth": (0, 1, 2), "curve": (0, 1, 2), "matrix": (0, 2, 3)}
    if kind not in allowed or axes not in allowed[kind]:
        raise ValueError(
            f"{first.name!r} is of kind {kind!r} with {axes} axes; the report draws "
            "depth and curve with up to 2 axes, matrix with 2 or 3"
        )
    return kind, axes


def _limits(all_series: Iterable[Any], pad: float = 0.0) -> tuple[float, float]:
    """One range for all runs, so that colours and heights can be compared."""
    values = np.concatenate([s.values.ravel() for s in all_series])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    margin = pad * (high - low) or (0.0 if high > low else 0.5)
    return low - margin, high + margin


def _named(axis: Any) -> bool:
    return all(isinstance(v, str) for v in axis.values)


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The running mean over a twentieth of the log; whole windows only."""
    width = max(2, len(values) // 20)
    kernel = np.full(width, 1 / width)
    return tuple(np.convolve(x, kernel, "valid") for x in (steps, values))


def _panel(run: str, figure: Figure) -> Panel:
    small = figure.get_figwidth() <= SMALL[0]
    return Panel(run, canvas.to_png(figure), small)
