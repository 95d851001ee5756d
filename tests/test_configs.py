"""Every recipe works, every key in it is read, and the page of recipes knows it."""

import copy
import re

import jax
import numpy as np
import pytest
import runs
from ml_collections import ConfigDict
from recipes import CONFIGS, FILES, get, leaves, module, shallow, variants

from clvsmim import build, plugin

# Keys that a recipe may leave out, because leaving them out has one obvious meaning.
OPTIONAL = {
    "data.repeats",
    "data.source.selection",
    "data.source.test_length",
    "data.unreadable",
    "encoder.scan",
    "init.path",
    "init.zoo",
    "mesh.fsdp",
    "objective.crop.once",
    "optim.clip",
    "optim.frozen",
    "optim.layer_decay",
    "optim.no_decay",
    "optim.no_trust",
    "optim.schedule.per",
}


def methods(name, variant):
    """The objectives that a recipe is made of."""
    objective = get(name, variant).objective
    return objective.name, objective.get("mim", {}).get("name", "")


def kind(name, variant):
    """What tracing depends on: methods and keys, not numbers and data."""
    keys = leaves(build.plain(get(name, variant)))
    return methods(name, variant), tuple(k for k in keys if not k.startswith("data."))


# One recipe of each file, and one of each kind; other tests train the demo's.
FIRSTS = [(name, variants(name)[0]) for name in FILES]
KINDS = list({kind(*c): c for c in reversed(CONFIGS) if "demo" not in c[0]}.values())
each = pytest.mark.parametrize("name, variant", CONFIGS)
each_file = pytest.mark.parametrize("name, variant", FIRSTS)
each_kind = pytest.mark.parametrize("name, variant", KINDS)


def message(config):
    """What `build` has against a config; "" if nothing."""
    try:
        build.build(ConfigDict(config), jax.devices()[:1])
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture
def traced_once(monkeypatch):
    """Parameters do not depend on what the two tests below change, but take long."""
    found, real = [], build.abstract_params

    def abstract_params(objective):
        if not found:
            found.append(real(objective))
        return found[0]

    monkeypatch.setattr(build, "abstract_params", abstract_params)


def test_there_is_a_recipe_for_every_method():
    found = {name for config in CONFIGS for name in methods(*config)} - {""}
    assert found | {"encoder"} == set(plugin.names("objectives"))  # of files, no recipe


@each
def test_the_docstring_has_the_command(name, variant):
    suffix = f":{variant}" if variant else ""
    command = f"clvsmim train --config=configs/{name}.py{suffix} --workdir="
    assert command in re.sub(r"[ ]+", " ", module(name).__doc__)


@pytest.mark.parametrize("name", [n for n, variant in FIRSTS if variant])
def test_an_unknown_variant_names_those_that_exist(name):
    with pytest.raises(
        ValueError, match=rf"{name}.py:Xl does not exist|demo.py:Xl"
    ) as e:
        get(name, "Xl")
    assert all(repr(variant) in str(e.value) for variant in variants(name))


@each
def test_it_builds(name, variant):
    config, made = get(name, variant), build.build(shallow(name, variant))
    plain = build.plain(config)
    real = build.make_encoder(plain["encoder"])  # at its own size, without tracing
    assert (
        build.make_objective(real, plain["input"], plain["objective"]).encoder == real
    )
    images = len(made.source)
    assert made.steps_per_epoch == images // config.batch
    assert made.total == pytest.approx(config.epochs * made.steps_per_epoch)
    # A checkpoint before the end and a record before that; one may be damaged.
    assert config.log.every <= config.log.save <= made.total
    assert config.log.keep >= 2 or made.total < 1000
    if images == 1281167:
        share = config.log.save / made.steps_per_epoch
        assert 0.3 < share < 7, f"{share:.2f} epochs between two checkpoints"


@each_kind
def test_its_functions_fit_together(name, variant):
    made = build.build(shallow(name, variant))
    after, logs = jax.eval_shape(made.step, made.state, made.batch)
    for x, y in zip(*map(jax.tree.leaves, (made.state, after)), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
    assert {"loss", "learning_rate", "gradient_norm"} <= set(logs)
    assert all(x.shape == () for x in logs.values())


@each_file
def test_it_splits_what_is_big_over_eight_devices(name, variant):
    config = shallow(name, variant)
    config.mesh.fsdp = 4
    made = build.build(config)
    assert made.mesh.shape == {"data": 2, "fsdp": 4}
    split = [x for x in jax.tree.leaves(made.state) if any(x.sharding.spec)]
    assert split and all(x.size >= 2**16 for x in split)


def sections(section, start=()):
    yield start
    for key, value in section.items():
        if isinstance(value, dict):
            yield from sections(value, (*start, key))


def at(config, path):
    for key in path:
        config = config[key]
    return config


@each_file
def test_every_key_is_needed_or_known_to_be_optional(name, variant, traced_once):
    whole = build.plain(shallow(name, variant))
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


@each_file
def test_a_misspelt_key_is_refused_in_every_section(name, variant, traced_once):
    whole = build.plain(shallow(name, variant))
    for path in sections(whole):
        config = copy.deepcopy(whole)
        keys = sorted(k for k in at(config, path) if len(k) > 3)
        key = keys[0]
        at(config, path)[f"{key}x"] = 1
        said = message(config)
        assert f"'{key}x'" in said, f"{'.'.join(path)}: {said}"
        if key not in OPTIONAL | {"name"}:
            assert f"did you mean '{key}'?" in said, f"{'.'.join(path)}: {said}"


@each_file
def test_a_missing_section_is_named(name, variant):
    whole = build.plain(shallow(name, variant))
    for key in whole:
        config = copy.deepcopy(whole)
        del config[key]
        assert re.search(rf"the config needs a value for: {key}\b", message(config))


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


PAGE = (runs.ROOT / "docs" / "recipes.md").read_text()
ROWS = {
    cells[0].strip("`"): cells[1:]
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.findall(r"^\| `configs/.*\|$", PAGE, re.M)
    )
}


def test_the_page_has_a_row_for_every_recipe():
    short = {"demo", "demo_labels", "mini_zoo", "shape_texture"}  # in a sentence
    want = {
        f"configs/{name}.py" + (f":{variant}" if variant else "")
        for name, variant in CONFIGS
        if name not in short
    }
    assert set(ROWS) == want
    assert all(f"`configs/{name}.py`" in PAGE for name in short)


@pytest.mark.parametrize("recipe", ROWS)
def test_the_page_has_the_length_and_the_cost_of_the_recipe(recipe):
    name, variant = re.fullmatch(r"configs/(\w+)\.py(?::(.*))?", recipe).groups()
    config = build.plain(get(name, variant))
    assert ROWS[recipe][0] == f"{config['epochs']:g}, {config['batch']}"
    encoder = build.make_encoder(config["encoder"])
    work = build.make_objective(encoder, config["input"], config["objective"]).flops
    source = build.make_source(config["data"], "train")
    images = config["epochs"] * (len(source) // config["batch"]) * config["batch"]
    cost, unit = re.fullmatch(r"([\d.]+) (h|min)", ROWS[recipe][-1]).groups()
    seconds = {"h": 3600, "min": 60}[unit] * float(cost)
    assert seconds == pytest.approx(work.step * images / (0.4 * 197e12), rel=0.06)
