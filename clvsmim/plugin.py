"""Find a module by its name: `load("objectives", "moco_v3", tau=0.2)`.

The string in a config is the name of a file in a folder of this package; the file
has a function `make`. There is no registry to keep in step with the folder.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any


def names(folder: str) -> list[str]:
    """The modules of `clvsmim/<folder>` that can be loaded, sorted; no `_private`."""
    package = importlib.import_module(f"clvsmim.{folder}")
    found = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(folder: str, name: str, **kwargs: Any) -> Any:
    """`clvsmim.<folder>.<name>.make(**kwargs)`, with the arguments checked by name.

    Raises:
      ValueError: no such module, or an argument it does not know or still needs.
    """
    return call(find(folder, name), f"{folder}/{name}", **kwargs)


def load_with(folder: str, name: str, facts: dict[str, Any]) -> Any:
    """Like `load`, with those of `facts` that the module's `make` asks for."""
    make = find(folder, name)
    wanted = inspect.signature(make).parameters
    given = {key: value for key, value in facts.items() if key in wanted}
    return call(make, f"{folder}/{name}", **given)


def find(folder: str, name: str) -> Callable:
    """`clvsmim.<folder>.<name>.make`; ValueError with the closest name without it."""
    known = names(folder)
    make = _make(folder, name) if name in known else None
    if make is None:
        known = [n for n in known if _make(folder, n)]  # not every file is a plugin
        raise ValueError(unknown(f"{folder} name", name, known))
    return make


def _make(folder: str, name: str) -> Callable | None:
    return getattr(importlib.import_module(f"clvsmim.{folder}.{name}"), "make", None)


def call(function: Callable, where: str, **kwargs: Any) -> Any:
    """Call with keywords; a misspelt or missing one is reported under `where`."""
    check(function, where, kwargs)
    return function(**kwargs)


def bind(function: Callable, where: str, later: Iterable[str], **kwargs: Any) -> Any:
    """`partial(function, **kwargs)`; those named in `later` come with the call."""
    check(function, where, [*kwargs, *later])
    return functools.partial(function, **kwargs)


def check(function: Callable, where: str, given: Iterable[str]) -> None:
    """Raise ValueError unless `given` names every required keyword and no unknown."""
    parameters = inspect.signature(function).parameters
    for key in given:
        if key not in parameters:
            raise ValueError(unknown(f"key in {where}", key, parameters))
    missing = [
        key
        for key, p in parameters.items()
        if p.default is p.empty and key not in given
    ]
    if missing:
        raise ValueError(f"{where} needs a value for: {', '.join(missing)}")


def unknown(what: str, got: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the closest one that does."""
    known = sorted(known)
    close = difflib.get_close_matches(got, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {what} {got!r}: {hint}(known: {', '.join(known)})"
