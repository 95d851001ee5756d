"""The three small runs of `clvsmim demo`: same encoder, same data, another objective.

    clvsmim train --config=configs/demo.py:moco_v3 --workdir=runs/moco_v3
    clvsmim train --config=configs/demo.py:simmim  --workdir=runs/simmim
    clvsmim train --config=configs/demo.py:hybrid  --workdir=runs/hybrid

About a minute each on two CPU cores. Encoder, optimizer and schedule are the same for
all three, so that only the objective varies: SimMIM's kind of encoder and AdamW groups,
shrunk to 32-pixel images, and a learning rate high enough to see something in a minute.
No published result: it exists to be watched. A fourth run, demo.py:mae, is not part of
the demo: MAE needs absolute positions in place of the relative bias.
"""

from ml_collections import ConfigDict

# About a minute each.
STEPS = {"moco_v3": 75, "simmim": 180, "hybrid": 50, "mae": 180}


def get_config(name: str = "hybrid") -> ConfigDict:
    """The run `name`: moco_v3, simmim, hybrid or mae."""
    if name not in STEPS:
        raise ValueError(f"configs/demo.py:{name} does not exist; known: {list(STEPS)}")
    config = ConfigDict({"seed": 0, "batch": 128})
    config.encoder = dict(
        image=(32, 32),
        patch=4,
        width=96,
        depth=6,
        heads=3,
        stem="patch",
        position="none",
        relative="shared",
        layer_scale=0.1,
        qkv_bias="qv",
        drop_path=0.1,
        final_norm=True,
        prefix=1,
        init="simmim",
        dtype="float32",
        remat=False,
        scan=False,
    )
    config.input = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    moco_v3, simmim = contrastive(), masked()
    hybrid = dict(name="hybrid", lam=0.2, mim=simmim, cl=moco_v3)
    methods = (moco_v3, simmim, hybrid, autoencoded())
    config.objective = next(m for m in methods if m["name"] == name)
    config.data = dict(
        source=dict(name="photos", length=4096, side=48),
        workers=0,
        threads=1,
        prefetch=2,
        unreadable=100,
    )
    config.epochs = STEPS[name] / 32  # 4096 / 128 steps an epoch
    config.optim = dict(
        name="adamw",
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,
        clip=5.0,
        no_decay=(r".*/(bias|scale|gamma_[12])", "encoder/cls_token"),
        schedule=dict(name="cosine", base=2e-3, minimum=0.0, warmup_epochs=0.3),
    )
    if name == "mae":
        config.encoder.update(position="mae_sincos", relative="none")
        config.optim.frozen = ("encoder/pos_embed",)
    config.mesh = dict(fsdp=1)
    config.log = dict(every=5, save=30, keep=2, tensorboard=False)
    config.eval = dict(epochs=0.0, images=0)
    config.xray = dict(share=0.01, least=50, images=64)
    config.init = dict(path="", zoo="")
    return config


def contrastive() -> dict:
    """MoCo v3 with narrow heads, a larger smallest crop and blur to scale."""
    view = dict(
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        jitter_p=0.8,
        grey_p=0.2,
        blur_sigma=(0.1, 0.6),
        solarize_threshold=128,
        flip_p=0.5,
    )
    return dict(
        name="moco_v3",
        crop=dict(area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), filter="bilinear"),
        view_1=dict(blur_p=1.0, solarize_p=0.0, **view),
        view_2=dict(blur_p=0.1, solarize_p=0.2, **view),
        projector=(256, 256, 64),
        predictor=(256, 64),
        tau=0.2,
        momentum=0.99,
    )


def masked() -> dict:
    """SimMIM with cells of 2 x 2 patches, as 32 pixels are at 224."""
    return dict(
        name="simmim",
        crop=dict(area=(0.67, 1.0), aspect=(3 / 4, 4 / 3), filter="bilinear"),
        flip_p=0.5,
        mask_unit=8,
        mask_ratio=0.6,
    )


def autoencoded() -> dict:
    """MAE with a decoder half as wide, two thirds as deep as the encoder."""
    return dict(
        name="mae",
        crop=dict(area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), filter="bicubic"),
        flip_p=0.5,
        mask_ratio=0.75,
        norm_pix=True,
        decoder=dict(width=48, depth=4, heads=3),
    )
