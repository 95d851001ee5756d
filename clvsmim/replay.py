"""The paper's curves of its three models, and what a public file must show of them.

Park et al. 2023 analyse the public MoCo v3, SimMIM and MAE, ViT-B/16. When a file is
what one of these would be, the curves stand behind what was measured, with a table of
what is expected. That a file is the published one cannot be proven without it: another
training of the same network looks the same from outside.

The numbers were read off figures, so each has its source and its tolerance.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clvsmim.metrics import DECODER, Axis, Series, block_axis, continued
from clvsmim.report import Run, Section, Table

TITLES = {"moco_v3": "MoCo v3", "simmim": "SimMIM", "mae": "MAE"}
FAMILIES = {**{name: name for name in TITLES}, "hf_vitmae": "mae"}
SIZE = {"width": 768, "depth": 12, "heads": 12, "patch": 16}
IMAGE = (224, 224)

DISTANCE = "attention distance"
NMI = "normalized mutual information"
DELTA = "delta log amplitude at the highest frequency"
PROBE = "linear probe accuracy"
UNIFORM = 116.4922  # px: the attention distance of uniform attention on 14 x 14

NOTEBOOK = "plots in the authors' notebooks, 59 Imagenette images"
POSTER = "vector figures of the authors' poster"
FIGURE = "a pixel figure of the paper, to 0.02"


class Curve(NamedTuple):
    """One published curve over blocks, where it was read, how far apart is the same."""

    values: tuple[float, ...]
    source: str
    tolerance: float
    unit: str = ""


CURVES: dict[str, dict[str, Curve]] = {
    "moco_v3": {
        DISTANCE: Curve(
            (110.5, 89.2, 73.1, 69.5, 72.8, 81.4)
            + (88.2, 79.7, 95.7, 101.2, 109.8, 113.6),
            NOTEBOOK,
            12.0,
            "px",
        ),
        NMI: Curve(
            (0.062, 0.122, 0.321, 0.296, 0.238, 0.180)
            + (0.145, 0.171, 0.093, 0.077, 0.029, 0.009),
            NOTEBOOK,
            0.05,
        ),
        DELTA: Curve(
            (-2.905, -3.180, -3.140, -3.075, -2.952, -2.810, -2.665)
            + (-2.554, -2.463, -2.404, -2.389, -2.400, -2.508),
            POSTER,
            0.25,
        ),
        PROBE: Curve(
            (5.1, 10.2, 17.4, 28.4, 40.0, 47.7, 54.6, 58.6, 62.2, 66.2, 69.4, 71.7),
            POSTER,
            2.0,
            "%",
        ),
    },
    "simmim": {
        DELTA: Curve(
            (-1.999, -2.049, -2.245, -2.184, -2.133, -2.122, -2.091)
            + (-2.064, -2.038, -2.057, -2.128, -2.116, -2.308),
            POSTER,
            0.25,
        ),
        PROBE: Curve(
            (14.9, 25.9, 35.5, 43.2, 48.6, 53.6, 56.7, 56.8, 56.0, 52.9, 48.3, 45.3),
            POSTER,
            2.0,
            "%",
        ),
    },
    "mae": {
        DELTA: Curve(
            (-3.06, -2.10, -2.28, -2.38, -2.34, -2.35, -2.31)
            + (-2.32, -2.27, -2.24, -2.18, -2.15, -2.52),
            FIGURE,
            0.25,
        ),
        DECODER + DELTA: Curve(
            (-3.44, -3.21, -3.08, -3.01, -3.03, -3.16, -3.24, -3.30, -3.19),
            FIGURE,
            0.25,
        ),
        PROBE: Curve(
            (13.6, 21.5, 27.2, 32.3, 37.6, 43.6, 51.6, 58.4, 62.8, 64.6, 64.9, 64.1),
            POSTER,
            2.0,
            "%",
        ),
    },
}


class Check(NamedTuple):
    """Something that the published file shows: (values over blocks) -> (number, ok)."""

    text: str
    series: str
    judge: Callable[[np.ndarray], tuple[float, bool]]


def least_at(x: np.ndarray, first: int, *blocks: int) -> tuple[float, bool]:
    """The block of the smallest value, counted from `first`."""
    found = int(x.argmin()) + first
    return found, found in blocks


CHECKS: dict[str, tuple[Check, ...]] = {
    "moco_v3": (
        Check(
            "the nearest attention is in block 4", DISTANCE, lambda x: least_at(x, 1, 4)
        ),
        Check(
            "the last block is nearly uniform: above 0.93 of 116.5 px",
            DISTANCE,
            lambda x: (x[-1] / UNIFORM, x[-1] > 0.93 * UNIFORM),
        ),
        Check(
            "it depends most on the query in block 3", NMI, lambda x: least_at(-x, 1, 3)
        ),
        Check(
            "there between 0.25 and 0.40",
            NMI,
            lambda x: (x.max(), 0.25 <= x.max() <= 0.40),
        ),
        Check("in the last block below 0.03", NMI, lambda x: (x[-1], x[-1] < 0.03)),
        Check("lowest after block 1", DELTA, lambda x: least_at(x, 0, 1)),
        Check("highest after block 10 or 11", DELTA, lambda x: least_at(-x, 0, 10, 11)),
    ),
    "simmim": (
        Check("everywhere at least -2.4", DELTA, lambda x: (x.min(), x.min() >= -2.4)),
        Check("everywhere at most -1.9", DELTA, lambda x: (x.max(), x.max() <= -1.9)),
        Check(
            "the last block lowers it by more than 0.1",
            DELTA,
            lambda x: (x[-2] - x[-1], x[-2] - x[-1] > 0.1),
        ),
        Check("best probed at block 7 to 9", PROBE, lambda x: least_at(-x, 1, 7, 8, 9)),
    ),
    "mae": (
        Check("below -2.8 before block 1", DELTA, lambda x: (x[0], x[0] < -2.8)),
        Check(
            "block 1 raises it by more than 0.7",
            DELTA,
            lambda x: (x[1] - x[0], x[1] - x[0] > 0.7),
        ),
        Check(
            "below -2.9 in all of the decoder",
            DECODER + DELTA,
            lambda x: (x.max(), x.max() < -2.9),
        ),
    ),
}
COLUMNS = ("expected", "of", "measured", "verdict", "source")
TEXT = (
    "By family and size {names} is what the public ViT-B/16 of the paper would be; "
    "that it is the published file cannot be proven from the file. Dashed curves are "
    "the paper's. They were read off figures and measured on other images: a curve "
    "passes within the tolerance at every block; a difference just beyond may be the "
    "images'. Probes are on ImageNet, and only compared with probes trained here."
)


def public(found: Mapping[str, Any]) -> str:
    """Which published model an analysed file would be, "" for none."""
    file, config = found.get("file"), found["config"]
    encoder, objective = config["encoder"], config["objective"]
    same = all(encoder[key] == value for key, value in SIZE.items())
    if not file or not same or tuple(encoder["image"]) != IMAGE:
        return ""
    return "" if objective.get("labels") else FAMILIES.get(file["family"], "")


def backdrop(
    of_files: Sequence[tuple[Run, Mapping]],
    paper: bool,
    drawn: Sequence[tuple[Run, Any]],
) -> list[Run]:
    """Published curves of what was measured: of the files', or all with `paper`."""
    wanted = {public(found) for _, found in of_files}
    names = {s.name for run, _ in drawn for s in run.series}
    runs = [published(name) for name in TITLES if paper or name in wanted]
    runs = [
        dataclasses.replace(run, series=[s for s in run.series if s.name in names])
        for run in runs
    ]
    return [run for run in runs if run.series]


def published(name: str) -> Run:
    """A model of the paper, drawn dashed."""
    series = [as_series(quantity, curve) for quantity, curve in CURVES[name].items()]
    facts = {
        "encoder": "width 768, depth 12, 12 heads; 224 x 224 px, patch 16",
        "read off": "; ".join(dict.fromkeys(c.source for c in CURVES[name].values())),
    }
    title = f"{TITLES[name]} in the paper"
    return Run(title, "reference", series, facts=facts)


def as_series(quantity: str, curve: Curve) -> Series:
    """A curve in the form that the metric of that name has."""
    count = len(curve.values)
    if quantity.endswith(DELTA):
        axis = block_axis(count)
    elif quantity == PROBE:
        axis = Axis("depth", tuple((i + 1, "mlp") for i in range(count)))
    else:
        axis = Axis("block", tuple(range(1, count + 1)))
    found = Series(
        name=quantity.removeprefix(DECODER),
        axes=(axis,),
        values=np.array(curve.values),
        stderr=None,
        kind="depth",
        unit=curve.unit,
        source="",
        count=0,
        notes=(f"the paper's curve was read off {curve.source}",),
    )
    return continued(found, SIZE["depth"]) if quantity != found.name else found


def section(of_files: Sequence[tuple[Run, Mapping]]) -> Section | None:
    """What is expected of each file that would be a published one; None without."""
    runs = [(run, public(found)) for run, found in of_files]
    runs = [(run, name) for run, name in runs if name]
    if not runs:
        return None
    tables = tuple(
        Table(
            f"{run.name}: {TITLES[name]} in the paper", COLUMNS, rows(run.series, name)
        )
        for run, name in runs
    )
    names = ", ".join(run.name for run, _ in runs)
    return Section("As in the paper?", TEXT.format(names=names), tables=tables)


def rows(series: Sequence[Series], name: str) -> list[tuple[str, ...]]:
    """A row for each check of a published model, and for each of its curves."""
    measured = {s.name: over_heads(s.values) for s in series}
    checks = [(c, CURVES[name][c.series].source) for c in CHECKS[name]]
    checks += [(near(q, c), c.source) for q, c in CURVES[name].items()]
    return [row(check, measured.get(check.series), source) for check, source in checks]


def near(quantity: str, curve: Curve) -> Check:
    """The check that every block is as in a curve."""
    want = np.array(curve.values)

    def judge(x: np.ndarray) -> tuple[float, bool]:
        if x.shape != want.shape:
            return np.nan, False
        far = np.abs(x - want).max()
        return far, bool(far <= curve.tolerance)

    unit = f" {curve.unit}" if curve.unit else ""
    return Check(f"at most {curve.tolerance:g}{unit} from the curve", quantity, judge)


def row(check: Check, values: np.ndarray | None, source: str) -> tuple[str, ...]:
    """The words of a check and its verdict."""
    if values is None or not np.isfinite(values).all():
        return check.text, check.series, "", "not measured", source
    number, holds = check.judge(values)
    return (
        check.text,
        check.series,
        f"{number:.4g}",
        "PASS" if holds else "FAIL",
        source,
    )


def over_heads(values: np.ndarray) -> np.ndarray:
    """(L, ...) -> (L,)."""
    return values.reshape(len(values), -1).mean(axis=1) if values.ndim else values
