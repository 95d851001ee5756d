"""Show what a config will train on, before a long run: counts, speed, pictures.

    clvsmim inspect-data --config=configs/demo.py:simmim --out=inspect
    clvsmim inspect-data --config=... --images_per_second=2400

Opens a sample of each split, times the host's pipeline as the config sets it, and
writes OUT/views.png, the first images of the first step as the objective's own
`prepare` makes them, with masks and mixed labels, and OUT/data.json, all numbers. What
is wrong is a line that begins with "!". Needs no accelerator and no checkpoint, and
runs beside a training: it computes on the CPU.

--images_per_second is what your step takes (as the log of a run says, or a benchmark);
with it the answer is whether this host can feed it.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from clvsmim import build, cli, meta, tree, views
from clvsmim.data import HostView, Source, Unreadable
from clvsmim.data.crops import to_image
from clvsmim.data.pipeline import batches
from clvsmim.objectives import Objective

Facts = dict[str, Any]
BAR = {"leave": False, "disable": None}  # on stderr, if that is a terminal
# Keys of an objective that change what its pictures or targets look like.
LOOKS = ("flip_p", "mask_unit", "mask_ratio", "erasing", "mix", "smoothing")


def main(argv: Sequence[str]) -> None:
    values, _ = cli.parse(__doc__, argv, _flags)
    config = cli.config_of(values)
    jax.config.update("jax_platforms", "cpu")
    facts = inspect(
        config,
        values.out,
        images=values.images,
        seconds=values.seconds,
        rows=values.rows,
        asked=values.images_per_second,
    )
    print("\n".join(lines(facts)))
    print(f"open {epath.Path(values.out) / 'views.png'}")


def _flags(values: flags.FlagValues) -> None:
    own = {"flag_values": values}
    cli.define_config(values)
    flags.DEFINE_string("out", "inspect", "folder for the results", **own)
    what = "how many images of each split to open"
    flags.DEFINE_integer("images", 1000, what, lower_bound=1, **own)
    what = "how long to time the pipeline, twice"
    flags.DEFINE_float("seconds", 10.0, what, lower_bound=0.1, **own)
    what = "images on the contact sheet"
    flags.DEFINE_integer("rows", 4, what, lower_bound=2, upper_bound=64, **own)
    what = "what the step takes, 0 if you do not know"
    flags.DEFINE_float("images_per_second", 0.0, what, lower_bound=0.0, **own)


def inspect(
    config: ConfigDict,
    out: str,
    *,
    images: int,
    seconds: float,
    rows: int,
    asked: float,
) -> Facts:
    """Write `out`/data.json and `out`/views.png; returns what the first holds.

    Args:
      images: how many images of each split to open, spread over it.
      seconds: how long to time each of the two arrangements of the pipeline.
      rows: images on the contact sheet, an even number where labels are mixed.
      asked: images per second that the step takes, 0 if that is not known.

    Raises:
      ValueError: a config, a source or a label that training would refuse too.
    """
    settings = build.plain(config)
    encoder = build.make_encoder(settings["encoder"])
    objective = build.make_objective(encoder, settings["input"], settings["objective"])
    train = build.make_source(settings["data"], "train")
    meta.check_writable(out, "--out")
    splits, problems = {"train": describe(train, "train", images)}, []
    try:
        test = build.make_source(settings["data"], "test")
        splits["test"] = describe(test, "test", images)
    except ValueError as error:  # of use to an evaluation and an analysis alone
        problems.append(f"no test split: {error}")
    steps = len(train) // settings["batch"]
    facts = {
        "splits": splits,
        "batch": settings["batch"],
        "steps_per_epoch": steps,
        "steps": round(steps * settings["epochs"]),
        "speed": speed(train, objective.views, settings, seconds) | {"asked": asked},
    }
    facts["problems"] = problems + find_problems(facts, settings)
    batch, columns, targets = look(train, objective, settings, rows)
    facts["columns"] = [column.caption for column in columns]
    picture = sheet(train, batch, columns, targets)
    (epath.Path(out) / "views.png").write_bytes(picture)
    (epath.Path(out) / "data.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


# Counts


def describe(source: Source, split: str, images: int) -> Facts:
    """What `images` images spread over a split say about it; labels of all, if given.

    Sizes are (smallest, median, largest) in pixels; images that cannot be read have
    none.
    """
    places = np.unique(np.linspace(0, len(source) - 1, min(images, len(source))))
    found, sizes, unreadable = [], [], []
    for i in tqdm(places.astype(int), f"opening {split}", **BAR):
        try:
            item = source[i]
            found.append(item["label"])
            sizes.append(_size(item["image"]))
            to_image(item["image"])
        except Unreadable as error:
            unreadable.append(str(error))
    labels = getattr(source, "labels", None)  # where they cost no image
    counted = labels if labels is not None else found
    sides = np.array(sizes or [(0, 0)])
    return {
        "images": len(source),
        "classes": source.num_classes,
        "opened": len(places),
        "unreadable": unreadable,
        "per_class": per_class(counted, source) | {"of": len(counted)},
        "width": _spread(sides[:, 0]),
        "height": _spread(sides[:, 1]),
        "shorter_side": _spread(sides.min(1)),
    }


def per_class(labels: Sequence[int], source: Source) -> Facts:
    """{"min", "median", "max", "fewest", "most", "empty"}: images per class.

    Raises:
      ValueError: a label that is no class.
    """
    labels = np.asarray(labels, np.int64)
    count, names = source.num_classes, source.class_names
    if len(labels) and not 0 <= labels.min() <= labels.max() < count:
        worst = labels.max() if labels.min() >= 0 else labels.min()
        raise ValueError(
            f"{source.name} has the label {worst}, expected 0 to {count - 1}; "
            "set data.source.classes"
        )
    each = np.bincount(labels, minlength=count)
    return _spread(each) | {
        "fewest": names[int(each.argmin())],
        "most": names[int(each.argmax())],
        "empty": int((each == 0).sum()),
    }


def _size(image: Any) -> tuple[int, int]:
    """(width, height) of a Pillow image or of an array (h, w, 3)."""
    return image.shape[1::-1] if isinstance(image, np.ndarray) else image.size


def _spread(x: np.ndarray) -> Facts:
    return {"min": int(x.min()), "median": float(np.median(x)), "max": int(x.max())}


# Speed


def speed(
    source: Source, crops: Sequence[HostView], settings: Facts, seconds: float
) -> Facts:
    """Images per second of decoding and cropping: as configured, and on one core.

    In batches of 32, for a batch of thousands takes as long as the whole measurement.
    """
    data = build.loader_section(**settings["data"])
    alone = data | {"workers": 0, "threads": 0}
    found = {}
    for name, options in (("images_per_second", data), ("one_core", alone)):
        # The batches that were ready before the clock started are left out.
        ready = (options["prefetch"] + 1) * (options["workers"] + 1)
        ready = ready if options["threads"] else 1
        stream = batches(source, crops, batch=32, seed=settings["seed"], **options)
        with contextlib.closing(stream):
            found[name] = rate(stream, ready, seconds, f"timing {name}") * 32
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        **{k: round(v, 1) for k, v in found.items()},
        "cores": cores,
        "workers": data["workers"],
        "threads": data["threads"],
        "per_core": round(found["images_per_second"] / cores, 1),
    }


def rate(stream: Iterable, ready: int, seconds: float, what: str) -> float:
    """Items per second of a stream after the first `ready`, over some seconds."""
    form = "{desc} {bar} {n:.0f} of {total:.0f} s"
    with tqdm(total=seconds, desc=what, bar_format=form, **BAR) as bar:
        taken = sum(1 for _ in itertools.islice(stream, ready))
        assert taken == ready  # the stream is endless
        begun, count = time.monotonic(), 0
        for _ in stream:
            count, passed = count + 1, time.monotonic() - begun
            bar.update(min(passed, seconds) - bar.n)
            if passed >= seconds:
                return count / passed
    raise AssertionError("the stream ended")


def find_problems(facts: Facts, settings: Facts) -> list[str]:
    """What is wrong, a line each."""
    found = []
    for split, it in facts["splits"].items():
        if bad := it["unreadable"]:
            found.append(
                f"{split}: {len(bad)} of {it['opened']} images opened are unreadable, "
                f"such as: {bad[0]}"
            )
        whole = it["per_class"]["of"] == it["images"]
        if whole and it["per_class"]["empty"]:
            found.append(
                f"{split}: {it['per_class']['empty']} of {it['classes']} classes have "
                f"no image, such as {it['per_class']['fewest']}"
            )
    if not facts["steps_per_epoch"]:
        found.append(
            f"batch {settings['batch']} is larger than the "
            f"{facts['splits']['train']['images']} images"
        )
    at, want = facts["speed"], facts["speed"]["asked"]
    if want > at["images_per_second"]:
        best = at["one_core"] * at["cores"]
        found.append(
            f"the host makes {at['images_per_second']:.0f} images/s and the step takes "
            f"{want:.0f}: "
            + (
                f"raise data.workers ({at['workers']} now, {at['cores']} cores, "
                f"{at['one_core']:.0f} images/s each)"
                if best >= want
                else f"use a host of {-(-want // at['one_core']):.0f} cores, not "
                f"{at['cores']}, or store smaller images"
            )
        )
    return found


# The contact sheet


class Column(NamedTuple):
    """A kind of picture: (B, rows, columns, 3) in [0, 1], and what it is."""

    caption: str
    images: np.ndarray


def look(
    source: Source, objective: Objective, settings: Facts, rows: int
) -> tuple[dict, list[Column], np.ndarray | None]:
    """(batch, columns, targets (B, classes) if labels are mixed) of step 0."""
    options = build.loader_section(**settings["data"])
    options |= {"batch": rows, "seed": settings["seed"], "workers": 0, "threads": 0}
    with contextlib.closing(batches(source, objective.views, **options)) as stream:
        batch = next(stream)
    key = jax.random.fold_in(jax.random.key(settings["seed"]), 0)  # as the step does
    inputs = jax.jit(functools.partial(objective.prepare, train=True))(key, batch)
    leaves = tree.named(inputs) if isinstance(inputs, dict | tuple) else {"": inputs}
    leaves = {name: np.asarray(x) for name, x in leaves.items()}
    parts = {objective.name: settings["objective"]}
    # A mixture of methods hands each the inputs under its name.
    parts |= {
        part["name"]: part
        for part in settings["objective"].values()
        if isinstance(part, dict) and "name" in part
    }
    columns, taken = [], {}
    for name, x in leaves.items():
        if x.ndim != 4 or x.shape[-1] != 3:
            continue
        folder = name.rpartition("/")[0]
        part = next((p for p in reversed(parts) if f"{name}/".startswith(f"{p}/")), "")
        part = part or objective.name
        number = taken[part] = taken.get(part, 0) + 1
        crops = [v for v in objective.views if v.name.startswith(f"{part}/")]
        crops = crops or list(objective.views)
        recipe = describe_view(crops[number - 1], parts[part], number)
        back = functools.partial(views.denormalise, **settings["input"])
        shown = np.clip(jax.vmap(back)(x.astype(np.float32)) / 255, 0, 1)
        columns.append(Column(f"{part}, view {number}\n{recipe}", shown))
        mask = leaves.get(f"{folder}/mask" if folder else "mask")
        if mask is not None:
            columns.append(masked(shown, mask, objective.encoder.spec.grid))
    width = source.num_classes
    targets = [x for x in leaves.values() if x.ndim == 2 and x.shape[1] == width]
    targets = [x for x in targets if np.allclose(x.sum(1), 1, atol=1e-3)]
    return batch, columns, targets[0] if targets else None


def describe_view(crop: HostView, section: Facts, number: int) -> str:
    """The recipe of view `number` (from 1): its crop, then what the device does."""
    text = _flat(dataclasses.asdict(crop)) if dataclasses.is_dataclass(crop) else {}
    own = f"view_{number}"
    if own in section:
        text |= section[own]
    else:
        text |= {k: section[k] for k in LOOKS if k in section}
    parts = (f"{k.replace('_', ' ')} {_short(v)}" for k, v in text.items() if v)
    return ", ".join(parts)


def _flat(fields: Facts) -> Facts:
    """The settings of a crop and of the crop inside it, but names and sizes."""
    inner = [_flat(v) for v in fields.values() if isinstance(v, dict)]
    own = {k: v for k, v in fields.items() if not isinstance(v, dict)}
    found = functools.reduce(dict.__or__, inner, own)
    return {k: v for k, v in found.items() if k not in ("name", "size")}


def _short(value: Any) -> str:
    """A setting in few letters."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + ")"
    if isinstance(value, tuple | list):
        return " to ".join(map(_short, value)) if len(value) == 2 else str(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def masked(images: np.ndarray, mask: np.ndarray, grid: tuple[int, int]) -> Column:
    """The images with what the encoder does not see in grey."""
    from clvsmim.report.images import masked as grey

    hidden = mask.reshape(len(mask), *grid)
    share = f"{hidden.mean():.0%} of the patches hidden"
    shown = [grey(a, m) / 255 for a, m in zip(images, hidden, strict=True)]
    return Column(f"what of it is masked\n{share}", np.stack(shown))


def sheet(
    source: Source, batch: dict, columns: Sequence[Column], targets: np.ndarray | None
) -> bytes:
    """The PNG: a row per image, the original first."""
    import matplotlib  # slow to import

    from clvsmim.report import canvas, images, style

    rows, names = len(batch["label"]), source.class_names
    originals = [np.asarray(to_image(source[i]["image"])) for i in batch["index"]]
    first = Column("original\nas the source has it", originals)
    wrap = functools.partial(style.wrap, width=34)
    captions = ["\n".join(map(wrap, c.caption.split("\n"))) for c in (first, *columns)]
    top = 0.3 + 0.12 * max(caption.count("\n") for caption in captions)
    across = len(captions)
    with matplotlib.rc_context(style.RC | {"figure.dpi": 110}):
        size = (2.3 * across, 2.6 * rows + top)
        figure = matplotlib.figure.Figure(figsize=size, layout="compressed")
        axes = figure.subplots(rows, across, squeeze=False)
        for (i, line), (j, column) in itertools.product(
            enumerate(axes), enumerate((first, *columns))
        ):
            line[j].imshow(column.images[i])
            line[j].set(xticks=[], yticks=[])
            line[j].spines[:].set_visible(False)
            if not i:
                line[j].set_title(captions[j], fontsize=6.5)
        for line, i, label, index in zip(
            axes, range(rows), batch["label"], batch["index"], strict=True
        ):
            height, width = originals[i].shape[:2]
            text = f"{names[label]}, image {index}\n{width} x {height} pixels"
            line[0].set_xlabel(text, fontsize=6.5)
            if targets is not None:
                line[1].set_xlabel(target(targets[i], names), fontsize=6.5)
        return images.to_png(trimmed(canvas.to_array(figure)))


def trimmed(picture: np.ndarray, margin: int = 12) -> np.ndarray:
    """Without its white borders, but for a margin."""
    for _ in range(2):  # rows, then columns
        used = np.flatnonzero((picture < 255).any((1, 2)))
        picture = picture[max(0, used[0] - margin) : used[-1] + 1 + margin]
        picture = picture.swapaxes(0, 1)
    return picture


def target(shares: np.ndarray, names: Sequence[str]) -> str:
    """The classes of a mixed label, at most two, and their shares.

    What smoothing gives to every class is not worth a line.
    """
    first, second = np.argsort(-shares)[:2]
    floor = 2 * shares.min() if len(shares) > 2 else 0.0
    shown = (first, second) if shares[second] > floor else (first,)
    return "\n".join(f"{shares[i]:.2f} {names[i]}" for i in shown)


def lines(facts: Facts) -> list[str]:
    """The facts in words."""
    found = []
    for split, it in facts["splits"].items():
        each, w, h = it["per_class"], it["width"], it["height"]
        found.append(f"{split:8}{it['images']} images, {it['classes']} classes")
        some = "" if each["of"] == it["images"] else f" (in a sample of {each['of']})"
        found.append(
            f"        per class{some}: {each['min']} ({each['fewest']}) to "
            f"{each['max']} ({each['most']}), median {each['median']:g}"
        )
        found.append(
            f"        width {w['min']} to {w['max']} pixels, median {w['median']:g}; "
            f"height {h['min']} to {h['max']}, median {h['median']:g}; "
            f"{len(it['unreadable'])} of {it['opened']} opened are unreadable"
        )
    at = facts["speed"]
    found.append(
        f"steps   {facts['steps_per_epoch']} per epoch, {facts['steps']} in all, of "
        f"{facts['batch']} images"
    )
    each = facts["batch"] / at["images_per_second"]
    found.append(
        f"host    {at['images_per_second']:.0f} images/s with {at['workers']} workers "
        f"of {at['threads']} threads ({at['per_core']:.0f} per core of {at['cores']}; "
        f"one core alone {at['one_core']:.0f}): {each:.3g} s for a batch"
    )
    if 0 < at["asked"] <= at["images_per_second"]:
        share = at["asked"] / at["images_per_second"]
        found.append(f"        feeds the step's {at['asked']:.0f}, {share:.0%} busy")
    return found + [f"! {problem}" for problem in facts["problems"]]


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
