"""Measure a trained encoder over all parts of the data: saved, resumed, shared.

Every process measures its own images and saves its own states as it goes; in the end
each merges all, in the order of the processes.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from clvsmim import analysis
from clvsmim import mesh as meshes
from clvsmim.analysis import Analysis, Done
from clvsmim.data import HostView, Source
from clvsmim.data.crops import CenterCrop, RandomResizedCrop
from clvsmim.data.pipeline import eval_batches
from clvsmim.metrics import PARTS, Metric
from clvsmim.vit import ViT

Tree = Any


class Settings(NamedTuple):
    """Which images are measured, and how.

    Attributes:
      split: of the data that the encoder was trained on.
      images, skip: how many, after leaving out so many.
      train_images: of the split "train", for probes.
      batch: images in one forward; rounded up to what devices and metrics need.
      group: images in a mini-batch of CKA.
      metrics: their names.
      every: batches between two saves.
    """

    split: str = "test"
    images: int = 512
    skip: int = 0
    train_images: int = 2048
    batch: int = 64
    group: int = 64
    metrics: tuple[str, ...] = analysis.METRICS
    every: int = 50


class Subject(NamedTuple):
    """What is measured: an encoder with its weights, by its name, and its input.

    Anything that has a `spec` and an `apply` as a `ViT`: the decoder of MAE is another.
    """

    name: str
    encoder: ViT
    variables: Tree
    mean: Sequence[float]
    std: Sequence[float]


class Part(NamedTuple):
    """Some of the images, as one pass reads them; see `eval_batches`."""

    source: Source
    view: HostView
    limit: int
    skip: int = 0
    copies: int = 1

    @property
    def count(self) -> int:
        return self.copies * min(self.limit, len(self.source) - self.skip)


def eval_view(size: tuple[int, int]) -> CenterCrop:
    """Shorter side to 256/224 of the input, then its centre (the usual protocol)."""
    resize = round(max(size) * 256 / 224)
    return CenterCrop(name="eval", size=tuple(size), resize=resize, filter="bilinear")


def random_view(size: tuple[int, int]) -> RandomResizedCrop:
    """A fifth of the image or more, at random: the views of the part "views"."""
    return RandomResizedCrop(
        name="views",
        size=tuple(size),
        area=(0.2, 1.0),
        aspect=(3 / 4, 4 / 3),
        filter="bilinear",
    )


def make_parts(
    make_source: Callable[[str], Source],
    size: tuple[int, int],
    settings: Settings,
    metrics: dict[str, Metric],
    view: HostView | None = None,
) -> dict[str, Part]:
    """The parts that the metrics read, in the order in which they are measured.

    Args:
      view: how images are prepared, if not as `eval_view` does; the part "views" has
        its own crops.

    Raises:
      ValueError: too few images, or probes that would learn from what they measure.
    """
    measured = make_source(settings.split)
    view = view or eval_view(size)
    whole = Part(measured, view, settings.images, settings.skip)
    learning = analysis.reading(metrics, "train")
    least = analysis.unit(analysis.reading(metrics, "test"))
    if whole.count < least:
        need = f"one mini-batch of CKA, {least}" if least > 1 else "one"
        raise ValueError(
            f"{max(whole.count, 0)} images (of {len(measured)}, {settings.skip} left "
            f"out) are less than {need}; give more --images, a smaller --skip"
            + (" or a smaller --group (at least 4)" if least > 1 else "")
        )
    if learning and settings.split == "train":
        raise ValueError(
            f"--split=train is what {', '.join(learning)} would learn from; measure "
            "another split, or leave them out of --metrics"
        )
    parts = {"test": whole}  # also if no metric reads it: its images are counted
    if learning:
        images = make_source("train")
        parts["train"] = Part(images, view, settings.train_images)
    seeing = analysis.reading(metrics, "views")
    if seeing:
        copies = analysis.unit(seeing)
        limits = [m.limit // copies for m in seeing.values() if m.limit is not None]
        most = min([settings.images, *limits])
        parts["views"] = whole._replace(
            view=random_view(size), limit=most, copies=copies
        )
    return {name: parts[name] for name in PARTS if name in parts}


def measure(
    subject: Subject,
    parts: dict[str, Part],
    metrics: dict[str, Metric],
    *,
    stamp: dict[str, Any],
    out: str,
    settings: Settings,
) -> Analysis:
    """The states over all parts and processes; goes on with what `out` holds of it.

    Call `forget(out)` when the result has been saved.
    """
    mesh = meshes.make()
    plan = settings._asdict() | {"processes": jax.process_count(), "devices": mesh.size}
    del plan["every"]  # saves may come more or less often
    progress = Progress(out, stamp, plan)
    found, part, begin = progress.resume()
    names = list(parts)
    for name in names[names.index(part) if part else 0 :]:
        chosen, done = analysis.reading(metrics, name), begin
        if not chosen:
            continue
        count = begin.batches if begin else 0
        for so_far in one_pass(
            subject, name, parts[name], chosen, mesh, settings.batch, begin
        ):
            count, done = count + 1, None
            if count % settings.every == 0:
                done = so_far()
                progress.save(found.with_part(name, done), name, count)
        if done is None:
            done = so_far()
            progress.save(found.with_part(name, done), name, count)
        found, begin = found.with_part(name, done), None
    mine = f"{out}/state_{jax.process_index()}.npz"
    analysis.save(mine, found)
    sync("analysis states are written")
    files = (f"{out}/state_{i}.npz" for i in range(jax.process_count()))
    whole = functools.reduce(
        functools.partial(analysis.merge, metrics),
        (analysis.load(path)[0] for path in files),
    )
    for name, ids in whole.ids.items():
        want = parts[name].count // parts[name].copies
        if len(ids) != want:
            raise ValueError(
                f"measured {len(ids)} of {want} {name} images; remove the files "
                f"progress_* from {out} and start again"
            )
    return whole


def forget(out: str) -> None:
    """Remove what this process saved on the way."""
    sync("everybody has read the states")
    for path in (*_saves(out), f"{out}/state_{jax.process_index()}.npz"):
        epath.Path(path).unlink(missing_ok=True)


def one_pass(
    subject: Subject,
    name: str,
    part: Part,
    metrics: dict[str, Metric],
    mesh: jax.sharding.Mesh,
    batch: int,
    begin: Done | None,
) -> Iterator[Callable[[], Done]]:
    """`analysis.run` over one part, with a progress bar."""
    unit = mesh.size * analysis.unit(metrics)
    batch = -(-batch // unit) * unit  # padding is free of harm
    count, start = part.count, begin.batches if begin else 0
    data = eval_batches(
        part.source,
        part.view,
        batch=batch,
        process=jax.process_index(),
        processes=jax.process_count(),
        start=start,
        skip=part.skip,
        limit=part.limit,
        copies=part.copies,
    )
    passing = analysis.run(
        subject.encoder,
        subject.variables,
        data,
        metrics,
        mean=subject.mean,
        std=subject.std,
        mesh=mesh,
        part=name,
        begin=begin,
    )
    title = f"measuring {subject.name}, {name} images"
    first = min(start * batch, count)
    bar = tqdm(
        total=count,
        initial=first,
        unit=" images",
        desc=title,
        delay=1,
        disable=jax.process_index() > 0,  # one bar for all hosts
    )
    with bar:
        for so_far in passing:
            bar.update(min(batch, count - bar.n))
            yield so_far


class Progress:
    """What a process has measured so far, in two files by turns.

    A kill may come when some processes have saved and others have not; so each keeps
    the save before, and all go on from the newest that all have.
    """

    def __init__(self, out: str, stamp: dict[str, Any], plan: dict[str, Any]) -> None:
        self.stamp, self.plan = stamp, json.loads(json.dumps(plan))
        self.paths, self.saves = _saves(out), 0

    def save(self, found: Analysis, part: str, batches: int) -> None:
        """Save all of the parts before, and `part` as far as it is."""
        sync("the save before is written")
        self.saves += 1
        at = {"part": part, "batches": batches, "saves": self.saves}
        more = {"plan": self.plan, "at": at}
        analysis.save(self.paths[self.saves % 2], found, more)

    def resume(self) -> tuple[Analysis, str, Done | None]:
        """The analysis so far, the part to go on with ("": the first), and how far."""
        found = {}
        for path in filter(lambda path: epath.Path(path).exists(), self.paths):
            try:
                saved, more = analysis.load(path)
            except ValueError as error:
                print(f"not used: {error}", file=sys.stderr)
                continue
            if (saved.stamp, more["plan"]) == (self.stamp, self.plan):
                found[more["at"]["saves"]] = saved, more["at"]
        self.saves = _least(max(found, default=0))
        if self.saves not in found:
            return Analysis(self.stamp, {}, {}), "", None
        saved, at = found[self.saves]
        part = at["part"]
        states = {n: s[part] for n, s in saved.states.items() if part in s}
        return saved, part, Done(at["batches"], saved.ids[part], states)


def _saves(out: str) -> list[str]:
    process = jax.process_index()
    return [f"{out}/progress_{process}_{i}.npz" for i in range(2)]


def sync(what: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _least(number: int) -> int:
    """The least over all processes."""
    if jax.process_count() == 1:
        return number
    return int(np.min(multihost_utils.process_allgather(np.int32(number))))
