"""The X-rays of a run as pictures of depth against time, with its alarms."""

from collections.abc import Sequence

import numpy as np

from clvsmim.log import Record, read
from clvsmim.metrics import Axis, Series
from clvsmim.report import Run, Section, Table
from clvsmim.xray import QUANTITIES

NAMES = {
    key: f"{f'{q.series} {q.site}'.strip()} while training"
    for key, q in QUANTITIES.items()
}
TEXT = (
    "A few training images, always the same, went through the encoder at intervals: "
    "time runs to the right, depth upwards. All numbers are means over images and "
    "heads. A triangle is where an alarm began: attention that no longer depends on "
    "the query, or a representation with hardly a direction left."
)


def series(workdir: str) -> list[Series]:
    """Each quantity of `xray.jsonl` over (block, step); nothing without X-rays.

    Marks are where an alarm began; the notes of its series say what it said.
    """
    found, alarms = split(read(f"{workdir}/xray.jsonl"))
    return [
        of(key, having, [a for a in alarms if a["quantity"] == key])
        for key in QUANTITIES
        if (having := [r for r in found if key in r])
    ]


def split(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """(X-rays, alarms)."""
    alarms = [r for r in records if "alarm" in r]
    return [r for r in records if "alarm" not in r], alarms


def of(key: str, records: Sequence[Record], alarms: Sequence[Record]) -> Series:
    """One quantity of X-rays."""
    steps = tuple(r["step"] for r in records)
    values = np.array([r[key] for r in records], float).T  # (L, steps)
    return Series(
        name=NAMES[key],
        axes=(Axis("block", (*range(1, len(values) + 1),)), Axis("step", steps)),
        values=values,
        stderr=None,
        kind="matrix",
        unit=QUANTITIES[key].unit,
        source="",
        count=min(r["images"] for r in records),
        notes=tuple(f"step {a['step']}: {a['alarm']}" for a in alarms),
        marks=tuple((a["block"] - 1, steps.index(a["step"])) for a in alarms),
    )


def section(drawn: Sequence[tuple[Run, str]]) -> Section | None:
    """The part of the report about runs and their workdirs; None without X-rays."""
    alarms = [
        (run.name, f"{a['step']:,}", a["alarm"])
        for run, workdir in drawn
        for a in split(read(f"{workdir}/xray.jsonl"))[1]
    ]
    if not any(s.name in NAMES.values() for run, _ in drawn for s in run.series):
        return None
    tables = (Table("Alarms", ("run", "step", "what"), alarms),) if alarms else ()
    return Section("The encoder while it trains", TEXT, (*NAMES.values(),), tables)
