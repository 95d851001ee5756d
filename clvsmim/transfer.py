"""A trained encoder, fitted to the encoder of another run."""

from typing import Any

import jax

from clvsmim import packed, tree
from clvsmim.checkpoint import restore_params
from clvsmim.meta import read_meta
from clvsmim.vit import Spec

Tree = Any


def read(
    workdir: str,
    spec: Spec,
    colour: dict[str, Any],
    wanted: Tree,
    sharding: jax.sharding.Sharding,
) -> Tree:
    """The encoder of the newest checkpoint in a workdir: {"params", "stats"}.

    Args:
      spec: of the encoder that will get it.
      colour: the section `input` of its run, which must be that of the saved one.
      wanted: its {"params", "stats"}, as shapes.
      sharding: of every array.

    Raises:
      ValueError: it does not fit, as `fit`, or there is none.
    """
    folder = packed.place(workdir)
    found, _ = restore_params(folder, sharding=sharding)
    about = read_meta(folder)
    what = f"init.path={workdir}"
    if about is not None and (spec.position, spec.relative) != ("none", "none"):
        check_grid(about["encoder"], spec, what)
    if about is not None:
        check_colour(about["input"], colour, what)
    given = {"params": found["params"], "stats": found["extra"]}
    given = {part: fields.get("encoder", {}) for part, fields in given.items()}
    return {
        part: tree.strict(wanted[part], fit(given[part], wanted[part]), what)
        for part in wanted
    }


def settings_of(workdir: str) -> dict[str, Any]:
    """The config that a workdir was trained with, as nested dicts.

    Raises:
      ValueError: nobody trained there.
    """
    about = read_meta(packed.place(workdir))
    if about is None:
        raise ValueError(
            f"no meta.json in {workdir!r}; expected a --workdir of `clvsmim train`"
        )
    return about["config"]


def check_grid(saved: dict[str, Any], spec: Spec, what: str) -> None:
    """Raise ValueError if the positions are those of another number of patches."""
    (rows, columns), patch = saved["image"], saved["patch"]
    there, here = (rows // patch, columns // patch), spec.grid
    if there != here:
        raise ValueError(
            f"the positions of {what} are saved for grid {there[0]}x{there[1]}, wanted "
            f"{here[0]}x{here[1]}; use encoder.image={(rows, columns)} and "
            f"encoder.patch={patch}, with which it was trained"
        )


def check_colour(saved: dict[str, Any], colour: dict[str, Any], what: str) -> None:
    """Raise ValueError if the images would be normalised in another way."""
    for key, values in colour.items():
        there, here = tuple(saved[key]), tuple(values)
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
