"""Measure a trained encoder on held-out images and write a report.

    clvsmim analyze runs/simmim
    clvsmim analyze runs/simmim --images=2000 --metrics=distance,nmi --out=somewhere
    clvsmim analyze vit-b-300ep.pth.tar --data=/data/imagenet --out=moco
    clvsmim analyze mae.pth dino.pth runs/simmim --data=photos/ --out=side_by_side

A checkpoint FILE of another library (docs/checkpoints.md) stands where a WORKDIR does;
--data is a folder of images for it: DIR/train and DIR/val, or any other folder, of
which nothing is learned then. Every file gets the images as its own code prepares them.
Several are measured into OUT/NAME each, and compared in OUT/report.html.

Everything is measured in one pass over the images; probes need another one, over
training images. Stopped, it goes on where it last saved. Writes to WORKDIR/analysis:
report.html with figures and tables, series.json (every number), state.npz (sums that
`clvsmim merge` adds to those of other images), pictures.npz. The blocks of MAE's
decoder are measured too, in one more pass, and follow those of the encoder.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath

from clvsmim import (
    analysis,
    build,
    cli,
    files,
    foreign,
    hosts,
    meta,
    packed,
    pictures,
    plugin,
)
from clvsmim.data import folder
from clvsmim.data.crops import to_image
from clvsmim.measure import Part, Settings, Subject, forget, make_parts, measure
from clvsmim.metrics import Series, continued
from clvsmim.trained import Trained, check, load

__all__ = ["Trained", "analyze", "load", "main"]

Tree = Any


def main(argv: Sequence[str]) -> None:
    values, rest = cli.parse(__doc__, argv, _flags, positional="WORKDIR or FILE ...")
    if not rest:
        raise ValueError("expected a WORKDIR of a training, or a checkpoint FILE")
    names = tuple(n for n in values.metrics.split(",") if n)
    for name in names:
        plugin.find("metrics", name)
    if not names:
        raise ValueError(f"--metrics names none; known: {', '.join(analysis.METRICS)}")
    shipped = rest[0].startswith(packed.PREFIX)
    if (shipped or len(rest) > 1 or foreign.find(rest[0])) and not values.out:
        why = "several are compared" if len(rest) > 1 else f"{rest[0]} is no workdir"
        why = f"{rest[0]} ships with the package" if shipped else why
        raise ValueError(f"where to? {why}: give --out")
    for run in rest:
        check(run)
    out = values.out or f"{rest[0]}/analysis"
    given = {k: getattr(values, k) for k in Settings._fields}
    settings = Settings(**given | {"metrics": names})
    hosts.start(values)
    places = [out] if len(rest) == 1 else [f"{out}/{n}" for n in short_names(rest)]
    for run, place in zip(rest, places, strict=True):
        analyze(run, place, settings, values.data)
    if jax.process_index() == 0:
        from clvsmim import compare, present  # matplotlib is slow to import

        if len(rest) == 1:
            print(present.one(out, paper=values.paper))
        else:
            print(compare.compare(places, out, paper=values.paper))


def short_names(runs: Sequence[str]) -> list[str]:
    """A folder's name for each run: the last part of its path, numbered if need be."""
    found: list[str] = []
    for run in runs:
        name = foreign.name_of(run.removeprefix(packed.PREFIX).rstrip("/"))
        taken = sum(other == name or other.startswith(f"{name}-") for other in found)
        found.append(f"{name}-{taken + 1}" if taken else name)
    return found


def _flags(values: flags.FlagValues) -> None:
    own, usual = {"flag_values": values}, Settings()
    hosts.define_flags(values)

    def integer(name: str, least: int, what: str) -> None:
        default = getattr(usual, name)
        flags.DEFINE_integer(name, default, what, lower_bound=least, **own)

    flags.DEFINE_string("out", "", "folder for the results; WORKDIR/analysis", **own)
    what = "folder of images to measure on, instead of the training's data"
    flags.DEFINE_string("data", "", what, **own)
    what = "draw the paper's curves of MoCo v3, SimMIM and MAE behind"
    flags.DEFINE_bool("paper", False, what, **own)
    what = "which images of the training's data"
    flags.DEFINE_string("split", usual.split, what, **own)
    integer("images", 1, "how many")
    integer("skip", 0, "leave out so many, the first ones")
    integer("train_images", 1, "how many training images the probes learn from")
    integer("batch", 1, "images in one forward")
    integer("group", 4, "images in a mini-batch of CKA")
    integer("every", 1, "batches between two saves")
    known = ",".join(usual.metrics)
    flags.DEFINE_string("metrics", known, "what to measure, by commas", **own)


def images_for(run: Trained, data: str, workdir: str) -> dict[str, Any]:
    """The section `data` to measure on: of the run, or a folder of images.

    Raises:
      ValueError: a file, and no folder.
    """
    if data:
        return {
            "source": folder.section(data),
            "workers": 0,
            "threads": 1,
            "prefetch": 2,
            "unreadable": 100,
        }
    if "data" not in run.config:
        raise ValueError(
            f"{workdir} is a network from a file, which has no images; name a folder "
            "of images: --data=DIR"
        )
    return run.config["data"]


def without_learning(
    metrics: dict[str, Any], where: dict[str, Any], classes: int
) -> dict[str, Any]:
    """The metrics that a folder of images allows, with a line about the others: where
    it has no training images or no classes, nothing can be learned.

    Raises:
      ValueError: some were left out already, so those that remain are meant.
    """
    learning = analysis.reading(metrics, "train")
    split = where["train"] != where["test"]
    if not learning or (split and classes > 1):
        return metrics
    why = "folders of classes" if split else "train/ beside val/ to learn from"
    text = f"not measured: {', '.join(learning)}, for {where['path']} has no {why}"
    if tuple(metrics) != analysis.METRICS:
        raise ValueError(f"{text}; leave them out of --metrics")
    print(f"clvsmim analyze: {text}", file=sys.stderr)
    return {name: m for name, m in metrics.items() if name not in learning}


def analyze(workdir: str, out: str, settings: Settings, data: str = "") -> list[Series]:
    """Measure the newest checkpoint of `workdir`, write states, series and pictures.

    Nothing is measured again if `out` holds the same measurement already.

    Args:
      workdir: or a checkpoint file.
      data: a folder of images, instead of the run's own data.
    """
    run = load(workdir)
    section = images_for(run, data, workdir)
    if run.file and jax.process_index() == 0:
        print(run.file["report"], file=sys.stderr)
    encoder = run.objective.encoder
    source = build.make_source(section, settings.split)
    facts = analysis.facts_of(encoder, group=settings.group, classes=source.num_classes)
    metrics = analysis.make_metrics(settings.metrics, facts)
    if data:
        metrics = without_learning(metrics, section["source"], source.num_classes)
        settings = settings._replace(metrics=tuple(metrics))
    transform = foreign.transform_of(run.file) if run.file else None
    parts = make_parts(
        lambda split: build.make_source(section, split),
        encoder.spec.image,
        settings,
        metrics,
        foreign.view(transform) if transform else None,
    )
    stamp = {
        "clvsmim": meta.versions()["clvsmim"],
        "encoder": analysis.digest(run.variables),
        "data": {**section["source"], "split": settings.split},
        "input": run.config["input"],
        "metrics": settings.metrics,
        "facts": facts,
        "train_images": settings.train_images,
    }
    stamp |= {"transform": str(transform)} if transform else {}
    stamp = json.loads(json.dumps(stamp))
    asked = {"stamp": stamp, "images": parts["test"].count, "skip": settings.skip}
    done = analysis.read_series(out)
    if done and all(done.get(k) == v for k, v in asked.items()):
        return done["series"]
    meta.check_writable(out, "--out")
    subject = Subject(run.name, encoder, run.variables, **run.config["input"])
    whole = measure(subject, parts, metrics, stamp=stamp, out=out, settings=settings)
    series = analysis.series(metrics, whole.states)
    series += behind(run, parts["test"], stamp, out, settings)
    if jax.process_index() == 0:
        # Without it nothing here counts as measured, whatever else is from before.
        epath.Path(f"{out}/series.json").unlink(missing_ok=True)
        series += save_pictures(run, parts["test"], f"{out}/pictures.npz")
        analysis.save(f"{out}/state.npz", whole)
        about = {"config": run.config, "step": run.step}
        # A probe of a file is looked for where its analysis is.
        place = packed.place(str(workdir))
        about["workdir"] = out if foreign.find(place) else place
        about |= {"file": run.file} if run.file else {}
        analysis.write_series(out, series, asked | about)
    for place in (out, decoder_of(out)):
        forget(place)
    return series


def decoder_of(out: str) -> str:
    """The folder for the states of a decoder, beside those of its encoder."""
    return f"{out}/decoder"


def behind(
    run: Trained, part: Part, stamp: dict[str, Any], out: str, settings: Settings
) -> list[Series]:
    """Measure the decoder, if there is one to measure: whole images, nothing hidden."""
    file = epath.Path(f"{decoder_of(out)}/state.npz")
    names = [n for n in analysis.DECODER_METRICS if n in settings.metrics]
    if not (run.objective.decoder and names):
        file.unlink(missing_ok=True)
        return []
    model, variables = run.objective.decoder(run.params, run.extra)
    classes = stamp["facts"]["classes"]
    facts = analysis.facts_of(model, group=settings.group, classes=classes)
    metrics = analysis.make_metrics(names, facts)
    depth = run.objective.encoder.spec.depth
    own = {"encoder": analysis.digest(variables), "metrics": names, "facts": facts}
    own = json.loads(json.dumps({**stamp, **own, "behind": depth}))
    name = f"the decoder of {run.name}"
    subject = Subject(name, model, variables, **run.config["input"])
    where = {"stamp": own, "out": decoder_of(out), "settings": settings}
    whole = measure(subject, {"test": part}, metrics, **where)
    if jax.process_index() == 0:
        analysis.save(str(file), whole)
    return [continued(s, depth) for s in analysis.series(metrics, whole.states)]


def save_pictures(run: Trained, part: Part, path: str, rows: int = 4) -> list[Series]:
    """Attention maps of two queries, some reconstructions, the tokens of some images.

    Returns what was measured on the tokens.
    """
    encoder, colour = run.objective.encoder, run.config["input"]
    images, labels = few(part, range(min(rows, part.count)))
    places = pictures.queries(encoder.spec.grid)
    arrays = {"image": images[0], "places": np.array(places)}
    arrays["attention"] = pictures.attention_maps(
        encoder, run.variables, images[0], places=places, **colour
    )
    if run.objective.reconstruct:
        seen = pictures.reconstructions(
            run.objective, run.params, run.extra, images, seed=0, **colour
        )
        arrays |= dict(zip(("original", "mask", "reconstruction"), seen, strict=True))
    among = [part.source[part.skip + i]["label"] for i in range(min(part.count, 256))]
    images, labels = few(part, pictures.choose(among))
    tokens = pictures.patch_tokens(encoder, run.variables, images, **colour)
    finite = all(np.isfinite(x).all() for x in tokens)
    if not finite:  # a diverged encoder; the metrics say so
        files.save_arrays(path, arrays)
        return []
    arrays["token_map"] = pictures.token_map(np.concatenate(tokens[-1]))
    arrays["token_label"] = np.repeat(labels, tokens[-1].shape[1])
    files.save_arrays(path, arrays)
    return pictures.clusters(tokens, labels)


def few(part: Part, places: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, rows, columns, 3) and labels (n,) at some places of a part."""
    items = [part.source[part.skip + place] for place in places]
    images = [part.view(to_image(item["image"]), None) for item in items]
    return np.stack(images), np.array([item["label"] for item in items])


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
