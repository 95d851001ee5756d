"""Measure a trained encoder on held-out images and write a report.

    clvsmim analyze runs/simmim
    clvsmim analyze runs/simmim --images=2000 --metrics=distance,nmi --out=somewhere

Writes to WORKDIR/analysis: report.html with figures and tables, series.json (every
number), state_0.npz (sums that can be merged with those of other images), pictures.npz.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from tqdm import tqdm

from clvsmim import analysis, build, cli, meta, pictures, plugin, tree
from clvsmim import mesh as meshes
from clvsmim.analysis import Analysis
from clvsmim.checkpoint import restore_params
from clvsmim.data import Source
from clvsmim.data.crops import CenterCrop
from clvsmim.data.pipeline import eval_batches
from clvsmim.metrics import Series
from clvsmim.objectives import Objective

Tree = Any


def main(argv: Sequence[str]) -> None:
    values, rest = cli.parse(__doc__, argv, _flags, positional="WORKDIR")
    if len(rest) != 1:
        raise ValueError(f"expected one WORKDIR of a training, got {len(rest)}")
    names = [n for n in values.metrics.split(",") if n]
    for name in names:
        plugin.find("metrics", name)
    if not names:
        raise ValueError(f"--metrics names none; known: {', '.join(analysis.METRICS)}")
    out = values.out or f"{rest[0]}/analysis"
    analyze(
        rest[0],
        out,
        split=values.split,
        images=values.images,
        batch=values.batch,
        metrics=names,
    )
    if jax.process_index() == 0:
        from clvsmim import present  # matplotlib is slow to import

        print(present.one(rest[0], out))


def _flags(values: flags.FlagValues) -> None:
    own = {"flag_values": values}
    flags.DEFINE_string("out", "", "folder for the results; WORKDIR/analysis", **own)
    flags.DEFINE_string("split", "test", "which images of the training's data", **own)
    flags.DEFINE_integer(
        "images", 512, "how many, the first ones", lower_bound=1, **own
    )
    flags.DEFINE_integer("batch", 64, "images in one forward", lower_bound=1, **own)
    known = ",".join(analysis.METRICS)
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
    whole = jax.device_get(tree.strict(shapes, saved, f"the checkpoint in {workdir}"))
    return Trained(config, objective, whole["params"], whole["extra"], step)


def eval_view(size: tuple[int, int]) -> CenterCrop:
    """Shorter side to 256/224 of the input, then its centre (the usual protocol)."""
    resize = round(max(size) * 256 / 224)
    return CenterCrop(name="eval", size=tuple(size), resize=resize, filter="bilinear")


def analyze(
    workdir: str,
    out: str,
    *,
    split: str,
    images: int,
    batch: int,
    metrics: Sequence[str],
) -> list[Series]:
    """Measure the newest checkpoint of `workdir`, write states, series and pictures.

    Nothing is measured again if `out` holds the same measurement already.
    """
    run = load(workdir)
    source = build.make_source(run.config["data"], split)
    stamp = {
        "clvsmim": meta.versions()["clvsmim"],
        "encoder": analysis.digest(run.variables),
        "data": {**run.config["data"]["source"], "split": split},
        "input": run.config["input"],
        "metrics": list(metrics),
    }
    stamp = json.loads(json.dumps(stamp))
    done = analysis.read_series(out)
    if done and done["stamp"] == stamp and done["images"] == min(images, len(source)):
        return done["series"]
    meta.check_writable(out, "--out")
    chosen = analysis.make_metrics(metrics, run.objective.encoder)
    whole = measure(run, source, out, stamp, chosen, images=images, batch=batch)
    series = analysis.series(chosen, whole.states)
    if jax.process_index() == 0:
        save_pictures(run, source, f"{out}/pictures.npz")
        plain = {"stamp": stamp, "step": run.step, "images": len(whole.ids)}
        plain["series"] = [s.to_json() for s in series]
        text = json.dumps(plain, indent=1, allow_nan=False)
        analysis.write_whole(f"{out}/series.json", text.encode())
    return series


def measure(
    run: Trained,
    source: Source,
    out: str,
    stamp: dict[str, Any],
    metrics: dict,
    *,
    images: int,
    batch: int,
) -> Analysis:
    """States over all processes; each writes its own file, then all are merged."""
    mesh = meshes.make()
    batch = -(-batch // mesh.size) * mesh.size  # padding is free of harm
    count = min(images, len(source))
    data = eval_batches(
        source,
        eval_view(run.objective.encoder.spec.image),
        batch=batch,
        process=jax.process_index(),
        processes=jax.process_count(),
        limit=count,
    )
    title = f"measuring {run.config['objective']['name']}"
    with tqdm(total=count, unit=" images", desc=title, delay=1) as bar:
        states, ids = analysis.run(
            run.objective.encoder,
            run.variables,
            data,
            metrics,
            mesh=mesh,
            seen=lambda n: bar.update(min(n * jax.process_count(), count - bar.n)),
            **run.config["input"],
        )
    mine = Analysis(stamp, ids, states)
    analysis.save(f"{out}/state_{jax.process_index()}.npz", mine)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("analysis states are written")
    others = range(1, jax.process_count())
    whole = analysis.load(f"{out}/state_0.npz")
    for process in others:
        part = analysis.load(f"{out}/state_{process}.npz")
        whole = analysis.merge(metrics, whole, part)
    return whole


def save_pictures(run: Trained, source: Source, path: str, rows: int = 4) -> None:
    """Attention maps of two queries on one image, and some reconstructions."""
    spec, colour = run.objective.encoder.spec, run.config["input"]
    data = eval_batches(source, eval_view(spec.image), batch=rows, limit=rows)
    images = next(iter(data))["views"][0]
    places = pictures.queries(spec.grid)
    arrays = {"image": images[0], "places": np.array(places)}
    arrays["attention"] = pictures.attention_maps(
        run.objective.encoder, run.variables, images[0], places=places, **colour
    )
    if run.objective.reconstruct:
        seen = pictures.reconstructions(
            run.objective, run.params, run.extra, images, seed=0, **colour
        )
        arrays |= dict(zip(("original", "mask", "reconstruction"), seen, strict=True))
    analysis.save_arrays(path, arrays)


if __name__ == "__main__":
    import sys

    cli.run(sys.modules["__main__"])
