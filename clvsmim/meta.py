"""`meta.json`: which run a workdir holds.

A workdir belongs to one run. Starting the same run again continues it; starting another
one in the same place is an error that names what differs.
"""

import json
import re
import uuid
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
from etils import epath

PACKAGES = ("clvsmim", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def prepare(
    workdir: str,
    config: dict[str, Any],
    facts: dict[str, Any],
    *,
    ignore: Sequence[str] = (),
    same: Sequence[str] = (),
) -> None:
    """Make `workdir` ready for the run of `config`: a new one, or the same again.

    Args:
      config: nested dict of JSON values (tuples count as lists).
      facts: what else to record, e.g. the encoder's heads and patch size.
      ignore: regular expressions on "a.b" keys that may differ between two starts of
        one run because they do not change what is trained.
      same: the facts that, like the config, may not differ.

    Raises:
      ValueError: `workdir` cannot be written or holds a run of another config.
    """
    check_writable(workdir)
    found = read_meta(workdir)
    if found is not None:
        there = {key: found[key] for key in same if key in found}
        here = {key: facts[key] for key in there}
        check_same(workdir, found["config"] | there, config | here, ignore)
    if jax.process_index() == 0:
        write_meta(workdir, {"config": config, "versions": versions(), **facts})


def check_writable(workdir: str, flag: str = "--workdir") -> None:
    """Create a folder and write a file into it, or raise one clear ValueError.

    Args:
      flag: which argument named the folder.
    """
    # Hosts ask at once, some of them before they know their number.
    probe = epath.Path(workdir) / f".writable_{uuid.uuid4().hex[:12]}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # gs:// backends raise their own classes
        raise ValueError(
            f"{flag.strip('-')} {workdir} cannot be written "
            f"({type(error).__name__}: {error}); choose another {flag}"
        ) from error


def check_same(
    workdir: str,
    old: dict[str, Any],
    new: dict[str, Any],
    ignore: Sequence[str] = (),
) -> None:
    """Raise ValueError if two configs differ, naming keys and both values."""
    old, new = _flat(old), _flat(new)
    rows = [
        f"{key} is {_shown(old, key)} there and {_shown(new, key)} here"
        # What is there on both sides says most: the method before its settings.
        for key in sorted(old | new, key=lambda k: ((k in old) + (k in new) < 2, k))
        if _shown(old, key) != _shown(new, key)
        and not any(re.fullmatch(pattern, key) for pattern in ignore)
    ]
    if rows:
        more = f"; and {len(rows) - 8} more" if len(rows) > 8 else ""
        raise ValueError(
            f"workdir {workdir} holds another run: {'; '.join(rows[:8])}{more}. "
            "Use another --workdir, or delete this one"
        )


def write_meta(workdir: str, meta: dict[str, Any]) -> None:
    """Write `workdir/meta.json`; a reader sees the old one or the new one, whole."""
    path = epath.Path(workdir) / "meta.json"
    part = path.with_name("meta.json.part")
    part.write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")
    part.replace(path)


def read_meta(workdir: str) -> dict[str, Any] | None:
    """What `write_meta` wrote, or None if nothing was.

    Raises:
      ValueError: the file is not JSON.
    """
    path = epath.Path(workdir) / "meta.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); choose another --workdir"
        ) from error


def versions() -> dict[str, str]:
    """The installed versions of what the numbers of a run depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _flat(config: dict[str, Any], start: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        inner = isinstance(value, dict) and value
        flat |= _flat(value, f"{start}{key}.") if inner else {f"{start}{key}": value}
    return flat


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], sort_keys=True) if key in flat else "absent"
