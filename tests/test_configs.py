"""Every recipe works, every key in it is read, and its numbers hang together."""

import copy
import functools
import importlib
import inspect
import re

import jax
import numpy as np
import pytest
import runs
from ml_collections import ConfigDict

from clvsmim import build, plugin

FILES = sorted(
    path.stem
    for path in (runs.ROOT / "configs").glob("*.py")
    if path.stem != "__init__"
)
# Keys that a recipe may leave out, because leaving them out has one obvious meaning.
OPTIONAL = {"optim.clip", "optim.no_decay", "optim.frozen", "mesh.fsdp"}


def variants(name):
    """What may stand after "file.py:"."""
    wanted = inspect.signature(module(name).get_config).parameters
    return list(runs.OBJECTIVES) if wanted else [None]


def module(name):
    return importlib.import_module(f"clvsmim.configs.{name}")


CONFIGS = [(name, variant) for name in FILES for variant in variants(name)]


def get(name, variant=None):
    return module(name).get_config(*([variant] if variant else []))


@functools.cache
def program(name, variant):
    return build.build(get(name, variant), jax.devices()[:1])


each = pytest.mark.parametrize("name, variant", CONFIGS)


def test_there_is_a_recipe_for_every_method():
    found = {get(*config).objective.name for config in CONFIGS}
    assert found == set(plugin.names("objectives"))


@each
def test_the_docstring_has_the_command(name, variant):
    suffix = f":{variant}" if variant else ""
    command = f"clvsmim train --config=configs/{name}.py{suffix} "
    assert command in re.sub(r"[ ]+", " ", module(name).__doc__)


@each
def test_it_builds_and_its_functions_fit_together(name, variant):
    config, made = get(name, variant), program(name, variant)
    config.encoder.depth = 2  # to trace a step of twelve blocks takes seconds
    small = build.build(config, jax.devices()[:1])
    after, logs = jax.eval_shape(small.step, small.state, small.batch)
    for x, y in zip(*map(jax.tree.leaves, (small.state, after)), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
    assert {"loss", "learning_rate", "gradient_norm"} <= set(logs)
    assert all(x.shape == () for x in logs.values())
    assert made.steps_per_epoch == config.data.source.length // config.batch
    assert made.total == pytest.approx(config.epochs * made.steps_per_epoch)


@each
def test_it_builds_on_eight_devices_and_splits_what_is_big(name, variant):
    config = get(name, variant)
    config.mesh.fsdp = 4
    made = build.build(config)
    assert made.mesh.shape == {"data": 2, "fsdp": 4}
    split = [x for x in jax.tree.leaves(made.state) if any(x.sharding.spec)]
    assert split or config.encoder.width < 128
    assert all(x.size >= 2**16 for x in split)


@each
def test_there_is_a_checkpoint_before_the_end_and_a_record_before_that(name, variant):
    config, made = get(name, variant), program(name, variant)
    assert config.log.every <= config.log.save <= made.total
    assert config.log.keep >= 2  # one may be damaged


def leaves(section, start=""):
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{start}{key}.")
        else:
            yield f"{start}{key}"


def sections(section, start=()):
    yield start
    for key, value in section.items():
        if isinstance(value, dict):
            yield from sections(value, (*start, key))


def at(config, path):
    for key in path:
        config = config[key]
    return config


def shallow(name, variant):
    """A recipe as plain dicts, one block deep: its keys are those of twelve."""
    config = get(name, variant)
    config.encoder.depth = 1
    return build.plain(config)


def message(config):
    """What `build` has against a config; "" if nothing."""
    try:
        build.build(ConfigDict(config), jax.devices()[:1])
    except ValueError as error:
        return str(error)
    return ""


@each
def test_every_key_is_needed_or_known_to_be_optional(name, variant):
    whole = shallow(name, variant)
    found = set()
    for path in leaves(whole):
        config = copy.deepcopy(whole)
        *folders, key = path.split(".")
        del at(config, folders)[key]
        said = message(config)
        if said:
            wanted = rf"\b{key}\b" if key != "name" else r"needs a name"
            assert re.search(wanted, said), f"{path}: {said}"
        else:
            found.add(path)
    assert found <= OPTIONAL


@each
def test_a_misspelt_key_is_refused_in_every_section(name, variant):
    whole = shallow(name, variant)
    for path in sections(whole):
        config = copy.deepcopy(whole)
        keys = sorted(k for k in at(config, path) if len(k) > 3)
        key = keys[0]
        at(config, path)[f"{key}x"] = 1
        said = message(config)
        assert f"'{key}x'" in said, f"{'.'.join(path)}: {said}"
        if key not in OPTIONAL | {"name"}:
            assert f"did you mean '{key}'?" in said, f"{'.'.join(path)}: {said}"


@each
def test_a_missing_section_is_named(name, variant):
    whole = shallow(name, variant)
    for key in whole:
        config = copy.deepcopy(whole)
        del config[key]
        assert re.search(rf"the config needs a value for: {key}\b", message(config))


PAPER = {  # learning rate at a batch of 256, and per image of the batch
    "photos_moco_v3": 1.5e-4,
    "photos_simmim": 1e-4 / 2,
    "photos_hybrid": 1e-4 / 2,
}


@pytest.mark.parametrize("name", PAPER)
def test_the_learning_rate_follows_the_batch(name):
    config = get(name)
    config.batch = 256
    assert config.optim.schedule.base == pytest.approx(PAPER[name], rel=1e-12)
    before = config.optim.schedule.to_dict()
    config.batch = 1024
    after = config.optim.schedule.to_dict()
    assert after["base"] == pytest.approx(4 * before["base"], rel=1e-12)
    if "start" in before:
        assert after["start"] == pytest.approx(4 * before["start"], rel=1e-12)
    assert after["warmup_epochs"] == before["warmup_epochs"]
    assert build.plain(config)["optim"]["schedule"]["base"] == after["base"]


@pytest.mark.parametrize("name", PAPER)
def test_warmup_and_milestones_follow_the_epochs(name):
    config = get(name)
    warmup = config.optim.schedule.warmup_epochs
    config.epochs = 300.0
    assert config.optim.schedule.warmup_epochs == pytest.approx(3 * warmup, rel=1e-12)
    assert 0 < config.optim.schedule.warmup_epochs < config.epochs / 4


def test_the_demo_s_runs_differ_in_the_objective_and_its_length_alone():
    runs_ = {v: build.plain(get("demo", v)) for v in variants("demo")}
    for plain in runs_.values():
        objective, _ = plain.pop("objective"), plain.pop("epochs")
        assert objective["name"] in runs_
    first, *rest = runs_.values()
    assert all(plain == first for plain in rest)


def test_the_learning_rate_in_the_log_is_that_of_the_schedule():
    config = runs.config("simmim")
    config.optim.schedule.warmup_epochs = 1.0
    made = build.make_optimizer(
        program_of(config).objective, build.plain(config)["optim"], 12, 4
    )
    rates = np.array([float(made.rate(step)) for step in range(12)])
    np.testing.assert_allclose(rates[:5], 2e-3 * np.arange(5) / 4, rtol=1e-6)
    assert (np.diff(rates[4:]) < 0).all()


def program_of(config):
    return build.build(config, jax.devices()[:1])
