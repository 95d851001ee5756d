"""(1 - lam) SimMIM + lam MoCo v3 on ImageNet-1k (Park et al. 2023, section 5).

    clvsmim train --config=configs/hybrid.py:B --workdir=runs/hybrid_B
    clvsmim train --config=configs/hybrid.py:B --workdir=... --config.objective.lam=0.6
    clvsmim train --config=configs/hybrid.py:B,mae --workdir=runs/hybrid_B_mae

The authors published the loss, three views (the CL views are not masked) and a table of
settings (A.1: batch 1024, 100 epochs, AdamW at 1e-4, decay 0.05, warmup 10, a stepped
rate, stochastic depth 0.1, gradients clipped at 5), but no code. So this is ours, made
so that lam alone varies: SimMIM's encoder, all of it trained, and SimMIM's optimizer
for every lam in [0, 1], the step at 7/8 of the run; the CL loss keeps its factor 2 tau
and both directions; the teacher is an average of encoder and projector, without drop
path. At lam 0 and 1 the other branch is not there.

B,mae has MAE in SimMIM's place, which needs an encoder without a relative bias: fixed
sin-cos positions, k bias, no layer scale. Nobody has published that with these settings
(Layer Grafted Pre-training, 2023, finds that MAE and MoCo v3 in one naive sum harm each
other in the deep layers).

Results of B by lam, linear probe / fine-tuned, % of top-1 (Park et al. 2023, Fig. 12a,
read off the plot; epochs not stated there):
    0: 18.2 / 81.90    0.2: 61.6 / 82.29    0.4: 62.3 / 81.95    0.6: 61.9 / 81.62
    1: 58.1 / 81.34

Cost, an estimate from the products alone at 40% of the peak of TPU v5e, in chip-hours
(divide by the chips): 175, with MAE 154. Where it does not fit on few
chips, --config.encoder.remat=True.
"""

from ml_collections import ConfigDict

from clvsmim.vit import SIZES

VARIANTS = ("B", "B,mae")


def get_config(variant: str = "B") -> ConfigDict:
    """SIZE or SIZE,mae; every number can be overridden with --config.key=value."""
    if variant not in VARIANTS:
        known = list(VARIANTS)
        raise ValueError(f"configs/hybrid.py:{variant} does not exist; known: {known}")
    size, _, mae = variant.partition(",")
    config = ConfigDict({"seed": 0, "batch": 1024, "epochs": 100.0})
    batch = config.get_ref("batch")
    config.encoder = dict(
        image=(224, 224),
        patch=16,
        **SIZES[size],
        stem="patch",
        position="mae_sincos" if mae else "none",
        relative="none" if mae else "shared",
        layer_scale=0.0 if mae else 0.1,
        qkv_bias="qkv" if mae else "qv",
        drop_path=0.1,
        final_norm=True,
        prefix=1,
        init="mae" if mae else "simmim",
        dtype="bfloat16",
        remat=False,
        scan=False,
    )
    config.input = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    view = dict(
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        jitter_p=0.8,
        grey_p=0.2,
        blur_sigma=(0.1, 2.0),
        solarize_threshold=128,
        flip_p=0.5,
    )
    simmim = dict(
        name="simmim",
        crop=dict(area=(0.67, 1.0), aspect=(3 / 4, 4 / 3), filter="bilinear"),
        flip_p=0.5,
        mask_unit=32,
        mask_ratio=0.6,
    )
    masked = dict(
        name="mae",
        crop=dict(area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), filter="bicubic"),
        flip_p=0.5,
        mask_ratio=0.75,
        norm_pix=True,
        decoder=dict(width=512, depth=8, heads=16),
    )
    config.objective = dict(
        name="hybrid",
        lam=0.2,
        mim=masked if mae else simmim,
        cl=dict(
            name="moco_v3",
            crop=dict(area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), filter="bilinear"),
            view_1=dict(blur_p=1.0, solarize_p=0.0, **view),
            view_2=dict(blur_p=0.1, solarize_p=0.2, **view),
            projector=(4096, 4096, 256),
            predictor=(4096, 256),
            tau=0.2,
            momentum=0.99,
        ),
    )
    config.data = dict(
        source=dict(
            name="tfds",
            dataset="imagenet2012",
            train="train",
            test="validation",
            lengths=(1281167, 50000),
            classes=1000,
            dir="",
        ),
        workers=32,
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
        no_decay=(r".*/(bias|scale|gamma_[12])", "encoder/cls_token"),
        schedule=dict(
            name="milestones",
            base=1e-4 * batch / 512,
            start=5e-7 * batch / 512,
            warmup_epochs=10.0,
            milestones=(7 / 8,),
            factor=0.1,
            lag=1,
        ),
    )
    if mae:
        config.optim.frozen = ("encoder/pos_embed",)
    config.mesh = dict(fsdp=1)
    config.log = dict(every=20, save=1251, keep=2, tensorboard=False)
    config.eval = dict(epochs=0.0, images=0)
    config.xray = dict(share=0.01, least=50, images=64)
    config.init = dict(path="", zoo="")
    return config
