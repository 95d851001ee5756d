"""What a report is made of: runs, sections, tables. Galleries are in images.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clvsmim.report.images import Gallery


@dataclass(frozen=True)
class Run:
    """One model in the report, or one set of published values to compare with.

    Attributes:
      name: what every legend calls it, such as "MoCo v3".
      family: its colour: "cl", "mim", "hybrid", "supervised", "reference" (dashed), or
        "" for the next free one.
      series: what was measured, no name twice.
      log: the training log, a dict per line with "step", "loss" and other scalars.
      facts: short strings to show at the top, such as {"images seen": "61,440"}.
      galleries: pictures of this model.
    """

    name: str
    family: str = ""
    series: Sequence[Any] = ()
    log: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    galleries: Sequence[Gallery] = ()


@dataclass(frozen=True)
class Table:
    """Strings in rows; a cell that is exactly "shows", "does not show" or "opposite"
    is set off in colour."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
      title: its heading.
      text: in plain words, what to look for; "" names the figure of the paper.
      series: names of the quantities that belong here; those of no run are left out.
      tables, galleries: more to show here, the tables before the figures.
    """

    title: str
    text: str = ""
    series: Sequence[str] = ()
    tables: Sequence[Table] = ()
    galleries: Sequence[Gallery] = ()
