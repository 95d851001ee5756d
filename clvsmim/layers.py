"""The layers of a ViT: block, attention, MLP, patch embedding, norm, drop path."""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen as nn

from clvsmim.heads import BatchNorm
from clvsmim.inits import (
    fan_in_uniform,
    initializers,
    relative_bias,
    relative_shape,
)

if TYPE_CHECKING:
    from clvsmim.vit import Spec


class Block(nn.Module):
    """x += attention(LN(x)); x += MLP(LN(x)); returns every tap by name."""

    spec: "Spec"
    index: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        key: jax.Array | None,
        keep: float | jax.Array,
    ) -> dict[str, jax.Array]:
        keys = (None, None) if key is None else jax.random.split(key)
        out, attention, heads = Attention(self.spec, self.index, name="attn")(
            layer_norm("ln1", self.spec.norm_eps)(x), bias
        )
        attn = x + drop_path(self.scale("gamma_1", out), keep, keys[0])
        out = MLP(self.spec, self.index, name="mlp")(
            layer_norm("ln2", self.spec.norm_eps)(attn)
        )
        mlp = attn + drop_path(self.scale("gamma_2", out), keep, keys[1])
        return {
            "attn": attn,
            "mlp": mlp,
            "attention": attention,
            "head_outputs": heads,
        }

    def scale(self, name: str, branch: jax.Array) -> jax.Array:
        if not self.spec.layer_scale:
            return branch
        init = nn.initializers.constant(self.spec.layer_scale)
        gamma = self.param(name, init, (self.spec.width,))
        return branch * gamma.reshape(1, 1, -1).astype(branch.dtype)


class Attention(nn.Module):
    """Multi-head self-attention that returns its probabilities and head outputs."""

    spec: "Spec"
    index: int

    @nn.compact
    def __call__(
        self, x: jax.Array, bias: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        spec, inits = self.spec, initializers(self.spec, self.index)
        if spec.relative == "per_block":
            zeros = nn.initializers.zeros
            table = self.param("rel_table", zeros, relative_shape(spec))
            bias = relative_bias(table, spec)
        q, k, v = (
            nn.DenseGeneral(
                (spec.heads, spec.width // spec.heads),
                use_bias=name in spec.qkv_bias,
                kernel_init=inits["qkv"],
                dtype=spec.dtype,
                name=name,
            )(x)  # (B, T, D) -> (B, T, H, d)
            for name in "qkv"
        )
        q = q * (spec.width // spec.heads) ** -0.5
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + bias[None]
        attention = jax.nn.softmax(logits)
        heads = jnp.einsum("bhqk,bkhd->bhqd", attention.astype(v.dtype), v)
        out = nn.DenseGeneral(
            spec.width,
            axis=(-2, -1),
            kernel_init=inits["residual"],
            dtype=spec.dtype,
            name="out",
        )(heads.swapaxes(1, 2))  # (B, H, T, d) -> (B, T, H, d) -> (B, T, D)
        return out, attention, heads


class MLP(nn.Module):
    """Linear D -> 4D, GELU (exact, or by tanh), linear 4D -> D; or SwiGLU (DINOv2).

    SwiGLU's first linear map has twice the hidden width: SiLU of one half is the gate
    of the other.
    """

    spec: "Spec"
    index: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec, inits = self.spec, initializers(self.spec, self.index)
        hidden = round(spec.mlp_ratio * spec.width)
        gated = spec.mlp == "swiglu"
        fc1 = nn.Dense(
            2 * hidden if gated else hidden,
            kernel_init=inits["linear"],
            dtype=spec.dtype,
            name="fc1",
        )
        fc2 = nn.Dense(
            spec.width, kernel_init=inits["residual"], dtype=spec.dtype, name="fc2"
        )
        x = fc1(x)
        if gated:
            gate, x = jnp.split(x, 2, axis=-1)
            return fc2(nn.silu(gate) * x)
        return fc2(nn.gelu(x, approximate=spec.mlp == "gelu_tanh"))


class PatchEmbed(nn.Module):
    """One linear map of each patch: the P x P stride-P convolution as a product."""

    spec: "Spec"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        spec, inits = self.spec, initializers(self.spec)
        (rows, columns), p = spec.grid, spec.patch
        kernel = self.param("kernel", inits["patch"], (p, p, 3, spec.width))
        bias = self.param("bias", inits["patch_bias"], (spec.width,))
        x = images.astype(spec.dtype).reshape(-1, rows, p, columns, p, 3)
        x = x.swapaxes(2, 3).reshape(-1, rows * columns, p * p * 3)  # (B, N, 3PP)
        x = x @ kernel.reshape(-1, spec.width).astype(spec.dtype)
        return x + bias.reshape(1, 1, -1).astype(spec.dtype)


class ConvStem(nn.Module):
    """log2(P) x [3x3 stride-2 convolution, BatchNorm, ReLU], then 1x1 (MoCo v3)."""

    spec: "Spec"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        spec, x = self.spec, images.astype(self.spec.dtype)
        count = int(math.log2(spec.patch))
        for i in range(count):
            x = nn.Conv(
                spec.width >> (count - 1 - i),  # D/8, D/4, D/2, D for P = 16
                (3, 3),
                strides=2,
                padding=1,
                use_bias=False,
                kernel_init=fan_in_uniform(9 * x.shape[-1]),
                dtype=spec.dtype,
                name=f"conv_{i}",
            )(x)
            x = nn.relu(BatchNorm(name=f"bn_{i}")(x, train))
        init = fan_in_uniform(spec.width)
        proj = nn.Dense(
            spec.width, kernel_init=init, bias_init=init, dtype=spec.dtype, name="proj"
        )
        return proj(
            x.reshape(x.shape[0], -1, spec.width)
        )  # (B, rows, cols, D) -> (B, N, D)


def layer_norm(name: str | None = None, epsilon: float = 1e-6) -> nn.LayerNorm:
    """Of a ViT: float32, two-pass variance."""
    return nn.LayerNorm(
        epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name
    )


def drop_path(
    branch: jax.Array, keep: float | jax.Array, key: jax.Array | None
) -> jax.Array:
    """Keep a whole branch per sample with probability `keep`, rescale the kept."""
    if key is None:
        return branch
    mask = jax.random.bernoulli(key, keep, (branch.shape[0], 1, 1))
    return branch * (mask / keep).astype(branch.dtype)
