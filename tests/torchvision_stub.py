"""Lets timm and transformers be imported where torchvision cannot be had.

timm imports torchvision for its image transforms and data sets, of which the tests of
checkpoint formats use nothing. What pip finds as torchvision is built for CUDA and
fails on import beside a PyTorch that is built for CPUs, as the tests have it.
"""

import enum
import importlib.machinery
import sys
import types

MODULES = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",  # transformers asks for these two
    "torchvision.transforms.v2.functional",
    "torchvision.datasets",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.models",
    "torchvision.models.feature_extraction",
)


class Mode(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Anything(types.ModuleType):
    """A module of which every name is an empty class."""

    InterpolationMode = Mode

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def install():
    """Put the stub in place of torchvision, unless there is one that works."""
    try:
        importlib.import_module("torchvision")
        return
    except (ImportError, RuntimeError):  # none, or one for another PyTorch
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    for name in MODULES:
        module = Anything(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
