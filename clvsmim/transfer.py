"""A trained encoder, fitted to the encoder of another run."""

import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from clvsmim import foreign, packed, tree, vit
from clvsmim.checkpoint import restore_params, saved_steps
from clvsmim.formats import _fit
from clvsmim.meta import read_meta
from clvsmim.vit import Spec

Tree = Any
# What no shape tells, and what the network computes with.
QUIET = ("mlp", "norm_eps")


class Given(NamedTuple):
    """A trained encoder as it was found.

    Attributes:
      variables: {"params", "stats"}.
      spec: None if nobody wrote down what it is.
      colour: {"mean", "std"} of its input; {} if nobody did.
      family: whose file it came from, "" of a run.
      report: for the user, "" of a run.
    """

    variables: Tree
    spec: Spec | None
    colour: dict[str, Any]
    family: str
    report: str


def read(
    workdir: str,
    spec: Spec,
    colour: dict[str, Any],
    wanted: Tree,
    sharding: jax.sharding.Sharding,
) -> Tree:
    """The encoder of a run, or of a file of another library: {"params", "stats"}.

    Position tables, relative tables and the patch embedding are resized to what is
    wanted; that, and the report on a file, are printed.

    Args:
      workdir: its newest checkpoint is read; or a file, or "zoo:NAME".
      spec: of the encoder that will get it.
      colour: the section `input` of its run, which must be that of the saved one.
      wanted: its {"params", "stats"}, as shapes.
      sharding: of every array.

    Raises:
      ValueError: it does not fit, as `fit`, or there is none.
    """
    what = f"init.path={workdir}"
    file = foreign.find(packed.place(workdir))
    given = of_file(file, spec.heads) if file else of_run(workdir, sharding)
    if given.report:
        say(given.report)
    check_colour(given.colour, colour, what)
    variables = given.variables
    if given.spec is not None:
        for name in QUIET:
            there, here = getattr(given.spec, name), getattr(spec, name)
            if there != here:
                say(f"{what} was trained with {name}={there}, this run has {here}")
        variables, lines = resized(given, spec)
        for line in lines:
            say(f"{what}, resized: {line}")
    found = {
        part: tree.strict(wanted[part], fit(variables[part], wanted[part]), what)
        for part in wanted
    }
    return jax.tree.map(
        lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, sharding), found
    )


def check_there(path: str) -> None:
    """Raise ValueError unless this process sees a run or a file to start from.

    It reads none, for that brings all processes together.
    """
    folder = packed.place(path)
    if not (foreign.find(folder) or packed.is_packed(folder) or saved_steps(folder)):
        raise ValueError(
            f"init.path={path}: no run of clvsmim and no checkpoint file is there; all "
            "hosts must see it"
        )


def of_run(workdir: str, sharding: jax.sharding.Sharding) -> Given:
    """The newest checkpoint of a workdir, or a packed run."""
    folder = packed.place(workdir)
    found, _ = restore_params(folder, sharding=sharding)
    about = read_meta(folder) or {}
    variables = {"params": found["params"], "stats": found["extra"]}
    return Given(
        {part: fields.get("encoder", {}) for part, fields in variables.items()},
        vit.make(**about["encoder"]).spec if about else None,
        about.get("input", {}),
        about.get("file", {}).get("family", ""),
        "",
    )


def of_file(path: str, heads: int = 0) -> Given:
    """The encoder in a checkpoint of another library."""
    opened = foreign.open_run(path, heads=heads)
    return Given(
        {"params": opened.params["encoder"], "stats": opened.extra["encoder"]},
        vit.make(**opened.encoder).spec,
        opened.input,
        opened.family,
        foreign.as_flags(str(opened.report)),
    )


def resized(given: Given, spec: Spec) -> tuple[Tree, list[str]]:
    """The variables for the image and the patch of `spec`, and what was resized."""
    there, here = given.spec, spec
    if (there.grid, there.patch) == (here.grid, here.patch):
        return given.variables, []
    params = jax.tree.map(np.asarray, given.variables["params"])
    how = _fit.reference(given.family, registers=there.prefix > 1)
    params, lines = _fit.fit_encoder(params, there, here, how)
    return {**given.variables, "params": params}, lines


def say(line: str) -> None:
    """To stderr, from one process."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def settings_of(workdir: str) -> dict[str, Any]:
    """The config that a workdir was trained with, as nested dicts.

    Of a file, and of a converted one, it has no `data`: nobody knows.

    Raises:
      ValueError: nobody trained there.
    """
    folder = packed.place(workdir)
    file = foreign.find(folder)
    if file:
        opened = foreign.open_run(file)
        return {"encoder": opened.encoder, "input": opened.input}
    about = read_meta(folder)
    if about is None:
        raise ValueError(
            f"no meta.json in {workdir!r}; expected a --workdir of `clvsmim train`, or "
            "a checkpoint file"
        )
    return about["config"]


def check_colour(saved: dict[str, Any], colour: dict[str, Any], what: str) -> None:
    """Raise ValueError if the images would be normalised in another way."""
    for key, there in saved.items():
        there, here = tuple(there), tuple(colour[key])
        if there != here:
            raise ValueError(
                f"{what} was trained with input.{key}={there}, this run has {here}; "
                "use that of the checkpoint"
            )


def fit(saved: Tree, wanted: Tree) -> Tree:
    """`saved` in the form of `wanted`, as far as fine-tuning knows how.

    The bias table that the blocks of SimMIM share becomes one copy per block, and a
    final norm is dropped where none is wanted (MAE, SimMIM). The rest stays as it is,
    for `tree.strict` to compare.
    """
    saved, names = tree.named(saved), tree.named(wanted)
    own = [name for name in names if name.endswith("/attn/rel_table")]
    if "rel_table" in saved and own:
        saved |= dict.fromkeys(own, saved.pop("rel_table"))
    if not any(name.startswith("ln_final/") for name in names):
        saved = {n: x for n, x in saved.items() if not n.startswith("ln_final/")}
    return tree.nest(saved)
