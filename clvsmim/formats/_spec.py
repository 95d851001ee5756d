"""The configuration of a network, read off its leaves."""

import math
from collections.abc import Mapping
from typing import Any

from clvsmim.formats._family import Family
from clvsmim.formats._positions import kind_of_table
from clvsmim.formats._report import Report
from clvsmim.formats._rules import Leaves, Rule, fill, match
from clvsmim.formats._tables import HEAD

# Heads by width, of the ViTs that everybody knows.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24}
HEADS |= {1664: 16}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",  # as timm calls it
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def shapes(
    tensors: Mapping[str, Any], rules: tuple[Rule, ...]
) -> dict[str, tuple[int, ...]]:
    """Shapes in the file by the (first) leaf that each tensor will be."""
    found = {}
    for name, x in tensors.items():
        rule, numbers = match(name, rules)
        if rule is not None:
            found[fill(rule.ours[0], numbers)] = tuple(x.shape) or (0,)
    return found


def head_count(
    shapes: Mapping[str, tuple], family: Family, given: int, about: Mapping, out: Report
) -> int:
    """Heads of the encoder: from a table, what was said, or the width.

    Raises:
      ValueError: nothing tells them, or they cannot be.
    """
    width = shapes.get("encoder/block_0/ln1/scale", (0,))[-1]
    if not width:
        name = "encoder/block_0/ln1/scale"
        raise ValueError(f"{name} is not in the file: no ViT of this kind")
    known = 0
    for name in ("encoder/rel_table", "encoder/block_0/attn/rel_table"):
        known = known or shapes.get(name, (0,))[-1]
    kernel = shapes.get("encoder/block_0/attn/q/kernel", ())
    if len(kernel) == 3:  # Google's (D, H, d)
        known = kernel[1]
    said = int(about.get("num_attention_heads", 0))
    if given and known and given != known:
        raise ValueError(f"heads={given}, and the file has tables of {known} heads")
    if known:
        out.found.append(f"{known} heads, by the shape of a tensor")
    elif given:
        known = given
        out.found.append(f"{given} heads, as you said")
    elif said:
        known = said
        out.found.append(f"{said} heads, by config.json")
    else:
        known = guess_heads(width, family, out)
    if width % known:
        raise ValueError(
            f"width {width} does not divide into {known} heads; say heads="
        )
    return known


def guess_heads(width: int, family: Family, out: Report) -> int:
    """Heads by width alone: shapes cannot tell them."""
    if width == 384:
        other = 18 - family.heads_of_s
        whose = "MoCo v3's" if family.heads_of_s == 12 else "DeiT's and DINO's"
        others = "MoCo v3's" if family.heads_of_s == 6 else "DeiT's and DINO's"
        out.assumed.append(
            f"{family.heads_of_s} heads, {whose} ViT-S; {others} S has {other} with "
            f"the same shapes: heads={other}"
        )
        return family.heads_of_s
    heads = HEADS.get(width, 0)
    if not heads:
        raise ValueError(
            f"shapes do not tell the heads of an encoder {width} wide; say heads="
        )
    out.assumed.append(f"{heads} heads, as ViTs {width} wide have; shapes do not tell")
    return heads


def decoder_head_count(
    shapes: Mapping[str, tuple], given: int, about: Mapping, out: Report
) -> int:
    """Heads of MAE's decoder; 0 without one."""
    width = shapes.get("heads/decoder/block_0/ln1/scale", (0,))[-1]
    if not width:
        return 0
    heads = given or int(about.get("decoder_num_attention_heads", 0))
    kernel = shapes.get("heads/decoder/block_0/attn/q/kernel", ())
    if not heads and len(kernel) == 3:  # ours: (D, H, d)
        return kernel[1]
    if not heads:
        heads = 16
        out.assumed.append("16 heads of the decoder, as in MAE; shapes do not tell")
    if width % heads:
        raise ValueError(
            f"a decoder {width} wide does not divide into {heads} heads; say "
            "decoder_heads="
        )
    return heads


def encoder_fields(
    leaves: Leaves,
    family: Family,
    heads: int,
    image: tuple[int, ...],
    about: Mapping,
    half: bool,
    out: Report,
) -> dict[str, Any]:
    """Every field of `vit.Spec`; what the tensors cannot tell is the family's."""
    at = {name: x.shape for name, x in leaves.items() if name.startswith("encoder/")}
    depth = 1 + max((number_of_block(n) for n in at), default=-1)
    blocks = range(depth)  # stop at the first gap: a name may hold a huge number
    gap = next((i for i in blocks if f"encoder/block_{i}/ln1/scale" not in at), depth)
    if gap < depth:
        raise ValueError(
            f"block {gap} of {depth} is not there, or encoder/block_{gap}/ln1/scale of "
            "it: the file is cut"
        )
    stem, patch = stem_of(at)
    if stem == "conv":
        out.warnings.append("the names of the conv stem are from documentation only")
    width = at["encoder/block_0/ln1/scale"][-1]
    hidden = at["encoder/block_0/mlp/fc2/kernel"][0]
    gated = at["encoder/block_0/mlp/fc1/kernel"][-1] == 2 * hidden
    activation = ACTIVATIONS.get(activation_of(about), "")
    registers = at.get("encoder/registers", (1, 0))[1]
    prefix = 1 + registers if "encoder/cls_token" in at else 0
    relative = "none"
    if "encoder/rel_table" in at:
        relative = "shared"
    elif "encoder/block_0/attn/rel_table" in at:
        relative = "per_block"
    biases = [n for n in "qkv" if f"encoder/block_0/attn/{n}/bias" in at]
    fields = {
        "image": image_size(at, patch, relative, prefix, image, about, out),
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": heads,
        "stem": stem,
        "position": position_of(leaves, family, half, out),
        "relative": relative,
        "layer_scale": 0.0,
        "qkv_bias": "".join(biases) or "none",
        "drop_path": 0.0,
        "final_norm": "encoder/ln_final/scale" in at,
        "prefix": prefix,
        "init": "timm",
        "dtype": "float32",
        "remat": False,
        "mlp_ratio": hidden / width,
        "scan": False,
        "mlp": "swiglu" if gated else activation or "gelu",
        "norm_eps": 1e-6,
    }
    own = dict(family.fields)
    if "encoder/block_0/gamma_1" in at:
        said = about.get("layer_scale_init_value", about.get("layerscale_value"))
        fields["layer_scale"] = float(said or own.get("layer_scale") or 1e-5)
    own.pop("layer_scale", None)
    if gated or activation:
        own.pop("mlp", None)
    fields |= {k: v for k, v in own.items() if k != "position"}
    if "layer_norm_eps" in about:
        fields["norm_eps"] = float(about["layer_norm_eps"])
        out.found.append(f"LayerNorm epsilon {fields['norm_eps']:g}, by config.json")
    elif fields["norm_eps"] != 1e-6:
        out.assumed.append(f"LayerNorm epsilon {fields['norm_eps']:g}, its default")
    if activation and not gated:
        how = "by tanh" if activation == "gelu_tanh" else "the exact one"
        out.found.append(f"GELU {how}, by config.json")
    elif fields["mlp"] == "gelu_tanh":
        out.assumed.append(
            "GELU by tanh, as Google's code has it; timm runs these weights with the "
            "exact one: encoder.mlp=gelu"
        )
    return fields


def activation_of(about: Mapping) -> str:
    """What config.json of Hugging Face or of timm calls it; "" if it does not say."""
    return str(
        about.get("hidden_act") or about.get("model_args", {}).get("act_layer", "")
    )


def number_of_block(name: str) -> int:
    """The number in "encoder/block_3/..."; -1 of other leaves."""
    part = name.split("/")[1]
    return int(part[6:]) if part.startswith("block_") else -1


def stem_of(at: Mapping[str, tuple]) -> tuple[str, int]:
    """("patch" or "conv", patch size in pixels)."""
    kernel = at.get("encoder/patch_embed/kernel")
    if kernel is None:
        convolutions = [n for n in at if n.startswith("encoder/patch_embed/conv_")]
        if not convolutions:
            raise ValueError("no patch embedding in the file")
        return "conv", 2 ** len(convolutions)
    if kernel[0] != kernel[1] or kernel[2] != 3:
        raise ValueError(
            f"patches of {kernel[0]} x {kernel[1]} pixels of {kernel[2]} channels; "
            "expected square patches of RGB images"
        )
    return "patch", kernel[0]


def image_size(
    at: Mapping[str, tuple],
    patch: int,
    relative: str,
    prefix: int,
    given: tuple[int, ...],
    about: Mapping,
    out: Report,
) -> tuple[int, int]:
    """(rows, columns) in pixels, from the tables; asked for where no table tells."""
    said = about.get("image_size", 0)
    said = tuple(said) if isinstance(said, list | tuple) else (said,) * 2
    n = 0
    if "encoder/pos_embed" in at:
        n = at["encoder/pos_embed"][1] - min(prefix, 1)
    side = math.isqrt(n)
    if relative != "none":
        name = "encoder/rel_table"
        table = at.get(name) or at["encoder/block_0/attn/rel_table"]
        side = (math.isqrt(max(table[0] - 3, 0)) + 1) // 2
        n = side * side if (2 * side - 1) ** 2 + 3 == table[0] else -1
    for size in (tuple(given), said):
        if len(size) == 2 and all(size):
            if n > 0 and math.prod(s // patch for s in size) != n:
                raise ValueError(
                    f"{size[0]} x {size[1]} px in patches of {patch} are not the "
                    f"file's table of {n}; open it as it is and resize it afterwards"
                )
            return int(size[0]), int(size[1])
    if n > 0 and side * side == n:
        return (side * patch,) * 2
    if n:
        raise ValueError(
            "the tables are of no square image; say its rows and columns with image="
        )
    whole = 224 - 224 % patch
    out.assumed.append(f"{whole} x {whole} pixels: there is no position table")
    return (whole, whole)


def position_of(leaves: Leaves, family: Family, half: bool, out: Report) -> str:
    """The kind of absolute table, compared with what the family has."""
    table = leaves.get("encoder/pos_embed")
    if table is None:
        return "none"
    kind, far = kind_of_table(table, half)
    names = {"moco_sincos": "MoCo v3's", "mae_sincos": "MAE's"}
    if kind in names:
        out.found.append(
            f"{names[kind]} sin-cos positions (difference at most {far:.0e})"
        )
    expected = family.fields.get("position")
    if expected and kind != expected:
        out.warnings.append(
            f"the position table is not {names[expected]} sin-cos table "
            f"(difference {far:.2g}): fine-tuned, resized, or another network"
        )
    return kind


def objective_of(
    leaves: Leaves, heads: int, about: Mapping, out: Report
) -> dict[str, Any] | None:
    """The settings of the objective whose heads came along, as far as they tell."""
    at = {name: x.shape for name, x in leaves.items() if name.startswith("heads/")}
    if "heads/decoder/proj/kernel" in at:
        depth = len({n.split("/")[2] for n in at if "/block_" in n})
        width = at["heads/decoder/proj/kernel"][1]
        out.assumed.append(
            "norm_pix: pixels normalised per patch (MAE's *_visualize files were "
            "trained without; the names are the same)"
        )
        decoder = {"width": width, "depth": depth, "heads": heads}
        return {"name": "mae", "norm_pix": True, "decoder": decoder}
    if "heads/decoder/kernel" in at:
        return {"name": "simmim"}
    if f"{HEAD}/kernel" in at:
        layer = f"{HEAD}/fc_norm/scale" in at
        said = about.get("model_args", {}).get("global_pool", about.get("global_pool"))
        pooled = {"avg": True, "token": False}.get(str(said), layer)  # of timm
        pooled = pooled or "encoder/cls_token" not in leaves
        return {
            "name": "classify",
            "classes": at[f"{HEAD}/kernel"][1],
            "tune": "all",
            "blocks": "last",
            "pool": "patches" if pooled else "cls",
            "norm": "layer" if layer else "none",
            "rates": (1.0,),
        }
    found = {"name": "moco_v3"}
    for name in ("projector", "predictor"):
        kernels = sorted(n for n in at if n.startswith(f"heads/{name}/fc_"))
        found |= {name: tuple(at[n][1] for n in kernels)} if kernels else {}
    return found if len(found) == 3 else None
