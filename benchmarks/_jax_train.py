"""Our side of `train_step.py`: the trainer's program on one device.

It is `build.program` where all that the package needs is installed. With jax, flax and
optax alone it is the same step, put together from the parts that import nothing else.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from _step_shapes import ADAMW, MASKED, MEAN, MOMENTUM, REMOVED, STD, TAU, Shape, Side

from clvsmim import optim, plugin, tree, vit
from clvsmim.objectives import Objective
from clvsmim.step import Optimizer, init_params, make_init, make_step

Tree = Any
EPOCHS = 1e6  # of one step each: more than are ever taken
VIEW = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "jitter_p": 0.8,
    "grey_p": 0.2,
    "blur_sigma": (0.1, 2.0),
    "solarize_threshold": 128,
    "flip_p": 0.5,
}
CROP = {"area": (0.2, 1.0), "aspect": (3 / 4, 4 / 3), "filter": "bilinear"}
METHODS = {
    "simmim": {
        "encoder": {"position": "learned", "init": "simmim"},
        "objective": {"flip_p": 0.5, "mask_ratio": MASKED},
        "frozen": (),
    },
    "mae": {
        "encoder": {"position": "mae_sincos", "init": "mae"},
        "objective": {"flip_p": 0.5, "mask_ratio": REMOVED, "norm_pix": True},
        "frozen": ("encoder/pos_embed",),
    },
    "moco_v3": {
        "encoder": {"position": "moco_sincos", "init": "moco_v3"},
        "objective": {
            "view_1": VIEW | {"blur_p": 1.0, "solarize_p": 0.0},
            "view_2": VIEW | {"blur_p": 0.1, "solarize_p": 0.2},
            "tau": TAU,
            "momentum": MOMENTUM,
        },
        "frozen": ("encoder/patch_embed/.*", "encoder/pos_embed"),
    },
}


def sides(
    method: str,
    shape: Shape,
    images: np.ndarray,
    views: np.ndarray,
) -> list[Side]:
    """Our rows, each compiled and two steps old.

    Args:
      images: uint8 (2, B, rows, columns, 3); SimMIM and MAE take one.
      views: the same as float32, normalised, for a row without augmentation.
    """
    parts = sections(method, shape)
    given = images[: 2 if method == "moco_v3" else 1]
    found = [row("ours", *whole(parts), given, parts)]
    if method == "moco_v3":
        ready = dataclasses.replace(objective(parts), prepare=take_views)
        steps = assemble(ready, parts, np.float32)
        found.append(row("ours, views ready", *steps, views, parts))
    return found


def row(
    label: str,
    init: Callable,
    step: Callable,
    spec: Tree,
    views: np.ndarray,
    parts: dict,
) -> Side:
    """Compile `step`, take two of them."""
    index = np.arange(len(views[0]), dtype=np.int32)
    batch = {"views": tuple(views), "label": index, "index": index}
    batch = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), batch, spec)
    state = init()
    begun = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - begun
    frozen = "|".join(parts["optim"]["frozen"])
    names = tree.named(state.params).items()
    trained = sum(x.size for name, x in names if not re.fullmatch(frozen, name))

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, logs = compiled(state, batch)
        jax.block_until_ready(state)
        return float(logs["loss"])

    first = run(1)
    run(1)
    return Side(
        label=label,
        run=run,
        first=first,
        trained=trained,
        compile_s=seconds,
        memory=held(compiled.memory_analysis()),
    )


def held(stats: Any) -> int:
    """Bytes that a program holds while it runs: temporaries are one allocation on a CPU
    and a GPU, where `peak_memory_in_bytes` leaves them out."""
    kept = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes + kept


def whole(parts: dict) -> tuple[Callable, Callable, Tree]:
    """(init, step, shapes of a batch) of the trainer's program."""
    try:
        from clvsmim import build

        program = build.program(devices=jax.devices()[:1], **parts)
    except ImportError as error:
        print(f"  ours is put together from its parts ({error})")
        return assemble(objective(parts), parts, np.uint8)
    return program.init, program.step, program.batch


def assemble(
    method: Objective, parts: dict, dtype: Any
) -> tuple[Callable, Callable, Tree]:
    """As `whole`, without a mesh, a source or a config; `dtype` is that of a view."""
    n = parts["batch"]

    def leaf(shape: tuple, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, *shape), dtype)

    spec = {"views": tuple(leaf((*v.size, 3), dtype) for v in method.views)}
    spec |= {"label": leaf((), np.int32), "index": leaf((), np.int32)}
    section = dict(parts["optim"])
    name, schedule = section.pop("name"), dict(section.pop("schedule"))
    total = round(EPOCHS)
    rate = optim.schedule(
        schedule.pop("name"), total_steps=total, steps_per_epoch=1, **schedule
    )
    params, _ = jax.eval_shape(lambda: init_params(method, spec, 0))
    groups = optim.groups(params, frozen=section.pop("frozen"))
    rule = optim.optimizer(groups, name, schedule=rate, **section)
    optimizer = Optimizer(groups, rule, rate)
    step = make_step(method, optimizer, seed=parts["seed"], total=total)
    init = make_init(method, optimizer, spec, seed=parts["seed"])
    return jax.jit(init), jax.jit(step, donate_argnums=0), spec


def take_views(key: jax.Array, batch: dict, *, train: bool) -> tuple:
    """`Objective.prepare` for views that are normalised already."""
    del key, train
    return batch["views"]


def objective(parts: dict) -> Objective:
    """The method of the sections."""
    section = dict(parts["objective"])
    name, encoder = section.pop("name"), vit.make(**parts["encoder"])
    return plugin.load("objectives", name, encoder=encoder, **parts["input"], **section)


def work(method: str, shape: Shape) -> float:
    """Operations of a step per image, by `clvsmim.flops`."""
    return objective(sections(method, shape)).flops.step


def device(platform: str) -> jax.Device | None:
    """The first device of a platform ("cpu" or "gpu") that JAX would use, or None."""
    found = jax.devices()[0]
    return found if found.platform == platform else None


def sections(method: str, shape: Shape) -> dict[str, Any]:
    """What `build.program` takes: a config as plain dicts."""
    recipe = METHODS[method]
    own = {
        "simmim": {"mask_unit": 2 * shape.patch},
        "mae": {"decoder": shape.decoder},
        "moco_v3": {"projector": shape.projector, "predictor": shape.predictor},
    }[method]
    rule = dict(ADAMW)
    schedule = {"name": "constant", "base": rule.pop("base")}
    return {
        "seed": 0,
        "batch": shape.batch,
        "epochs": EPOCHS,
        "encoder": {
            "width": shape.width,
            "depth": shape.depth,
            "heads": shape.heads,
            "patch": shape.patch,
            "image": (shape.image, shape.image),
            "stem": "patch",
            "relative": "none",
            "layer_scale": 0.0,
            "qkv_bias": "qkv",
            "drop_path": 0.0,
            "final_norm": True,
            "prefix": 1,
            "dtype": shape.dtype,
            "remat": False,
            **recipe["encoder"],
        },
        "input": {"mean": MEAN, "std": STD},
        "objective": {"name": method, "crop": CROP, **recipe["objective"], **own},
        "data": {
            "source": {"name": "photos", "length": shape.batch, "side": shape.image},
            "workers": 0,
            "threads": 0,
            "prefetch": 0,
            "unreadable": 0,
        },
        "optim": {
            "name": "adamw",
            "frozen": recipe["frozen"],
            "schedule": schedule,
            **rule,
        },
        "mesh": {"fsdp": 1},
        "log": {"every": 1, "save": 1, "keep": 1, "tensorboard": False},
        "eval": {"epochs": 0.0, "images": 0},
        "xray": {"share": 0.0, "least": 1, "images": 1},
        "init": {},
    }
