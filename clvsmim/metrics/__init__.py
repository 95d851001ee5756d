"""Metrics of a trained encoder: the contract here, then one metric a file.

For a researcher, every file's kernels are plain functions of one example, importable
from here: `from clvsmim.metrics import attention_distance`. They need jax and numpy
only, and `jax.vmap` batches them.

For the analysis, `plugin.load("metrics", "nmi", prefix=1)` calls `make(prefix=1)` of
`nmi.py`, which returns a `Metric`. A new metric is one new file with a `make` and with
its kernels named in `__all__`; no list anywhere has to learn of it. A file has a short
name of one word (`distance`), a kernel one of several (`attention_distance`): importing
a submodule `metrics.x` would overwrite a function `metrics.x`.

Features, the first argument of `update`, are a dict of tuples over blocks. They are
never stacked, so a block's tensors can be freed before the next block runs:
  "residual"      2L+1 arrays (B, T, D), the stream before the final norm, in the order
                  of `taps(L)`: embed, block 1 attn, block 1 mlp, block 2 attn, ...
  "attention"     L arrays (B, H, T, T), probabilities after the softmax, rows = queries
  "head_outputs"  L arrays (B, H, T, d), attention @ values, heads not yet joined

Static facts come as keywords of `make`, each metric taking those it needs: `grid` =
(rows, columns) of patches, `patch` = side of a patch in pixels, `prefix` = number of
tokens before the patches (CLS, registers), `depth` = number of blocks.

The way of a number: `update` (device) -> rows, a pytree of float32 arrays whose leading
axis is in image order -> `to_state` (host) -> float64 sums -> `merge` over batches and
processes -> `compute` -> list of `Series`. Nothing is summed over images on the device,
so no result depends on how many devices there were.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim import plugin

Features = dict[str, tuple[jax.Array, ...]]
State = Any  # a pytree of float64 numpy arrays

FEATURES = ("residual", "attention", "head_outputs")
KINDS = ("depth", "curve", "matrix")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a Series: its name and one value per entry.

    Values are numbers, strings, or, where the axis walks through the residual stream,
    pairs (block, site) as made by `taps`; "depth" is never a bare number for those.
    """

    name: str
    values: tuple

    @property
    def positions(self) -> np.ndarray:
        """Where to draw the entries: (n,) float64. Block l's mlp is at l, its attn
        half a step before, the embedding at 0; strings are numbered from 0."""
        return np.array([_position(i, v) for i, v in enumerate(self.values)], float)

    @property
    def labels(self) -> tuple[str, ...]:
        """One short string per entry, such as `embed` or `3 attn`."""
        return tuple(map(_label, self.values))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Series:
    """A result to draw or save; the report knows nothing more about any metric.

    Attributes:
      name: the field's usual term for the quantity.
      axes: one Axis per dimension of `values`.
      values: float64; NaN only where no image was left to average.
      stderr: standard error of the mean over images, same shape, or None if unknown.
      kind: "depth", a line over the first axis, where a second axis (heads) is drawn as
        dots and the line is their mean; "curve", lines over the last axis, one per
        entry of the first; "matrix", an image of the last two axes.
      unit: "px", "nats", or "" for a pure number.
      source: the figure of the paper that shows it, or "".
      count: number of images averaged.
      notes: sentences a reader must see beside the numbers.
    """

    name: str
    axes: tuple[Axis, ...]
    values: np.ndarray
    stderr: np.ndarray | None
    kind: str
    unit: str
    source: str
    count: int
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(plugin.unknown("kind of series", self.kind, KINDS))
        want = tuple(len(a.values) for a in self.axes)
        for field in ("values", "stderr"):
            got = getattr(self, field)
            if got is None and field == "stderr":
                continue
            got = np.asarray(got, np.float64)
            if got.shape != want:
                raise ValueError(
                    f"{field} of series {self.name!r} has shape {got.shape}, but its "
                    f"axes {[a.name for a in self.axes]} have lengths {want}; "
                    "give one axis per dimension, with one value per entry"
                )
            object.__setattr__(self, field, got)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, strings and numbers; floats are exact, a NaN becomes None."""
        plain = dataclasses.asdict(self)
        for field in ("values", "stderr"):
            plain[field] = _to_list(plain[field])
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Series":
        """The inverse of `to_json`, also after a round trip through JSON text."""
        axes = tuple(Axis(a["name"], _tuples(a["values"])) for a in plain["axes"])
        return cls(**{**plain, "axes": axes, "notes": tuple(plain["notes"])})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A quantity measured on an encoder, as four pure functions.

    Attributes:
      needs: the features read, from `FEATURES`; only those are computed.
      update: (features, weights (B,)) -> rows; traced inside the one jitted forward.
        A weight is 1 for an image and 0 for padding, which may hold anything.
      compute: state -> list of Series; on the host.
      to_state: rows of this process's images, as numpy -> state; by default `moments`.
      merge: (state, state) -> state, associative and commutative; by default `add`.
      perturbs: what the metric needs changed about the forward pass, if anything.
    """

    needs: tuple[str, ...]
    update: Callable[[Features, jax.Array], Any]
    compute: Callable[[State], list[Series]]
    to_state: Callable[[Any], State] = lambda rows: moments(rows)
    merge: Callable[[State, State], State] = lambda a, b: add(a, b)
    perturbs: tuple = ()

    def __post_init__(self):
        for name in self.needs:
            if name not in FEATURES:
                raise ValueError(plugin.unknown("feature", name, FEATURES))


def taps(depth: int) -> tuple[tuple[int, str], ...]:
    """(block, site) of each of the 2 * depth + 1 "residual" features, in order.

    Blocks count from 1; the embedding is (0, "embed").
    """
    blocks = range(1, depth + 1)
    return ((0, "embed"), *((b, site) for b in blocks for site in ("attn", "mlp")))


def check_tokens(tokens: int, grid: tuple[int, int], prefix: int) -> None:
    """Raise ValueError unless `tokens` = prefix + rows * columns."""
    rows, columns = grid
    want = prefix + rows * columns
    if tokens != want:
        raise ValueError(
            f"got {tokens} tokens, expected {want} = prefix {prefix} + grid {rows} x "
            f"{columns}; give the grid in patches (image side / patch) and the number "
            "of tokens before them (CLS, registers)"
        )


def over_blocks(kernel: Callable, maps: tuple[jax.Array, ...], batch_axes: int) -> Any:
    """`kernel` on each example of each array: leaves (B, len(maps), ..., kernel's own).

    `batch_axes` leading axes of every array are mapped over: 1 for (B, T, D), 2 for
    (B, H, T, T). Only the kernel's small results are stacked.
    """
    for _ in range(batch_axes):
        kernel = jax.vmap(kernel)
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *map(kernel, maps))


def moments(rows: dict[str, Any]) -> State:
    """Sums over images of {"weight": (B,), "values": {key: (B, ...)}}, in float64.

    Padding (weight 0) is left out whatever it holds. A real image with a value that is
    not finite is left out under every key and counted.

    Returns:
      {"count", "nonfinite": numbers of images, "sum", "square": {key: (...)}}.
    """
    values = {k: np.asarray(v) for k, v in rows["values"].items()}
    real = np.asarray(rows["weight"]) > 0  # (B,)
    finite = np.ones_like(real)
    for v in values.values():
        finite &= np.isfinite(v).all(axis=tuple(range(1, v.ndim)))
    kept = {k: v[real & finite].astype(np.float64) for k, v in values.items()}
    return {
        "count": np.float64(np.sum(real & finite)),
        "nonfinite": np.float64(np.sum(real & ~finite)),
        "sum": {k: v.sum(axis=0) for k, v in kept.items()},
        "square": {k: np.square(v).sum(axis=0) for k, v in kept.items()},
    }


def add(a: State, b: State) -> State:
    """Leaf-by-leaf sum of two states.

    Raises:
      ValueError: the states are of models or settings of different shapes.
    """

    def leaf(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if np.shape(x) != np.shape(y):
            raise ValueError(
                f"cannot merge states: a sum of shape {np.shape(x)} meets one of shape "
                f"{np.shape(y)}; merge states of one model, grid and metric only"
            )
        return np.add(x, y, dtype=np.float64)

    return jax.tree.map(leaf, a, b)


def mean_series(
    state: State, key: str, *, axes: tuple[Axis, ...], at: Any = ..., **fields: Any
) -> Series:
    """The mean over images of `key`, with its standard error, from a `moments` state.

    `at` selects entries of the mean (any numpy index); `axes` describe what is left.
    `fields` are the other fields of Series. With one image the error is None; with
    none, the values are NaN and the notes say so.
    """
    n, lost = float(state["count"]), float(state["nonfinite"])
    total, square = (np.asarray(state[k][key])[at] for k in ("sum", "square"))
    values = total / n if n else np.full(np.shape(total), np.nan)
    stderr = None
    if n > 1:
        spread = np.maximum(square - n * np.square(values), 0.0)
        stderr = np.sqrt(spread / (n - 1) / n)
    notes = tuple(fields.pop("notes", ()))
    if lost:
        notes += (f"{lost:.0f} of {n + lost:.0f} images left out: not finite",)
    if not n:
        notes += ("no image to average",)
    return Series(
        axes=axes, values=values, stderr=stderr, count=int(n), notes=notes, **fields
    )


def _position(index: int, value: Any) -> float:
    if isinstance(value, tuple):
        block, site = value
        return block - 0.5 if site == "attn" else block
    return index if isinstance(value, str) else value


def _label(value: Any) -> str:
    if isinstance(value, tuple):
        block, site = value
        return f"{block} {site}" if block else site
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _to_list(x: np.ndarray | None) -> Any:
    """Nested lists with None for what JSON cannot write."""
    if x is None:
        return None
    return np.where(np.isfinite(x), x.astype(object), None).tolist()


def _tuples(x: Any) -> Any:
    """Lists, which is what JSON makes of tuples, back to tuples."""
    return tuple(map(_tuples, x)) if isinstance(x, list | tuple) else x


def __getattr__(name: str) -> Any:
    """The public kernel `name` of whichever file lists it in `__all__`."""
    if not name.startswith("_"):
        for file in plugin.names("metrics"):
            module = importlib.import_module(f"{__name__}.{file}")
            if name == file:
                return module
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    files = map(lambda f: __getattr__(f).__all__, plugin.names("metrics"))
    return sorted({*globals(), *(name for file in files for name in file)})
