"""Whether a file has everything that the network needs, and nothing else."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from clvsmim import tree, vit
from clvsmim.formats._choose import known
from clvsmim.formats._family import Family
from clvsmim.formats._report import Report, some
from clvsmim.formats._rules import Leaves

Tree = Any


def refuse_expressions(name: str, rules: tuple[str, ...]) -> None:
    """Raise ValueError if a rule of `partial` or `ignore` is no regular expression."""
    for rule in rules:
        try:
            re.compile(rule)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{name}={rule!r} is no regular expression ({error}); to match any "
                "text, write .*"
            ) from error


def refuse_unknown(
    short: dict[str, Any], names: Mapping[str, str], family: Family, ignore: tuple
) -> dict[str, str]:
    """Take what the table has no line for out of `short`: {name in the file: why}.

    Raises:
      ValueError: a tensor without a place that was not to be ignored.
    """
    unknown = [name for name in short if not known(name, family)]
    left = [
        names[n] for n in unknown if not any(re.fullmatch(r, names[n]) for r in ignore)
    ]
    if left:
        raise ValueError(
            f"{len(left)} tensors that no {family.title} has: {some(left)}; another "
            "format=, or leave them out with ignore="
        )
    for name in unknown:
        del short[name]
    return {names[name]: "ignored, as you said" for name in unknown}


# Leaves without which nothing can be said of a network, and the rank of those that say
# something.
RANKS = {
    "encoder/block_0/ln1/scale": 1,
    "encoder/block_0/mlp/fc1/kernel": 2,
    "encoder/block_0/mlp/fc2/kernel": 2,
}
OTHER_RANKS = {
    "encoder/cls_token": 3,
    "encoder/registers": 3,
    "encoder/pos_embed": 3,
    "encoder/patch_embed/kernel": 4,
    "encoder/rel_table": 2,
    "encoder/block_0/attn/rel_table": 2,
    "heads/decoder/proj/kernel": 2,
    "heads/last/rate_1/kernel": 2,
}


def refuse_ranks(leaves: Leaves) -> None:
    """Raise ValueError if a leaf that tells what the network is has other axes."""
    for name, rank in (RANKS | OTHER_RANKS).items():
        if name in RANKS and name not in leaves:
            raise ValueError(f"{name} is not in the file: no ViT of this kind")
        if name in leaves and (leaves[name].ndim != rank or not leaves[name].size):
            shape = leaves[name].shape
            raise ValueError(
                f"{name} has shape {shape}; expected {rank} axes, not empty"
            )


def refuse_missing(absent: list[str], family: Family, partial: tuple) -> None:
    """Raise ValueError if a leaf that every such file has is not there.

    "a|b" is either; `partial` may name one of them, or both so.
    """
    left = [n for n in absent if not any(allows(partial, x) for x in n.split("|"))]
    if left:
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        raise ValueError(
            f"not a whole {family.title}: {', '.join(left[:4])}{more} missing; if that "
            "is so on purpose, name them with partial="
        )


def allows(partial: tuple[str, ...], name: str) -> bool:
    """Whether one of the expressions is of this leaf."""
    return any(re.fullmatch(rule, name) for rule in partial)


def warn_built_without(absent: list[str], leaves: Leaves, out: Report) -> None:
    """Report the parts that the network lacks because the file does, as was allowed."""
    for names in absent:
        name, *others = names.split("|")
        if not any(n in leaves for n in (name, *others)):
            part = names.replace("|", " or ")
            out.missing.append(name)
            out.warnings.append(
                f"built without {part}: the file has none, and partial= allows it; "
                "it is another network than others of its family"
            )


def completed(
    leaves: Leaves, fields: Mapping[str, Any], partial: tuple, out: Report
) -> Leaves:
    """Leaves of exactly the encoder's names and shapes; the allowed ones initialised.

    Raises:
      ValueError: both sides, of what is missing, unexpected or of another shape.
    """
    wanted = expected(fields)
    missing = [n for n in wanted if n not in leaves]
    out.missing = [n for n in missing if allows(partial, n)]
    if out.missing:
        leaves = leaves | initial(fields, out.missing)
    own = {
        n: x for n, x in leaves.items() if not n.startswith(("heads/", "stats/heads"))
    }
    tree.strict(tree.nest(wanted), tree.nest(own), "the file")
    return {n: leaves[n] for n in wanted} | leaves


def expected(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of the encoder's leaves and batch statistics by our names.

    All blocks are alike, so one is traced: twelve take longer than reading the file.
    """
    shapes = jax.eval_shape(lambda: init({**fields, "depth": 1}))
    return {
        name.replace("/block_0/", f"/block_{i}/"): shape
        for name, shape in shapes.items()
        for i in range(fields["depth"] if "/block_0/" in name else 1)
    }


def initial(fields: Mapping[str, Any], names: list[str]) -> Leaves:
    """Initial values, of seed 0, of some leaves."""
    made = jax.jit(lambda: {name: init(fields)[name] for name in names})()
    return {name: np.asarray(x) for name, x in made.items()}


def init(fields: Mapping[str, Any]) -> dict[str, jax.Array]:
    """A new encoder's leaves and batch statistics by our names."""
    encoder = vit.make(**fields)
    images = jax.numpy.zeros((1, *encoder.spec.image, 3))
    found = encoder.init(jax.random.key(0), images, train=True)
    own = tree.named({"encoder": found["params"]})
    return own | tree.named({"stats": {"encoder": found.get("stats", {})}})
