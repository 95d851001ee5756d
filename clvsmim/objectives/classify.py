"""Learn labels: from scratch, by fine-tuning, or by linear probes of a frozen encoder.

DeiT (Touvron et al. 2021), the fine-tuning of SimMIM and MAE, and linear probes on any
blocks at many learning rates at once are settings of this one objective.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clvsmim import flops, mixing, plugin, views
from clvsmim.data.crops import CenterCrop
from clvsmim.data.randaugment import RandAugmentCrop
from clvsmim.heads import BatchNorm
from clvsmim.objectives import (
    Objective,
    Tree,
    apply,
    ema,
    fold,
    init_encoder,
    random_crop,
)
from clvsmim.vit import Spec, ViT, layer_norm

NAME = "classify"
CHOICES = {
    "tune": ("all", "head"),
    "pool": ("cls", "patches"),
    "norm": ("none", "layer", "batch"),
}
LAST = "last"  # the name of the encoder's output among the blocks
BATCH_NORM = BatchNorm(affine=False, epsilon=1e-6)  # as in MAE's probe; momentum 0.1


class Heads(NamedTuple):
    """What reads the encoder: one linear classifier per block and learning rate.

    Attributes:
      blocks: name in the parameters -> number of the block whose output is read,
        before the final norm; None is the encoder's output.
      rates: name in the parameters -> factor of the learning rate.
      classes, pool, norm, std: see `make`.
    """

    blocks: dict[str, int | None]
    rates: dict[str, float]
    classes: int
    pool: str
    norm: str
    std: float

    @property
    def names(self) -> list[str]:
        return [f"{block}/{rate}" for block in self.blocks for rate in self.rates]


def make(
    *,
    encoder: ViT,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    classes: int,
    tune: str,
    blocks: str | int | tuple[int, ...],
    pool: str,
    norm: str,
    head_std: float,
    rates: tuple[float, ...],
    crop: dict[str, Any],
    eval_crop: dict[str, Any],
    flip_p: float,
    rand_augment: dict[str, Any] | None,
    erasing: dict[str, Any] | None,
    mix: dict[str, Any] | None,
    smoothing: float,
    average: float,
) -> Objective:
    """Cross-entropy with (soft) labels, summed over the heads.

    With tune="head" the heads share nothing but batch statistics, so the sum trains
    each as if it were alone, with any optimizer that does not clip the gradient as a
    whole. With tune="all" they share the encoder too: deep supervision.

    Args:
      mean, std: of the input, per channel, of pixels in [0, 1].
      classes: K; labels are 0 to K - 1.
      tune: "all", or "head": the encoder is frozen, as in evaluation, without drop
        path, gradient or new batch statistics.
      blocks: which to read: "last" is the encoder's output, after its final norm if it
        has one; a number from 1 to L, several, or "all" are read before that norm.
      pool: "cls", or "patches": their mean.
      norm: of what is pooled: "none", "layer" (LayerNorm, trained) or "batch"
        (BatchNorm over the global batch, without affine part).
      head_std: of a classifier's initial weights; its bias starts at 0.
      rates: factors of the learning rate; each has its own head on each block.
      crop: arguments of `RandomResizedCrop`, but its size and name.
      eval_crop: arguments of `CenterCrop`, but its size and name.
      flip_p: probability of a horizontal flip.
      rand_augment: arguments of `RandAugmentCrop`: ops, p, magnitude, spread; or None.
      erasing: arguments of `mixing.erase`: p, area, aspect; or None.
      mix: arguments of `mixing.mix`: mixup, cutmix, switch_p; or None.
      smoothing: of the labels.
      average: decay per step of a moving average of the parameters, which is evaluated
        as "average/..."; 0 is none.

    Raises:
      ValueError: a setting that cannot work, and what can.
    """
    spec = encoder.spec
    for key, got in (("tune", tune), ("pool", pool), ("norm", norm)):
        if got not in CHOICES[key]:
            raise ValueError(plugin.unknown(f"objective.{key}", got, CHOICES[key]))
    if pool == "cls" and not spec.prefix:
        raise ValueError("pool='cls' reads the CLS token: set encoder.prefix >= 1")
    if classes < 2 or head_std < 0 or not 0 <= smoothing < 1:
        raise ValueError(
            f"classes={classes}, head_std={head_std}, smoothing={smoothing}: use at "
            "least 2, at least 0, and 0 or more but less than 1"
        )
    if not 0 <= average < 1 or (average and tune == "head"):
        raise ValueError(
            f"average={average}: use 0 (none) or more but less than 1, and with "
            "tune='all'"
        )
    heads = Heads(
        blocks=named_blocks(blocks, spec.depth),
        rates=named_rates(rates),
        classes=classes,
        pool=pool,
        norm=norm,
        std=head_std,
    )
    view = random_crop(f"{NAME}/1", spec.image, crop)
    if rand_augment is not None:  # which mirrors the image between crop and operations
        fill = tuple(round(255 * channel) for channel in mean)
        more = {"crop": view, "flip_p": flip_p, "fill": fill}
        view = plugin.call(RandAugmentCrop, "rand_augment", **more, **rand_augment)
        flip_p = 0.0
    own = {"name": f"{NAME}/eval", "size": spec.image}
    return Objective(
        name=NAME,
        encoder=encoder,
        views=(view,),
        prepare=partial(
            prepare,
            partial(views.simmim_view, flip_p=flip_p, mean=tuple(mean), std=tuple(std)),
            part(mixing.erase, "erasing", ("key", "image"), erasing),
            part(mixing.mix, "mix", ("key", "images", "targets"), mix),
            partial(mixing.smooth, classes=classes, smoothing=smoothing),
        ),
        init=partial(init, encoder, heads, bool(average)),
        loss=partial(loss, encoder, heads, tune == "all"),
        after=partial(after, average),
        view=plugin.call(CenterCrop, "eval_crop", **own, **eval_crop),
        evaluate=partial(evaluate, encoder, heads, bool(average)),
        frozen=("encoder/.*",) if tune == "head" else (),
        lr_scales=tuple(
            (f"heads/.*/{re.escape(name)}/.*", factor)
            for name, factor in heads.rates.items()
        ),
        flops=work(spec, heads, tune),
    )


def named_blocks(
    blocks: str | int | tuple[int, ...], depth: int
) -> dict[str, int | None]:
    """The blocks to read by the names of their heads."""
    if blocks == LAST:
        return {LAST: None}
    every = tuple(range(1, depth + 1))
    asked = {"all": every}.get(blocks, ()) if isinstance(blocks, str) else blocks
    numbers = (asked,) if isinstance(asked, int) else tuple(asked)
    if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= {*every}:
        raise ValueError(
            f"objective.blocks={blocks!r}: use 'last', 'all', a number from 1 to "
            f"{depth}, the depth of the encoder, or several different ones"
        )
    return {f"block_{number}": number for number in numbers}


def named_rates(rates: tuple[float, ...]) -> dict[str, float]:
    """The factors of the learning rate by the names of their heads."""
    found = {f"rate_{rate:g}": float(rate) for rate in rates}
    if not rates or len(found) < len(rates) or min(rates) <= 0:
        raise ValueError(f"objective.rates={rates}: use different factors above 0")
    return found


def part(
    function: Callable, where: str, later: tuple, section: dict | None
) -> Callable | None:
    """`function` with the settings of a section; None if there is no section."""
    return plugin.bind(function, where, later, **section) if section else None


def work(spec: Spec, heads: Heads, tune: str) -> flops.Forward:
    """Of the whole encoder, though a probe of early blocks ends there."""
    encode = flops.embed(spec) + flops.encode(spec)
    read = len(heads.names) * flops.linear(1, spec.width, heads.classes)
    if tune == "head":
        return flops.Forward(trained=read, frozen=encode)
    return flops.Forward(trained=encode + read)


def prepare(
    view: Callable,
    erase: Callable | None,
    mix: Callable | None,
    smooth: Callable,
    key: jax.Array,
    batch: dict,
    *,
    train: bool,
) -> dict:
    """{"image": (B, rows, columns, 3) normalised, "label": (B,), "target": (B, K)}.

    In evaluation nothing is flipped, erased, mixed or smoothed.
    """
    (images,), labels = batch["views"], batch["label"]

    def each(name: str) -> jax.Array:
        return jax.random.split(fold(key, f"{NAME}/{name}"), images.shape[0])

    if not train:
        view, smooth = partial(view, flip_p=0.0), partial(smooth, smoothing=0.0)
    image, target = jax.vmap(view)(each("flip"), images), smooth(labels)
    if train and erase:
        image = jax.vmap(erase)(each("erase"), image)
    if train and mix:
        image, target = mix(fold(key, f"{NAME}/mix"), image, target)
    return {"image": image, "label": labels, "target": target}


def init(
    encoder: ViT,
    heads: Heads,
    average: bool,
    key: jax.Array,
    inputs: dict,
    given: Tree = None,
) -> tuple[Tree, Tree]:
    """Encoder and heads; those of one block begin equal. The average begins as they."""
    variables = init_encoder(encoder, key, inputs["image"], given)
    params = {
        "encoder": variables["params"],
        "heads": {
            block: init_block(heads, encoder.spec.width, fold(key, f"{NAME}/{block}"))
            for block in heads.blocks
        },
    }
    stats = {}
    if heads.norm == "batch":
        x = jnp.zeros((2, encoder.spec.width))
        stats = {b: BATCH_NORM.init(key, x, True)["stats"] for b in heads.blocks}
    if average:
        stats["average"] = jax.tree.map(jnp.copy, params)
    return params, {"encoder": variables["stats"], "heads": stats}


def init_block(heads: Heads, width: int, key: jax.Array) -> Tree:
    """The heads of one block by rate: {"kernel": (D, K), "bias": (K,)} and a norm."""

    def head() -> Tree:
        kernel = heads.std * jax.random.normal(key, (width, heads.classes))
        new = {"kernel": kernel, "bias": jnp.zeros(heads.classes)}
        if heads.norm == "layer":
            zeros = jnp.zeros((1, width))
            new["fc_norm"] = layer_norm().init(key, zeros)["params"]
        return new

    return {rate: head() for rate in heads.rates}


def logits(
    encoder: ViT,
    heads: Heads,
    params: Tree,
    extra: Tree,
    images: jax.Array,
    key: jax.Array | None,
    *,
    train_encoder: bool,
    train: bool,
) -> tuple[dict[str, jax.Array], Tree]:
    """({"block/rate": (B, K)}, extra with the new batch statistics)."""
    (tokens, taps), stats = apply(
        encoder,
        params["encoder"],
        extra["encoder"],
        images,
        key,
        train=train_encoder,
        taps=any(number is not None for number in heads.blocks.values()),
    )
    new, out = dict(extra["heads"]), {}
    for block, number in heads.blocks.items():
        x = tokens if number is None else taps["residual"][2 * number]  # (B, T, D)
        x = pooled(x.astype(jnp.float32), heads.pool, encoder.spec.prefix)  # (B, D)
        if heads.norm == "batch":
            x, new[block] = apply(BATCH_NORM, {}, new[block], x, train=train)
        for rate, head in params["heads"][block].items():
            out[f"{block}/{rate}"] = classify(head, x)
    return out, {"encoder": stats, "heads": new}


def pooled(tokens: jax.Array, pool: str, prefix: int) -> jax.Array:
    """(B, T, D) -> (B, D): the CLS token or the mean of the patches."""
    return tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(axis=1)


def classify(head: Tree, x: jax.Array) -> jax.Array:
    """(B, D) -> logits (B, K), float32."""
    if "fc_norm" in head:
        x = layer_norm().apply({"params": head["fc_norm"]}, x)
    return x @ head["kernel"] + head["bias"][None]


def cross_entropy(scores: jax.Array, target: jax.Array) -> jax.Array:
    """Of each image (B,), for logits and targets (B, K)."""
    return -jnp.sum(target * jax.nn.log_softmax(scores), axis=-1)


def loss(
    encoder: ViT,
    heads: Heads,
    tune: bool,
    params: Tree,
    extra: Tree,
    inputs: dict,
    key: jax.Array,
    *,
    progress: jax.Array,
    train: bool,
) -> tuple[jax.Array, tuple[Tree, dict]]:
    """Sum over the heads of the mean over the images; logged: the mean, and each."""
    del progress
    encoder_trains = train and tune
    drop = fold(key, f"{NAME}/drop") if encoder_trains else None
    scores, extra = logits(
        encoder,
        heads,
        params,
        extra,
        inputs["image"],
        drop,
        train_encoder=encoder_trains,
        train=train,
    )
    each = {k: jnp.mean(cross_entropy(x, inputs["target"])) for k, x in scores.items()}
    total = sum(each.values())
    if len(each) == 1:
        return total, (extra, {})
    logs = {f"loss/{name}": value for name, value in each.items()}
    return total, (extra, logs | {"mean_loss": total / len(each)})


def after(average: float, params: Tree, extra: Tree, progress: jax.Array) -> Tree:
    """Move the average, if there is one, towards the parameters."""
    del progress
    if not average:
        return extra
    moved = ema(extra["heads"]["average"], params, 1.0 - average)
    return {**extra, "heads": {**extra["heads"], "average": moved}}


def evaluate(
    encoder: ViT, heads: Heads, average: bool, params: Tree, extra: Tree, inputs: dict
) -> dict[str, jax.Array]:
    """Per image: "loss", "top1" and, of more than five classes, "top5".

    Of several heads each, as "top1/block_3/rate_0.3"; of the average "average/top1".
    """
    found = {}
    versions = {"": params} | (
        {"average/": extra["heads"]["average"]} if average else {}
    )
    for start, version in versions.items():
        scores, _ = logits(
            encoder,
            heads,
            version,
            extra,
            inputs["image"],
            None,
            train_encoder=False,
            train=False,
        )
        for head, x in scores.items():
            end = f"/{head}" if len(scores) > 1 else ""
            found |= {f"{start}{k}{end}": v for k, v in scored(x, inputs).items()}
    return found


def scored(scores: jax.Array, inputs: dict) -> dict[str, jax.Array]:
    """Loss and hits of each image; a tie, or NaN, is no hit."""
    own = jnp.take_along_axis(scores, inputs["label"][:, None], axis=1)
    rank = jnp.sum(~(scores < own), axis=1)  # 1 is the best; the own one counts
    found = {"loss": cross_entropy(scores, inputs["target"]), "top1": rank <= 1}
    if scores.shape[1] > 5:
        found["top5"] = rank <= 5
    return {name: x.astype(jnp.float32) for name, x in found.items()}
