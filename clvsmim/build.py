"""A config and devices -> a program: the one place where settings meet functions.

Shared by training, analysis, ahead-of-time compilation and the tests. Everything below
takes explicit keywords, so a misspelt or missing key is an error here.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from clvsmim import mesh as meshes
from clvsmim import optim, plugin, tree, vit
from clvsmim.data import Source
from clvsmim.objectives import Objective
from clvsmim.step import (
    Optimizer,
    init_params,
    make_evaluate,
    make_init,
    make_step,
)

Tree = Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """All that a command needs to run a config.

    Attributes:
      init: `(given=None) -> State`, born sharded: no unsharded copy ever exists.
      step: `(state, batch) -> (state, logs)`; the state is donated.
      evaluate: `(state, batch) -> sums` of `step.make_evaluate`; None where the
        objective has no evaluation.
      held_out: the images to evaluate on, None without an evaluation.
      state: ShapeDtypeStructs with shardings, to restore onto.
      batch: ShapeDtypeStructs of a global batch, with shardings.
      total, steps_per_epoch: numbers of steps.
    """

    objective: Objective
    source: Source
    held_out: Source | None
    mesh: jax.sharding.Mesh
    init: Callable
    step: Callable
    evaluate: Callable | None
    state: Tree
    batch: Tree
    total: int
    steps_per_epoch: int


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Program:
    """The program of a config on `devices` (all by default).

    Equal configs on equal devices give the identical program, so that building twice
    does not compile twice.

    Raises:
      ValueError: what is wrong with the config, and how to fix it.
    """
    devices = tuple(jax.devices() if devices is None else devices)
    return _build(FrozenConfigDict(config), devices)


@functools.lru_cache(maxsize=16)
def _build(config: FrozenConfigDict, devices: tuple) -> Program:
    return plugin.call(program, "the config", devices=devices, **plain(config))


def program(
    *,
    devices: Sequence[jax.Device],
    seed: int,
    batch: int,
    epochs: float,
    encoder: dict[str, Any],
    input: dict[str, Any],
    objective: dict[str, Any],
    data: dict[str, Any],
    optim: dict[str, Any],
    mesh: dict[str, Any],
    log: dict[str, Any],
    eval: dict[str, Any],
    xray: dict[str, Any],
    init: dict[str, Any],
) -> Program:
    """The sections of a config; `log`, `eval`, `xray` and `init` are for the training
    loop alone.

    Raises:
      ValueError: as `build`.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: use a number >= 0")
    plugin.call(log_section, "log", **log)
    plugin.call(eval_section, "eval", **eval)
    plugin.call(xray_section, "xray", **xray)
    plugin.call(init_section, "init", **init)
    grid = plugin.call(meshes.make, "mesh", devices=devices, **mesh)
    meshes.check_batch(batch, grid)
    method = make_objective(make_encoder(encoder), input, objective)
    source = make_source(data, "train")
    held_out = make_source(data, "test") if method.evaluate else None
    check_classes(objective, source)
    steps_per_epoch = len(source) // batch
    if not steps_per_epoch:
        raise ValueError(f"batch {batch} is larger than the {len(source)} images")
    if not math.isfinite(epochs) or round(epochs * steps_per_epoch) < 1:
        least = f"{1 / steps_per_epoch:.3g}"
        raise ValueError(f"epochs={epochs} is no step; use {least} (one) or more")
    total = round(epochs * steps_per_epoch)
    spec = batch_spec(method, batch, grid)
    optimizer = make_optimizer(method, optim, total, steps_per_epoch)
    born = make_init(method, optimizer, spec, seed=seed)
    shapes = jax.eval_shape(born)
    shardings = meshes.state_shardings(shapes, grid)
    step = make_step(method, optimizer, seed=seed, total=total)
    return Program(
        objective=method,
        source=source,
        held_out=held_out,
        mesh=grid,
        init=jax.jit(on_mesh(born, grid), out_shardings=shardings),
        step=jax.jit(
            on_mesh(step, grid),
            in_shardings=(shardings, meshes.batch_sharding(grid)),
            out_shardings=(shardings, meshes.replicated(grid)),
            donate_argnums=0,
        ),
        evaluate=jax.jit(
            on_mesh(make_evaluate(method), grid),
            in_shardings=(shardings, meshes.batch_sharding(grid)),
            out_shardings=meshes.replicated(grid),
        )
        if method.evaluate
        else None,
        state=jax.tree.map(_with_sharding, shapes, shardings),
        batch=spec,
        total=total,
        steps_per_epoch=steps_per_epoch,
    )


def log_section(
    *, every: int, save: int, keep: int, tensorboard: bool, keep_every: int = 0
) -> dict[str, int]:
    """The keys of the section `log`: steps between records, steps between checkpoints,
    how many of these stay, whether TensorBoard gets the records too; and checkpoints
    whose step is a multiple of `keep_every` stay for ever (0: none).

    Returns the keywords of `Checkpoints`.
    """
    if min(every, save, keep) < 1 or keep_every % save:
        raise ValueError(
            f"log.every={every}, log.save={save}, log.keep={keep}: use >= 1; "
            f"log.keep_every={keep_every}: use a multiple of log.save, or 0"
        )
    return {"keep": keep, "keep_every": keep_every or None}


def eval_section(*, epochs: float, images: int) -> None:
    """The keys of the section `eval`: epochs between two evaluations, the last step is
    followed by one anyway (0: that one alone); and on how many images (0: on all)."""
    if min(epochs, images) < 0:
        raise ValueError(f"eval.epochs={epochs}, eval.images={images}: use >= 0")


def xray_section(*, share: float, least: int, images: int) -> None:
    """The keys of the section `xray`: which share of the training lies between two
    X-rays (0: none are taken), at least how many steps, and on how many images."""
    if not 0 <= share <= 1 or min(least, images) < 1:
        raise ValueError(
            f"xray.share={share}, xray.least={least}, xray.images={images}: use a "
            "share from 0 (off) to 1, and numbers >= 1"
        )


def init_section(*, path: str = "", zoo: str = "") -> str:
    """The keys of the section `init`: the workdir whose encoder to start from, or a
    checkpoint file of another library; or the member of the mini zoo. Returns the run,
    "" for none."""
    if path and zoo:
        raise ValueError(f"init.path={path!r} and init.zoo={zoo!r}: use one of them")
    return f"zoo:{zoo}" if zoo else path


def loader_section(
    *,
    source: dict,
    workers: int,
    threads: int,
    prefetch: int,
    repeats: int = 1,
    unreadable: int = 100,
    draft: bool = False,
) -> dict[str, Any]:
    """The keys of the section `data`, of which all but the source are keywords of
    `data.pipeline.batches`; returns these."""
    del source
    if min(workers, threads, prefetch, unreadable) < 0 or repeats < 1:
        raise ValueError(
            f"data.workers={workers}, data.threads={threads}, "
            f"data.prefetch={prefetch}, data.unreadable={unreadable}: use >= 0; "
            f"data.repeats={repeats}: use >= 1"
        )
    return {
        "workers": workers,
        "threads": threads,
        "prefetch": prefetch,
        "repeats": repeats,
        "unreadable": unreadable,
        "draft": draft,
    }


def plain(config: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """A config as nested dicts, references resolved, lists as tuples."""

    def walk(x: Any) -> Any:
        if isinstance(x, ConfigDict):
            return {k: walk(v) for k, v in x.items()}
        return tuple(walk(v) for v in x) if isinstance(x, list | tuple) else x

    return walk(config)


def make_encoder(section: dict[str, Any]) -> vit.ViT:
    """The section `encoder`: the fields of `vit.Spec`."""
    plugin.check(vit.Spec, "encoder", section)
    return vit.make(**section)


def make_objective(
    encoder: vit.ViT, input: dict[str, Any], section: dict[str, Any]
) -> Objective:
    """The section `objective`; a part of it with a `name` is an objective in turn."""
    parts = {
        key: make_objective(encoder, input, value)
        if isinstance(value, dict) and "name" in value
        else value
        for key, value in section.items()
    }
    if not any(isinstance(part, Objective) for part in parts.values()):
        parts |= input
    name = _named(parts, "objective")
    return plugin.load("objectives", name, encoder=encoder, **parts)


def make_source(section: dict[str, Any], split: str) -> Source:
    """The section `data`: its source, of one split."""
    plugin.call(loader_section, "data", **section)
    source = dict(section["source"])
    return plugin.load("data", _named(source, "data.source"), split=split, **source)


def check_classes(objective: dict[str, Any], source: Source) -> None:
    """Raise ValueError if the heads are for another number of classes than the data
    have: a label beyond the last head has no target, and nobody would notice."""
    if "classes" in objective and objective["classes"] != source.num_classes:
        raise ValueError(
            f"objective.classes={objective['classes']}, but {source.name!r} has "
            f"{source.num_classes} classes; use that number"
        )


def make_optimizer(
    objective: Objective,
    section: dict[str, Any],
    total: int,
    steps_per_epoch: int,
) -> Optimizer:
    """The section `optim`: groups by name, schedule, rule."""
    params, _ = abstract_params(objective)
    section = {"frozen": ()} | section
    known = ("no_decay", "no_trust", "frozen", "layer_decay")
    section["frozen"] = (*objective.frozen, *section["frozen"])
    name = _named(section, "optim")
    allowed = {"name", "schedule", *known, *optim.settings(name)}
    for key in section:
        if key not in allowed:
            raise ValueError(plugin.unknown("key in optim", key, allowed))
    rules = {k: section.pop(k) for k in known if k in section}
    groups = optim.groups(params, lr_scales=objective.lr_scales, **rules)
    if len(objective.lr_scales) > 1 and "clip" in section:
        raise ValueError(
            "optim.clip limits the gradient of all heads together, so heads of several "
            "objective.rates would not learn as if alone; leave one of the two out"
        )
    schedule = dict(section.pop("schedule", {}))
    rate = optim.schedule(
        _named(schedule, "optim.schedule"),
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        **schedule,
    )
    return Optimizer(
        groups, optim.optimizer(groups, name, schedule=rate, **section), rate
    )


def abstract_params(objective: Objective) -> tuple[Tree, Tree]:
    """Shapes of (params, extra), to check a checkpoint against."""
    spec = batch_spec(objective, 2)
    return jax.eval_shape(functools.partial(init_params, objective, spec, 0))


def batch_spec(
    objective: Objective, batch: int, mesh: jax.sharding.Mesh | None = None
) -> Tree:
    """Shapes of a global batch, with shardings if there is a mesh."""
    split = meshes.batch_sharding(mesh) if mesh else None

    def leaf(shape: tuple, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=split)

    return {
        "views": tuple(leaf((*v.size, 3), np.uint8) for v in objective.views),
        "label": leaf((), np.int32),
        "index": leaf((), np.int32),
    }


def on_mesh(function: Callable, mesh: jax.sharding.Mesh) -> Callable:
    """`function`, traced with `mesh` as the one that activations are split over."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return wrapped


def count(params: Tree) -> int:
    """Number of parameters."""
    return sum(x.size for x in tree.named(params).values())


def _named(section: dict[str, Any], where: str) -> str:
    if "name" not in section:
        raise ValueError(f"{where} needs a name")
    return section.pop("name")


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
