"""A Vision Transformer whose every intermediate has a name.

Letters: B images, N patches, T = prefix + N tokens, D width, H heads, d = D / H,
L depth, P patch. `ViT.apply` is a pure function of (parameters, images). Its three
public steps are `embed -> place -> encode`: SimMIM puts its mask token between the
first two, MAE drops tokens after the second and has a `Decoder` of the same blocks.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from clvsmim.inits import (
    initializers,
    position_init,
    relative_bias,
    relative_shape,
    sincos_table,
)
from clvsmim.layers import Block, ConvStem, PatchEmbed, layer_norm

SIZES = {
    "Ti": {"width": 192, "depth": 12, "heads": 3},
    "S": {"width": 384, "depth": 12, "heads": 6},
    # MoCo v3's S has 12 heads: the same tensor shapes, another network.
    "S_moco": {"width": 384, "depth": 12, "heads": 12},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "H": {"width": 1280, "depth": 32, "heads": 16},
}

CHOICES = {
    "stem": ("patch", "conv"),
    "position": ("none", "learned", "moco_sincos", "mae_sincos"),
    "relative": ("none", "shared", "per_block"),
    "qkv_bias": ("none", "qv", "qkv"),
    "mlp": ("gelu", "gelu_tanh", "swiglu"),
    "init": ("moco_v3", "simmim", "mae", "timm"),
    "dtype": ("float32", "bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a `ViT` is.

    Attributes:
      width, depth, heads, patch: D, L, H, P.
      image: (rows, columns) in pixels, multiples of P; need not be square.
      stem: "patch" (one linear map) or "conv" (MoCo v3's stack of 3x3 convolutions).
      position: absolute table: "none", "learned", "moco_sincos" or "mae_sincos". A
        sin-cos table is a parameter too; pre-training recipes freeze it.
      relative: relative position bias, "none", "shared" by all blocks or "per_block".
      layer_scale: initial gamma of both branches; 0 for no layer scale.
      qkv_bias: bias of "none", "qv" (BEiT, SimMIM) or "qkv".
      drop_path: rate at the last block, growing linearly from 0 at the first.
      final_norm: LayerNorm after the last block.
      prefix: tokens before the patches: 0, 1 = CLS, 1 + R = CLS and R registers.
      init: whose initialisation: "moco_v3", "simmim", "mae" or "timm".
      dtype: of matrix products and activations: "float32" or "bfloat16".
      remat: recompute each block in the backward pass (less memory, more time).
      mlp_ratio: hidden width of the MLP over D.
      scan: compile one block and loop over it wherever taps are not asked for. The
        parameters stay block_0, block_1 ... and are stacked on the way in.
      mlp: "gelu" (exact), "gelu_tanh" (its approximation, Google's ViTs) or "swiglu"
        (DINOv2's giant; its hidden width is mlp_ratio x D too).
      norm_eps: epsilon of the LayerNorms; some libraries have 1e-12.
    """

    width: int
    depth: int
    heads: int
    patch: int
    image: tuple[int, int]
    stem: str
    position: str
    relative: str
    layer_scale: float
    qkv_bias: str
    drop_path: float
    final_norm: bool
    prefix: int
    init: str
    dtype: str
    remat: bool
    mlp_ratio: float = 4.0
    scan: bool = False
    mlp: str = "gelu"
    norm_eps: float = 1e-6

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def tokens(self) -> int:
        """T = prefix + N."""
        return self.prefix + math.prod(self.grid)


class ViT(nn.Module):
    """Vision Transformer encoder (Dosovitskiy et al. 2021): pre-norm, exact GELU.

    Parameters are float32; so are softmax and LayerNorm, whatever `spec.dtype` is.
    """

    spec: Spec

    def setup(self) -> None:
        spec = self.spec
        inits = initializers(spec)
        stem = ConvStem if spec.stem == "conv" else PatchEmbed
        self.patch_embed = stem(spec)
        if spec.prefix:
            self.cls_token = self.param("cls_token", inits["token"], (1, 1, spec.width))
        if spec.prefix > 1:
            shape = (1, spec.prefix - 1, spec.width)
            self.registers = self.param("registers", inits["token"], shape)
        if spec.position != "none":
            shape = (1, min(spec.prefix, 1) + math.prod(spec.grid), spec.width)
            self.pos_embed = self.param("pos_embed", position_init(spec), shape)
        if spec.relative == "shared":
            zeros = nn.initializers.zeros
            self.rel_table = self.param("rel_table", zeros, relative_shape(spec))
        self.block = blocks(spec)  # block_0, block_1 ...
        if spec.final_norm:
            self.ln_final = layer_norm(epsilon=spec.norm_eps)

    def embed(self, images: jax.Array, train: bool = False) -> jax.Array:
        """(B, rows, columns, 3) normalised images -> patch embeddings (B, N, D)."""
        if images.shape[1:] != (*self.spec.image, 3):
            raise ValueError(
                f"images of shape {tuple(images.shape[1:])} given to an encoder for "
                f"{(*self.spec.image, 3)}; resize them or change encoder.image"
            )
        return shard_batch(self.patch_embed(images, train))

    def place(self, patches: jax.Array) -> jax.Array:
        """Put the prefix before (B, N, D) patches and add positions -> (B, T, D).

        Registers come after CLS and carry no position (as in DINOv2).
        """
        parts = [patches]
        if self.spec.prefix:
            parts = [_spread(self.cls_token, patches), patches]
        x = jnp.concatenate(parts, axis=1)
        if self.spec.position != "none":
            x = x + self.pos_embed.astype(x.dtype)
        if self.spec.prefix > 1:
            registers = _spread(self.registers, patches)
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        return x

    def encode(
        self, tokens: jax.Array, key: jax.Array | None = None, taps: bool = True
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, ...]]]:
        """Run the blocks on placed tokens (B, T, D).

        Args:
          tokens: from `place`. Any number of tokens, unless `relative` is used.
          key: draws drop path; None turns it off.
          taps: False where nobody reads them, which `spec.scan` needs to know.

        Returns:
          The tokens (B, T, D) after the final norm if there is one, and the taps ({} if
          not wanted), all before the final norm; what nobody reads, jit prunes:
            "residual": 2L + 1 arrays (B, T, D): the embedding, then after each
              block's attention and after each block's MLP;
            "attention": L arrays (B, H, T, T), probabilities, float32;
            "head_outputs": L arrays (B, H, T, d), attention x values.
        """
        spec = self.spec
        shared = spec.relative == "shared"
        bias = relative_bias(self.rel_table, spec) if shared else None
        x, found = through(self.block, tokens.astype(spec.dtype), bias, key, taps)
        if spec.final_norm:
            x = self.ln_final(x).astype(spec.dtype)
        return x, found

    def __call__(
        self,
        images: jax.Array,
        key: jax.Array | None = None,
        train: bool = False,
        taps: bool = True,
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, ...]]]:
        """`encode(place(embed(images)))`."""
        return self.encode(self.place(self.embed(images, train)), key, taps)


def make(**fields: object) -> ViT:
    """A `ViT` whose fields have been checked.

    Raises:
      ValueError: a field whose value cannot work, with those that can.
    """
    fields["image"] = tuple(fields["image"])
    spec = Spec(**fields)
    for name, known in CHOICES.items():
        if getattr(spec, name) not in known:
            raise ValueError(
                f"encoder.{name}={getattr(spec, name)!r}; known: {', '.join(known)}"
            )
    for name in ("width", "depth", "heads", "patch"):
        if getattr(spec, name) < 1:
            raise ValueError(f"encoder.{name}={getattr(spec, name)}: use >= 1")
    if spec.prefix < 0 or len(spec.image) != 2:
        raise ValueError(
            f"encoder.prefix={spec.prefix} and encoder.image={spec.image}: expected "
            "tokens before the patches (0, 1 or more) and (rows, columns)"
        )
    for side in spec.image:
        if side % spec.patch or side <= 0:
            fits = tuple(max(s // spec.patch, 1) * spec.patch for s in spec.image)
            raise ValueError(
                f"image size {spec.image} is not a multiple of patch {spec.patch}; "
                f"use for instance {fits}"
            )
    if spec.width % spec.heads:
        raise ValueError(f"width {spec.width} does not divide into {spec.heads} heads")
    if spec.position.endswith("sincos") and spec.width % 4:
        raise ValueError(f"sin-cos positions need a width % 4 == 0, got {spec.width}")
    if spec.stem == "conv" and (spec.patch < 2 or spec.patch & (spec.patch - 1)):
        raise ValueError(f"a conv stem needs patch 2, 4, 8, 16 ..., got {spec.patch}")
    return ViT(spec)


class Decoder(nn.Module):
    """MAE's decoder (He et al. 2022, section 3): blocks of its own width.

    `spec` is that of its blocks; what it has of the encoder are prefix, grid and patch.
    """

    spec: Spec

    def setup(self) -> None:
        spec = self.spec
        linear = {"kernel_init": initializers(spec)["linear"], "dtype": spec.dtype}
        self.proj = nn.Dense(spec.width, **linear)
        self.block = blocks(spec)
        self.ln_final = layer_norm(epsilon=spec.norm_eps)
        self.pixels = nn.Dense(3 * spec.patch**2, **linear)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """The encoder's tokens (B, any number, D) in the decoder's width."""
        return self.proj(tokens)

    def decode(
        self, x: jax.Array, taps: bool = True
    ) -> tuple[jax.Array, dict[str, tuple]]:
        """All tokens (B, T, width), in order -> as `ViT.encode`.

        The positions are constants: fixed sin-cos, nothing for the prefix.
        """
        spec = self.spec
        table = sincos_table(spec.grid, spec.width, rows_first=False)
        table = np.pad(table, ((spec.prefix, 0), (0, 0)))[None]  # (1, T, width)
        x = shard_batch(x.astype(spec.dtype) + jnp.asarray(table, spec.dtype))
        x, found = through(self.block, x, None, None, taps)
        return self.ln_final(x).astype(spec.dtype), found

    def predict(self, tokens: jax.Array) -> jax.Array:
        """Decoded tokens (B, T, width) -> patches (B, N, P * P * 3), float32."""
        return self.pixels(tokens[:, self.spec.prefix :]).astype(jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Pixels of patches of which none was hidden: (B, T, D) -> (B, N, 3PP)."""
        return self.predict(self.decode(self.embed(tokens))[0])


def decoder_spec(encoder: Spec, *, width: int, depth: int, heads: int) -> Spec:
    """That of the decoder's blocks behind an encoder, whatever its own variant.

    An encoder with the GELU by tanh has a decoder with it: a library has one for both.
    """
    return dataclasses.replace(
        encoder,
        width=width,
        depth=depth,
        heads=heads,
        position="mae_sincos",
        relative="none",
        layer_scale=0.0,
        qkv_bias="qkv",
        drop_path=0.0,
        final_norm=True,
        init="mae",
        mlp=encoder.mlp if encoder.mlp == "gelu_tanh" else "gelu",
        mlp_ratio=4.0,
    )


def blocks(spec: Spec) -> list[Block]:
    """The blocks of a network, for its `setup`."""
    block = nn.remat(Block) if spec.remat else Block
    return [block(spec, i) for i in range(spec.depth)]


def through(
    blocks: Sequence[Block],
    x: jax.Array,
    bias: jax.Array | None,
    key: jax.Array | None,
    taps: bool = True,
) -> tuple[jax.Array, dict[str, tuple[jax.Array, ...]]]:
    """Run tokens (B, T, D) through blocks: the last output, and the taps by name."""
    spec, depth = blocks[0].spec, len(blocks)
    kept = [1.0 - spec.drop_path * i / max(depth - 1, 1) for i in range(depth)]
    keys = None
    if key is not None and spec.drop_path:
        keys = jax.random.split(key, depth)
    if spec.scan and not taps:
        return scanned(blocks, x, bias, keys, kept), {}
    residual, attention, head_outputs = [x], [], []
    for i, block in enumerate(blocks):
        # The first block never drops.
        own = None if keys is None or kept[i] == 1.0 else keys[i]
        found = block(x, bias, own, kept[i])
        x = shard_batch(found["mlp"])
        residual += [found["attn"], x]
        attention.append(found["attention"])
        head_outputs.append(found["head_outputs"])
    if not taps:
        return x, {}
    return x, {
        "residual": tuple(residual),
        "attention": tuple(attention),
        "head_outputs": tuple(head_outputs),
    }


def scanned(
    blocks: Sequence[Block],
    x: jax.Array,
    bias: jax.Array | None,
    keys: jax.Array | None,
    kept: Sequence[float],
) -> jax.Array:
    """Tokens (B, T, D) through blocks of equal form, as a loop over one of them.

    Its parameters are slices of the blocks' own, stacked here: (L, ...) each.
    """
    spec = blocks[0].spec
    block = Block(spec, 0, parent=None)  # the index is for new parameters only
    own = [block.variables["params"] for block in blocks]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)

    def one(x: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        params, key, keep = part
        found = block.apply({"params": params}, x, bias, key, keep)
        return shard_batch(found["mlp"]), None

    # What a loop keeps for the way back stays in memory, L times, while of unrolled
    # blocks the compiler recomputes what is cheap. So keep the linear products alone.
    policy = (
        None if spec.remat else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    )
    one = jax.checkpoint(one, prevent_cse=False, policy=policy)
    parts = (stacked, keys, np.asarray(kept, np.float32))
    return jax.lax.scan(one, x, parts)[0]


def shard_batch(x: jax.Array) -> jax.Array:
    """Keep the leading axis split over every axis of the mesh in use, if one is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = jax.sharding.PartitionSpec(mesh.axis_names)
    return jax.lax.with_sharding_constraint(x, spec)


def _spread(token: jax.Array, like: jax.Array) -> jax.Array:
    shape = (like.shape[0], *token.shape[1:])
    return jnp.broadcast_to(token.astype(like.dtype), shape)
