"""Rules that several families share: the blocks of timm's and Hugging Face's ViTs."""

import math

import numpy as np

from clvsmim import inits
from clvsmim.formats._rules import (
    CONV,
    HEADS_BIAS,
    HEADS_WEIGHT,
    LINEAR,
    OUT_WEIGHT,
    QKV_BIAS,
    QKV_WEIGHT,
    SAME,
    Given,
    Leaves,
    Rule,
)

HEAD = "heads/last/rate_1"  # of objectives/classify.py: one head on the last block


def norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A LayerNorm."""
    return (
        Rule(f"{theirs}.weight", (f"{ours}/scale",), SAME),
        Rule(f"{theirs}.bias", (f"{ours}/bias",), SAME),
    )


def linear(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A linear map with its bias."""
    return (
        Rule(f"{theirs}.weight", (f"{ours}/kernel",), LINEAR),
        Rule(f"{theirs}.bias", (f"{ours}/bias",), SAME),
    )


def patch(theirs: str) -> tuple[Rule, ...]:
    """The patch convolution."""
    return (
        Rule(f"{theirs}.weight", ("encoder/patch_embed/kernel",), CONV),
        Rule(f"{theirs}.bias", ("encoder/patch_embed/bias",), SAME),
    )


def mlp(
    theirs: str, ours: str, names: tuple[str, str], needs: str = ""
) -> tuple[Rule, ...]:
    """Two linear maps."""
    first, second = names
    rules = (
        *linear(f"{theirs}{first}", f"{ours}/mlp/fc1"),
        *linear(f"{theirs}{second}", f"{ours}/mlp/fc2"),
    )
    return tuple(rule._replace(needs=needs) for rule in rules)


def either_mlp(theirs: str, plain: tuple, gated: tuple) -> tuple[Rule, ...]:
    """The MLP of an encoder's block, which has other names if it is a SwiGLU."""
    ours = "encoder/block_{i}"
    return (*mlp(theirs, ours, plain, "!gated"), *mlp(theirs, ours, gated, "gated"))


def timm_blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Blocks as timm names them; of BEiT the q and v biases stand alone."""
    out = f"{ours}/attn"
    kernels, biases = (tuple(f"{out}/{n}/{k}" for n in "qkv") for k in KINDS)
    return (
        *norm(f"{theirs}.norm1", f"{ours}/ln1"),
        *norm(f"{theirs}.norm2", f"{ours}/ln2"),
        Rule(f"{theirs}.attn.qkv.weight", kernels, QKV_WEIGHT),
        Rule(f"{theirs}.attn.qkv.bias", biases, QKV_BIAS),
        Rule(f"{theirs}.attn.proj.weight", (f"{out}/out/kernel",), OUT_WEIGHT),
        Rule(f"{theirs}.attn.proj.bias", (f"{out}/out/bias",), SAME),
        *mlp(f"{theirs}.mlp.", ours, ("fc1", "fc2")),
    )


KINDS = ("kernel", "bias")


def timm_encoder() -> tuple[Rule, ...]:
    """What MoCo v3, MAE, DINO, iBOT, DeiT and timm's own ViTs have in common."""
    return (
        Rule("cls_token", ("encoder/cls_token",), SAME),
        Rule("pos_embed", ("encoder/pos_embed",), SAME),
        *patch("patch_embed.proj"),
        *timm_blocks("blocks.{i}", "encoder/block_{i}"),
        *norm("norm", "encoder/ln_final"),
    )


def layer_scale(first: str, second: str) -> tuple[Rule, ...]:
    """The layer scale of both branches of a block, under these names."""
    return (
        Rule(first, ("encoder/block_{i}/gamma_1",), SAME),
        Rule(second, ("encoder/block_{i}/gamma_2",), SAME),
    )


def timm_head() -> tuple[Rule, ...]:
    """A classifier, with the norm of pooled patches if it has one."""
    return (*linear("head", HEAD), *norm("fc_norm", f"{HEAD}/fc_norm"))


def beit_encoder() -> tuple[Rule, ...]:
    """BEiT and SimMIM: relative positions, layer scale, no bias of the keys."""
    attn = "encoder/block_{i}/attn"
    return (
        *layer_scale("blocks.{i}.gamma_1", "blocks.{i}.gamma_2"),
        Rule("blocks.{i}.attn.q_bias", (f"{attn}/q/bias",), HEADS_BIAS, NO_K),
        Rule("blocks.{i}.attn.v_bias", (f"{attn}/v/bias",), HEADS_BIAS, NO_K),
        Rule(
            "blocks.{i}.attn.relative_position_bias_table",
            (f"{attn}/rel_table",),
            SAME,
        ),
        Rule("rel_pos_bias.relative_position_bias_table", ("encoder/rel_table",), SAME),
        *(rule for rule in timm_encoder() if "qkv.bias" not in rule.theirs),
    )


NO_K = "!encoder/block_{i}/attn/k/bias"


def beit_indices() -> tuple[Given, ...]:
    """The stored index of every pair of tokens into the relative table."""
    why = "the index into the relative table is computed here; it is the same"
    attn = "encoder/block_{i}/attn/rel_table"
    return (
        Given("rel_pos_bias.relative_position_index", why, index, "encoder/rel_table"),
        Given("blocks.{i}.attn.relative_position_index", why, index, attn),
    )


def index(leaves: Leaves, numbers: tuple[str, ...]) -> np.ndarray:
    """(T, T) int64 of a square grid with CLS, from the size of the table.

    Raises:
      ValueError: a table of no square grid, of which nobody has stored an index.
    """
    name = (
        f"encoder/block_{numbers[0]}/attn/rel_table" if numbers else "encoder/rel_table"
    )
    if name not in leaves:
        raise ValueError(f"an index into {name}, and no such table in the file")
    rows = max(len(leaves[name]) - 3, 0)
    side = (math.isqrt(rows) + 1) // 2
    if (2 * side - 1) ** 2 != rows:
        raise ValueError(
            f"a relative table of {rows + 3} rows belongs to no square grid: the "
            "index that these files store is only known for one"
        )
    return inits.relative_index((side, side), 1).astype(np.int64)


LAYER = "encoder.layer.{i}"


def hf_encoder() -> tuple[Rule, ...]:
    """Hugging Face's encoders, but for norms and MLPs."""
    return (
        Rule("embeddings.cls_token", ("encoder/cls_token",), SAME),
        Rule("embeddings.position_embeddings", ("encoder/pos_embed",), SAME),
        *patch("embeddings.patch_embeddings.projection"),
        *hf_attention(LAYER, "encoder/block_{i}"),
    )


def hf_attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    """q, k and v as three linear maps, and the one after them."""
    rules = []
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        start = f"{theirs}.attention.attention.{name}"
        leaf = f"{ours}/attn/{letter}"
        rules += [
            Rule(f"{start}.weight", (f"{leaf}/kernel",), HEADS_WEIGHT),
            Rule(f"{start}.bias", (f"{leaf}/bias",), HEADS_BIAS),
        ]
    out = f"{theirs}.attention.output.dense"
    return (
        *rules,
        Rule(f"{out}.weight", (f"{ours}/attn/out/kernel",), OUT_WEIGHT),
        Rule(f"{out}.bias", (f"{ours}/attn/out/bias",), SAME),
    )


HF_MLP = ("intermediate.dense", "output.dense")


def hf_norms(layer: str, ours: str) -> tuple[Rule, ...]:
    """The two norms of ViT's and BEiT's blocks."""
    return (
        *norm(f"{layer}.layernorm_before", f"{ours}/ln1"),
        *norm(f"{layer}.layernorm_after", f"{ours}/ln2"),
    )


# What transformers 5 calls its modules in memory, or writes, in the names of the hub.
HF_ALIASES = (
    (r"^((?:vit|beit|deit)\.)?layers\.(\d+)\.", r"\1encoder.layer.\2."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"(layers?\.\d+\.attention)\.q_proj\.", r"\1.attention.query."),
    (r"(layers?\.\d+\.attention)\.k_proj\.", r"\1.attention.key."),
    (r"(layers?\.\d+\.attention)\.v_proj\.", r"\1.attention.value."),
    (r"(layers?\.\d+\.attention)\.o_proj\.", r"\1.output.dense."),
)
HF_MLP_ALIASES = (
    (r"(layers?\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(layers?\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
)
