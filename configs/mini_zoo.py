"""The mini zoo: small encoders that ship with the package, trained on photographs.

    clvsmim train --config=configs/mini_zoo.py:moco_v3    --workdir=runs/mini_moco_v3
    clvsmim train --config=configs/mini_zoo.py:simmim     --workdir=runs/mini_simmim
    clvsmim train --config=configs/mini_zoo.py:mae        --workdir=runs/mini_mae
    clvsmim train --config=configs/mini_zoo.py:hybrid_0.2 --workdir=runs/mini_hybrid_0.2
    clvsmim train --config=configs/mini_zoo.py:hybrid_0.4 --workdir=runs/mini_hybrid_0.4
    clvsmim train --config=configs/mini_zoo.py:hybrid_0.6 --workdir=runs/mini_hybrid_0.6
    clvsmim train --config=configs/mini_zoo.py:supervised --workdir=runs/mini_supervised

`moco_v3,1` is the same with seed 1. All have one encoder (width 64, depth 6, 64 patches
and CLS, fixed sin-cos positions), the same AdamW and schedule, and see the same crops
of the embedded photographs, so that only the objective varies. How the numbers were
chosen, before what was looked at, and what came out stands in docs/mini-zoo.md. Half an
hour each on one CPU core. No published result.
"""

from ml_collections import ConfigDict

STEPS = {
    "moco_v3": 1000,
    "simmim": 3000,
    "mae": 3000,
    "hybrid_0.2": 850,
    "hybrid_0.4": 850,
    "hybrid_0.6": 850,
    "supervised": 3000,
}
VARIANTS = tuple(STEPS)
CROPS = 16384  # that an epoch consists of


def get_config(member: str = "moco_v3") -> ConfigDict:
    """METHOD or METHOD,SEED."""
    method, _, seed = member.partition(",")
    if method not in STEPS:
        raise ValueError(
            f"configs/mini_zoo.py:{method} does not exist; known: {list(STEPS)}"
        )
    if seed and not seed.isdecimal():
        raise ValueError(
            f"configs/mini_zoo.py:{member}: expected a seed after the comma"
        )
    config = ConfigDict({"seed": int(seed or 0), "batch": 128})
    config.epochs = STEPS[method] * config.batch / CROPS
    config.encoder = dict(
        image=(32, 32),
        patch=4,
        width=64,
        depth=6,
        heads=4,
        stem="patch",
        position="mae_sincos",
        relative="none",
        layer_scale=0.0,
        qkv_bias="qkv",
        drop_path=0.0,
        final_norm=True,
        prefix=1,
        init="mae",
        dtype="float32",
        remat=False,
        scan=False,
    )
    config.input = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    name, _, lam = method.partition("_0.")
    if lam:
        mixed = dict(mim=simmim(), cl=moco_v3())
        config.objective = dict(name="hybrid", lam=float(f"0.{lam}"), **mixed)
    else:
        methods = dict(moco_v3=moco_v3, simmim=simmim, mae=mae, supervised=labels)
        config.objective = methods[name]()
    config.data = dict(
        source=dict(name="photos", length=CROPS, side=48, selection=False),
        workers=0,
        threads=1,
        prefetch=2,
        unreadable=100,
    )
    config.optim = dict(
        name="adamw",
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,
        clip=5.0,
        no_decay=(r".*/(bias|scale)", "encoder/cls_token"),
        frozen=("encoder/pos_embed",),
        schedule=dict(
            name="cosine",
            base=3e-3,  # chosen on selection images
            minimum=0.0,
            warmup_epochs=config.epochs / 20,
        ),
    )
    config.mesh = dict(fsdp=1)
    config.log = dict(every=10, save=100, keep=2, tensorboard=False)
    config.eval = dict(epochs=0.0, images=0)
    config.xray = dict(share=0.02, least=50, images=64)
    config.init = dict(path="", zoo="")
    return config


def moco_v3() -> dict:
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


def simmim() -> dict:
    """SimMIM with cells of 2 x 2 patches, as 32 pixels are at 224."""
    return dict(
        name="simmim",
        crop=dict(area=(0.67, 1.0), aspect=(3 / 4, 4 / 3), filter="bilinear"),
        flip_p=0.5,
        mask_unit=8,
        mask_ratio=0.6,
    )


def mae() -> dict:
    """MAE with a decoder half as wide, two thirds as deep as the encoder."""
    return dict(
        name="mae",
        crop=dict(area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), filter="bicubic"),
        flip_p=0.5,
        mask_ratio=0.75,
        norm_pix=True,
        decoder=dict(width=32, depth=4, heads=2),
    )


def labels() -> dict:
    """Sixteen scenes as classes, with crops and flips, no mixing."""
    return dict(
        name="classify",
        classes=16,
        tune="all",
        blocks="last",
        pool="patches",
        norm="layer",
        head_std=0.01,
        rates=(1.0,),
        crop=dict(area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), filter="bilinear"),
        eval_crop=dict(resize=37, filter="bilinear"),
        flip_p=0.5,
        rand_augment=None,
        erasing=None,
        mix=None,
        smoothing=0.1,
        average=0.0,
    )
