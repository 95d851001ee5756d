"""From one of our networks to the tensors of another library."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from clvsmim import plugin, tree
from clvsmim.formats import _rules
from clvsmim.formats._family import Family
from clvsmim.formats._open import Opened, Origin
from clvsmim.formats._report import some
from clvsmim.formats._tables import HEAD

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
    pool: str = "",
    decoder_heads: int = 0,
    origin: Origin | None = None,
) -> Exported:
    """The tensors of {"encoder", "heads"} under the names of a family.

    Args:
      params, extra: as of `Opened`, or of a checkpoint of ours.
      encoder: every field of `vit.Spec`.
      to: a module of `formats` ("timm", "hf_vit", ...).
      pool: what a classifier reads, "cls" or "patches"; "" is CLS, or the patches if
        there is none or the classifier has a LayerNorm of its own. One that their code
        would read otherwise is left out.
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
    refuse_unsaid(encoder, family)
    own = (
        family.unfold(leaves, origin.folded if same else ())
        if family.unfold
        else leaves
    )

    reads, norm = classifier(own, encoder, pool)
    apart = []
    if not same and (reads, norm) not in family.classifiers:
        apart = [n for n in own if n.startswith(f"{HEAD}/")]
        own = {n: x for n, x in own.items() if n not in apart}
        reads, _ = classifier(own, encoder, "")
    absent = [n for n in family.needs if not any(k in own for k in n.split("|"))]
    if absent:
        raise ValueError(f"a {family.title} needs {some(absent)}, which is not here")

    def heads_at(name: str) -> int:
        return decoder_heads if name.startswith("heads/decoder/") else encoder["heads"]

    tensors, left = _rules.write(own, family.rules, family.givens, heads_at)
    refuse_left([n for n in left if "encoder/" in n], family.title)
    if same:
        tensors = as_it_was(tensors, origin, family)
    config = family.config(own, encoder, decoder_heads, reads) if family.config else {}
    if same:
        config = beside_it(origin.about, config)
    return Exported(tensors, config, [*left, *apart])


def export_again(opened: Opened, to: str = "") -> Exported:
    """What was opened, in the names of another family, or as the file that it was."""
    objective = opened.objective or {}
    return export(
        opened.params,
        opened.extra,
        opened.encoder,
        to or opened.family,
        pool=objective.get("pool", ""),
        decoder_heads=objective.get("decoder", {}).get("heads", 0),
        origin=opened.origin,
    )


def classifier(
    leaves: Mapping[str, Any], encoder: Mapping[str, Any], pool: str
) -> tuple[str, str]:
    """What a classifier reads, and the norm of its own, as in `Family.classifiers`."""
    norm = "none"
    if "stats/heads/last/mean" in leaves:
        norm = "batch"
    elif f"{HEAD}/fc_norm/scale" in leaves:
        norm = "both" if encoder["final_norm"] else "layer"
    if not encoder["prefix"]:
        return "tokens", norm
    return pool or ("patches" if norm in ("layer", "both") else "cls"), norm


def beside_it(about: Mapping[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the file if the same library wrote it, for it may say more.

    Hugging Face's knows nothing of heads that were given, nor that a patch embedding of
    grey images is one of RGB here.
    """
    if "model_type" in made and "model_type" in about:
        ours = ("num_attention_heads", "num_channels")
        return dict(about) | {key: made[key] for key in ours}
    return dict(about) if "class" in made and "architecture" in about else made


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
