"""What was found in a checkpoint, for the user to read before trusting it."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """The doctor's report on one file; `str` is the text.

    Attributes:
      source: the path, or "" of tensors in memory.
      family, title, evidence: what it is, in words, and how that was seen.
      what: sentences about what the file is and lacks.
      encoder: fields of `vit.Spec`.
      parameters: of the encoder.
      matched: their name -> our leaves; `moved` are those in another layout.
      dropped: their name -> why.
      missing: our leaves that were allowed to be missing: left as initialised, but for
        those that a warning says the network was built without.
      found, assumed, warnings: sentences.
    """

    source: str = ""
    family: str = ""
    title: str = ""
    evidence: str = ""
    what: list[str] = field(default_factory=list)
    encoder: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    matched: dict[str, tuple[str, ...]] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        start = f"{self.source}: " if self.source else ""
        lines = [f"{start}{self.title} (format {self.family}; {self.evidence})"]
        lines += [f"  {text}" for text in (self._network(), self._counts(), *self.what)]
        for title, rows in (
            ("found", self.found),
            ("assumed", self.assumed),
            ("dropped", grouped(self.dropped)),
            ("missing, left as initialised if not warned of", self.missing),
            ("WARNING", self.warnings),
        ):
            lines += [f"  {title}: {row}" for row in rows]
        return "\n".join(lines)

    def _network(self) -> str:
        spec = self.encoder
        rows, columns = spec["image"]
        return (
            f"ViT of width {spec['width']}, depth {spec['depth']}, {spec['heads']} "
            f"heads, patch {spec['patch']}, {rows} x {columns} px, "
            f"{self.parameters:,} parameters"
        )

    def _counts(self) -> str:
        same = len(self.matched) - len(self.moved)
        return (
            f"{len(self.matched)} tensors matched ({same} as they are, "
            f"{len(self.moved)} in another layout), {len(self.dropped)} dropped, "
            f"{len(self.missing)} missing"
        )


def grouped(dropped: dict[str, str]) -> list[str]:
    """One line per reason: how many tensors, and the first."""
    count = Counter(dropped.values())
    first = {}
    for name, why in dropped.items():
        first.setdefault(why, name)
    return [
        f"{n} tensors ({first[why]}, ...): {why}" if n > 1 else f"{first[why]}: {why}"
        for why, n in count.items()
    ]


def some(names: list[str], most: int = 4) -> str:
    """The first of some names; blocks are shown once."""
    shown = list(dict.fromkeys(re.sub(r"(?<=[._/])\d+(?=[./])", "*", n) for n in names))
    more = f" and {len(shown) - most} more kinds" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
