"""The numbers behind a figure: CSV and JSON in full, and a short table for the page."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clvsmim.report import style

MAX_ROWS = 40


def mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean over what is not NaN; NaN where nothing is left, without a warning."""
    there = np.isfinite(values)
    count = there.sum(axis)
    total = np.where(there, values, 0.0).sum(axis)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def to_csv(drawn: Mapping[str, Any]) -> str:
    """One line per number: run, a column per axis, value, stderr. Floats in full."""
    names = list(dict.fromkeys(n for s in drawn.values() for n in columns(s)))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *names, "value", "stderr"])
    for run, series in drawn.items():
        for index in np.ndindex(series.values.shape):
            at = map(_plain, series.axes, index)
            where = dict(zip(columns(series), at, strict=True))
            error = "" if series.stderr is None else repr(float(series.stderr[index]))
            value = repr(float(series.values[index]))
            writer.writerow([run, *(where.get(n, "") for n in names), value, error])
    return out.getvalue()


def columns(series: Any) -> list[str]:
    """A name per axis; the second axis of a matrix of equal axes gets a number."""
    names = [axis.name for axis in series.axes]
    return [n if n not in names[:i] else f"{n} {i + 1}" for i, n in enumerate(names)]


def to_json(drawn: Mapping[str, Any]) -> str:
    """`{run: series}`, each as its own `to_json` gives it."""
    plain = {run: series.to_json() for run, series in drawn.items()}
    plain = {k: json.loads(v) if isinstance(v, str) else v for k, v in plain.items()}
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def short(drawn: Mapping[str, Any]) -> list[dict]:
    """Tables for the page: `[{"title", "columns", "rows"}, ...]` of ready strings."""
    first = next(iter(drawn.values()))
    if first.kind == "matrix":
        return [_matrix(run, series) for run, series in drawn.items()]
    if first.values.ndim == 0:
        rows = [[run, _cell(s.values, s.stderr)] for run, s in drawn.items()]
        return [_table("", ["run", first.unit or "value"], rows)]
    # The long axis goes down: blocks of (block, head), frequencies of (block, f).
    down = -1 if first.kind == "curve" else 0
    return [_by_axis(dict(_each_name(drawn, down)), down)]


def few(axis: Any) -> bool:
    """An axis of a few names (attn, mlp), each a line and a column of its own."""
    return len(axis.values) <= 4 and all(isinstance(v, str) for v in axis.values)


def _each_name(drawn: Mapping[str, Any], down: int) -> Iterator[tuple[str, Any]]:
    """The series, or one per entry of its other axis if that has a few names."""
    for run, series in drawn.items():
        if series.values.ndim < 2 or not few(series.axes[1 + down]):
            yield run, series
            continue
        for i, name in enumerate(series.axes[1 + down].values):
            one, errors = np.take(series.values, i, 1 + down), series.stderr
            errors = None if errors is None else np.take(errors, i, 1 + down)
            axes = (series.axes[down],)
            yield (
                f"{run}, {name}",
                dataclasses.replace(series, axes=axes, values=one, stderr=errors),
            )


def _by_axis(drawn: Mapping[str, Any], down: int) -> dict:
    """A row per value of one axis, a column per run; the other axes are averaged.

    The standard errors of heads are averaged too: they saw the same images, so they
    are not independent, and the mean of them bounds the error of their mean.
    """
    first = next(iter(drawn.values()))
    columns = {run: _rows_of(series, down) for run, series in drawn.items()}
    keys = list(dict.fromkeys(key for rows in columns.values() for key in rows))
    kept = keys[:: max(1, -(-len(keys) // MAX_ROWS))]
    rows = [[key, *(columns[run].get(key, "") for run in drawn)] for key in kept]
    notes = []
    if first.values.ndim > 1:
        others = [f"every {a.name}" for a in first.axes if a is not first.axes[down]]
        notes.append(f"Averaged over {' and '.join(others)}")
    if len(kept) < len(keys):
        notes.append(f"{len(kept)} of {len(keys)} rows, all are in the CSV file")
    return _table("; ".join(notes), [first.axes[down].name, *drawn], rows)


def _rows_of(series: Any, down: int) -> dict[str, str]:
    keys = series.axes[down].labels
    flat = _flat(series.values, down)
    value, error = mean(flat, 1), [None] * len(keys)
    if series.stderr is not None:
        error = mean(_flat(series.stderr, down), 1)
    return {k: _cell(v, e) for k, v, e in zip(keys, value, error, strict=True)}


def _flat(values: np.ndarray, down: int) -> np.ndarray:
    return np.moveaxis(values, down, 0).reshape(values.shape[down], -1)


def _matrix(run: str, series: Any) -> dict:
    """The matrix itself; of a stack of matrices, the mean of each."""
    if series.values.ndim > 2:
        rows = [list(pair) for pair in _rows_of(series, 0).items()]
        return _table(f"{run}: mean of each matrix", [series.axes[0].name, ""], rows)
    across, along = series.axes
    labels = [x.labels[:MAX_ROWS] for x in series.axes]
    columns = [f"{across.name} \\ {along.name}", *labels[1]]
    rows = [
        [key, *(style.number(v) for v in row[:MAX_ROWS])]
        for key, row in zip(labels[0], series.values, strict=False)
    ]
    return _table(run, columns, rows)


def _table(title: str, columns: Sequence[str], rows: list) -> dict:
    return {"title": title, "columns": list(columns), "rows": rows}


def _cell(value: Any, error: Any) -> str:
    return style.number(float(value), None if error is None else float(error))


def _plain(axis: Any, index: int) -> Any:
    """A value of an axis for CSV: a pair (block, site) by its label."""
    value = axis.values[index]
    return axis.labels[index] if isinstance(value, tuple) else value
