"""Whether the heads that came along are whole, and such as stand on the encoder."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim import tree, vit
from clvsmim.formats._check import allows
from clvsmim.formats._report import Report
from clvsmim.formats._rules import Leaves
from clvsmim.formats._tables import HEAD
from clvsmim.heads import MLPHead, PixelDecoder

TOKEN = "heads/mask_token"


def complete_heads(
    leaves: Leaves,
    fields: Mapping[str, Any],
    decoder_heads: int,
    theirs: Mapping[str, str],
    partial: tuple,
    out: Report,
) -> Leaves:
    """Leaves with heads of exactly the names and shapes that a file of this kind has.

    What a file lacks as a whole (the predictor of a momentum encoder) is not asked
    for; of what is there in part, everything is. `theirs` are the file's names by ours.

    Raises:
      ValueError: a part is missing that `partial` does not allow, or of another shape.
    """
    own = {n: x for n, x in leaves.items() if n.startswith(("heads/", "stats/heads/"))}
    if not own:
        return leaves
    make = parts(own, vit.make(**fields).spec, decoder_heads)
    wanted = jax.eval_shape(make)
    missing = [n for n in wanted if n not in own]
    allowed = [n for n in missing if allows(partial, n)]
    rows = [f"{n} {wanted[n].shape} is missing" for n in missing if n not in allowed]
    rows += [
        f"{both_names(theirs.get(n, n), n)} has shape {x.shape}, expected "
        + (str(wanted[n].shape) if n in wanted else "none there")
        for n, x in own.items()
        if n not in wanted or x.shape != wanted[n].shape or not x.size
    ]
    if rows:
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        raise ValueError(
            f"the heads in the file are not whole: {'; '.join(rows[:3])}{more}; "
            "ignore= leaves tensors out, partial= allows missing ones"
        )
    if not allowed:
        return leaves
    out.missing += allowed
    made = jax.jit(lambda: {n: make()[n] for n in allowed})()
    return leaves | {n: np.asarray(x) for n, x in made.items()}


def both_names(theirs: str, ours: str) -> str:
    """As the file has it, and where that belongs."""
    return ours if theirs == ours else f"{theirs} ({ours})"


def parts(own: Mapping[str, np.ndarray], spec: vit.Spec, decoder_heads: int) -> Any:
    """() -> the initial leaves of every head of which there is something."""
    at = {n: x.shape for n, x in own.items()}
    mae = any(n.startswith("heads/decoder/") and n.count("/") > 2 for n in at)
    layers = {name: widths(at, name) for name in ("projector", "predictor")}
    if layers["predictor"] and not layers["projector"]:
        raise ValueError(
            "a predictor without the projector that it stands on: "
            "heads/projector/fc_0/kernel is missing"
        )
    first = number_of(at, "heads/pre_logits", spec.width)

    def make() -> dict[str, jax.Array]:
        made = {}
        if mae:
            made |= mae_decoder(at, spec, decoder_heads)
        elif any(n.startswith("heads/decoder/") for n in at):
            made |= simmim_decoder(spec)
        elif TOKEN in at:
            made[TOKEN] = mask_token(spec.width)
        if f"{HEAD}/kernel" in at or f"{HEAD}/bias" in at:
            made |= linear(HEAD, spec.width, number_of(at, HEAD, 0))
        if any(n.startswith(f"{HEAD}/fc_norm/") for n in at):
            made[f"{HEAD}/fc_norm/scale"] = jnp.ones(spec.width)
            made[f"{HEAD}/fc_norm/bias"] = jnp.zeros(spec.width)
        if any(n.startswith("heads/pre_logits/") for n in at):
            made |= linear("heads/pre_logits", spec.width, first)
        if any(n.startswith("heads/after_pre_logits/") for n in at):
            count = number_of(at, "heads/after_pre_logits", 0)
            made |= linear("heads/after_pre_logits", first, count)
        width = spec.width
        for name, sizes in layers.items():
            if sizes:
                made |= mlp_head(name, width, sizes)
                width = sizes[-1]
        return made

    return make


def mae_decoder(at: Mapping[str, tuple], spec: vit.Spec, heads: int) -> dict:
    """MAE's mask token and decoder, as wide as its first block."""
    start = "heads/decoder/"
    sides = at.get(f"{start}block_0/ln1/scale") or at.get(f"{start}proj/kernel", (0,))
    width, depth = sides[-1], len({n.split("/")[2] for n in at if "/block_" in n})
    if not (width and depth) or width % 4 or width % max(heads, 1):
        raise ValueError(
            f"a decoder {width} wide of {depth} blocks; expected a width that divides "
            f"by 4, {start}proj/kernel and {start}block_0/ln1/scale"
        )
    wide = {"width": width, "depth": depth, "heads": max(heads, 1)}
    decoder = vit.Decoder(vit.decoder_spec(spec, **wide))
    params = decoder.init(jax.random.key(0), jnp.zeros((1, spec.tokens, spec.width)))[
        "params"
    ]
    return {TOKEN: mask_token(width)} | tree.named({"heads": {"decoder": params}})


def simmim_decoder(spec: vit.Spec) -> dict[str, jax.Array]:
    """SimMIM's mask token, and its linear map to the pixels of a patch."""
    decoder = PixelDecoder(3 * spec.patch**2)
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 1, spec.width)))["params"]
    made = tree.named({"heads": {"decoder": params}})
    return {TOKEN: mask_token(spec.width)} | made


def mask_token(width: int) -> jax.Array:
    """(1, 1, width)."""
    return 0.02 * jax.random.normal(jax.random.key(0), (1, 1, width))


def linear(name: str, width: int, count: int) -> dict[str, jax.Array]:
    """A linear map that begins as zeros."""
    return {
        f"{name}/kernel": jnp.zeros((width, count)),
        f"{name}/bias": jnp.zeros(count),
    }


def number_of(at: Mapping[str, tuple], name: str, other: int) -> int:
    """How many numbers a linear map gives, by its kernel or its bias."""
    sides = at.get(f"{name}/kernel") or at.get(f"{name}/bias") or (other,)
    return sides[-1]


def mlp_head(name: str, width: int, sizes: tuple[int, ...]) -> dict[str, jax.Array]:
    """MoCo v3's projector or predictor, with its batch statistics."""
    found = MLPHead(sizes).init(jax.random.key(0), jnp.zeros((2, width)), True)
    made = tree.named({"heads": {name: found["params"]}})
    return made | tree.named({"stats": {"heads": {name: found["stats"]}}})


def widths(at: Mapping[str, tuple], name: str) -> tuple[int, ...]:
    """Of the layers of an MLP head, up to the last of which there is something.

    Raises:
      ValueError: a layer of which nothing is there.
    """
    found: dict[int, int] = {}
    for n, shape in at.items():
        if hit := re.fullmatch(rf"(?:stats/)?heads/{name}/(?:fc|bn)_(\d+)/\w+", n):
            found.setdefault(int(hit[1]), (shape or (0,))[-1])
    for i in range(len(found)):
        if not found.get(i):
            raise ValueError(f"heads/{name}/fc_{i}/kernel is missing, or empty")
    return tuple(found[i] for i in range(len(found)))
