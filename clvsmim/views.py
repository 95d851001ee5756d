"""Augmentations of one float image (h, w, 3) in [0, 255]; batch them with `jax.vmap`.

Every operation is a pure function of explicit factors that agrees with Pillow, apart
from Pillow's rounding to 8 bits. What is random is drawn beforehand, by a function
that sees a key and no image. Crops are made on the host, in `clvsmim.data.crops`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Draws = dict[str, jax.Array]
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # entries of Draws["order"]


# ---------------------------------------------------------------- deterministic


def clip(image: jax.Array) -> jax.Array:
    """Limit to the range of a byte, as every 8-bit operation does."""
    return jnp.clip(image, 0.0, 255.0)


def luma(image: jax.Array) -> jax.Array:
    """Grey value (h, w, 1) with the weights of ITU-R 601: .299 R + .587 G + .114 B."""
    red, green, blue = (image[..., i : i + 1] for i in range(3))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def grayscale(image: jax.Array) -> jax.Array:
    """The grey value in all three channels."""
    return jnp.broadcast_to(luma(image), image.shape)


def brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blend with black: 0 is black, 1 the image, more extrapolates."""
    return clip(factor * image)


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blend with the mean grey of the whole image, an integer as in Pillow."""
    mean = jnp.floor(jnp.mean(luma(image)) + 0.5)
    return clip(factor * image + (1.0 - factor) * mean)


def saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blend every pixel with its own grey: 0 is grey, 1 the image."""
    return clip(factor * image + (1.0 - factor) * luma(image))


def hue(image: jax.Array, turn: jax.Array) -> jax.Array:
    """Add `turn` (1.0 is the full circle) to the hue of HSV; value and chroma stay."""
    red, green, blue = (image[..., i] for i in range(3))
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1.0 / jnp.where(chroma == 0.0, 1.0, chroma)
    angle = jnp.where(  # in sixths of a turn, red at 0
        value == red,
        (green - blue) * scale,
        jnp.where(
            value == green, 2.0 + (blue - red) * scale, 4.0 + (red - green) * scale
        ),
    )

    def channel(offset: float) -> jax.Array:
        """HSV to RGB without branches: a channel is a trapezium of the angle."""
        k = angle + (6.0 * turn + offset)
        k = k - 6.0 * jnp.floor(k / 6.0)
        return value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

    return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-1)


def solarize(image: jax.Array, threshold: float) -> jax.Array:
    """Invert what is at or above the threshold (in [0, 255])."""
    return jnp.where(image < threshold, image, 255.0 - image)


def flip(image: jax.Array) -> jax.Array:
    """Mirror left and right."""
    return image[:, ::-1]


def blur_matrix(size: int, sigma: jax.Array) -> jax.Array:
    """(size, size): row i holds the Gaussian weights that make output pixel i.

    A weight is the integral of the Gaussian over the pixel. The outermost pixels also
    take all that lies beyond them, which is Pillow's extension of the edge. Integrating
    over a pixel adds 1/12 to the variance, so that much is taken off first.
    """
    narrow = jnp.sqrt(jnp.maximum(sigma**2 - 1.0 / 12.0, 1e-4))
    borders = jnp.arange(1, size) - 0.5  # (size - 1,), between neighbouring pixels
    offset = borders[None, :] - jnp.arange(size)[:, None]  # (size, size - 1)
    below = jax.scipy.stats.norm.cdf(offset / narrow)
    below = jnp.pad(below, ((0, 0), (1, 1)), constant_values=((0, 0), (0.0, 1.0)))
    return jnp.diff(below, axis=1)  # (size, size)


def blur(image: jax.Array, sigma: jax.Array) -> jax.Array:
    """Gaussian blur, `sigma` in pixels, as one small matmul along each axis."""
    rows = blur_matrix(image.shape[0], sigma)
    columns = blur_matrix(image.shape[1], sigma)
    return jnp.einsum("ih,hwc,jw->ijc", rows, image, columns, precision="highest")


def color_jitter(image: jax.Array, factors: jax.Array, order: jax.Array) -> jax.Array:
    """Brightness, contrast, saturation and hue, one after the other.

    Under vmap a choice computes all its branches, and hue is the dear one. So it is
    computed once, between two runs over the other three: the first run applies those
    that come before hue, the second those that come after; the factor of one that does
    not apply is 1, which leaves the image as it is.

    Args:
      image: (h, w, 3) in [0, 255].
      factors: (4,) indexed by BRIGHTNESS, CONTRAST, SATURATION, HUE; the last is in
        turns.
      order: (4,) a permutation of 0..3; `order[0]` is applied first.
    """
    place = jnp.argmax(order == HUE)
    rest = jnp.where(jnp.arange(3) < place, order[:3], order[1:])  # (3,), hue left out
    for step in range(3):
        factor = jnp.where(step < place, factors[rest[step]], 1.0)
        image = _blend(image, rest[step], factor)
    image = hue(image, factors[HUE])
    for step in range(3):
        factor = jnp.where(step < place, 1.0, factors[rest[step]])
        image = _blend(image, rest[step], factor)
    return image


def _blend(image: jax.Array, op: jax.Array, factor: jax.Array) -> jax.Array:
    """`brightness`, `contrast` or `saturation`, whichever number `op` is."""
    grey = luma(image)
    mean = jnp.floor(jnp.mean(grey) + 0.5)
    other = jnp.where(op == BRIGHTNESS, 0.0, jnp.where(op == CONTRAST, mean, grey))
    return clip(factor * image + (1.0 - factor) * other)


def normalise(
    image: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """[0, 255] to zero mean and unit variance; `mean`, `std` (3,) are of [0, 1]."""
    mean, std = _channels(mean, "mean"), _channels(std, "std")
    return (image / 255.0 - mean) / std


def denormalise(
    image: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """The inverse of `normalise`: back to [0, 255], not clipped."""
    mean, std = _channels(mean, "mean"), _channels(std, "std")
    return (image * std + mean) * 255.0


def _channels(values: Sequence[float], what: str) -> jax.Array:
    if len(values) != 3:
        raise ValueError(
            f"{what} has {len(values)} values, expected 3 (red, green, blue in [0, 1])"
        )
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 3)


# ---------------------------------------------------------------------- random


def moco_draws(
    key: jax.Array,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    jitter_p: float,
    grey_p: float,
    blur_p: float,
    blur_sigma: tuple[float, float],
    solarize_p: float,
    flip_p: float,
) -> Draws:
    """All that is random in one view, as scalars, without looking at an image.

    Args:
      key: one key per image and view.
      brightness, contrast, saturation: the factor is uniform in 1 -+ this (at least 0).
      hue: the shift is uniform in -+ this, in turns.
      jitter_p, grey_p, blur_p, solarize_p, flip_p: probabilities of the operations.
      blur_sigma: the standard deviation is uniform between these two, in pixels.

    Returns:
      bools `jitter`, `grey`, `blur`, `solarize`, `flip`; `factors` (4,) and `order`
      (4,) for `color_jitter`; `sigma`.
    """
    names = ("jitter", "grey", "blur", "solarize", "flip")
    p = jnp.asarray([jitter_p, grey_p, blur_p, solarize_p, flip_p])
    spread = jnp.asarray([brightness, contrast, saturation])
    low = jnp.append(jnp.maximum(0.0, 1.0 - spread), -hue)
    high = jnp.append(1.0 + spread, hue)
    which, how, order, sigma = jax.random.split(key, 4)
    happens = jax.random.uniform(which, (5,)) < p
    return {
        **{name: happens[i] for i, name in enumerate(names)},
        "factors": low + (high - low) * jax.random.uniform(how, (4,)),
        "order": jnp.argsort(jax.random.uniform(order, (4,))),
        "sigma": jax.random.uniform(sigma, minval=blur_sigma[0], maxval=blur_sigma[1]),
    }


def moco_apply(
    image: jax.Array,
    draws: Draws,
    *,
    solarize_threshold: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> jax.Array:
    """Jitter, grey, blur, solarize, flip, normalise: the order of MoCo v3.

    Mirroring commutes exactly with every other operation here, so it is done first,
    on bytes: at the end XLA computes all the others twice for it.
    """
    image = jnp.where(draws["flip"], flip(image), image).astype(jnp.float32)
    jittered = color_jitter(image, draws["factors"], draws["order"])
    image = jnp.where(draws["jitter"], jittered, image)
    image = jnp.where(draws["grey"], grayscale(image), image)
    image = jnp.where(draws["blur"], blur(image, draws["sigma"]), image)
    image = jnp.where(draws["solarize"], solarize(image, solarize_threshold), image)
    return normalise(image, mean, std)


def moco_view(
    key: jax.Array,
    image: jax.Array,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    jitter_p: float,
    grey_p: float,
    blur_p: float,
    blur_sigma: tuple[float, float],
    solarize_p: float,
    solarize_threshold: float,
    flip_p: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> jax.Array:
    """uint8 (h, w, 3) -> float32 (h, w, 3), normalised; see `moco_draws`."""
    draws = moco_draws(
        key,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        jitter_p=jitter_p,
        grey_p=grey_p,
        blur_p=blur_p,
        blur_sigma=blur_sigma,
        solarize_p=solarize_p,
        flip_p=flip_p,
    )
    return moco_apply(
        image, draws, solarize_threshold=solarize_threshold, mean=mean, std=std
    )


def simmim_view(
    key: jax.Array,
    image: jax.Array,
    *,
    flip_p: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> jax.Array:
    """uint8 (h, w, 3) -> float32 (h, w, 3): mirrored with `flip_p`, normalised."""
    mirrored = jax.random.uniform(key) < flip_p
    image = jnp.where(mirrored, flip(image), image)
    return normalise(image.astype(jnp.float32), mean, std)
