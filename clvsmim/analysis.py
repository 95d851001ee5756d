"""One jitted forward of an encoder with every requested metric inside it.

Images in, per-image rows out; the rows become float64 states on the host, which merge
over batches, processes and runs, and turn into Series at the end.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from clvsmim import mesh as meshes
from clvsmim import plugin, tree, views
from clvsmim.metrics import Metric, Series
from clvsmim.vit import ViT

Tree = Any
METRICS = ("distance", "nmi", "fourier")


def make_metrics(names: Sequence[str], encoder: ViT) -> dict[str, Metric]:
    """Metrics by name, each given what it asks for of the encoder's shape."""
    spec = encoder.spec
    facts = {
        "grid": spec.grid,
        "patch": spec.patch,
        "prefix": spec.prefix,
        "depth": spec.depth,
    }
    return {name: plugin.load_with("metrics", name, facts) for name in names}


def make_measure(
    encoder: ViT,
    metrics: dict[str, Metric],
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[[Tree, jax.Array, jax.Array], Tree]:
    """`measure(variables, images, weights) -> {metric: rows}`, to be jitted.

    `images` are uint8 (B, rows, columns, 3); `variables` are {"params", "stats"} of
    the encoder. Drop path is off, nothing is masked.
    """

    def measure(variables: Tree, images: jax.Array, weights: jax.Array) -> Tree:
        x = jax.vmap(lambda image: views.normalise(image, mean, std))(images)
        # Metrics are float32 at full precision, and so is the network they look at.
        with jax.default_matmul_precision("highest"):
            _, features = encoder.apply(variables, x)
        return {name: m.update(features, weights) for name, m in metrics.items()}

    return measure


def run(
    encoder: ViT,
    variables: Tree,
    batches: Iterable[dict[str, np.ndarray]],
    metrics: dict[str, Metric],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    mesh: jax.sharding.Mesh,
    seen: Callable[[int], None] = lambda images: None,
) -> tuple[dict[str, Any], np.ndarray]:
    """States of every metric over this process's rows of `batches`, and image ids.

    The rows of one batch are read while the device works on the next.
    """
    # Rows stay split as the images are: `local` reads each process's own.
    measure = jax.jit(
        make_measure(encoder, metrics, tuple(mean), tuple(std)),
        out_shardings=meshes.batch_sharding(mesh),
    )
    variables = jax.device_put(variables, meshes.replicated(mesh))
    states: dict[str, Any] = {}
    ids, waiting = [], None

    def absorb(rows: Tree) -> None:
        new = {n: metrics[n].to_state(x) for n, x in jax.tree.map(local, rows).items()}
        states.update(merge_states(metrics, states, new) if states else new)

    for batch in batches:
        arrays = meshes.put((batch["views"][0], batch["weight"]), mesh)
        rows = measure(variables, *arrays)
        real = batch["weight"] > 0
        ids.append(batch["index"][real])
        if waiting is not None:
            absorb(waiting)
        waiting = rows
        seen(int(real.sum()))
    if waiting is None:
        raise ValueError("no image to measure")
    absorb(waiting)
    return states, np.sort(np.concatenate(ids))


def local(x: jax.Array) -> np.ndarray:
    """This process's rows of an array whose leading axis is split, in image order."""
    shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def merge_states(metrics: dict[str, Metric], a: dict, b: dict) -> dict[str, Any]:
    """Metric by metric."""
    return {name: metric.merge(a[name], b[name]) for name, metric in metrics.items()}


def series(metrics: dict[str, Metric], states: dict[str, Any]) -> list[Series]:
    """What the states say; a Series that two metrics report is kept once."""
    found: dict[str, Series] = {}
    for name, metric in metrics.items():
        for s in metric.compute(states[name]):
            found.setdefault(s.name, s)
    return list(found.values())


class Analysis(NamedTuple):
    """What was measured on which images: `stamp` says all that must agree to merge."""

    stamp: dict[str, Any]
    ids: np.ndarray
    states: dict[str, Any]


def merge(metrics: dict[str, Metric], a: Analysis, b: Analysis) -> Analysis:
    """The analysis of both sets of images.

    Raises:
      ValueError: other weights, settings or data, or images that are in both.
    """
    differ = [k for k in sorted(a.stamp | b.stamp) if a.stamp.get(k) != b.stamp.get(k)]
    if differ:
        raise ValueError(
            "these analyses do not belong together: they differ in "
            + ", ".join(f"{k} ({a.stamp.get(k)} and {b.stamp.get(k)})" for k in differ)
        )
    twice = np.intersect1d(a.ids, b.ids)
    if twice.size:
        raise ValueError(
            f"{twice.size} images are in both analyses (such as number {twice[0]}); "
            "merge analyses of different images"
        )
    ids = np.union1d(a.ids, b.ids)
    return Analysis(a.stamp, ids, merge_states(metrics, a.states, b.states))


def save(path: str, analysis: Analysis) -> None:
    """Write an analysis; floats survive exactly."""
    arrays = {f"states/{k}": v for k, v in tree.named(analysis.states).items()}
    stamp = np.array(json.dumps(analysis.stamp, sort_keys=True))
    save_arrays(path, {"stamp": stamp, "ids": analysis.ids, **arrays})


def load(path: str) -> Analysis:
    """What `save` wrote."""
    data = load_arrays(path)
    stamp, ids = json.loads(str(data.pop("stamp"))), data.pop("ids")
    return Analysis(stamp, ids, tree.nest(data)["states"])


def read_series(out: str) -> dict[str, Any] | None:
    """What `analyze` wrote to series.json, or None."""
    path = epath.Path(out) / "series.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return {**found, "series": [Series.from_json(s) for s in found["series"]]}


def save_arrays(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Write one compressed .npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def load_arrays(path: str) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote; no pickles."""
    with np.load(io.BytesIO(epath.Path(path).read_bytes())) as file:
        return {name: file[name] for name in file.files}


def write_whole(path: str, data: bytes) -> None:
    """Write a file that a reader sees whole or not at all."""
    part = epath.Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(data)
    part.replace(path)


def digest(x: Tree) -> str:
    """A short hash of the names, types and bytes of a tree of arrays."""
    sha = hashlib.sha256()
    for name, leaf in sorted(tree.named(x).items()):
        array = np.asarray(leaf)
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]
