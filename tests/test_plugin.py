"""Modules by name, and what is said of names and arguments that do not exist."""

import sys
import types

import pytest

from clvsmim import plugin
from clvsmim.metrics import Metric


def make(*, width: int, depth: int = 2) -> tuple:
    return width, depth


@pytest.fixture
def folder(monkeypatch):
    """A folder `toys` with the plugin `box` and `helpers`, which is none."""
    toys, box, helpers = (types.ModuleType(n) for n in ("toys", "box", "helpers"))
    toys.__path__ = []
    box.make = make
    for name, module in (("toys", toys), ("toys.box", box), ("toys.helpers", helpers)):
        monkeypatch.setitem(sys.modules, f"clvsmim.{name}", module)
    found = [types.SimpleNamespace(name=n) for n in ("helpers", "box")]
    monkeypatch.setattr(plugin.pkgutil, "iter_modules", lambda path: found)


def test_names_are_the_modules_of_a_folder():
    known = ["classify", "encoder", "hybrid", "mae", "moco_v3", "simmim"]
    assert plugin.names("objectives") == known
    assert set(plugin.names("metrics")) >= {"distance", "fourier", "nmi"}


def test_names_are_sorted(folder):
    assert plugin.names("toys") == ["box", "helpers"]


def test_load_calls_make_of_that_module(folder):
    assert plugin.load("toys", "box", width=3) == (3, 2)
    assert plugin.load("toys", "box", width=3, depth=4) == (3, 4)


def test_load_finds_the_files_of_this_package():
    assert isinstance(plugin.load("metrics", "nmi", prefix=1), Metric)


def test_load_with_gives_a_module_what_it_asks_for(folder):
    assert plugin.load_with("toys", "box", {"width": 5, "colour": "red"}) == (5, 2)
    with pytest.raises(ValueError, match="toys/box needs a value for: width"):
        plugin.load_with("toys", "box", {"colour": "red"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bok", r"unknown toys name 'bok': did you mean 'box'\? \(known: box\)"),
        ("train", r"unknown toys name 'train': \(known: box\)"),
        ("helpers", r"unknown toys name 'helpers': \(known: box\)"),
        ("__init__", r"unknown toys name '__init__': \(known: box\)"),
    ],
)
def test_a_name_that_cannot_be_loaded_lists_those_that_can(folder, name, message):
    with pytest.raises(ValueError, match=message):
        plugin.load("toys", name, width=1)


def test_modules_without_make_are_not_offered():
    with pytest.raises(ValueError) as error:
        plugin.load("data", "photo")
    known = str(error.value).split("known: ")[1]
    assert "did you mean 'photos'?" in str(error.value)
    assert "photos" in known and "crops" not in known and "pipeline" not in known
    with pytest.raises(ValueError, match="unknown data name 'crops'"):
        plugin.load("data", "crops")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"widht": 1},
            r"unknown key in toys/box 'widht': did you mean 'width'\? "
            r"\(known: depth, width\)",
        ),
        ({"depth": 1}, "toys/box needs a value for: width"),
        ({"width": 1, "xyz": 1}, r"unknown key in toys/box 'xyz': \(known: depth"),
    ],
)
def test_arguments_are_checked_by_name(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        plugin.load("toys", "box", **arguments)


def test_all_missing_arguments_are_listed():
    def function(*, a, b, c=1):
        raise AssertionError("must not be called")

    with pytest.raises(ValueError, match="here needs a value for: a, b$"):
        plugin.call(function, "here")


def test_an_error_inside_make_is_not_disguised():
    def function(*, a):
        raise TypeError("from inside")

    with pytest.raises(TypeError, match="from inside"):
        plugin.call(function, "here", a=1)
