"""Soft labels, mixup, CutMix and random erasing, of normalised images on the device.

As timm has them, in DeiT, SimMIM's and MAE's fine-tuning. Shapes are static and
everything is a pure function of a key.
"""

import math

import jax
import jax.numpy as jnp


def smooth(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Labels (B,) -> targets (B, K): smoothing / K each, and the rest on the label."""
    one_hot = jax.nn.one_hot(labels, classes)
    return smoothing / classes + (1.0 - smoothing) * one_hot


def mix(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    switch_p: float,
) -> tuple[jax.Array, jax.Array]:
    """Mix every image of a batch with the one at its place in the flipped batch.

    One draw for the whole batch, as in timm's batch mode: CutMix (Yun et al. 2019) with
    probability `switch_p`, else mixup (Zhang et al. 2018).

    Args:
      images: (B, h, w, 3).
      targets: (B, K), which sum to 1.
      mixup, cutmix: lambda ~ Beta(a, a) of each; 0 leaves the one out.
    """
    which, first, second, box = jax.random.split(key, 4)
    switch_p = switch_p if mixup and cutmix else float(bool(cutmix))
    cut = jax.random.uniform(which) < switch_p
    blend = jax.random.beta(first, mixup, mixup) if mixup else jnp.ones(())
    size = images.shape[1:3]
    if cutmix:
        inside = cut_box(box, jax.random.beta(second, cutmix, cutmix), size)
    else:
        inside = jnp.zeros(size, bool)
    own = jnp.where(cut, 1.0 - inside, blend)  # (h, w): the image's own share
    share = own[None, :, :, None]
    images = share * images + (1.0 - share) * images[::-1]
    kept = jnp.where(cut, jnp.mean(own), blend)  # what the box, once cut, really left
    return images, kept * targets + (1.0 - kept) * targets[::-1]


def cut_box(key: jax.Array, lam: jax.Array, size: tuple[int, int]) -> jax.Array:
    """(h, w) bools, true in a box of side sqrt(1 - lam) around a uniform centre.

    What lies outside the image is cut off, so the box may be smaller than 1 - lam.
    """
    share = jnp.sqrt(1.0 - lam)

    def inside(key: jax.Array, length: int) -> jax.Array:
        half = jnp.floor(length * share).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, length)
        place = jnp.arange(length)
        return (place >= centre - half) & (place < centre + half)

    rows, columns = (
        inside(k, n) for k, n in zip(jax.random.split(key), size, strict=True)
    )
    return rows[:, None] & columns[None, :]


def erase(
    key: jax.Array,
    image: jax.Array,
    *,
    p: float,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> jax.Array:
    """Fill one rectangle of one image (h, w, 3) with noise (Zhong et al. 2020).

    Args:
      p: probability that anything happens.
      area: smallest and largest share of the image.
      aspect: smallest and largest height / width, log-uniform between.

    Returns:
      the image with N(0, 1) in the first of ten rectangles that is smaller than the
      image both ways; as it was, if none is.
    """
    happens, size, shape, place, noise = jax.random.split(key, 5)
    height, width, _ = image.shape
    pixels = height * width * _uniform(size, (10,), *area)
    ratio = jnp.exp(_uniform(shape, (10,), *map(math.log, aspect)))
    h = jnp.round(jnp.sqrt(pixels * ratio)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(pixels / ratio)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits)
    h, w = h[first], w[first]
    at = jax.random.uniform(place, (2,))
    top = jnp.floor(at[0] * (height - h + 1)).astype(jnp.int32)
    left = jnp.floor(at[1] * (width - w + 1)).astype(jnp.int32)
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside = ((rows >= top) & (rows < top + h))[:, None] & (
        (columns >= left) & (columns < left + w)
    )[None, :]
    inside = inside & jnp.any(fits) & (jax.random.uniform(happens) < p)
    return jnp.where(inside[..., None], jax.random.normal(noise, image.shape), image)


def _uniform(key: jax.Array, shape: tuple, low: float, high: float) -> jax.Array:
    return jax.random.uniform(key, shape, minval=low, maxval=high)
