"""Analyses on disk -> runs of a report, with the words that go beside the figures."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from clvsmim import analysis, claims, files, foreign, labelled, log, replay, timeline
from clvsmim.build import make_encoder
from clvsmim.metrics import Series
from clvsmim.report import (
    Gallery,
    Run,
    Section,
    Table,
    attention_gallery,
    reconstruction_gallery,
    scatter,
    write,
)

FAMILIES = {
    "moco_v3": "cl",
    "simmim": "mim",
    "mae": "mim",
    "hybrid": "hybrid",
    "classify": "supervised",
    "untrained": "reference",
}
TITLES = {
    "moco_v3": "MoCo v3 (CL)",
    "simmim": "SimMIM (MIM)",
    "mae": "MAE (MIM)",
    "hybrid": "hybrid",
    "classify": "supervised",
}


def one(out: str, *, paper: bool = False) -> epath.Path:
    """The report of one analysis, into its own folder; see `page` for `paper`."""
    run = read(out)
    return page(out, f"What {run.name} learned", [(run, out)], paper=paper)


def read(out: str, name: str = "", more: Sequence[Series] = ()) -> Run:
    """A run as the report shows it, from the files of its analysis and training.

    Args:
      name: what to call it; its method by default.
      more: series that are not in the files.
    """
    found = analysis.read_series(out)
    workdir = found["workdir"]
    records = log.read(f"{workdir}/log.jsonl")
    also = [*labelled.series(workdir), *timeline.series(workdir), *more]
    return Run(
        name=name or title_of(found),
        family=FAMILIES.get(method_of(found), ""),
        series=[*found["series"], *also],
        log=records,
        facts=facts(found["config"], found, records),
    )


def measured(out: str) -> claims.Measured:
    """An analysis as the claims are judged on it."""
    found = analysis.read_series(out)
    objective = found["config"]["objective"]
    return claims.Measured(
        method=method_of(found),
        seed=found["config"]["seed"],
        series=[*found["series"], *labelled.series(found["workdir"])],
        lam=objective.get("lam"),
        images=json.dumps([found["stamp"]["data"], found["images"], found["skip"]]),
        tuning=labelled.recipe(f"{found['workdir']}/finetune"),
    )


def names(folders: Sequence[str]) -> list[str]:
    """What to call analyses: the method, and its folder too if two share it."""
    titles = [title_of(analysis.read_series(out)) for out in folders]
    places = [place(out) for out in folders]
    short = next(
        n for n in range(1, 99) if len({p[-n:] for p in places}) == len(places)
    )
    return [
        t if titles.count(t) == 1 else f"{t}, {'/'.join(p[-short:])}"
        for t, p in zip(titles, places, strict=True)
    ]


def place(out: str) -> tuple[str, ...]:
    """The path of the workdir, or of the analysis if it is elsewhere, in parts."""
    path = epath.Path(out)
    return (path.parent if path.name == "analysis" else path).parts


def method_of(found: dict[str, Any]) -> str:
    """The method by which an analysed encoder was trained, if it was."""
    known = found["step"] or found.get("file")
    return method(found["config"]["objective"]) if known else "untrained"


def title_of(found: dict[str, Any]) -> str:
    """What a legend calls an analysed encoder; one from a file as the file."""
    if found.get("file"):
        return found["file"]["name"]
    return title(found["config"]["objective"]) if found["step"] else "untrained"


def method(objective: dict[str, Any]) -> str:
    """The method as the claims know it: a hybrid at λ = 0 or 1 is the one it consists
    of, and only those with SimMIM are the paper's. An encoder from a file is what its
    family trains, unless it has learned labels since."""
    if objective["name"] == "encoder":
        return "classify" if objective["labels"] else objective["family"]
    if "lam" not in objective:
        return objective["name"]
    mim, cl = objective["mim"]["name"], objective["cl"]["name"]
    other = "hybrid" if mim == "simmim" else f"hybrid with {mim}"
    return {0: mim, 1: cl}.get(objective["lam"], other)


def title(objective: dict[str, Any]) -> str:
    """The method as a legend calls it."""
    name = TITLES.get(method(objective), method(objective))
    return f"{name}, λ = {objective['lam']:g}" if "lam" in objective else name


def facts(config: dict, found: dict, records: list[dict]) -> dict[str, str]:
    """What was trained, for how long, and what was measured."""
    spec = make_encoder(config["encoder"]).spec
    size = f"width {spec.width}, depth {spec.depth}, {spec.heads} heads"
    images = f"{spec.image[0]} x {spec.image[1]} px, patch {spec.patch}"
    objective = config["objective"]
    mim = objective.get("mim", objective)
    shown = {
        "encoder": f"{size}; {images}",
        "trained on": trained_on(config, found),
        "measured on": f"{found['images']:,} {found['stamp']['data']['split']} images",
    }
    if "decoder" in mim:
        inner = mim["decoder"]
        shown["decoder"] = (
            f"width {inner['width']}, depth {inner['depth']}, {inner['heads']} heads"
        )
    if found.get("file"):
        prepared = foreign.transform_of(found["file"])
        shown |= {"images": str(prepared)} if prepared else {}
    losses = [r["loss"] for r in records if "loss" in r]  # evaluations have none
    if losses:
        shown["final loss"] = f"{losses[-1]:.4g}"
    return shown


def trained_on(config: dict, found: dict) -> str:
    """Which images, and how many; of a file nobody knows."""
    file = found.get("file")
    if file:
        return f"not known: {file['title']}, SHA-256 {file['sha256'][:12]}"
    return (
        f"{config['data']['source']['name']}, {found['step'] * config['batch']:,} "
        f"images in {found['step']:,} steps"
    )


def page(
    folder: str,
    heading: str,
    runs: Sequence[tuple[Run, str]],
    *,
    lead: str = "",
    first: Sequence[Section] = (),
    notes: Sequence[str] = (),
    judged: Sequence[str] = (),
    chosen: str = "",
    paper: bool = False,
) -> epath.Path:
    """Write the report of runs and their analysis folders; `first` leads the page.

    The claims are judged on the analyses `judged`, by default on those that are drawn;
    `chosen`, how these were chosen, ends the caption of their table.
    Behind a file that is what a published model would be stand the paper's curves of
    it; with `paper` those of all three models, whatever was measured.
    """
    drawn = [(run, pictures(out)) for run, out in runs]
    found = [analysis.read_series(out) for _, out in runs]
    models = [measured(out) for out in own(judged or [out for _, out in runs])]
    verdicts = claims.to_json(claims.judge(models))
    text = json.dumps(verdicts, indent=1, ensure_ascii=False)
    files.write_whole(f"{folder}/data/claims.json", f"{text}\n".encode())
    places = [(run, f["workdir"]) for (run, _), f in zip(runs, found, strict=True)]
    of_files = [
        (run, f) for (run, _), f in zip(runs, found, strict=True) if f.get("file")
    ]
    shown = (
        *first,
        files_found(of_files),
        replay.section(of_files),
        seeing(drawn, held_out=not of_files),
        looking(drawn),
        claimed(models, chosen),
    )
    shown += (timeline.section(places), *SECTIONS, alike(drawn), near(drawn))
    return write(
        folder,
        title=heading,
        runs=[*(run for run, _ in runs), *replay.backdrop(of_files, paper, runs)],
        lead=lead,
        sections=[s for s in shown if s],
        notes=notes,
    )


def own(folders: Sequence[str]) -> list[str]:
    """Those of our own training, if there are any: of a file nobody knows the seed."""
    ours = [out for out in folders if not analysis.read_series(out).get("file")]
    return ours or [*folders]


def files_found(of_files: Sequence[tuple[Run, dict]]) -> Section | None:
    """What the files said about themselves."""
    if not of_files:
        return None
    tables = tuple(
        Table(
            run.name,
            ("", "what was found"),
            [report_row(line) for line in found["file"]["report"].splitlines()[1:]],
            found["file"]["report"].splitlines()[0],
        )
        for run, found in of_files
    )
    text = "Tensors only were read; no code in a file is ever run."
    return Section("The files", text, tables=tables)


def report_row(line: str) -> tuple[str, str]:
    """A line of a report as (what kind of remark, the remark)."""
    kind, _, rest = line.strip().partition(": ")
    known = ("found", "images here", "assumed", "dropped", "missing", "WARNING")
    return (kind, rest) if kind.startswith(known) and rest else ("", line.strip())


def pictures(out: str) -> dict[str, np.ndarray]:
    """The arrays of pictures.npz, {} without it."""
    path = f"{out}/pictures.npz"
    return files.load_arrays(path) if epath.Path(path).exists() else {}


def seeing(drawn: Sequence[tuple[Run, dict]], held_out: bool) -> Section | None:
    """Masked reconstructions of those that make them.

    Args:
      held_out: whether it is known that none was trained on these images.
    """
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
        "MAE predicts them without their mean and contrast, which are put back here."
    )
    text += " These images were never trained on." if held_out else ""
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


def near(drawn: Sequence[tuple[Run, dict]]) -> Section | None:
    """The tokens of the last block, by t-SNE."""
    found = {
        run.name: scatter(p["token_map"], [f"class {x}" for x in p["token_label"]])
        for run, p in drawn
        if "token_map" in p
    }
    pictures = (tuple(found.values()),)
    galleries = [Gallery("t-SNE", "", tuple(found), pictures)] if found else []
    text = (
        "Every point is a patch token of the last block, its colour the class of its "
        "image (t-SNE, perplexity 20). The paper finds the tokens of contrastive "
        "learning in clusters, one for each image, and those of masked image modelling "
        "intermingled. A picture of t-SNE can mislead: purity, the share of the ten "
        "nearest tokens that are of the same image or class, and the silhouette are "
        "measured on the tokens themselves."
    )
    series = ("token purity", "token silhouette")
    return Section("Tokens near each other", text, series, galleries=galleries)


def alike(drawn: Sequence[tuple[Run, dict]]) -> Section | None:
    """CKA between models, which `compare` has added to their series."""
    series = [
        s.name for run, _ in drawn for s in run.series if "block of" in str(s.axes)
    ]
    text = (
        "CKA between the blocks of two models: 1 where both say the same about the "
        "images, up to a rotation; 0 where they are unrelated."
    )
    return Section("How alike the models are", text, series) if series else None


def claimed(models: Sequence[claims.Measured], chosen: str) -> Section:
    """The table of the paper's claims."""
    table = claims.table(models)
    table = dataclasses.replace(table, caption=f"{table.caption} {chosen}".strip())
    text = (
        "What the paper reports, as statements with a threshold, fixed before looking. "
        "A verdict needs three trainings from different seeds; with fewer the values "
        "stand there unjudged. Claims that cannot be measured here say what is missing."
    )
    return Section("The paper's claims", text, tables=(table,))


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
        "blocks and masked image modelling more local there. The aligned map is what a "
        "patch sees on average around itself, in the middle.",
        (
            "attention distance",
            "attention by distance",
            "aligned attention",
            "mean attention offset",
        ),
    ),
    Section(
        "How much attention depends on the query",
        "Normalised mutual information between query and key positions: 0 if every "
        "query looks at the same keys (attention collapse), 1 if each has its own. The "
        "paper (Fig. 4) finds it near 0 in the last blocks of contrastive learning. "
        "Uniform attention is 0 as well: its entropy tells the two apart.",
        (
            "normalized mutual information",
            "attention entropy",
            "mutual information",
            "key entropy",
            "deviation over queries",
            "cosine between heads",
            "attention mass on CLS",
            "null attention rows",
            "attention of CLS on patches",
            "attention rollout of CLS",
        ),
    ),
    Section(
        "How alike representations are",
        "CKA compares what heads, blocks or positions say about the same images: 0 for "
        "unrelated, 1 for the same up to a rotation. The paper (Fig. 5) finds heads, "
        "blocks and positions more alike in contrastive learning, most in late blocks.",
        (
            "CKA between heads",
            "CKA between positions",
            "CKA between depths",
            "CKA between depths, matrix",
            "CKA between taps, matrix",
            "CKA between heads, matrices",
        ),
    ),
    Section(
        "How much room tokens and images take",
        "Singular values of the covariance, as logarithms: of the tokens of one image "
        "(token level), and of the mean tokens of many images (image level). The paper "
        "(Fig. 7) finds that contrastive learning spreads images apart with depth and "
        "hardly the tokens within one; masked image modelling does the opposite.",
        (
            "token-level log singular value, mean over ranks",
            "image-level log singular value, mean over ranks",
            "token-level log singular values",
            "image-level log singular values",
            "CLS-level log singular value, mean over ranks",
            "CLS-level log singular values",
        ),
    ),
    Section(
        "How many dimensions are in use",
        "Effective ranks of the images' representations: few dimensions in use means "
        "that the representation collapses. They need no labels.",
        (
            "RankMe",
            "RankMe, centred",
            "effective rank",
            "participation ratio",
            "stable rank",
            "numerical rank",
            "alpha-ReQ",
            "alpha-ReQ, R squared",
            "LiDAR",
            "std of normalised features",
        ),
    ),
    Section(
        "What a block does to the tokens",
        "If attention moves all tokens of an image alike, the share of a common "
        "translation is 1 (Fig. 6). Tokens that grow alike have a cosine near 1 (over-"
        "smoothing). Displacement says how far a block moves them (Fig. 11).",
        (
            "translation share of attention updates",
            "translation share of MLP updates",
            "relative displacement",
            "displacement",
            "per-channel RMS displacement",
            "share of attention in displacement",
            "cosine of update and stream",
            "cosine between tokens",
            "cosine between centred tokens",
            "feature map variance",
        ),
    ),
    Section(
        "High and low frequencies",
        "Δ log amplitude: how much weaker the highest diagonal frequency of the token "
        "map is than its mean. Higher means more high-frequency detail. The paper "
        "(Fig. 8) finds masked image modelling above contrastive learning throughout.",
        (
            "delta log amplitude at the highest frequency",
            "delta log amplitude",
            "log amplitude",
            "radial log amplitude",
            "radial log amplitude, absolute",
            "log amplitude spectrum",
        ),
    ),
    Section(
        "What a linear probe and neighbours find",
        "A ridge regression on the mean patch token of each block names the class of "
        "held-out images. The paper (Fig. 10) finds contrastive learning best at its "
        "last block, masked image modelling in the middle.",
        (
            "ridge probe accuracy",
            *labelled.NAMES.values(),
            "ridge probe alpha",
            "k-NN accuracy",
            "k-NN accuracy, top 5",
        ),
    ),
)
