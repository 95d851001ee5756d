"""The laws of docs and code that are about structure: trees, imports, signatures."""

import ast
import dataclasses
import functools
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import (
    SIMMIM,
    pictures,
    small,
    tiny,
    tiny_hybrid,
    tiny_mae,
    tiny_moco_v3,
    tiny_simmim,
)

import clvsmim
from clvsmim import build, mesh, tree
from clvsmim.objectives import Objective
from clvsmim.step import State

ROOT = pathlib.Path(clvsmim.__file__).parent

# Which room lies where; a folder stands for every file in it. Nothing imports a later
# layer, and commands may import each other.
LAYERS = {
    "plugin": 0,
    "files": 0,
    "tree": 0,
    "views": 0,
    "masks": 0,
    "inits": 0,
    "layers": 0,
    "vit": 0,
    "heads": 0,
    "mixing": 0,
    "flops": 0,
    "metrics": 0,
    "mesh": 1,
    "data": 1,
    "schedules": 1,
    "optim": 1,
    "checkpoint": 1,
    "meta": 1,
    "packed": 1,
    "transfer": 1,
    "foreign": 1,
    "formats": 1,
    "report": 1,
    "log": 1,
    "objectives": 2,
    "step": 2,
    "analysis": 2,
    "build": 3,
    "cli": 4,
    "train": 4,
    "pictures": 4,
    "present": 4,
    "labelled": 4,
    "measure": 4,
    "xray": 4,
    "timeline": 4,
    "claims": 4,
    "trained": 4,
    "analyze": 4,
    "compare": 4,
    "merge": 4,
    "sweep": 4,
    "inspect_data": 4,
    "convert_data": 4,
    "convert": 4,
    "handover": 4,
    "replay": 4,
    "aot": 4,
    "aot_report": 4,
    "aot_text": 4,
    "hlo": 4,
    "hlo_places": 4,
    "roofline": 4,
    "doctor": 4,
    "machine": 4,
    "preflight": 4,
    "rehearsal": 4,
    "rollcall": 4,
    "hosts": 4,
    "stopping": 4,
    "zoo": 4,
    "demo": 4,
    "configs": 4,  # recipes: no room, and only the demo reads them by name
}
PLAIN = {"jax", "numpy"}
# What else a room below the commands may import, apart from the standard library.
OTHERS = {
    "vit": {"flax"},
    "layers": {"flax"},
    "heads": {"flax"},
    "data": {"PIL", "grain", "absl", "tensorflow_datasets", "etils"},
    "optim": {"optax"},
    "checkpoint": {"orbax", "absl", "etils"},
    "files": {"etils"},
    "meta": {"etils"},
    "packed": {"etils"},
    "foreign": {"etils"},
    "formats": {"PIL", "etils", "google", "ml_dtypes", "onnx"}
    | {"safetensors", "scipy", "torch"},
    "report": {"matplotlib", "jinja2", "PIL", "etils"},
    "log": {"clu", "etils", "tqdm"},
    "step": {"optax"},
    "analysis": {"etils"},
    "build": {"ml_collections"},
}


@functools.cache
def modules():
    """{name under clvsmim: syntax tree} of every module; __init__ has its folder's."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def room(module):
    """The name in LAYERS: the first part of the module's."""
    return module.split(".")[0]


def imports(module):
    """Full names of all that a module imports, at the top or inside a function."""
    found = []
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def rooms_of(module):
    """The rooms of this package that a module imports, but its own."""
    ours = [x.split(".") for x in imports(module)]
    rooms = {x[1] for x in ours if x[0] == "clvsmim" and len(x) > 1}
    return rooms - {room(module)}


NAMES = [name for name in modules() if name]


def test_the_package_itself_is_empty():
    assert not modules()[""].body


def test_every_room_has_a_layer():
    assert not {room(name) for name in NAMES} - set(LAYERS)


def test_law_nothing_upstream_imports_anything_downstream():
    later = {
        f"{name} imports {other}"
        for name in NAMES
        for other in rooms_of(name)
        if LAYERS[other] > LAYERS[room(name)]
    }
    assert not later


def test_law_every_room_has_its_third_parties():
    foreign = {}
    for name in (n for n in NAMES if LAYERS[room(n)] < 4):
        found = {x.split(".")[0] for x in imports(name)} - {"clvsmim"}
        allowed = sys.stdlib_module_names | PLAIN | OTHERS.get(room(name), set())
        foreign |= {name: found - allowed} if found - allowed else {}
    assert not foreign


def users(package):
    """The modules that import a package."""
    return {n for n in NAMES if package in {x.split(".")[0] for x in imports(n)}}


def test_law_only_the_network_rooms_know_flax():
    assert users("flax") == {"vit", "layers", "heads"}


def test_law_only_build_and_the_commands_see_a_config():
    assert {LAYERS[room(name)] for name in users("ml_collections")} == {3, 4}


def test_law_metrics_need_jax_numpy_and_the_plugin_loader():
    rooms = {name: rooms_of(name) for name in NAMES if room(name) == "metrics"}
    assert len(rooms) >= 4 and set().union(*rooms.values()) == {"plugin"}


def test_law_no_import_starts_a_device():
    """`jax.distributed` and the settings of `clvsmim aot` come before the devices."""
    names = [f"clvsmim.{name}" for name in NAMES if not name.endswith("__main__")]
    program = f"""
import importlib
from jax._src import xla_bridge
for name in {names}:
    importlib.import_module(name)
    assert not xla_bridge._backends, name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-500:]


# They pass keywords on to what checks them by name, or name the leaves of a tree.
KEYWORDS = {
    "plugin.load",
    "plugin.call",
    "plugin.bind",
    "vit.make",  # Spec(**fields)
    "optim.optimizer",
    "schedules.schedule",
    "metrics._contract.mean_series",  # Series(**fields)
    "metrics.rank.image_series",  # the same
    "objectives.moco_v3.split",  # {"name": subtree}
}


def test_law_no_function_swallows_keywords():
    found = {
        f"{name}.{getattr(node, 'name', 'lambda')}"
        for name in NAMES
        if LAYERS[room(name)] <= 2
        for node in ast.walk(modules()[name])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        and node.args.kwarg
    }
    assert found <= KEYWORDS


def calls(name):
    """Every call in a module."""
    return [n for n in ast.walk(modules()[name]) if isinstance(n, ast.Call)]


def test_law_no_setting_has_a_default_behind_the_config():
    """No `config.get(key, default)`: a missing key is an error."""
    found = {
        ast.unparse(node)
        for name in NAMES
        for node in calls(name)
        if isinstance(node.func, ast.Attribute)
        and node.func.attr in ("get", "setdefault", "pop")
        and re.search("config|section|settings", ast.unparse(node.func.value))
    }
    # A section without a schedule is then refused, because {} has no name.
    assert found <= {
        "section.pop(k)",
        "section.pop('name')",
        "section.pop('schedule', {})",
    }


def test_law_no_name_is_hashed_by_python():
    """`hash` of a string differs between processes; keys use crc32."""
    hashing = {
        name
        for name in NAMES
        for node in calls(name)
        if isinstance(node.func, ast.Name) and node.func.id == "hash"
    }
    assert not hashing


def test_law_a_state_is_four_fields_of_arrays():
    assert State._fields == ("step", "params", "extra", "opt")
    program = build.build(small("hybrid"), jax.devices()[:1])
    leaves = jax.tree.leaves(program.state)
    assert {x.dtype for x in leaves} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert program.state.step.shape == ()


def test_law_an_objective_is_a_record_of_functions():
    assert [f.name for f in dataclasses.fields(Objective)] == [
        "name",
        "encoder",
        "views",
        "prepare",
        "init",
        "loss",
        "after",
        "reconstruct",
        "decoder",
        "view",
        "evaluate",
        "frozen",
        "lr_scales",
        "flops",
    ]
    assert Objective.__dataclass_params__.frozen and Objective.__bases__ == (object,)


ENCODERS = {
    "relative": SIMMIM,
    "conv stem": SIMMIM | {"stem": "conv", "position": "learned", "prefix": 3},
}


@pytest.mark.parametrize("form", ENCODERS)
def test_law_the_encoder_tree_is_the_same_for_every_objective(form):
    encoder = tiny(ENCODERS[form])
    methods = {
        "simmim": tiny_simmim(encoder),
        "moco_v3": tiny_moco_v3(encoder),
        "hybrid": tiny_hybrid(encoder, 0.5),
    }
    if encoder.spec.relative == "none":  # which MAE cannot have
        methods["mae"] = tiny_mae(encoder)
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
    heads = {}
    for name, method in methods.items():
        params, extra = build.abstract_params(method)
        assert set(params) == set(extra) == {"encoder", "heads"}
        assert described(params["encoder"]) == described(variables["params"])
        assert described(extra["encoder"]) == described(variables.get("stats", {}))
        heads[name] = set(params["heads"])
    known = {
        "simmim": {"mask_token", "decoder"},
        "moco_v3": {"projector", "predictor"},
        "hybrid": {"simmim", "moco_v3"},
        "mae": {"mask_token", "decoder"},
    }
    assert heads == {name: known[name] for name in methods}


def described(x):
    return {name: (leaf.shape, leaf.dtype) for name, leaf in tree.named(x).items()}


@pytest.fixture(scope="module")
def steps():
    """(state on the host, logs) after each of four steps; and how to take one."""
    program = build.build(small("simmim"), jax.devices()[:1])
    shardings = jax.tree.map(lambda x: x.sharding, program.state)

    def take(state, number):
        state = jax.device_put(jax.tree.map(jnp.array, state), shardings)
        batch = mesh.put(pictures(program.batch, number), program.mesh)
        return jax.device_get(program.step(state, batch))

    taken, state = [], program.init()
    for i in range(4):
        state, logs = program.step(
            state, mesh.put(pictures(program.batch, i), program.mesh)
        )
        taken.append(jax.device_get((state, logs)))
    return taken, take


def test_law_a_restored_run_goes_on_bit_for_bit(steps):
    taken, take = steps
    for a, b in zip(
        *map(jax.tree.leaves, (take(taken[2][0], 3), taken[3])), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_law_draws_are_a_function_of_the_step_alone(steps):
    """Same parameters, same images: only the number of the step differs."""
    taken, take = steps
    state = taken[2][0]
    again, other = (
        float(take(state._replace(step=np.int32(n)), 3)[1]["loss"]) for n in (3, 4)
    )
    assert again == float(taken[3][1]["loss"]) != other


def test_law_draws_depend_on_the_seed_and_the_name():
    objective = tiny_simmim(tiny(SIMMIM))
    batch = pictures(build.batch_spec(objective, 8))
    masks = {
        (seed, step): np.asarray(
            objective.prepare(
                jax.random.fold_in(jax.random.key(seed), step), batch, train=True
            )["mask"]
        ).tobytes()
        for seed in (0, 1)
        for step in (0, 1)
    }
    assert len(set(masks.values())) == 4
