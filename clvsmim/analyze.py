"""Measure a trained encoder on held-out images and write a report.

    clvsmim analyze runs/simmim
    clvsmim analyze runs/simmim --images=2000 --metrics=distance,nmi --out=somewhere

Everything is measured in one pass over the images; probes need another one, over
training images. Stopped, it goes on where it last saved. Writes to WORKDIR/analysis:
report.html with figures and tables, series.json (every number), state.npz (sums that
`clvsmim merge` adds to those of other images), pictures.npz. The blocks of MAE's
decoder are measured too, in one more pass, and follow those of the encoder.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath

from clvsmim import (
    analysis,
    build,
    cli,
    files,
    hosts,
    meta,
    packed,
    pictures,
    plugin,
    tree,
)
from clvsmim.checkpoint import restore_params
from clvsmim.data.crops import to_image
from clvsmim.measure import Part, Settings, Subject, forget, make_parts, measure
from clvsmim.metrics import Series, continued
from clvsmim.objectives import Objective

Tree = Any


def main(argv: Sequence[str]) -> None:
    values, rest = cli.parse(__doc__, argv, _flags, positional="WORKDIR")
    if len(rest) != 1:
        raise ValueError(f"expected one WORKDIR of a training, got {len(rest)}")
    names = tuple(n for n in values.metrics.split(",") if n)
    for name in names:
        plugin.find("metrics", name)
    if not names:
        raise ValueError(f"--metrics names none; known: {', '.join(analysis.METRICS)}")
    if rest[0].startswith(packed.PREFIX) and not values.out:
        raise ValueError(f"where to? {rest[0]} ships with the package: give --out")
    out = values.out or f"{rest[0]}/analysis"
    given = {k: getattr(values, k) for k in Settings._fields}
    hosts.start(values)
    analyze(rest[0], out, Settings(**given | {"metrics": names}))
    if jax.process_index() == 0:
        from clvsmim import present  # matplotlib is slow to import

        print(present.one(out))


def _flags(values: flags.FlagValues) -> None:
    own, usual = {"flag_values": values}, Settings()
    hosts.define_flags(values)

    def integer(name: str, least: int, what: str) -> None:
        default = getattr(usual, name)
        flags.DEFINE_integer(name, default, what, lower_bound=least, **own)

    flags.DEFINE_string("out", "", "folder for the results; WORKDIR/analysis", **own)
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


class Trained(NamedTuple):
    """A trained run as its workdir holds it."""

    config: dict[str, Any]
    objective: Objective
    params: Tree
    extra: Tree
    step: int

    @property
    def variables(self) -> Tree:
        """{"params", "stats"} of the encoder."""
        return {"params": self.params["encoder"], "stats": self.extra["encoder"]}


def load(workdir: str) -> Trained:
    """The newest checkpoint of a run, arrays on the host.

    Raises:
      ValueError: the folder holds no run, or a checkpoint of another architecture.
    """
    workdir = packed.place(workdir)
    found = meta.read_meta(workdir)
    if found is None:
        raise ValueError(f"no run in {workdir}; expected a --workdir of clvsmim train")
    config = found["config"]
    # Whatever the training computed in: bfloat16 moves a Δ log amplitude by 0.04.
    exact = {**config["encoder"], "dtype": "float32", "remat": False}
    encoder = build.make_encoder(exact)
    objective = build.make_objective(encoder, config["input"], config["objective"])
    saved, step = restore_params(workdir)
    shapes = dict(
        zip(("params", "extra"), build.abstract_params(objective), strict=True)
    )
    if packed.is_packed(workdir):
        shapes = packed.kept(shapes)
    whole = jax.device_get(tree.strict(shapes, saved, f"the checkpoint in {workdir}"))
    return Trained(config, objective, whole["params"], whole["extra"], step)


def analyze(workdir: str, out: str, settings: Settings) -> list[Series]:
    """Measure the newest checkpoint of `workdir`, write states, series and pictures.

    Nothing is measured again if `out` holds the same measurement already.
    """
    run = load(workdir)
    encoder, data = run.objective.encoder, run.config["data"]
    source = build.make_source(data, settings.split)
    facts = analysis.facts_of(encoder, group=settings.group, classes=source.num_classes)
    metrics = analysis.make_metrics(settings.metrics, facts)
    parts = make_parts(
        lambda split: build.make_source(data, split),
        encoder.spec.image,
        settings,
        metrics,
    )
    stamp = {
        "clvsmim": meta.versions()["clvsmim"],
        "encoder": analysis.digest(run.variables),
        "data": {**data["source"], "split": settings.split},
        "input": run.config["input"],
        "metrics": settings.metrics,
        "facts": facts,
        "train_images": settings.train_images,
    }
    stamp = json.loads(json.dumps(stamp))
    asked = {"stamp": stamp, "images": parts["test"].count, "skip": settings.skip}
    done = analysis.read_series(out)
    if done and all(done.get(k) == v for k, v in asked.items()):
        return done["series"]
    meta.check_writable(out, "--out")
    name = run.config["objective"]["name"]
    subject = Subject(name, encoder, run.variables, **run.config["input"])
    whole = measure(subject, parts, metrics, stamp=stamp, out=out, settings=settings)
    series = analysis.series(metrics, whole.states)
    series += behind(run, parts["test"], stamp, out, settings)
    if jax.process_index() == 0:
        # Without it nothing here counts as measured, whatever else is from before.
        epath.Path(f"{out}/series.json").unlink(missing_ok=True)
        series += save_pictures(run, parts["test"], f"{out}/pictures.npz")
        analysis.save(f"{out}/state.npz", whole)
        about = {"config": run.config, "workdir": packed.place(str(workdir))}
        about |= {"step": run.step}
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
    name = f"the decoder of {run.config['objective']['name']}"
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
    import sys

    cli.run(sys.modules["__main__"])
