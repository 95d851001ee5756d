"""The recordings' PyTorch names and layouts -> this project's parameter tree."""

import re

import numpy as np

Flat = dict[str, np.ndarray]


def encoder(flat: Flat, heads: int, prefix: str = "") -> dict:
    """The encoder tree of a flat state dict whose names begin with `prefix`."""
    flat = {k[len(prefix) :]: v for k, v in flat.items() if k.startswith(prefix)}
    tree: dict = {}
    for name, x in flat.items():
        for path, value in _leaf(name, x, heads):
            _put(tree, path, value)
    return tree


def head(flat: Flat, prefix: str) -> tuple[dict, dict]:
    """(params, stats) of an MLP head `0 Linear, 1 BatchNorm, 2 ReLU, 3 Linear ...`."""
    params: dict = {}
    stats: dict = {}
    for name, x in flat.items():
        if not name.startswith(prefix) or "num_batches" in name:
            continue
        index, kind = name[len(prefix) :].split(".")
        i = int(index) // 3
        if int(index) % 3 == 0:
            _put(params, f"fc_{i}/kernel", x.T)
        elif "running" in kind:
            _put(stats, f"bn_{i}/{kind[len('running_') :]}", x)
        else:
            _put(params, f"bn_{i}/{'scale' if kind == 'weight' else 'bias'}", x)
    return params, stats


def images(x: np.ndarray) -> np.ndarray:
    """NCHW -> NHWC."""
    return x.transpose(0, 2, 3, 1)


def _put(tree: dict, path: str, value: np.ndarray) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _leaf(name: str, x: np.ndarray, heads: int) -> list[tuple[str, np.ndarray]]:
    block = re.match(r"blocks\.(\d+)\.(.*)", name)
    if block:
        return [(f"block_{block[1]}/{p}", v) for p, v in _block(block[2], x, heads)]
    if "index" in name or re.match(r"head|fc_norm|mask_token", name):
        return []
    if name == "patch_embed.proj.weight":
        return [("patch_embed/kernel", x.transpose(2, 3, 1, 0))]
    plain = {
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.proj.bias": "patch_embed/bias",
        "norm.weight": "ln_final/scale",
        "norm.bias": "ln_final/bias",
        "rel_pos_bias.relative_position_bias_table": "rel_table",
    }
    return [(plain[name], x)]


def _block(name: str, x: np.ndarray, heads: int) -> list[tuple[str, np.ndarray]]:
    width = x.shape[-1] if x.ndim == 2 else x.shape[0]
    if name == "attn.qkv.weight":  # (3D, D), rows q, k, v -> each (D, H, d)
        parts = zip("qkv", np.split(x, 3), strict=True)
        return [(f"attn/{n}/kernel", w.T.reshape(width, heads, -1)) for n, w in parts]
    if name == "attn.qkv.bias":
        parts = zip("qkv", np.split(x, 3), strict=True)
        return [(f"attn/{n}/bias", b.reshape(heads, -1)) for n, b in parts]
    if name in ("attn.q_bias", "attn.v_bias"):
        return [(f"attn/{name[5]}/bias", x.reshape(heads, -1))]
    if name == "attn.proj.weight":
        return [("attn/out/kernel", x.T.reshape(heads, -1, width))]
    if name == "attn.relative_position_bias_table":
        return [("attn/rel_table", x)]
    if "index" in name:
        return []
    if name.startswith("gamma"):
        return [(name, x)]
    module, kind = name.rsplit(".", 1)
    module = {
        "norm1": "ln1",
        "norm2": "ln2",
        "attn.proj": "attn/out",
        "mlp.fc1": "mlp/fc1",
        "mlp.fc2": "mlp/fc2",
    }[module]
    if module.startswith("ln"):
        return [(f"{module}/{'scale' if kind == 'weight' else 'bias'}", x)]
    return [(f"{module}/{'kernel' if kind == 'weight' else 'bias'}", x.T)]
