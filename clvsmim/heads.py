"""Layers and MLP heads that objectives share: BatchNorm, projector, predictor."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from clvsmim.inits import fan_in_uniform


class BatchNorm(nn.Module):
    """BatchNorm over all axes but the last, as PyTorch keeps it.

    Not `nn.BatchNorm`: that stores the biased variance, the originals the unbiased
    one. Statistics are float32 over the global batch (`jit` sees the whole array,
    whatever the sharding) and live in the collection "stats".
    """

    affine: bool = True
    epsilon: float = 1e-5
    momentum: float = 0.1  # weight of the new batch

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.astype(jnp.float32)
        width, count = x.shape[-1], x.size // x.shape[-1]
        mean = self.variable("stats", "mean", jnp.zeros, (width,))
        var = self.variable("stats", "var", jnp.ones, (width,))
        m, v = mean.value, var.value
        if train:
            axes = tuple(range(x.ndim - 1))
            m = x.mean(axes)
            # The variance's gradient through the mean is 0, the sum of all x - m. Not
            # to ask for it saves an all-reduce.
            centred = x - _like(jax.lax.stop_gradient(m), x)
            v = jnp.square(centred).mean(axes)
            if not self.is_initializing():
                mean.value += self.momentum * (m - mean.value)
                unbiased = v * (count / max(count - 1, 1))
                var.value += self.momentum * (unbiased - var.value)
        x = (x - _like(m, x)) * _like(jax.lax.rsqrt(v + self.epsilon), x)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (width,))
            bias = self.param("bias", nn.initializers.zeros, (width,))
            x = x * _like(scale, x) + _like(bias, x)
        return x


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class MLPHead(nn.Module):
    """[Linear, BatchNorm, ReLU] per width; the last BatchNorm has no affine or ReLU.

    The projector and predictor of MoCo v3 (Chen et al. 2021, section 3 and code):
    no Linear bias.
    """

    widths: tuple[int, ...]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        last = len(self.widths) - 1
        for i, width in enumerate(self.widths):
            init = fan_in_uniform(x.shape[-1])
            dense = nn.Dense(
                width,
                use_bias=False,
                kernel_init=init,
                dtype=self.dtype,
                name=f"fc_{i}",
            )
            x = BatchNorm(affine=i < last, name=f"bn_{i}")(dense(x), train)
            x = nn.relu(x) if i < last else x
        return x


class PixelDecoder(nn.Module):
    """Linear token -> P*P*3 pixels: SimMIM's 1x1 convolution (Xie et al. 2022)."""

    pixels: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width = tokens.shape[-1]
        init = fan_in_uniform(width)
        kernel = self.param("kernel", init, (width, self.pixels))
        bias = self.param("bias", init, (self.pixels,))
        out = tokens.astype(self.dtype) @ kernel.astype(self.dtype)
        return out.astype(jnp.float32) + bias.reshape(1, 1, -1)
