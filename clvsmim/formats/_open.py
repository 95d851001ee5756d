"""From tensors to a network: choose the family, apply its table, check everything."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from clvsmim import tree
from clvsmim.formats import _check, _fit, _rules, _spec
from clvsmim.formats._about import check_about
from clvsmim.formats._choose import choose, select
from clvsmim.formats._family import Family, Look
from clvsmim.formats._heads import complete_heads
from clvsmim.formats._images import images_of
from clvsmim.formats._positions import fold_positions
from clvsmim.formats._preprocess import Transform
from clvsmim.formats._report import Report
from clvsmim.formats._rules import Leaves

Tree = Any


class Origin(NamedTuple):
    """What gives back the very file that a network came from; see `export`.

    Attributes:
      family: whose table read it.
      names: name in the table -> name in the file.
      dtypes: name in the file -> dtype, where it was not float32.
      rest: dropped tensors by name.
      folded: forms that were folded into ours.
      about: its config.json.
    """

    family: str
    names: dict[str, str]
    dtypes: dict[str, str]
    rest: dict[str, Any]
    folded: tuple[str, ...]
    about: Mapping[str, Any]


class Opened(NamedTuple):
    """A checkpoint of another library, as one of our networks.

    Attributes:
      family: the module of `formats` whose table read it.
      encoder: every field of `vit.Spec`.
      input: {"mean", "std"} that its images want, as `config.input`.
      transform: how its images are prepared for evaluation; None for a file of ours
        with nothing beside it, whose run knows.
      params: {"encoder", "heads"}: float32, our names, NumPy.
      extra: {"encoder", "heads"}: batch statistics; {} where there are none.
      objective: settings of the objective whose heads came along, those that the file
        decides; None for an encoder alone.
      report: what was found; `str(report)` is for the user.
      origin: for `export`, to give back the same file.
    """

    family: str
    encoder: dict[str, Any]
    input: dict[str, tuple]
    transform: Transform | None
    params: Tree
    extra: Tree
    objective: dict[str, Any] | None
    report: Report
    origin: Origin


def open_tensors(
    tensors: Mapping[str, Any],
    *,
    format: str = "",
    branch: str = "",
    heads: int = 0,
    decoder_heads: int = 0,
    image: tuple[int, ...] = (),
    partial: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    about: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    source: str = "",
) -> Opened:
    """Recognise a family by names and shapes, and map its tensors.

    Args:
      tensors: by name; dict keys on the way to it are joined by "/".
      format: a module of `formats`; "" looks which one it is.
      branch: of two encoders in a file, which ("base" or "momentum" of MoCo v3,
        "teacher" or "student" of DINO and iBOT); "" is the one that is evaluated.
      heads, decoder_heads: number of attention heads, which shapes do not tell.
      image: (rows, columns) in pixels, where no square position table tells.
      partial: regular expressions of our leaves that may be missing
        ("encoder/block_3/.*"); they are left as initialised, or the network is built
        without a part that it can lack ("encoder/ln_final/.*").
      ignore: regular expressions of tensors in the file to leave out.
      about: config.json of Hugging Face or timm, if there is one.
      processor: preprocessor_config.json of Hugging Face, if there is one.
      source: what to call it in messages.

    Raises:
      ValueError: one line: an unknown or ambiguous file, tensors without a place,
        missing ones, or shapes that are not those of the network.
    """
    try:
        _check.refuse_expressions("partial", partial)
        _check.refuse_expressions("ignore", ignore)
        return _open(
            tensors,
            format,
            branch,
            (heads, decoder_heads),
            tuple(image),
            (partial, ignore),
            about or {},
            processor or {},
            source,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from error


def _open(
    tensors: Mapping[str, Any],
    format: str,
    branch: str,
    heads: tuple[int, int],
    image: tuple[int, ...],
    allowed: tuple[tuple[str, ...], tuple[str, ...]],
    about: Mapping[str, Any],
    processor: Mapping[str, Any],
    source: str,
) -> Opened:
    out = Report(source=source)
    given, about = about, check_about(about)
    out.family, family, out.evidence = choose(Look(tensors), format)
    out.title = family.title
    tensors = family.prepare(tensors) if family.prepare else tensors
    names, others = select(tensors, family, branch, out)
    short = {name: tensors[full] for name, full in names.items()}
    others |= _check.refuse_unknown(short, names, family, allowed[1])
    at = _spec.shapes(short, family.rules)
    count = _spec.head_count(at, family, heads[0], about, out)
    second = _spec.decoder_head_count(at, heads[1], about, out)

    def heads_at(name: str) -> int:
        return second if name.startswith("heads/decoder/") else count

    found = _rules.read(short, family.rules, family.givens, family.drops, heads_at)
    _check.refuse_ranks(found.leaves)
    leaves = found.leaves
    notes = family.fold(leaves, about) if family.fold else []
    more_channels(leaves, out)
    patch = leaves.get("encoder/patch_embed/kernel", np.zeros(1)).shape[0]
    patches = image[0] // patch * (image[1] // patch) if len(image) == 2 else 0
    folded, more = fold_positions(leaves, patches)
    out.found += [*notes, *more]
    absent = [n for n in family.needs if not any(k in leaves for k in n.split("|"))]
    _check.refuse_missing(absent, family, allowed[0])
    half = any("encoder/pos_embed" in found.matched[name] for name in found.cast)
    fields = _spec.encoder_fields(leaves, family, count, image, about, half, out)
    _rules.check(found, short)
    leaves = _check.completed(leaves, fields, allowed[0], out)
    _check.warn_built_without(absent, leaves, out)
    theirs = {x: names[n] for n, ours in found.matched.items() for x in ours}
    leaves = complete_heads(leaves, fields, second, theirs, allowed[0], out)
    objective = _spec.objective_of(leaves, second, about, out)
    out.encoder = fields
    out.parameters = sum(x.size for n, x in leaves.items() if n.startswith("encoder/"))
    out.matched = {names[n]: ours for n, ours in found.matched.items()}
    out.moved = [names[n] for n in found.moved]
    out.dropped = {names[n]: why for n, why in found.dropped.items()} | others
    describe(out, leaves, found, family, objective)
    colour, transform = images_of(out.family, fields["image"], about, processor, out)
    parts = split(leaves)
    origin = Origin(
        out.family,
        names,
        {names[n]: dtype for n, dtype in found.cast.items()},
        {n: tensors[n] for n in out.dropped},
        tuple(folded),
        given,
    )
    return Opened(
        family=out.family,
        encoder=fields,
        input=colour,
        transform=transform,
        params={k: parts["params"].get(k, {}) for k in ("encoder", "heads")},
        extra={k: parts["extra"].get(k, {}) for k in ("encoder", "heads")},
        objective=objective,
        report=out,
        origin=origin,
    )


def more_channels(leaves: Leaves, out: Report) -> None:
    """Let an encoder of grey images take RGB: of a grey image it gives the same."""
    for name in ("encoder/patch_embed/kernel", "encoder/patch_embed/conv_0/kernel"):
        kernel = leaves.get(name)
        if kernel is not None and kernel.ndim == 4 and kernel.shape[2] == 1:
            leaves[name] = _fit.channels(kernel, _fit.RGB)
            out.found.append(
                f"{name} is of one channel (grey); its weights, divided by 3, are used "
                "for each of the three here"
            )


def split(leaves: Leaves) -> Tree:
    """{"params": {"encoder", "heads"}, "extra": the same of batch statistics}."""
    placed = {}
    for name, x in leaves.items():
        stats = name.startswith("stats/")
        placed["extra/" + name[6:] if stats else "params/" + name] = x
    return {"params": {}, "extra": {}} | tree.nest(placed)


def describe(
    out: Report,
    leaves: Leaves,
    found: _rules.Found,
    family: Family,
    objective: dict[str, Any] | None,
) -> None:
    """Fill in what a user should know before trusting the file."""
    if objective is None:
        out.what.append(family.alone)
    elif objective["name"] == "classify":
        out.what.append(
            f"with a linear classifier of {objective['classes']} classes: a fine-tuned "
            "or linear-probe file, not one of pre-training"
        )
    else:
        out.what.append(f"with the heads of {objective['name']}")
    bad = [n for n, x in leaves.items() if not np.isfinite(x).all()]
    out.warnings += found.warnings
    for name in bad:
        count = int((~np.isfinite(leaves[name])).sum())
        out.warnings.append(f"{count} values of {name} are NaN or infinite")
    if found.cast:
        kinds = ", ".join(sorted(set(found.cast.values())))
        out.found.append(f"{len(found.cast)} tensors in {kinds}, float32 here")
    where = family.checked or "names from documentation only, nobody's file was read"
    out.found.append(f"the table is checked against {where}")
