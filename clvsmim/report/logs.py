"""Training logs: which scalars there are, and each as a curve per run."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np

from clvsmim.report import style

Curves = dict[str, tuple[np.ndarray, np.ndarray]]
AXES = ("step", "epoch", "time")  # what the others are plotted against


def scalars(logs: Mapping[str, Sequence[Mapping]]) -> list[str]:
    """The names of the numbers logged in any run, the loss first, then in order."""
    names = {
        key: None
        for log in logs.values()
        for line in log
        for key, value in line.items()
        if isinstance(value, Real) and not isinstance(value, bool) and key not in AXES
    }
    return sorted(names, key=lambda name: name != "loss")


def curves(logs: Mapping[str, Sequence[Mapping]], name: str) -> Curves:
    """`{run: (steps, values)}` of the runs that logged it; lines without it skipped."""
    result = {}
    for run, log in logs.items():
        points = [
            (float(line.get("step", i)), float(line[name]))
            for i, line in enumerate(log)
            if line.get(name) is not None
        ]
        if points:
            result[run] = tuple(np.array(points).T)
    return result


def to_csv(found: Curves, name: str) -> str:
    """One line per number: run, step, value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "step", name])
    for run, (steps, values) in found.items():
        for step, value in zip(steps, values, strict=True):
            step = int(step) if step.is_integer() else step
            writer.writerow([run, step, repr(float(value))])
    return out.getvalue()


def to_json(found: Curves) -> str:
    """`{run: {"step": [...], "value": [...]}}`; what is not finite is null."""
    plain = {
        run: {
            "step": steps.tolist(),
            "value": [v if np.isfinite(v) else None for v in values.tolist()],
        }
        for run, (steps, values) in found.items()
    }
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def short(found: Curves) -> dict:
    """Where each run began and ended."""
    rows = [
        [run, *map(style.number, (v[0], v[-1], np.fmin.reduce(v), x[-1]))]
        for run, (x, v) in found.items()
    ]
    columns = ["run", "first", "last", "lowest", "last step"]
    return {"title": "", "columns": columns, "rows": rows}
