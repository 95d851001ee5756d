"""What there is in configs/, for the tests that look at all of it."""

import importlib
import inspect

import runs

FILES = sorted(
    path.stem
    for path in (runs.ROOT / "configs").glob("*.py")
    if path.stem != "__init__"
)
DEMO = ("moco_v3", "simmim", "hybrid")


def module(name):
    return importlib.import_module(f"clvsmim.configs.{name}")


def variants(name):
    """What may stand after "file.py:"."""
    wanted = inspect.signature(module(name).get_config).parameters
    return getattr(module(name), "VARIANTS", DEMO) if wanted else [None]


def get(name, variant=None):
    return module(name).get_config(*([variant] if variant else []))


CONFIGS = [(name, variant) for name in FILES for variant in variants(name)]


def leaves(section, start=""):
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{start}{key}.")
        else:
            yield f"{start}{key}"


def shallow(name, variant):
    """A recipe one narrow block deep, for tracing: its keys are those of the whole."""
    config = get(name, variant)
    config.encoder.update(width=256, depth=1, heads=4, remat=False)
    if isinstance(config.objective.get("blocks"), int):  # of a probe
        config.objective.blocks = 1
    return config
