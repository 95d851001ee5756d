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
    """Raise ValueError if a leaf that every such file has is not there."""
    absent = [n for n in absent if not any(re.fullmatch(rule, n) for rule in partial)]
    if absent:
        raise ValueError(
            f"not a whole {family.title}: {some(absent)} missing; if that is so on "
            "purpose, name them with partial="
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
    out.missing = [n for n in missing if any(re.fullmatch(rule, n) for rule in partial)]
    if out.missing:
        leaves = leaves | initial(fields, out.missing)
    own = {
        n: x for n, x in leaves.items() if not n.startswith(("heads/", "stats/heads"))
    }
    tree.strict(tree.nest(wanted), tree.nest(own), "the file")
    return {n: leaves[n] for n in wanted} | leaves


def expected(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of the encoder's leaves and batch statistics by our names."""
    return jax.eval_shape(lambda: init(fields))


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


def check_heads(
    leaves: Leaves, fields: Mapping[str, Any], objective: dict[str, Any] | None
) -> None:
    """Raise ValueError if a decoder that came along is not one of ours."""
    if not objective or objective["name"] != "mae":
        return
    spec = vit.make(**fields).spec
    decoder = vit.Decoder(vit.decoder_spec(spec, **objective["decoder"]))
    shapes = jax.eval_shape(
        lambda: decoder.init(
            jax.random.key(0), jax.numpy.zeros((1, spec.tokens, spec.width))
        )
    )["params"]
    start = "heads/decoder/"
    own = {n[len(start) :]: x for n, x in leaves.items() if n.startswith(start)}
    tree.strict(shapes, tree.nest(own), "the decoder in the file")
