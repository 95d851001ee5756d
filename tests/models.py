"""Tiny encoders and what the recordings agree with: shared by several tests."""

import copy
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from clvsmim import vit
from clvsmim.configs import demo
from clvsmim.objectives import Objective, hybrid, mae, moco_v3, simmim

TINY = {
    "image": (32, 32),
    "patch": 8,
    "width": 48,
    "depth": 3,
    "heads": 3,
    "stem": "patch",
    "position": "none",
    "relative": "none",
    "layer_scale": 0.0,
    "qkv_bias": "qkv",
    "drop_path": 0.0,
    "final_norm": True,
    "prefix": 1,
    "init": "timm",
    "dtype": "float32",
    "remat": False,
    "scan": False,
}
MOCO = TINY | {"position": "moco_sincos", "init": "moco_v3"}
SIMMIM = TINY | {
    "relative": "shared",
    "layer_scale": 0.1,
    "qkv_bias": "qv",
    "init": "simmim",
}
MAE = TINY | {"position": "mae_sincos", "init": "mae"}


def tiny(base: dict = TINY, **fields: object) -> vit.ViT:
    """A 32 px, patch 8, width 48, 3-block, 3-head encoder: the recordings' shape."""
    return vit.make(**(base | fields))


def close(ours: object, theirs: object, scale: float = 0.0, rtol: float = 1e-4) -> None:
    """|a - b| <= rtol max|theirs| + 1e-6 scale: what float32 recordings allow.

    `scale` is the largest value over all tensors of the kind: some tensors are exactly
    zero in real arithmetic, and hold only rounding noise of the others.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    worst = np.abs(ours - theirs).max()
    allowed = rtol * np.abs(theirs).max() + 1e-6 * scale
    assert worst <= allowed, f"{worst} > {allowed}"


COLOUR = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CROP = {"aspect": (3 / 4, 4 / 3), "filter": "bilinear"}
VIEW = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "jitter_p": 0.8,
    "grey_p": 0.2,
    "blur_sigma": (0.1, 2.0),
    "solarize_threshold": 128,
    "flip_p": 0.5,
}


def tiny_moco_v3(encoder: vit.ViT) -> Objective:
    """The recorded MoCo v3: hidden 64, output 32, tau 0.2, m 0.99."""
    return moco_v3.make(
        encoder=encoder,
        crop=CROP | {"area": (0.08, 1.0)},
        view_1=VIEW | {"blur_p": 1.0, "solarize_p": 0.0},
        view_2=VIEW | {"blur_p": 0.1, "solarize_p": 0.2},
        projector=(64, 64, 32),
        predictor=(64, 32),
        tau=0.2,
        momentum=0.99,
        **COLOUR,
    )


def tiny_simmim(encoder: vit.ViT) -> Objective:
    """The recorded SimMIM: cells of 16 px, 60% hidden."""
    return simmim.make(
        encoder=encoder,
        crop=CROP | {"area": (0.67, 1.0)},
        flip_p=0.5,
        mask_unit=16,
        mask_ratio=0.6,
        **COLOUR,
    )


def tiny_mae(encoder: vit.ViT, **changes: Any) -> Objective:
    """The recorded MAE: 75% hidden, a decoder of two blocks of width 32."""
    given = {
        "crop": CROP | {"area": (0.2, 1.0)},
        "flip_p": 0.5,
        "mask_ratio": 0.75,
        "norm_pix": True,
        "decoder": {"width": 32, "depth": 2, "heads": 4},
    }
    return mae.make(encoder=encoder, **given | COLOUR | changes)


def tiny_hybrid(encoder: vit.ViT, lam: float) -> Objective:
    """(1 - lam) SimMIM + lam MoCo v3."""
    mim, cl = tiny_simmim(encoder), tiny_moco_v3(encoder)
    return hybrid.make(encoder=encoder, lam=lam, mim=mim, cl=cl)


def tiny_objectives() -> dict[str, Objective]:
    """One of each method."""
    return {
        "moco_v3": tiny_moco_v3(tiny(MOCO)),
        "simmim": tiny_simmim(tiny(SIMMIM, drop_path=0.1)),
        "hybrid": tiny_hybrid(tiny(SIMMIM, drop_path=0.1), 0.5),
    }


# Everything that `classify` can do, on every block.
LABELS = {
    "name": "classify",
    "classes": 16,
    "tune": "all",
    "blocks": "all",
    "pool": "patches",
    "norm": "batch",
    "head_std": 0.01,
    "rates": (1.0,),
    "crop": {"area": (0.08, 1.0), "aspect": (3 / 4, 4 / 3), "filter": "bicubic"},
    "eval_crop": {"resize": 37, "filter": "bicubic"},
    "flip_p": 0.5,
    "rand_augment": {"ops": 2, "p": 0.5, "magnitude": 9.0, "spread": 0.5},
    "erasing": {"p": 0.25, "area": (0.02, 1 / 3), "aspect": (0.3, 1 / 0.3)},
    "mix": {"mixup": 0.8, "cutmix": 1.0, "switch_p": 0.5},
    "smoothing": 0.1,
    "average": 0.9,
}


def recipe(name: str) -> ConfigDict:
    """configs/demo.py:NAME; for "classify" its encoder and optimizer with labels."""
    if name != "classify":
        return demo.get_config(name)
    config = demo.get_config("simmim")
    config.objective = copy.deepcopy(LABELS)
    return config


HEADS = {"projector": (64, 64, 32), "predictor": (64, 32)}


def small(name: str, **changes: Any) -> ConfigDict:
    """configs/demo.py:NAME for 16-pixel images and a batch of 16, of eight steps.

    Weights are Xavier's and layer scale is 1: with those of the demo, images hardly
    differ behind two narrow blocks, and BatchNorm would normalise rounding.
    """
    config = recipe(name)
    config.epochs, config.batch = 2.0, 16
    config.data.source = {"name": "photos", "length": 64, "side": 24}
    config.encoder.update(image=(16, 16), width=32, depth=2, heads=2)
    config.encoder.update(init="moco_v3", layer_scale=1.0, drop_path=0.3)
    contrastive = config.objective.get("cl", config.objective)
    if contrastive.name == "moco_v3":
        contrastive.update(HEADS)
    config.update_from_flattened_dict(changes)
    return config


def pictures(spec: dict, seed: int = 0) -> dict:
    """A host batch of the shapes in `spec`: images with a colour and a texture each."""
    rng = np.random.default_rng(seed)

    def view(x: jax.ShapeDtypeStruct) -> np.ndarray:
        colour = rng.uniform(0, 200, (x.shape[0], 1, 1, 3))
        return (colour + rng.uniform(0, 55, x.shape)).astype(np.uint8)

    rows = np.arange(spec["index"].shape[0], dtype=np.int32)
    return {"views": tuple(map(view, spec["views"])), "label": rows, "index": rows}
