"""From one of our networks to the tensors of another library."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from clvsmim import plugin, tree
from clvsmim.formats import _rules
from clvsmim.formats._family import Family
from clvsmim.formats._open import Opened, Origin
from clvsmim.formats._report import some

Tree = Any


class Exported(NamedTuple):
    """A network in another library's names.

    Attributes:
      tensors: to save as .safetensors or .npz.
      config: what the library needs beside them (config.json of Hugging Face; class and
        arguments of timm), {} where there is nothing to say.
      left: our heads that the library has no place for.
    """

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    left: list[str]


def export(
    params: Tree,
    extra: Tree,
    encoder: Mapping[str, Any],
    to: str,
    *,
    decoder_heads: int = 0,
    origin: Origin | None = None,
) -> Exported:
    """The tensors of {"encoder", "heads"} under the names of a family.

    Args:
      params, extra: as of `Opened`, or of a checkpoint of ours.
      encoder: every field of `vit.Spec`.
      to: a module of `formats` ("timm", "hf_vit", ...).
      decoder_heads: of MAE's decoder, if there is one.
      origin: of the `Opened` that they came from: names, dtypes and dropped tensors are
        given back as they were, if it was of the same family.

    Raises:
      ValueError: the family has no place for a part or a setting of the encoder, or
        needs a part.
    """
    family = plugin.find("formats", to)()
    leaves = {n: np.asarray(x, np.float32) for n, x in tree.named(params).items()}
    leaves |= {f"stats/{n}": np.asarray(x) for n, x in tree.named(extra).items()}
    same = origin is not None and origin.family == to
    if not (same and origin.about):  # which is written again, and tells
        refuse_unsaid(encoder, family)
    own = (
        family.unfold(leaves, origin.folded if same else ())
        if family.unfold
        else leaves
    )
    absent = [n for n in family.needs if not any(k in own for k in n.split("|"))]
    if absent:
        raise ValueError(f"a {family.title} needs {some(absent)}, which is not here")

    def heads_at(name: str) -> int:
        return decoder_heads if name.startswith("heads/decoder/") else encoder["heads"]

    tensors, left = _rules.write(own, family.rules, family.givens, heads_at)
    refuse_left([n for n in left if "encoder/" in n], family.title)
    if same:
        tensors = as_it_was(tensors, origin, family)
    config = family.config(own, encoder, decoder_heads) if family.config else {}
    if same and origin.about:
        config = dict(origin.about)
    return Exported(tensors, config, left)


def export_again(opened: Opened, to: str = "") -> Exported:
    """What was opened, in the names of another family, or as the file that it was."""
    decoder = (opened.objective or {}).get("decoder", {})
    return export(
        opened.params,
        opened.extra,
        opened.encoder,
        to or opened.family,
        decoder_heads=decoder.get("heads", 0),
        origin=opened.origin,
    )


def refuse_left(left: list[str], title: str) -> None:
    """Raise ValueError if a part of the encoder would be lost."""
    if left:
        raise ValueError(
            f"a {title} has no place for {some(left)}: it would be another network"
        )


def refuse_unsaid(encoder: Mapping[str, Any], family: Family) -> None:
    """Raise ValueError if a setting of the encoder would be another one over there."""
    for field, can in family.can.items():
        value = encoder[field]
        if value in can:
            continue
        others = {n: plugin.find("formats", n)().can for n in plugin.names("formats")}
        able = [n for n, c in others.items() if value in c.get(field, (value,))]
        raise ValueError(
            f"a {family.title} has no place for {field}={value!r}, its code has "
            f"{' or '.join(map(repr, can))}: it would be another network; these have "
            f"one: {', '.join(able)}"
        )


def as_it_was(
    tensors: Mapping[str, np.ndarray], origin: Origin, family: Family
) -> dict[str, Any]:
    """The names and dtypes of the file, and what was dropped from it."""
    named = {
        origin.names.get(name, name): x
        for name, x in tensors.items()
        # An index that is always computed may not have been stored.
        if name in origin.names or _rules.match(name, family.givens)[0] is None
    }
    for name, dtype in origin.dtypes.items():
        if name in named:
            named[name] = named[name].astype(dtype)
    return named | {name: np.asarray(x) for name, x in origin.rest.items()}
