"""Show two or more analyses side by side, in one report.

    clvsmim compare runs/moco_v3 runs/simmim --out=report

Each is a workdir that was analyzed, or the --out of an analysis. Where all saw the same
images, the similarity (CKA) between the blocks of each two models is shown as well.
Three trainings from different seeds of each method let the paper's claims be judged.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from clvsmim import analysis, cli
from clvsmim.analysis import Analysis
from clvsmim.metrics import Series, between_models


def main(argv: Sequence[str]) -> None:
    values, rest = cli.parse(__doc__, argv, _flags, positional="A B ...")
    if len(rest) < 2:
        raise ValueError(f"expected two or more analyses to compare, got {len(rest)}")
    folders = [analysis.find(folder) for folder in rest]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise ValueError(f"{rest[i]} is there twice; compare different analyses")
    print(compare(folders, values.out))


def _flags(values: flags.FlagValues) -> None:
    what = "folder for the report"
    flags.DEFINE_string("out", "comparison", what, flag_values=values)


def compare(
    folders: Sequence[str],
    out: str,
    *,
    title: str = "",
    lead: str = "",
    first: Sequence[Any] = (),
    notes: Sequence[str] = (),
    names: Sequence[str] = (),
    judged: Sequence[str] = (),
    chosen: str = "",
    paper: bool = False,
) -> epath.Path:
    """Write the report of analyses; returns the path of report.html.

    `first` are sections that lead the page, `notes` end it, `names` are what to call
    the models, `judged` the analyses that the claims are judged on, if not these, and
    `chosen` says how they were chosen; `paper` draws the published curves behind them.
    """
    from clvsmim import present  # matplotlib is slow to import

    names = names or present.names(folders)
    found, why = similarities(folders, names)
    runs = [
        present.read(folder, name, more=found.get(name, ()))
        for folder, name in zip(folders, names, strict=True)
    ]
    drawn = list(zip(runs, folders, strict=True))
    title = title or f"{len(runs)} models side by side"
    notes = [*notes, *why]
    more = {"first": first, "notes": notes, "judged": judged, "chosen": chosen}
    return present.page(out, title, drawn, lead=lead, paper=paper, **more)


def similarities(
    folders: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, list[Series]], list[str]]:
    """CKA between the blocks of models, and a note for each pair that has none.

    All pairs of up to four models; of more, the first with each other one.

    Returns:
      {name of the first of a pair: series}, and notes.
    """
    saved = dict(zip(names, map(grams, folders), strict=True))
    pairs = list(itertools.combinations(names, 2))
    if len(names) > 4:
        pairs = [pair for pair in pairs if pair[0] == names[0]]
    found: dict[str, list[Series]] = {}
    why = []
    for a, b in pairs:
        try:
            series = similarity(saved[a], saved[b], (a, b))
            found.setdefault(a, []).append(series)
        except ValueError as error:
            why.append(f"No CKA between {a} and {b}: {error}.")
    return found, why


def grams(folder: str) -> Analysis:
    """The states that make models comparable, with what they were measured on."""
    return analysis.load(f"{folder}/state.npz", within="states/grams/")[0]


def similarity(a: Analysis, b: Analysis, names: tuple[str, str]) -> Series:
    """CKA between the blocks of two models.

    Raises:
      ValueError: they did not see the same images, in the same mini-batches.
    """
    if not (a.states and b.states):
        raise ValueError("`grams` was not measured on both")
    if a.stamp["data"] != b.stamp["data"]:
        raise ValueError("they were measured on different data")
    if not np.array_equal(a.ids["test"], b.ids["test"]):
        raise ValueError("they were measured on different images")
    if a.stamp["facts"]["group"] != b.stamp["facts"]["group"]:
        raise ValueError("their --group differs")
    states = (x.states["grams"]["test"] for x in (a, b))
    series = between_models(*states, name_a=names[0], name_b=names[1])
    # A report draws one quantity of a name, and a model may be in several pairs.
    return dataclasses.replace(series, name=f"CKA between {names[0]} and {names[1]}")


if __name__ == "__main__":
    import sys

    cli.run(sys.modules["__main__"])
