"""The mini zoo: small trained encoders that ship with the package.

    clvsmim zoo                                          # lists them
    clvsmim analyze zoo:mini_moco_v3 --out=runs/measured
    clvsmim train --config=configs/demo_labels.py:probe,zoo:mini_moco_v3 --workdir=...

"zoo:NAME" stands wherever a trained run is asked for; `config.init = dict(zoo=NAME)`
starts from it. What they are, how they were chosen and what they show stands in
docs/mini-zoo.md. To make one again, train its config and pack the run:

    clvsmim zoo --pack=runs/mini_moco_v3 --name=mini_moco_v3
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from clvsmim import cli, meta, packed


def main(argv: Sequence[str]) -> None:
    values, rest = cli.parse(__doc__, argv, _flags)
    if rest:
        raise ValueError(f"unexpected {rest[0]!r}; `clvsmim zoo` takes flags only")
    if values.untrained and values.pack:
        raise ValueError("--pack and --untrained: give one of them")
    if values.untrained:
        print(pack_untrained(values.name))
    elif values.pack:
        print(pack(values.pack, values.name))
    else:
        print(listing())


def _flags(values: flags.FlagValues) -> None:
    own = {"flag_values": values}
    what = "a workdir to pack into the zoo, instead of listing it"
    flags.DEFINE_string("pack", "", what, **own)
    what = "pack the encoder of configs/mini_zoo.py as it is before training"
    flags.DEFINE_bool("untrained", False, what, **own)
    flags.DEFINE_string("name", "", "what to call the packed run", **own)


def pack(workdir: str, name: str) -> str:
    """Add a finished run to the zoo; returns its folder.

    Raises:
      ValueError: no name, no run, or one that is not finished.
    """
    from clvsmim.analyze import load  # which asks the zoo for its folders

    check_name(name)
    folder = packed.place(workdir)
    about = meta.read_meta(folder) or {}
    # A converted file is packed too, but it was never anything else.
    if packed.is_packed(folder) and "file" not in about:
        raise ValueError(f"--pack={workdir} is packed already; name its workdir")
    trained = load(workdir)
    total = about["steps"]
    if trained.step < total:
        raise ValueError(
            f"{workdir} is at step {trained.step} of {total}; train it to the end"
        )
    packed.pack(trained, workdir, str(packed.ZOO / name))
    return str(packed.ZOO / name)


def pack_untrained(name: str) -> str:
    """Add the encoder that all members start from, seed 0; returns its folder."""
    from clvsmim import build
    from clvsmim.analyze import Trained
    from clvsmim.configs import mini_zoo

    check_name(name)
    program = build.build(config := mini_zoo.get_config())
    state = jax.device_get(program.init())
    config = build.plain(config)
    trained = Trained(config, program.objective, state.params, state.extra, 0)
    encoder = dataclasses.asdict(program.objective.encoder.spec)
    about = {"config": config, "encoder": encoder, "input": config["input"]}
    about |= {"parameters": build.count(state.params["encoder"]), "steps": 0}
    with tempfile.TemporaryDirectory() as workdir:
        meta.write_meta(workdir, about | {"versions": meta.versions()})
        packed.pack(trained, workdir, str(packed.ZOO / name))
    return str(packed.ZOO / name)


def check_name(name: str) -> None:
    """Raise ValueError unless `name` can be that of a member."""
    if not name or "/" in name:
        raise ValueError(f"--name={name!r}: give the member a name without slashes")


def listing() -> str:
    """A line for each member: what it is, how long it trained, how large it is."""
    rows = [
        ("name", "objective", "seed", "steps", "images", "minutes", "kB", "weights")
    ]
    rows += [row(name) for name in packed.names()]
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
    folder = packed.ZOO / name
    about: dict[str, Any] = meta.read_meta(folder) or {}
    config = about["config"]
    objective = config["objective"]
    lam = f", λ = {objective['lam']:g}" if "lam" in objective else ""
    known = about["step"] or "file" in about
    size = sum(len(p.read_bytes()) for p in folder.iterdir())
    sums = about["sha256"].items()
    intact = all(packed.sha256(str(folder / file)) == want for file, want in sums)
    return (
        name,
        f"{objective['name']}{lam}" if known else "untrained",
        str(config["seed"]),
        f"{about['step']:,}",
        f"{about['step'] * config['batch']:,}",
        f"{about['seconds'] / 60:.0f}",
        f"{size / 1000:.0f}",
        "intact" if intact else "DAMAGED",
    )
