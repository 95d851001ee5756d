"""SimMIM (Xie et al. 2022): hide large blocks of an image, predict their pixels."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from clvsmim import flops, masks, views
from clvsmim.heads import PixelDecoder
from clvsmim.inits import cut_normal
from clvsmim.objectives import Objective, Tree, apply, fold, init_encoder, random_crop
from clvsmim.vit import ViT

NAME = "simmim"


def make(
    *,
    encoder: ViT,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop: dict[str, Any],
    flip_p: float,
    mask_unit: int,
    mask_ratio: float,
) -> Objective:
    """SimMIM with the one-layer decoder.

    Args:
      mean, std: of the input, per channel, of pixels in [0, 1].
      crop: arguments of `RandomResizedCrop`, but its size and name.
      flip_p: probability of a horizontal flip.
      mask_unit: side of a masked cell in pixels, a multiple of the patch.
      mask_ratio: share of the cells to hide, rounded up.
    """
    spec = encoder.spec
    if mask_unit < 1 or mask_unit % spec.patch:
        raise ValueError(
            f"mask_unit={mask_unit} pixels is not a multiple of the patch {spec.patch}"
        )
    cells = {"grid": spec.grid, "unit": mask_unit // spec.patch, "ratio": mask_ratio}
    masks.masked_cells(**cells)  # refuses what cannot be cut, before any data is read
    mask = partial(masks.block_mask, **cells)
    view = partial(views.simmim_view, flip_p=flip_p, mean=tuple(mean), std=tuple(std))
    decoder = PixelDecoder(3 * spec.patch**2, spec.dtype)
    return Objective(
        name=NAME,
        encoder=encoder,
        views=(random_crop(f"{NAME}/1", spec.image, crop),),
        prepare=partial(prepare, view, mask),
        init=partial(init, encoder, decoder),
        loss=partial(loss, encoder, decoder),
        after=lambda params, extra, progress: extra,
        reconstruct=partial(reconstruct, encoder, decoder),
        flops=flops.Forward(
            flops.embed(spec)
            + flops.encode(spec)  # hidden patches are tokens too
            + flops.linear(math.prod(spec.grid), spec.width, 3 * spec.patch**2)
        ),
    )


def prepare(view: Any, mask: Any, key: jax.Array, batch: dict, *, train: bool) -> dict:
    """{"image": (B, rows, columns, 3) normalised, "mask": (B, *grid), 1 is hidden}."""
    del train  # the loss is defined on a flipped, masked image in evaluation too
    (images,) = batch["views"]
    flip = jax.random.split(fold(key, f"{NAME}/flip"), images.shape[0])
    hide = jax.random.split(fold(key, f"{NAME}/mask"), images.shape[0])
    return {"image": jax.vmap(view)(flip, images), "mask": jax.vmap(mask)(hide)}


def init(
    encoder: ViT,
    decoder: PixelDecoder,
    key: jax.Array,
    inputs: dict,
    given: Tree = None,
) -> tuple[Tree, Tree]:
    """Encoder, mask token and decoder."""
    variables = init_encoder(encoder, key, inputs["image"], given)
    tokens = jnp.zeros((1, 1, encoder.spec.width))
    heads = {
        "mask_token": cut_normal(0.02, 1)(
            fold(key, f"{NAME}/mask_token"), tokens.shape
        ),
        "decoder": decoder.init(fold(key, f"{NAME}/decoder"), tokens)["params"],
    }
    extra = {"encoder": variables["stats"], "heads": {}}
    return {"encoder": variables["params"], "heads": heads}, extra


def predict(
    encoder: ViT,
    decoder: PixelDecoder,
    params: Tree,
    extra: Tree,
    inputs: dict,
    key: jax.Array | None,
    train: bool,
) -> tuple[jax.Array, jax.Array, Tree]:
    """(reconstruction, mask of the pixels (B, rows, columns, 1), statistics)."""
    encode = partial(apply, encoder, params["encoder"])
    e, stats = encode(extra["encoder"], inputs["image"], train=train, method="embed")
    mask = inputs["mask"]
    hidden = mask.reshape(len(mask), -1, 1).astype(e.dtype)  # (B, N, 1)
    token = params["heads"]["mask_token"].astype(e.dtype)
    e = e * (1 - hidden) + token * hidden
    placed = encoder.apply({"params": params["encoder"]}, e, method="place")
    run = partial(encode, method="encode", taps=False)
    (tokens, _), _ = run(extra["encoder"], placed, key, train=train)
    patches = tokens[:, encoder.spec.prefix :]  # (B, T, D) -> (B, N, D)
    pixels = decoder.apply({"params": params["heads"]["decoder"]}, patches)
    grid, p = encoder.spec.grid, encoder.spec.patch
    image = jax.vmap(lambda x: masks.unpatchify(x, grid, p, "cdyx"))(pixels)
    return image, mask.repeat(p, 1).repeat(p, 2)[..., None], stats


def loss(
    encoder: ViT,
    decoder: PixelDecoder,
    params: Tree,
    extra: Tree,
    inputs: dict,
    key: jax.Array,
    *,
    progress: jax.Array,
    train: bool,
) -> tuple[jax.Array, tuple[Tree, dict]]:
    """Mean absolute error over the hidden pixels (section 3.4 of the paper)."""
    del progress
    drop = fold(key, f"{NAME}/drop") if train else None
    image, hidden, stats = predict(encoder, decoder, params, extra, inputs, drop, train)
    error = jnp.sum(jnp.abs(inputs["image"] - image) * hidden)
    value = error / (jnp.sum(hidden) + 1e-5) / 3
    return value, ({**extra, "encoder": stats}, {})


def reconstruct(
    encoder: ViT, decoder: PixelDecoder, params: Tree, extra: Tree, inputs: dict
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(image, mask, reconstruction) for a picture; the mask has one channel."""
    image, hidden, _ = predict(encoder, decoder, params, extra, inputs, None, False)
    return inputs["image"], hidden, image
