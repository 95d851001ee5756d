"""An X-ray of the encoder while it trains: what every block does, and when it breaks.

At intervals the same few images go through the encoder as it is then; `xray.jsonl` in
the workdir gets a line of numbers per block, and one for every alarm. The training is
the same bit for bit with and without, and never waits for it: an X-ray is read when the
next record of the log is written.
"""

import functools
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from clvsmim import analysis, plugin
from clvsmim import mesh as meshes
from clvsmim.build import Program, loader_section
from clvsmim.data import Source
from clvsmim.data.pipeline import eval_batches
from clvsmim.log import JsonlLog, read
from clvsmim.measure import eval_view
from clvsmim.metrics import Metric, Series, State, block_axis, keep, of_each
from clvsmim.metrics.dimension import effective_rank
from clvsmim.vit import ViT

Tree = Any
Record = dict[str, Any]


class Quantity(NamedTuple):
    """What a line of X-ray holds under one key: L numbers, one per block.

    `series` of the metric `metric`, mean over heads; at the `site` if it has several.
    """

    metric: str
    series: str
    unit: str = ""
    site: str = ""


QUANTITIES = {
    "distance": Quantity("distance", "attention distance", "px"),
    "nmi": Quantity("nmi", "normalized mutual information"),
    "entropy": Quantity("nmi", "attention entropy", "nats"),
    "delta_log_amplitude": Quantity(
        "fourier", "delta log amplitude at the highest frequency"
    ),
    "effective_rank": Quantity("rank", "effective rank"),
    "displacement_attn": Quantity("displacement", "relative displacement", "", "attn"),
    "displacement_mlp": Quantity("displacement", "relative displacement", "", "mlp"),
}
METRICS = ("distance", "nmi", "fourier", "displacement")


def interval(total: int, *, share: float, least: int) -> int:
    """Steps between two X-rays: a share of the training, at least so many; 0 is off."""
    return max(least, round(share * total)) if share else 0


def make_metrics(encoder: ViT) -> dict[str, Metric]:
    """What is measured: metrics of the analysis, and ranks from a smaller matrix."""
    facts = analysis.facts_of(encoder, group=1, classes=1)
    # Fewer than 3 patches along a side have no frequency but zero.
    names = [n for n in METRICS if n != "fourier" or min(encoder.spec.grid) >= 3]
    rank = _few_images(encoder.spec.prefix)
    return {**analysis.make_metrics(names, facts), "rank": rank}


@functools.cache
def _few_images(prefix: int) -> Metric:
    """The `effective rank` of the metric `rank`, for a few images.

    Its covariance is of channels, C x C; the products of images, B x B, have the same
    eigenvalues, and 64 x 64 numbers take a host no time.
    """

    def to_state(rows: dict[str, Any]) -> State:
        index = np.arange(len(rows["weight"]))
        return keep({"weight": rows["weight"], "index": index, **rows["values"]})

    def compute(state: State) -> list[Series]:
        x = state["patches"].astype(np.float64).swapaxes(0, 1)  # (L+1, B, C)
        values = np.full(len(x), np.nan)
        if x.shape[1]:
            squares = np.linalg.eigvalsh(x @ x.swapaxes(1, 2))  # (L+1, B)
            values = effective_rank(np.sqrt(np.maximum(squares, 0.0)))
        return [
            Series(
                name="effective rank",
                axes=(block_axis(len(values)),),
                values=values,
                stderr=None,
                kind="depth",
                unit="",
                source="",
                count=x.shape[1],
            )
        ]

    usual = plugin.load("metrics", "rank", prefix=prefix, cls=False)
    return of_each("residual", usual.each, compute, to_state)


@functools.lru_cache(maxsize=8)
def measuring(
    encoder: ViT, mean: Sequence[float], std: Sequence[float], mesh: jax.sharding.Mesh
) -> Callable[[Tree, Tree], Tree]:
    """The compiled `(variables, batch) -> rows`, whole on every device."""
    measure = analysis.make_measure(encoder, make_metrics(encoder), mean, std)

    def on_mesh(variables: Tree, batch: Tree) -> Tree:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return measure(variables, batch)

    return jax.jit(on_mesh, out_shardings=meshes.replicated(mesh))


def numbers(metrics: dict[str, Metric], rows: Tree) -> dict[str, list[float]]:
    """{key of QUANTITIES: L numbers} of the rows of one X-ray."""
    found = {n: m.compute(m.to_state(rows[n])) for n, m in metrics.items()}
    return {
        key: per_block(next(s for s in found[q.metric] if s.name == q.series), q.site)
        for key, q in QUANTITIES.items()
        if q.metric in found
    }


def per_block(series: Series, site: str) -> list[float]:
    """A Series over blocks as one number for each: mean over heads, or of one site."""
    (lead, *others), values = series.axes, series.values
    if lead.name == "depth":  # the embedding comes before the outputs of the blocks
        values = values[1:]
    if others and others[0].name == "site":
        values = values[:, others[0].values.index(site)]
    return values.reshape(len(values), -1).mean(axis=1).tolist()


class Spread:
    """Images at equal distances of a source, which may be sorted by class."""

    def __init__(self, source: Source, images: int) -> None:
        self.source, self.images = source, min(images, len(source))
        self.name = source.name

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[index * len(self.source) // self.images]


def probe(
    source: Source,
    size: tuple[int, int],
    images: int,
    mesh: jax.sharding.Mesh,
    unreadable: int = 0,
) -> Tree:
    """The images to look at, on the devices: one batch of `make_measure`."""
    few = Spread(source, images)
    batches = eval_batches(
        few,
        eval_view(size),
        batch=-(-len(few) // mesh.size) * mesh.size,
        process=jax.process_index(),
        processes=jax.process_count(),
        unreadable=unreadable,
    )
    try:
        batch = next(batches)
    finally:
        batches.close()
    arrays = {k: batch[k] for k in ("weight", *analysis.LABELS)}
    arrays["images"] = batch["views"][0]
    arrays["position"] = np.arange(len(batch["weight"]), dtype=np.int32)
    return meshes.put(arrays, mesh)


# What counts as broken. An alarm ends when the value is back at twice its limit.
# Attention that depends on the query to a thousandth at most is the same map for all,
# be it uniform or one key; and it has collapsed if it was ten times above that before,
# for at the start all maps are uniform.
NMI, NMI_BEFORE = 1e-3, 1e-2
# An effective rank of 1 is one direction for all images; 1.5 is little more. It counts
# after 3, since a common mean (a table of positions) may begin there. A fall to a fifth
# of the highest is more than the start of a healthy training takes (about half).
RANK, RANK_BEFORE, RANK_SHARE = 1.5, 3.0, 1 / 5
# Gradients: so many times the median of the last records, of which there must be a few.
# Learning rates and losses move the norm by factors of two or three, spikes by tens.
SPIKE, WINDOW, ENOUGH = 10.0, 50, 10
NORMS = ("gradient_norm", "gradient_norm/patch_embed")


class Watch:
    """What has been seen of a run, and what is broken at present.

    A pure function of the records given to `see`, so that a run that was taken up
    again, and shows it the records from before, goes on with the same alarms.
    """

    def __init__(self) -> None:
        self.best: dict[str, np.ndarray] = {}
        self.norms = {name: deque(maxlen=WINDOW) for name in NORMS}
        self.broken: set[tuple[str, int]] = set()

    def see(self, record: Record) -> list[Record]:
        """The alarms that begin with a record of the log or of the X-ray.

        Each is {"step", "alarm": a sentence, "quantity", "block"}; block 0 is no block.
        """
        found = []
        for quantity, block, value, limit, text in self._limits(record):
            key = (quantity, block)
            if value < limit and key not in self.broken:
                self.broken.add(key)
                named = {"quantity": quantity, "block": block}
                found.append({"step": int(record["step"]), "alarm": text, **named})
            elif value >= 2 * limit:
                self.broken.discard(key)
        return found

    def _limits(self, record: Record) -> Iterable[tuple[str, int, float, float, str]]:
        """(quantity, block, value, what it must not fall below, what it means)."""
        if "nmi" in record:
            best = self._best("nmi", record)
            rows = zip(record["nmi"], record["entropy"], best, strict=True)
            for block, (nmi, entropy, most) in enumerate(rows, 1):
                text = (
                    f"attention of block {block} has collapsed, all queries look alike "
                    f"(NMI {nmi:.2g}, was {most:.2g}; entropy {entropy:.3g} nats)"
                )
                yield "nmi", block, nmi, NMI if most >= NMI_BEFORE else 0.0, text
        if "effective_rank" in record:
            most = self._best("effective_rank", record)[-1]
            rank, last = record["effective_rank"][-1], len(record["effective_rank"])
            text = (
                f"the representation has collapsed (effective rank {rank:.3g} after "
                f"the last block, was {most:.3g})"
            )
            limit = max(RANK if most >= RANK_BEFORE else 0.0, RANK_SHARE * most)
            yield "effective_rank", last, rank, limit, text
        for name in NORMS:
            if name in record:
                yield from self._spike(name, record[name])

    def _best(self, name: str, record: Record) -> np.ndarray:
        """The highest values seen, those of the record among them."""
        best = np.fmax(self.best.get(name, -np.inf), record[name])
        self.best[name] = best
        return best

    def _spike(self, name: str, norm: float) -> Iterable[tuple]:
        before = self.norms[name]
        if len(before) >= ENOUGH and norm:
            usual = statistics.median(before)
            text = f"{name} {norm:.3g} is {norm / (usual or norm):.0f} times the usual"
            # As a share of what is allowed, so that here too what is small is bad.
            yield name, 0, usual * SPIKE / norm, 1.0, f"{text} {usual:.3g}"
        before.append(norm)


class XRay:
    """Takes the X-rays of one run, writes them, and speaks up when something breaks.

    Raises:
      ValueError: an image of the probe cannot be read.
    """

    def __init__(
        self,
        program: Program,
        settings: dict[str, Any],
        workdir: str,
        start: int,
        boards: Sequence[Any] = (),
    ) -> None:
        encoder, section = program.objective.encoder, settings["xray"]
        share, least = section["share"], section["least"]
        self.total = program.total
        self.every = interval(program.total, share=share, least=least)
        self.metrics = make_metrics(encoder)
        colour = settings["input"]
        self.measure = measuring(
            encoder, tuple(colour["mean"]), tuple(colour["std"]), program.mesh
        )
        size = encoder.spec.image
        unreadable = loader_section(**settings["data"])["unreadable"]
        self.images = probe(
            program.source, size, section["images"], program.mesh, unreadable
        )
        self.watch, self.boards = Watch(), boards
        self.waiting: list[tuple[int, Tree]] = []
        self.log = None
        if jax.process_index() == 0:  # one process writes for all
            self.log = JsonlLog(f"{workdir}/xray.jsonl")
            self.log.rewind(start or -1)  # without a checkpoint step 0 comes again
            self._remember(workdir, start)

    def _remember(self, workdir: str, start: int) -> None:
        """Show the watch what was recorded up to `start`."""
        seen = [*read(f"{workdir}/xray.jsonl"), *read(f"{workdir}/log.jsonl")]
        for record in sorted(seen, key=lambda record: record["step"]):
            if record["step"] <= start:
                self.watch.see(record)

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.total

    def take(self, step: int, params: Tree, extra: Tree) -> None:
        """Dispatch an X-ray; nobody waits for it here."""
        variables = {"params": params["encoder"], "stats": extra["encoder"]}
        self.waiting.append((step, self.measure(variables, self.images)))

    def write(self) -> None:
        """Write what was taken, as soon as the devices have it."""
        for step, rows in self.waiting:
            if self.log:
                rows = jax.device_get(rows)
                found = numbers(self.metrics, rows)
                images = int(np.sum(rows["rank"]["weight"]))
                record = {"step": step, "images": images, **found}
                self.log.write(record)
                for board in self.boards:
                    board.write(scalars(record))
                self.see(record)
        self.waiting.clear()

    def see(self, record: Record) -> None:
        """Look at a record of the log or of the X-ray; say and write what is wrong."""
        if self.log:
            for alarm in self.watch.see(record):
                self.log.write(alarm)
                line = f"clvsmim train: ALARM at step {alarm['step']}: {alarm['alarm']}"
                tqdm.write(line, file=sys.stderr)

    def flush(self) -> None:
        """Make what was written visible."""
        if self.log:
            self.log.flush()

    def close(self) -> None:
        """Close the file."""
        if self.log:
            self.log.close()


def scalars(record: Record) -> Record:
    """A line of X-ray as TensorBoard has it: one scalar per quantity and block."""
    flat = {
        f"xray/{key}/block_{block}": value
        for key in QUANTITIES
        if key in record
        for block, value in enumerate(record[key], 1)
    }
    return {"step": record["step"], **flat}
