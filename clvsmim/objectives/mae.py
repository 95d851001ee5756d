"""MAE (He et al. 2022): encode the few patches that are seen, predict the others."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from clvsmim import flops, masks, plugin, views
from clvsmim.objectives import Objective, Tree, apply, fold, init_encoder, random_crop
from clvsmim.vit import Decoder, Spec, ViT, decoder_spec

NAME = "mae"
ORDER = "dyxc"  # of the values of a patch


def make(
    *,
    encoder: ViT,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop: dict[str, Any],
    flip_p: float,
    mask_ratio: float,
    norm_pix: bool,
    decoder: dict[str, int],
) -> Objective:
    """MAE with its decoder of transformer blocks.

    Args:
      mean, std: of the input, per channel, of pixels in [0, 1].
      crop: arguments of `RandomResizedCrop`, but its size and name.
      flip_p: probability of a horizontal flip.
      mask_ratio: share of the patches to remove; what stays is rounded down.
      norm_pix: predict pixels less their patch's mean, over its deviation.
      decoder: width, depth and heads of the decoder.

    Raises:
      ValueError: an encoder that cannot skip patches, a mask ratio that leaves none or
        hides none, or a decoder that cannot be built.
    """
    spec = encoder.spec
    if spec.relative != "none":
        raise ValueError(
            f"encoder.relative={spec.relative!r}: MAE's encoder sees some patches only "
            "and a relative position bias is a table of all; use encoder.relative=none "
            "and encoder.position=mae_sincos"
        )
    n = math.prod(spec.grid)
    keep = int(round(n * (1 - mask_ratio), 6))  # 10 * (1 - 0.9) is 0.9999999999999998
    if not 0 < keep < n:
        raise ValueError(
            f"mask_ratio={mask_ratio} keeps {keep} of {n} patches: at least one must "
            "be seen and one hidden; use for instance 0.75"
        )
    last = plugin.call(make_decoder, "objective.decoder", encoder=encoder, **decoder)
    view = partial(views.simmim_view, flip_p=flip_p, mean=tuple(mean), std=tuple(std))
    return Objective(
        name=NAME,
        encoder=encoder,
        views=(random_crop(f"{NAME}/1", spec.image, crop),),
        prepare=partial(prepare, view, partial(masks.random_mask, n=n, keep=keep)),
        init=partial(init, encoder, last),
        loss=partial(loss, encoder, last, norm_pix),
        after=lambda params, extra, progress: extra,
        reconstruct=partial(reconstruct, encoder, last, norm_pix),
        decoder=partial(whole, encoder, last),
        flops=work(spec, last.spec, keep),
    )


def work(spec: Spec, decoder: Spec, keep: int) -> flops.Forward:
    """Every patch is embedded and decoded, `keep` of them are encoded."""
    seen, n = spec.prefix + keep, math.prod(spec.grid)
    encode = flops.embed(spec) + flops.encode(spec, seen)
    decode = flops.linear(seen, spec.width, decoder.width) + flops.encode(decoder)
    pixels = flops.linear(n, decoder.width, 3 * spec.patch**2)
    return flops.Forward(trained=encode + decode + pixels)


def make_decoder(*, encoder: ViT, width: int, depth: int, heads: int) -> Decoder:
    """The decoder of an encoder, whatever the encoder's own variant."""
    if min(width, depth, heads) < 1 or width % heads or width % 4:
        raise ValueError(
            f"decoder.width={width}, decoder.depth={depth}, decoder.heads={heads}: use "
            ">= 1, and a width that divides by the heads and by 4 (sin-cos positions)"
        )
    return Decoder(decoder_spec(encoder.spec, width=width, depth=depth, heads=heads))


def prepare(view: Any, mask: Any, key: jax.Array, batch: dict, *, train: bool) -> dict:
    """{"image": (B, rows, columns, 3) normalised} and, of `masks.mask_from_noise`,
    "keep" (B, seen), "restore" (B, N) and "mask" (B, N), 1 is removed."""
    del train  # the loss is defined on a flipped, masked image in evaluation too
    (images,) = batch["views"]
    flip = jax.random.split(fold(key, f"{NAME}/flip"), images.shape[0])
    hide = jax.random.split(fold(key, f"{NAME}/mask"), images.shape[0])
    keep, restore, removed = jax.vmap(mask)(hide)
    image = jax.vmap(view)(flip, images)
    return {"image": image, "keep": keep, "restore": restore, "mask": removed}


def init(
    encoder: ViT, decoder: Decoder, key: jax.Array, inputs: dict, given: Tree = None
) -> tuple[Tree, Tree]:
    """Encoder, mask token and decoder."""
    variables = init_encoder(encoder, key, inputs["image"], given)
    tokens = jnp.zeros((1, encoder.spec.tokens, encoder.spec.width))
    shape = (1, 1, decoder.spec.width)
    heads = {
        "mask_token": 0.02 * jax.random.normal(fold(key, f"{NAME}/mask_token"), shape),
        "decoder": decoder.init(fold(key, f"{NAME}/decoder"), tokens)["params"],
    }
    extra = {"encoder": variables["stats"], "heads": {}}
    return {"encoder": variables["params"], "heads": heads}, extra


def encode(
    encoder: ViT,
    params: Tree,
    extra: Tree,
    inputs: dict,
    key: jax.Array | None,
    train: bool,
) -> tuple[jax.Array, Tree]:
    """(the encoder's tokens (B, prefix + seen, D), statistics)."""
    use = partial(apply, encoder, params["encoder"], extra["encoder"], train=train)
    e, stats = use(inputs["image"], method="embed")  # (B, N, D)
    placed = encoder.apply({"params": params["encoder"]}, e, method="place")
    prefix, patches = jnp.split(placed, [encoder.spec.prefix], axis=1)
    tokens = jnp.concatenate([prefix, gather(patches, inputs["keep"])], axis=1)
    (tokens, _), _ = use(tokens, key, method="encode", taps=False)
    return tokens, stats


def decode(
    decoder: Decoder, heads: Tree, tokens: jax.Array, restore: jax.Array
) -> jax.Array:
    """The encoder's tokens (B, prefix + seen, D) -> every patch (B, N, P * P * 3)."""
    use = partial(decoder.apply, {"params": heads["decoder"]})
    x = use(tokens, method="embed")  # (B, prefix + seen, width)
    prefix, seen = jnp.split(x, [decoder.spec.prefix], axis=1)
    hidden = restore.shape[1] - seen.shape[1]
    token = heads["mask_token"].astype(x.dtype)
    token = jnp.broadcast_to(token, (len(x), hidden, x.shape[2]))
    patches = gather(jnp.concatenate([seen, token], axis=1), restore)  # (B, N, width)
    x = jnp.concatenate([prefix, patches], axis=1)
    x, _ = use(x, method="decode", taps=False)
    return use(x, method="predict")


def gather(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """Tokens (B, T, D) at ids (B, n) -> (B, n, D)."""
    return jnp.take_along_axis(tokens, ids[..., None], axis=1)


def scale(patches: jax.Array, norm_pix: bool) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation (B, N, 1) that patches (B, N, 3PP) are normalised with.

    The variance is the unbiased one; 0 and 1 if pixels are not normalised.
    """
    if not norm_pix:
        one = jnp.ones((*patches.shape[:2], 1))
        return 0 * one, one
    variance = patches.var(axis=-1, ddof=1, keepdims=True)
    return patches.mean(axis=-1, keepdims=True), jnp.sqrt(variance + 1e-6)


def loss(
    encoder: ViT,
    decoder: Decoder,
    norm_pix: bool,
    params: Tree,
    extra: Tree,
    inputs: dict,
    key: jax.Array,
    *,
    progress: jax.Array,
    train: bool,
) -> tuple[jax.Array, tuple[Tree, dict]]:
    """Mean squared error over the removed patches (section 3 of the paper)."""
    del progress
    drop = fold(key, f"{NAME}/drop") if train else None
    tokens, stats = encode(encoder, params, extra, inputs, drop, train)
    found = decode(decoder, params["heads"], tokens, inputs["restore"])
    patches = patchify(inputs["image"], encoder.spec.patch)
    mean, deviation = scale(patches, norm_pix)
    error = jnp.square(found - (patches - mean) / deviation).mean(axis=-1)  # (B, N)
    value = jnp.sum(error * inputs["mask"]) / jnp.sum(inputs["mask"])
    return value, ({**extra, "encoder": stats}, {})


def reconstruct(
    encoder: ViT,
    decoder: Decoder,
    norm_pix: bool,
    params: Tree,
    extra: Tree,
    inputs: dict,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(image, mask, reconstruction) for a picture; the mask has one channel.

    Normalised predictions get the mean and deviation of the true patch back, which the
    model was never asked for.
    """
    tokens, _ = encode(encoder, params, extra, inputs, None, False)
    found = decode(decoder, params["heads"], tokens, inputs["restore"])
    image, (grid, p) = inputs["image"], (encoder.spec.grid, encoder.spec.patch)
    mean, deviation = scale(patchify(image, p), norm_pix)
    found = found * deviation + mean
    pixels = jax.vmap(lambda x: masks.unpatchify(x, grid, p, ORDER))(found)
    hidden = inputs["mask"].reshape(-1, *grid, 1)
    return image, hidden.repeat(p, 1).repeat(p, 2), pixels


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """(B, rows, columns, 3) -> (B, N, P * P * 3)."""
    return jax.vmap(lambda x: masks.patchify(x, patch, ORDER))(images)


@dataclasses.dataclass(frozen=True)
class Whole:
    """The decoder as something to measure: of whole images, none of it hidden.

    Used as a `ViT`; its residual stream begins with what the first block reads.
    """

    encoder: ViT
    decoder: Decoder

    @property
    def spec(self) -> Any:
        return self.decoder.spec

    def apply(self, variables: Tree, images: jax.Array) -> tuple[jax.Array, dict]:
        """As `ViT.__call__`; `variables` {"encoder", "decoder"} are those of each."""
        tokens, _ = self.encoder.apply(variables["encoder"], images)
        use = partial(self.decoder.apply, variables["decoder"])
        return use(use(tokens, method="embed"), method="decode")


def whole(
    encoder: ViT, decoder: Decoder, params: Tree, extra: Tree
) -> tuple[Whole, Tree]:
    """The decoder's `Whole`, and the variables to apply it with."""
    variables = {
        "encoder": {"params": params["encoder"], "stats": extra["encoder"]},
        "decoder": {"params": params["heads"]["decoder"]},
    }
    return Whole(encoder, decoder), variables
