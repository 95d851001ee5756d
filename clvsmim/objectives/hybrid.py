"""L = (1 - lam) L_MIM + lam L_CL on one encoder (Park et al. 2023, section 5)."""

from functools import partial

import jax

from clvsmim.flops import Forward
from clvsmim.objectives import Objective, Tree
from clvsmim.vit import ViT

NAME = "hybrid"
Parts = tuple[tuple[float, Objective], ...]


def make(*, encoder: ViT, lam: float, mim: Objective, cl: Objective) -> Objective:
    """Mix two objectives of the same encoder.

    Each has its own views, heads and draws, and is given the whole encoder; the loss
    of the mixture is the weighted sum. At lam 0 or 1 the other branch does not exist.

    Raises:
      ValueError: lam outside [0, 1], two branches of one name or of two encoders.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"objective.lam={lam}: lambda must lie in [0, 1]")
    if not (isinstance(mim, Objective) and isinstance(cl, Objective)):
        raise ValueError("objective.mim or objective.cl needs a name")
    if mim.name == cl.name:
        raise ValueError(
            f"a hybrid mixes two different objectives, got {cl.name} twice"
        )
    if not mim.encoder == cl.encoder == encoder:
        raise ValueError("the two objectives of a hybrid need its own encoder")
    parts = tuple((w, part) for w, part in ((1 - lam, mim), (lam, cl)) if w)
    reconstructs = [p for _, p in parts if p.reconstruct]
    decoders = [p for _, p in parts if p.decoder]
    return Objective(
        name=NAME,
        encoder=encoder,
        views=tuple(view for _, part in parts for view in part.views),
        prepare=partial(prepare, parts),
        init=partial(init, parts),
        loss=partial(loss, parts),
        after=partial(after, parts),
        reconstruct=partial(reconstruct, reconstructs[0]) if reconstructs else None,
        flops=work(parts),
        decoder=partial(decoder, decoders[0]) if decoders else None,
    )


def work(parts: Parts) -> Forward | None:
    """The sum over the branches, if all are counted."""
    found = [part.flops for _, part in parts]
    if not all(found):
        return None
    return Forward(*(sum(kind) for kind in zip(*found, strict=True)))


def of(tree: Tree, part: Objective) -> Tree:
    """What one branch sees of the parameters or of extra."""
    return {"encoder": tree["encoder"], "heads": tree["heads"][part.name]}


def prepare(parts: Parts, key: jax.Array, batch: dict, *, train: bool) -> dict:
    """Each branch prepares its own views with the same key."""
    inputs, start = {}, 0
    for _, part in parts:
        stop = start + len(part.views)
        own = {**batch, "views": batch["views"][start:stop]}
        inputs[part.name] = part.prepare(key, own, train=train)
        start = stop
    return inputs


def init(
    parts: Parts, key: jax.Array, inputs: dict, given: Tree = None
) -> tuple[Tree, Tree]:
    """One encoder (every branch would draw the same one), the heads of each branch."""
    drawn = {p.name: p.init(key, inputs[p.name], given) for _, p in parts}
    encoders = next(iter(drawn.values()))
    return tuple(
        {
            "encoder": encoders[i]["encoder"],
            "heads": {name: both[i]["heads"] for name, both in drawn.items()},
        }
        for i in (0, 1)
    )


def loss(
    parts: Parts,
    params: Tree,
    extra: Tree,
    inputs: dict,
    key: jax.Array,
    *,
    progress: jax.Array,
    train: bool,
) -> tuple[jax.Array, tuple[Tree, dict]]:
    """The weighted sum; the branches' own losses are logged unweighted."""
    total, logs = 0.0, {}
    for weight, part in parts:
        value, (own, more) = part.loss(
            of(params, part),
            of(extra, part),
            inputs[part.name],
            key,
            progress=progress,
            train=train,
        )
        total += weight * value
        # A conv stem's batch statistics see every branch's images, in order.
        heads = {**extra["heads"], part.name: own["heads"]}
        extra = {"encoder": own["encoder"], "heads": heads}
        logs[f"{part.name}/loss"] = value
        logs |= {f"{part.name}/{name}": x for name, x in more.items()}
    return total, (extra, logs)


def after(parts: Parts, params: Tree, extra: Tree, progress: jax.Array) -> Tree:
    """Each branch's own update of its teacher."""
    heads = {
        p.name: p.after(of(params, p), of(extra, p), progress)["heads"]
        for _, p in parts
    }
    return {**extra, "heads": heads}


def reconstruct(part: Objective, params: Tree, extra: Tree, inputs: dict) -> tuple:
    """The MIM branch's picture."""
    return part.reconstruct(of(params, part), of(extra, part), inputs[part.name])


def decoder(part: Objective, params: Tree, extra: Tree) -> tuple:
    """The MIM branch's decoder."""
    return part.decoder(of(params, part), of(extra, part))
