"""Analyses on disk -> runs of a report, with the words that go beside the figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from clvsmim import analysis, log, meta
from clvsmim.build import make_encoder
from clvsmim.report import (
    Gallery,
    Run,
    Section,
    attention_gallery,
    reconstruction_gallery,
    write,
)

FAMILIES = {"moco_v3": "cl", "simmim": "mim", "hybrid": "hybrid"}
TITLES = {"moco_v3": "MoCo v3 (CL)", "simmim": "SimMIM (MIM)", "hybrid": "hybrid"}


def one(workdir: str, out: str) -> epath.Path:
    """The report of one analysis, into its own folder."""
    run = read(workdir, out)
    return page(out, f"What {run.name} learned", [(run, out)])


def read(workdir: str, out: str, name: str = "") -> Run:
    """A run as the report shows it, from the files of its training and analysis."""
    found, config = analysis.read_series(out), meta.read_meta(workdir)["config"]
    objective = config["objective"]
    records = log.read(f"{workdir}/log.jsonl")
    return Run(
        name=name or title(objective),
        family=FAMILIES.get(objective["name"], ""),
        series=found["series"],
        log=records,
        facts=facts(config, found, records),
    )


def title(objective: dict[str, Any]) -> str:
    """The method as a legend calls it."""
    name = TITLES.get(objective["name"], objective["name"])
    return f"{name}, λ = {objective['lam']:g}" if "lam" in objective else name


def facts(config: dict, found: dict, records: list[dict]) -> dict[str, str]:
    """What was trained, for how long, and what was measured."""
    spec = make_encoder(config["encoder"]).spec
    size = f"width {spec.width}, depth {spec.depth}, {spec.heads} heads"
    images = f"{spec.image[0]} x {spec.image[1]} px, patch {spec.patch}"
    shown = {
        "encoder": f"{size}; {images}",
        "trained on": f"{config['data']['source']['name']}, "
        f"{found['step'] * config['batch']:,} images in {found['step']:,} steps",
        "measured on": f"{found['images']:,} {found['stamp']['data']['split']} images",
    }
    if records:
        shown["final loss"] = f"{records[-1]['loss']:.4g}"
    return shown


def page(
    folder: str,
    heading: str,
    runs: Sequence[tuple[Run, str]],
    *,
    lead: str = "",
    notes: Sequence[str] = (),
) -> epath.Path:
    """Write the report of runs and their analysis folders."""
    drawn = [(run, pictures(out)) for run, out in runs]
    return write(
        folder,
        title=heading,
        runs=[run for run, _ in runs],
        lead=lead,
        sections=[s for s in (seeing(drawn), looking(drawn), *SECTIONS) if s],
        notes=notes,
    )


def pictures(out: str) -> dict[str, np.ndarray]:
    """The arrays of pictures.npz, {} without it."""
    path = f"{out}/pictures.npz"
    return analysis.load_arrays(path) if epath.Path(path).exists() else {}


def seeing(drawn: Sequence[tuple[Run, dict]]) -> Section | None:
    """Masked reconstructions of those that make them."""
    galleries = [
        reconstruction_gallery(
            run.name,
            list(zip(p["original"], p["mask"], p["reconstruction"], strict=True)),
        )
        for run, p in drawn
        if "reconstruction" in p
    ]
    text = (
        "Masked image modelling hides blocks of an image and predicts their pixels. "
        "Visible patches are copied from the original; only hidden ones are predicted. "
        "These images were never trained on."
    )
    return (
        Section("Masked reconstructions", text, galleries=galleries)
        if galleries
        else None
    )


def looking(drawn: Sequence[tuple[Run, dict]]) -> Section | None:
    """Attention of two queries, first and last block, mean over heads."""
    drawn = [(run, p) for run, p in drawn if "attention" in p]
    if not drawn:
        return None
    _, first = drawn[0]
    alike = [(r, p) for r, p in drawn if np.array_equal(p["image"], first["image"])]
    galleries = [attention(*zip(*alike, strict=True))]
    text = (
        "Where two query patches (framed) look: mean over heads, each map on its own "
        "scale, bright is more. If both columns look alike, attention does not depend "
        "on the query: the collapse that NMI puts into a number."
    )
    return Section("Attention of two queries", text, galleries=galleries)


def attention(runs: Sequence[Run], arrays: Sequence[dict]) -> Gallery:
    """One row per run and block: first, middle, last."""
    maps, rows = [], []
    for run, found in zip(runs, arrays, strict=True):
        mean = found["attention"].mean(axis=1)  # (L, queries, rows, columns)
        for block in sorted({1, (len(mean) + 1) // 2, len(mean)}):
            maps.append(mean[block - 1])
            rows.append(f"{run.name}, block {block}")
    places = [tuple(map(int, place)) for place in arrays[0]["places"]]
    return attention_gallery("", arrays[0]["image"], np.stack(maps), places, rows=rows)


SECTIONS = (
    Section(
        "How far attention reaches",
        "Attention distance is the mean distance, in pixels, from a query to what it "
        "attends. The paper (Fig. 3) finds contrastive learning global in its last "
        "blocks and masked image modelling more local there.",
        ("attention distance",),
    ),
    Section(
        "How much attention depends on the query",
        "Normalised mutual information between query and key positions: 0 if every "
        "query looks at the same keys (attention collapse), 1 if each has its own. The "
        "paper (Fig. 4) finds it near 0 in the last blocks of contrastive learning.",
        ("normalized mutual information",),
    ),
    Section(
        "High and low frequencies",
        "Δ log amplitude: how much weaker the highest diagonal frequency of the token "
        "map is than its mean. Higher means more high-frequency detail. The paper "
        "(Fig. 8) finds masked image modelling above contrastive learning throughout.",
        ("delta log amplitude at the highest frequency", "delta log amplitude"),
    ),
)
