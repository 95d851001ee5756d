"""The page: which figure stands where, and the files beside it."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
import numpy as np
from etils import epath

from clvsmim.metrics import DECODER
from clvsmim.report import figures, images, logs, style, tables
from clvsmim.report.images import Gallery
from clvsmim.report.parts import Run, Section

SHADED = "Shaded: the blocks of the decoder, on whole images."


def write(
    folder: str | epath.Path,
    *,
    title: str,
    runs: Sequence[Run],
    lead: str = "",
    sections: Sequence[Section] = (),
    notes: Sequence[str] = (),
) -> epath.Path:
    """Write `report.html`, `figures/` and `data/` into `folder`, which may exist.

    Args:
      title, lead: the heading and the sentences under it.
      runs: in the order of the legends.
      sections: in the order of the page. Quantities that no section names follow in a
        section per source, so nothing measured is left out.
      notes: paragraphs at the end: what was measured on, with what, when.

    Returns:
      The path of `report.html`.

    Raises:
      ValueError: two runs of one name, two different series of one name in a run, a
        quantity in two sections, or a Series of a form that cannot be drawn.
    """
    folder = epath.Path(folder)
    page = Page(folder, style.looks((run.name, run.family) for run in runs))
    drawn = _by_name(runs)
    sections = [replace(s, series=_with_decoders(s.series, drawn)) for s in sections]
    parts = [
        page.part(section, {n: drawn[n] for n in section.series if n in drawn})
        for section in _complete(sections, drawn, runs)
    ]
    training = page.training({run.name: run.log for run in runs if run.log})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clvsmim.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.j2").render(
        title=title,
        lead=lead,
        runs=[{"run": run, "look": page.looks[run.name]} for run in runs],
        parts=[*training, *(part for part in parts if not _empty(part))],
        notes=notes,
    )
    facts = {run.name: {**run.facts} for run in runs}
    page.save("data/runs.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return page.save("report.html", html)


@dataclass
class Page:
    """Writes files beside the page and describes them to the template."""

    folder: epath.Path
    looks: Mapping[str, style.Look]
    taken: set[str] = field(default_factory=set)

    def save(self, name: str, content: str | bytes) -> epath.Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(content)
        return path

    def stem(self, text: str) -> str:
        """A file name that no other figure of this page has."""
        stem, n = style.slug(text), 1
        while stem in self.taken:
            stem, n = f"{style.slug(text)}-{n + 1}", n + 1
        self.taken.add(stem)
        return stem

    def part(self, section: Section, drawn: Mapping[str, Mapping[str, Any]]) -> dict:
        behind = {n: _behind(n, drawn) for n in drawn}
        joined = {DECODER + n for n, found in behind.items() if found}
        found = [
            self.figure(name, runs, behind[name])
            for name, runs in drawn.items()
            if name not in joined
        ]
        return {
            "title": section.title,
            "id": self.stem(f"part {section.title}"),
            "text": section.text or _where(drawn),
            "tables": section.tables,
            "figures": _alone(found),
            "more": [],
            "galleries": [self.gallery(g) for g in section.galleries],
        }

    def training(self, all_logs: Mapping[str, Sequence[Mapping]]) -> list[dict]:
        """The section of the training logs: losses open, other scalars folded away."""
        if not all_logs:
            return []
        names = logs.scalars(all_logs)
        found = {name: self.log_figure(name, all_logs) for name in names}
        return [
            {
                "title": "Training",
                "id": self.stem("part training"),
                "text": "A loss that still falls at the right edge means that the run "
                "was stopped early. Losses of different methods have different units: "
                "compare their shapes, not their heights.",
                "tables": [],
                "figures": _alone([found[n] for n in names if n == "loss"]),
                "more": _alone([found[n] for n in names if n != "loss"]),
                "galleries": [],
            }
        ]

    def figure(
        self, name: str, drawn: Mapping[str, Any], behind: Mapping[str, Any]
    ) -> dict:
        """One quantity; of decoders, its continuation `behind` is in the same panel."""
        stem, first = self.stem(name), next(iter(drawn.values()))
        files, shown = self.numbers(stem, drawn), tables.short(drawn)
        if behind:
            files += self.numbers(self.stem(DECODER + name), behind)
            shown += tables.short(behind)
        counts = sorted({series.count for series in drawn.values()})
        counts = " to ".join(f"{n:,}" for n in {counts[0]: 0, counts[-1]: 0})
        return {
            "title": style.words(name),
            "source": first.source,
            "notes": _notes(drawn, behind),
            "count": f"{counts} images" if first.count else "",
            "panels": self.panels(stem, figures.panels(drawn, self.looks, behind)),
            "files": files,
            "tables": shown,
        }

    def numbers(self, stem: str, drawn: Mapping[str, Any]) -> list[str]:
        """Write the numbers of a figure; returns the files."""
        self.save(f"data/{stem}.csv", tables.to_csv(drawn))
        self.save(f"data/{stem}.json", tables.to_json(drawn))
        return [f"data/{stem}.csv", f"data/{stem}.json"]

    def log_figure(self, name: str, all_logs: Mapping[str, Sequence[Mapping]]) -> dict:
        stem, curves = self.stem(f"log {name}"), logs.curves(all_logs, name)
        self.save(f"data/{stem}.csv", logs.to_csv(curves, name))
        self.save(f"data/{stem}.json", logs.to_json(curves))
        return {
            "title": style.words(name),
            "source": "",
            "notes": [],
            "count": "",
            "panels": self.panels(stem, figures.log_panels(curves, self.looks, name)),
            "files": [f"data/{stem}.csv", f"data/{stem}.json"],
            "tables": [logs.short(curves)],
        }

    def panels(self, stem: str, found: Iterable[figures.Panel]) -> list[dict]:
        result = []
        for panel in found:
            name = f"{stem}-{style.slug(panel.run)}" if panel.run else stem
            path = f"figures/{name}.png"
            self.save(path, panel.png)
            look = self.looks.get(panel.run)
            result.append(
                {
                    "run": panel.run,
                    "look": look,
                    "path": path,
                    "src": _src(panel.png),
                    "small": panel.small,
                }
            )
        return result

    def gallery(self, gallery: Gallery) -> dict:
        path = f"figures/{self.stem(gallery.title)}.png"
        self.save(path, images.to_png(images.sheet(gallery)))
        names = gallery.rows or ("",) * len(gallery.images)
        rows = [
            {"name": name, "pictures": [_src(images.to_png(x)) for x in row]}
            for name, row in zip(names, gallery.images, strict=True)
        ]
        width = max(np.shape(x)[1] for row in gallery.images for x in row)
        return {"gallery": gallery, "rows": rows, "path": path, "width": width}


def _by_name(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """{series name: {run name: series}}, in order of first appearance.

    Two metrics may report the same side quantity: an equal series counts once.
    """
    result: dict[str, dict[str, Any]] = {}
    for run in runs:
        for series in run.series:
            there = result.setdefault(series.name, {}).setdefault(run.name, series)
            if there is not series and not np.array_equal(
                there.values, series.values, equal_nan=True
            ):
                raise ValueError(
                    f"run {run.name!r} has two different series {series.name!r}; "
                    "give one of them another name"
                )
    return result


def _complete(
    sections: Sequence[Section], drawn: Mapping[str, Mapping], runs: Sequence[Run]
) -> list[Section]:
    """The sections asked for, then one per source of what is left, then pictures."""
    asked = [name for section in sections for name in section.series]
    for name in asked:
        if asked.count(name) > 1:
            raise ValueError(f"series {name!r} is in two sections; name it in one")
    rest: dict[str, list[str]] = {}
    for name, found in drawn.items():
        if name not in asked:
            rest.setdefault(next(iter(found.values())).source, []).append(name)
    extra = [
        Section(style.words(names[0]) if source else "Further measurements", "", names)
        for source, names in sorted(rest.items(), key=lambda x: not x[0])
    ]
    pictures = tuple(gallery for run in runs for gallery in run.galleries)
    last = [Section("Pictures", galleries=pictures)] if pictures else []
    return [*sections, *extra, *last]


def _with_decoders(names: Sequence[str], drawn: Mapping[str, Any]) -> list[str]:
    """Each name, and then that of its continuation if there is one."""
    names = [x for name in names for x in (name, DECODER + name)]
    return [n for n in names if n in drawn or not n.startswith(DECODER)]


def _behind(name: str, drawn: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What continues a quantity over depth, of the runs that have both."""
    runs = drawn[name]
    return {
        run: series
        for run, series in drawn.get(DECODER + name, {}).items()
        if series.kind == "depth" and run in runs
    }


def _where(drawn: Mapping[str, Mapping[str, Any]]) -> str:
    """What to compare with, when the caller does not say what to look for."""
    sources = {s.source for found in drawn.values() for s in found.values() if s.source}
    return f"Compare with {', '.join(sorted(sources))} of the paper." if sources else ""


def _notes(drawn: Mapping[str, Any], behind: Mapping[str, Any]) -> list[str]:
    """Every note once, with the runs it is about unless it is about all."""
    about: dict[str, dict[str, None]] = {}
    for run, series in (*drawn.items(), *behind.items()):
        for note in series.notes:
            about.setdefault(note, {})[run] = None
    notes = [
        note if len(names) == len(drawn) else f"{', '.join(names)}: {note}"
        for note, names in about.items()
    ]
    return [*notes, SHADED] if behind else notes


def _alone(found: list[dict]) -> list[dict]:
    """Figures of one panel stand in pairs; mark those that are left without."""
    waiting = None
    for figure in found:
        figure["single"] = len(figure["panels"]) == 1
        figure["lone"] = figure["single"] and waiting is None
        if waiting and figure["single"]:
            waiting["lone"] = False
        waiting = figure if figure["lone"] else None
    return found


def _empty(part: Mapping[str, Any]) -> bool:
    return not any(part[k] for k in ("tables", "figures", "more", "galleries"))


def _src(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
