"""The mini zoo: small trained encoders that ship with the package.

    clvsmim zoo                                          # lists them
    clvsmim analyze zoo:mini_moco_v3 --out=runs/measured
    clvsmim train --config=configs/demo_labels.py:probe,zoo:mini_moco_v3 --workdir=...

"zoo:NAME" stands wherever a trained run is asked for; `config.init = dict(zoo=NAME)`
starts from it. What they are, how they were chosen and what they show stands in
docs/mini-zoo.md. To make one again, train its config and pack the run:

    clvsmim zoo --pack=runs/mini_moco_v3 --name=mini_moco_v3
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath

from clvsmim import cli, meta, packed

PREFIX = "zoo:"
FOLDER = epath.resource_path("clvsmim.zoo")


def main(argv: Sequence[str]) -> None:
    values, rest = cli.parse(__doc__, argv, _flags)
    if rest:
        raise ValueError(f"unexpected {rest[0]!r}; `clvsmim zoo` takes flags only")
    if values.pack:
        print(pack(values.pack, values.name))
    else:
        print(listing())


def _flags(values: flags.FlagValues) -> None:
    own = {"flag_values": values}
    what = "a workdir to pack into the zoo, instead of listing it"
    flags.DEFINE_string("pack", "", what, **own)
    flags.DEFINE_string("name", "", "what to call the packed run", **own)


def names() -> list[str]:
    """The members that are installed."""
    return sorted(p.name for p in FOLDER.iterdir() if packed.is_packed(p))


def place(run: str) -> str:
    """The folder of "zoo:NAME"; any other `run` as it is.

    Raises:
      ValueError: there is no such member.
    """
    if not run.startswith(PREFIX):
        return run
    name, known = run.removeprefix(PREFIX), names()
    if name in known:
        return str(FOLDER / name)
    if known:
        raise ValueError(f"no {name!r} in the zoo; known: {', '.join(known)}")
    raise ValueError(
        f"{run}: this installation has none of the zoo's files; install clvsmim from "
        "its repository, or train one: clvsmim train --config=configs/mini_zoo.py:..."
    )


def pack(workdir: str, name: str) -> str:
    """Add a finished run to the zoo; returns its folder.

    Raises:
      ValueError: no name, no run, or one that is not finished.
    """
    from clvsmim.analyze import load  # which asks the zoo for its folders

    if not name or "/" in name:
        raise ValueError(f"--name={name!r}: give the member a name without slashes")
    trained = load(workdir)
    total = (meta.read_meta(workdir) or {})["steps"]
    if trained.step < total:
        raise ValueError(
            f"{workdir} is at step {trained.step} of {total}; train it to the end"
        )
    folder = str(FOLDER / name)
    packed.pack(trained, workdir, folder)
    return folder


def listing() -> str:
    """A line for each member: what it is, how long it trained, how large it is."""
    rows = [
        ("name", "objective", "seed", "steps", "images", "minutes", "kB", "weights")
    ]
    rows += [row(name) for name in names()]
    if len(rows) == 1:
        return "the zoo is empty: this installation has none of its files"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(text.ljust(w) for text, w in zip(r, widths, strict=True)).rstrip()
        for r in rows
    ]
    return "\n".join(lines)


def row(name: str) -> tuple[str, ...]:
    """What the list says of a member."""
    folder = FOLDER / name
    about: dict[str, Any] = meta.read_meta(folder) or {}
    config = about["config"]
    objective = config["objective"]
    lam = f", λ = {objective['lam']:g}" if "lam" in objective else ""
    size = sum(p.stat().length for p in folder.iterdir())
    intact = packed.sha256(folder / packed.WEIGHTS) == about["sha256"][packed.WEIGHTS]
    return (
        name,
        f"{objective['name']}{lam}",
        str(config["seed"]),
        f"{about['step']:,}",
        f"{about['step'] * config['batch']:,}",
        f"{about['seconds'] / 60:.0f}",
        f"{size / 1000:.0f}",
        "intact" if intact else "DAMAGED",
    )


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
