"""A training method is an `Objective`: a handful of pure functions, one file each."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from clvsmim import plugin, tree
from clvsmim.data.crops import RandomResizedCrop
from clvsmim.flops import Forward

Tree = Any


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a method is, to the trainer. No base class; combine with functions.

    `params` and `extra` are both `{"encoder": ..., "heads": ...}`: what is optimised,
    and what training carries beside it (batch statistics, teacher).

    Attributes:
      name: folded into every key, so that two objectives never share a draw.
      encoder: the `ViT` that `params["encoder"]` belongs to.
      views: one per crop, `(PIL image, numpy Generator) -> uint8 (rows, columns, 3)`;
        they run in the data workers and can be pickled.
      prepare: `(key, batch, *, train) -> inputs`: flips, jitter, masks, on the device;
        `batch["views"]` is a tuple of uint8 arrays (B, rows, columns, 3).
      init: `(key, inputs, given=None) -> (params, extra)`; `given` is a trained encoder
        {"params", "stats"} to start from, instead of a random one.
      loss: `(params, extra, inputs, key, *, progress, train) ->
        (scalar, (extra, logs))`; `progress` is step / total.
      after: `(params, extra, progress) -> extra`, after the optimizer (EMA).
      reconstruct: `(params, extra, inputs) -> (image, mask, reconstruction)`, each
        (B, rows, columns, 3), normalised as the inputs; None if there is none.
      decoder: `(params, extra) -> (model, variables)`, a decoder of blocks to measure:
        `model` has a `spec` and `apply(variables, images)`, as a `ViT`; None without.
      view: the crop of an image to evaluate on, where there is an evaluation.
      evaluate: `(params, extra, inputs) -> {name: float32 (B,)}`, per image, of inputs
        that `prepare(..., train=False)` made of that one view; None if there is none.
      frozen: names of parameters that are never trained, as regular expressions; a
        recipe's `optim.frozen` adds to them.
      lr_scales: (regular expression, factor) of parameters with a learning rate of
        their own; the first that matches counts.
      flops: operations of one image's forward passes, for the log; None if nobody
        counted them.
    """

    name: str
    encoder: Any
    views: tuple[Callable, ...]
    prepare: Callable
    init: Callable
    loss: Callable
    after: Callable
    reconstruct: Callable | None = None
    decoder: Callable | None = None
    view: Callable | None = None
    evaluate: Callable | None = None
    frozen: tuple[str, ...] = ()
    lr_scales: tuple[tuple[str, float], ...] = ()
    flops: Forward | None = None


def random_crop(
    name: str, size: tuple[int, int], crop: dict[str, Any]
) -> RandomResizedCrop:
    """The host view that the section `crop` of a config describes."""
    return plugin.call(RandomResizedCrop, "crop", name=name, size=size, **crop)


def fold(key: jax.Array, name: str) -> jax.Array:
    """A key for `name`. crc32, because Python's `hash` differs between processes."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def apply(
    module: Any,
    params: Tree,
    stats: Tree,
    *args: Any,
    train: bool,
    method: str = None,
    taps: bool = True,
) -> tuple[Any, Tree]:
    """Apply a module: (its output, its batch statistics, updated if `train`).

    `taps` is for the methods of a ViT that return some: False where nobody reads them.
    """
    variables = {"params": params, "stats": stats}
    if method != "encode":  # the blocks hold no batch statistics
        args = (*args, train)
    more = {} if taps else {"taps": False}
    out, new = module.apply(variables, *args, method=method, mutable=["stats"], **more)
    return out, new.get("stats", stats) if train else stats


def cast_kernels(params: Tree, dtype: str) -> Tree:
    """Every `kernel` in the dtype that its product is computed in anyway.

    A module casts what it is given, so each pass (two views, two objectives) would have
    a gradient of its own to exchange between devices. Those of one copy are added
    before.
    """
    return tree.map_named(
        lambda name, x: x.astype(dtype) if name.endswith("kernel") else x, params
    )


def init_encoder(module: Any, key: jax.Array, images: jax.Array, given: Tree) -> Tree:
    """{"params", "stats"}: the given encoder, or a new one that every method shares."""
    if given is not None:
        return given
    return {"stats": {}} | module.init(fold(key, "encoder"), images, train=True)


def ema_rate(momentum: float, progress: jax.Array) -> jax.Array:
    """1 - m of a teacher whose momentum m grows to 1 along a half cosine.

    The rate itself, because 1 - m in float32 has no digits left near the end
    (MoCo v3, BYOL).
    """
    # (1 + cos(pi x)) / 2 = sin(pi (1 - x) / 2)^2, which does not cancel near x = 1.
    left = jnp.asarray(1.0 - progress, jnp.float32)
    return (1.0 - momentum) * jnp.square(jnp.sin(0.5 * jnp.pi * left))


def ema(teacher: Tree, student: Tree, rate: jax.Array) -> Tree:
    """`teacher + rate * (student - teacher)`, leaf by leaf."""
    return jax.tree.map(lambda t, s: t + rate * (s - t), teacher, student)
