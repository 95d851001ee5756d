"""One jitted forward of an encoder with every requested metric inside it.

Images in, per-image rows out; the rows become float64 states on the host, which merge
over batches, processes and runs, and turn into Series at the end.
"""

import functools
import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from clvsmim import mesh as meshes
from clvsmim import plugin, tree, views
from clvsmim.files import load_arrays, save_arrays, write_whole
from clvsmim.metrics import PLACES, Metric, Series, over_each
from clvsmim.vit import ViT

Tree = Any
LABELS = ("label", "index")  # of an image; arrays of a batch and features
# What is measured unless told otherwise.
METRICS = (
    "distance",
    "nmi",
    "offsets",
    "rollout",
    "diversity",
    "cka",
    "grams",
    "smoothing",
    "variance",
    "displacement",
    "spectrum",
    "rank",
    "fourier",
    "amplitude",
    "probe",
    "knn",
)
# What makes sense on the blocks of a decoder too.
DECODER_METRICS = (
    "distance",
    "nmi",
    "offsets",
    "diversity",
    "smoothing",
    "variance",
    "displacement",
    "spectrum",
    "fourier",
    "amplitude",
)


def make_metrics(names: Sequence[str], facts: dict[str, Any]) -> dict[str, Metric]:
    """Metrics by name, each given those of `facts` that it asks for."""
    return {name: _make_metric(name, tuple(facts.items())) for name in names}


@functools.cache  # equal metrics are one, so that a step is compiled once
def _make_metric(name: str, facts: tuple) -> Metric:
    return plugin.load_with("metrics", name, dict(facts))


def facts_of(encoder: ViT, *, group: int, classes: int) -> dict[str, Any]:
    """What metrics may ask for: of the encoder, of CKA's mini-batch, of the data."""
    spec = encoder.spec
    return {
        "grid": spec.grid,
        "patch": spec.patch,
        "prefix": spec.prefix,
        "depth": spec.depth,
        "group": group,
        "classes": classes,
    }


def reading(metrics: dict[str, Metric], part: str) -> dict[str, Metric]:
    """The metrics that read a part of the images."""
    return {name: m for name, m in metrics.items() if part in m.parts}


def unit(metrics: dict[str, Metric]) -> int:
    """A batch must be a whole number of so many images."""
    return math.lcm(*(m.group for m in metrics.values()))


def make_measure(
    encoder: ViT,
    metrics: dict[str, Metric],
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[[Tree, dict[str, jax.Array]], Tree]:
    """`measure(variables, batch) -> {metric: rows}`, to be jitted.

    A batch is {"images": uint8 (B, rows, columns, 3), "weight": float32 (B,), "label",
    "index", "position": int32 (B,)}, the last being the place in the pass, by which a
    metric with a limit leaves images out. `variables` are {"params", "stats"} of the
    encoder. Drop path is off, nothing is masked.
    """

    def measure(variables: Tree, batch: dict[str, jax.Array]) -> Tree:
        x = jax.vmap(lambda image: views.normalise(image, mean, std))(batch["images"])
        # Metrics are float32 at full precision, and so is the network they look at.
        with jax.default_matmul_precision("highest"):
            output, taps = encoder.apply(variables, x)
        features = {**taps, "output": output, **{k: batch[k] for k in LABELS}}
        found = {}
        for feature in PLACES:  # all that look at one in the same loop
            here = {n: m for n, m in metrics.items() if feature in m.needs}
            kernels = {n: m.each for n, m in here.items() if m.each}
            found |= over_each(feature, kernels, features) if kernels else {}
        rows = {}
        for name, m in metrics.items():
            weight = batch["weight"]
            if m.limit is not None:
                weight = weight * (batch["position"] < m.limit)
            if name in found:
                rows[name] = {"weight": weight, "values": found[name]}
            else:
                rows[name] = m.update(features, weight)
        return rows

    return measure


@functools.lru_cache(maxsize=8)
def compiled_step(
    encoder: ViT, metrics: tuple, mean: tuple, std: tuple, mesh: jax.sharding.Mesh
) -> Callable:
    measure = make_measure(encoder, dict(metrics), mean, std)

    def on_mesh(variables: Tree, batch: dict[str, jax.Array]) -> Tree:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # images stay in place
            return measure(variables, batch)

    # Rows stay split as the images are: `local` reads each process's own.
    return jax.jit(on_mesh, out_shardings=meshes.batch_sharding(mesh))


class Done(NamedTuple):
    """How far a pass is: whole batches, the ids of the images, the metrics' states."""

    batches: int
    ids: np.ndarray
    states: dict[str, Any]


class Total:
    """A growing merge of states, in pairs of equal size.

    Rows that are kept are then copied log(n) times, not n times.
    """

    def __init__(self, merge: Callable[[Any, Any], Any], *states: Any) -> None:
        self.merge, self.parts = merge, [(math.inf, state) for state in states]

    def add(self, state: Any) -> None:
        size = 1
        while self.parts and self.parts[-1][0] == size:
            state = self.merge(self.parts.pop()[1], state)
            size *= 2
        self.parts.append((size, state))

    def fold(self) -> Any:
        """The merge of all, which then counts as one part, whatever its size."""
        *earlier, (_, state) = self.parts
        for _, before in reversed(earlier):  # small ones first
            state = self.merge(before, state)
        self.parts = [(math.inf, state)]
        return state


def run(
    encoder: ViT,
    variables: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    metrics: dict[str, Metric],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    mesh: jax.sharding.Mesh,
    part: str = "test",
    begin: Done | None = None,
) -> Iterator[Callable[[], Done]]:
    """Measure this process's rows of `batches`; yields once per batch.

    The rows of one batch are read while the device works on the next. A metric that
    has seen all the images it wants is no longer computed.

    Args:
      part: which images these are; the metrics are those that read it.
      begin: go on from here; `batches` are those that follow.

    Yields:
      a function that merges all so far; call it before the next batch. A pass that
      goes on from its result gives the same sums, bit for bit, as one that called it
      there and was not stopped.
    """
    number, ids, states = begin or Done(0, np.zeros(0, np.int64), {})
    seen = [ids]
    totals = {
        name: Total(m.merging(part), *([states[name]] if name in states else ()))
        for name, m in metrics.items()
    }
    variables = jax.device_put(variables, meshes.replicated(mesh))

    def start(number: int, batch: dict[str, Any]) -> Tree:
        count = len(batch["weight"])
        first = number * count * jax.process_count()
        position = first + jax.process_index() * count + np.arange(count)
        arrays = {k: batch[k] for k in ("weight", *LABELS)}
        arrays |= {"images": batch["views"][0], "position": position.astype(np.int32)}
        wanted = {
            n: m for n, m in metrics.items() if m.limit is None or first < m.limit
        }
        step = compiled_step(
            encoder, tuple(wanted.items()), tuple(mean), tuple(std), mesh
        )
        return step(variables, meshes.put(arrays, mesh))

    def absorb(rows: Tree) -> Callable[[], Done]:
        nonlocal number
        number += 1
        for name, found in rows.items():
            used = None if metrics[name].limit is None else found["weight"]
            mine = jax.tree.map(functools.partial(local, used=used), found)
            totals[name].add(metrics[name].summing(part)(mine))
        return so_far

    def so_far() -> Done:
        states = {name: total.fold() for name, total in totals.items()}
        return Done(number, np.unique(np.concatenate(seen)), states)

    waiting = None
    for place, batch in enumerate(batches, number):
        rows = start(place, batch)
        if waiting is not None:
            yield absorb(waiting)
        waiting = rows
        seen.append(batch["index"][batch["weight"] > 0])
    if waiting is not None:
        yield absorb(waiting)
    elif begin is None:
        raise ValueError("no image to measure")


def local(x: jax.Array, used: jax.Array | None = None) -> np.ndarray:
    """This process's rows of an array whose leading axis is split, in image order.

    Of devices where no row is `used` (a weight per row), nothing is copied, but for the
    first. The result is read-only.
    """
    parts = _shards(x)
    if used is not None:
        kept = [i for i, weight in enumerate(_shards(used)) if np.any(weight)]
        parts = [parts[i] for i in kept or [0]]
    if len(parts) == 1:
        return np.asarray(parts[0])  # rows may be large
    whole = np.concatenate(list(map(np.asarray, parts)))
    whole.flags.writeable = False  # as on one device
    return whole


def _shards(x: jax.Array) -> list[jax.Array]:
    """The parts of this process, in order."""
    found = {s.index[0].start or 0: s.data for s in x.addressable_shards}
    return [found[start] for start in sorted(found)]


def series(metrics: dict[str, Metric], states: dict[str, Any]) -> list[Series]:
    """What the states say; a Series that two metrics report is kept once."""
    found: dict[str, Series] = {}
    for name, metric in metrics.items():
        for s in metric.compute(*(states[name][part] for part in metric.parts)):
            found.setdefault(s.name, s)
    return list(found.values())


class Analysis(NamedTuple):
    """What was measured on which images.

    `stamp` says all that must agree to merge; `ids` {part: numbers of the images};
    `states` {metric: {part: state}}.
    """

    stamp: dict[str, Any]
    ids: dict[str, np.ndarray]
    states: dict[str, dict[str, Any]]

    def with_part(self, part: str, done: Done) -> "Analysis":
        """A new analysis, in which `part` is as far as `done`."""
        found = {n: {part: state} for n, state in done.states.items()}
        states = {n: self.states.get(n, {}) | x for n, x in found.items()}
        return Analysis(
            self.stamp, self.ids | {part: done.ids}, {**self.states, **states}
        )


def merge(metrics: dict[str, Metric], a: Analysis, b: Analysis) -> Analysis:
    """The analysis of the images of both.

    Training images may be the same in both; then they count once.

    Raises:
      ValueError: other weights, settings or data, or images that are in both.
    """
    differ = [k for k in sorted(a.stamp | b.stamp) if a.stamp.get(k) != b.stamp.get(k)]
    if differ:
        raise ValueError(
            "these analyses do not belong together: they differ in "
            + ", ".join(f"{k} ({a.stamp.get(k)} and {b.stamp.get(k)})" for k in differ)
        )
    merged = a
    for part, ids in b.ids.items():
        if part == "train" and np.array_equal(a.ids[part], ids):
            continue
        twice = np.intersect1d(a.ids[part], ids)
        if twice.size:
            raise ValueError(
                f"{twice.size} {part} images are in both analyses (such as number "
                f"{twice[0]}); merge analyses of different images"
            )
        states = {
            name: m.merging(part)(a.states[name][part], b.states[name][part])
            for name, m in reading(metrics, part).items()
        }
        done = Done(0, np.union1d(a.ids[part], ids), states)
        merged = merged.with_part(part, done)
    return merged


def save(path: str, analysis: Analysis, more: dict[str, Any] | None = None) -> None:
    """Write an analysis, and `more` that is plain; floats survive exactly."""
    arrays = {f"states/{k}": v for k, v in tree.named(analysis.states).items()}
    arrays |= {f"ids/{part}": ids for part, ids in analysis.ids.items()}
    plain = json.dumps({"stamp": analysis.stamp, **(more or {})}, sort_keys=True)
    save_arrays(path, {"plain": np.array(plain), **arrays})


def load(path: str, within: str = "") -> tuple[Analysis, dict[str, Any]]:
    """What `save` wrote: the analysis, and what more there was.

    `within` is how the names of the states begin that are read, all by default.

    Raises:
      ValueError: the file is not one of `save`, or is damaged.
    """
    try:
        data = load_arrays(path, ("plain", "ids/", within or "states/"))
        more = json.loads(str(data.pop("plain")))
        found = {"ids": {}, "states": {}} | tree.nest(data)
        return Analysis(more.pop("stamp"), found["ids"], found["states"]), more
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no readable states: {error}") from error


def find(folder: str) -> str:
    """The folder of an analysis: `folder`, or the one in it, if it is a workdir.

    Raises:
      ValueError: neither holds series.json.
    """
    for place in (folder, f"{folder}/analysis"):
        if (epath.Path(place) / "series.json").exists():
            return str(place)
    raise ValueError(
        f"no analysis in {folder}; expected the --out of clvsmim analyze, or a workdir "
        "that was analyzed"
    )


def write_series(out: str, found: Sequence[Series], about: dict[str, Any]) -> None:
    """Write series.json: what was measured, and plain facts about it."""
    plain = {**about, "series": [s.to_json() for s in found]}
    text = json.dumps(plain, indent=1, allow_nan=False)
    write_whole(f"{out}/series.json", text.encode())


def read_series(out: str) -> dict[str, Any] | None:
    """What `write_series` wrote, or None."""
    path = epath.Path(out) / "series.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        return {**found, "series": [Series.from_json(s) for s in found["series"]]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; measure again") from error


def digest(x: Tree) -> str:
    """A short hash of the names, types and bytes of a tree of arrays."""
    sha = hashlib.sha256()
    for name, leaf in sorted(tree.named(x).items()):
        array = np.asarray(leaf)
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]
