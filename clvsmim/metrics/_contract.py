"""What a metric is and what it returns; see the docstring of the package."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim import plugin
from clvsmim.metrics._states import State, add, moments

Features = dict[str, Any]  # of tuples of arrays, or of arrays
Image = dict[str, Any]  # what a kernel of `of_each` is given

FEATURES = ("residual", "attention", "head_outputs", "output", "label", "index")
PARTS = ("test", "train", "views")
KINDS = ("depth", "curve", "matrix")
DECODER = "decoder: "  # how the name of a series begins that continues another one


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
      marks: entries of `values` to point at, by their indices.
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
    marks: tuple[tuple[int, ...], ...] = ()

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
        tuples = {k: _tuples(plain[k]) for k in ("notes", "marks") if k in plain}
        return cls(**{**plain, "axes": axes, **tuples})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A quantity measured on an encoder, as four pure functions.

    Attributes:
      needs: the features read, from `FEATURES`; only those are computed.
      update: (features, weights (B,)) -> rows; traced inside the one jitted forward.
        A weight is 1 for an image and 0 for padding, which may hold anything.
      compute: (state, ...) -> list of Series, one state per part; on the host.
      to_state: rows of this process's images, read-only numpy -> state; by default
        `moments`.
      merge: (state, state) -> state, associative and commutative; by default `add`.
      fit_state, fit_merge: the same two for the part "train", where they differ.
      parts: the sets of images read, from `PARTS`; `compute` takes a state for each.
      limit: read only so many images of each part, the first; None for all.
      group: so many consecutive images must be in one batch; the rows of such a metric
        are one per group, and a batch is a whole number of groups.
      perturbs: what the metric needs changed about the forward pass, if anything.
      each: the kernel of a metric `of_each`, to compute several such in one loop.
    """

    needs: tuple[str, ...]
    update: Callable[[Features, jax.Array], Any]
    compute: Callable[..., list[Series]]
    to_state: Callable[[Any], State] = moments
    merge: Callable[[State, State], State] = add
    fit_state: Callable[[Any], State] | None = None
    fit_merge: Callable[[State, State], State] | None = None
    parts: tuple[str, ...] = ("test",)
    limit: int | None = None
    group: int = 1
    perturbs: tuple = ()
    each: Callable[[Image], dict[str, jax.Array]] | None = None

    def __post_init__(self):
        for name in self.needs:
            if name not in FEATURES:
                raise ValueError(plugin.unknown("feature", name, FEATURES))
        for name in self.parts:
            if name not in PARTS:
                raise ValueError(plugin.unknown("part", name, PARTS))

    def summing(self, part: str) -> Callable[[Any], State]:
        """`to_state`, or `fit_state` for the images that a metric learns from."""
        return (part == "train" and self.fit_state) or self.to_state

    def merging(self, part: str) -> Callable[[State, State], State]:
        """`merge`, or `fit_merge` for the images that a metric learns from."""
        return (part == "train" and self.fit_merge) or self.merge


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


def shared(features: Features | Image, name: str, derive: Callable[[Any], Any]) -> Any:
    """`derive(features)`, which several metrics need, computed once.

    It is remembered in `features`, under a name that says all it depends on. Without
    the barrier the compiler of a GPU or TPU would weave it into each use and compute it
    every time; that of a CPU does so all the same, if `derive` does not use `stored`.
    """
    if name not in features:
        features[name] = jax.lax.optimization_barrier(derive(features))
    return features[name]


def pooled(tokens: jax.Array, *, prefix: int, pool: str = "patches") -> jax.Array:
    """One vector of an image: (T, D) -> (D,) float32.

    `pool` is "patches", the mean over patch tokens, or "cls", the first token.
    """
    x = tokens.astype(jnp.float32)
    return x[0] if pool == "cls" else x[prefix:].mean(axis=0)


def image_features(
    residual: tuple[jax.Array, ...], *, prefix: int, pool: str = "patches"
) -> jax.Array:
    """`pooled` of each image and block: 2L+1 arrays (B, T, D) -> (B, L+1, D) float32.

    The first is of the embedding, then follow the outputs of the blocks.
    """
    one = jax.vmap(functools.partial(pooled, prefix=prefix, pool=pool))
    return jnp.stack([one(x) for x in residual[::2]], axis=1)


def group_weights(weights: jax.Array, group: int) -> jax.Array:
    """(B,) weights of images -> (B / group,): 1 for a group of real images only."""
    return weights.reshape(-1, group).min(axis=1)


def continued(series: Series, depth: int) -> Series:
    """A series of a decoder, to be drawn behind an encoder of `depth` blocks.

    Blocks go on counting, the decoder's input is at `depth`.
    """

    def later(axis: Axis) -> Axis:
        if axis.name not in ("block", "depth"):
            return axis
        values = (
            (v[0] + depth, v[1]) if isinstance(v, tuple) else v + depth
            for v in axis.values
        )
        return Axis(axis.name, tuple(values))

    return dataclasses.replace(
        series, name=DECODER + series.name, axes=tuple(map(later, series.axes))
    )


def block_axis(count: int) -> Axis:
    """The embedding and the outputs of `count - 1` blocks, as a depth axis."""
    return Axis("depth", taps(count - 1)[::2])


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
