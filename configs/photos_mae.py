"""MAE (He et al. 2022) on the embedded photographs, as published for ViTs.

    clvsmim train --config=configs/photos_mae.py --workdir=runs/photos_mae

As in the paper and its code: fixed sin-cos positions, 75% of the patches removed, a
decoder of transformer blocks, pixels normalised per patch, AdamW with betas .9 and .95,
no decay on vectors, learning rate 1.5e-4 x batch / 256, warmup over 5% of the run, then
a cosine to 0, no clipping, no drop path. Ours: a ViT-Ti on 64-pixel images in patches
of 8 with a decoder half as wide and a third as deep, batch 256, 100 epochs. There is no
published result on this data; meant for one accelerator.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The whole recipe; every number can be overridden with --config.key=value."""
    config = ConfigDict({"seed": 0, "batch": 256, "epochs": 100.0})
    batch, epochs = config.get_ref("batch"), config.get_ref("epochs")
    config.encoder = dict(
        image=(64, 64),
        patch=8,
        width=192,
        depth=12,
        heads=3,
        stem="patch",
        position="mae_sincos",
        relative="none",
        layer_scale=0.0,
        qkv_bias="qkv",
        drop_path=0.0,
        final_norm=True,
        prefix=1,
        init="mae",
        dtype="bfloat16",
        remat=False,
        scan=False,
    )
    config.input = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.objective = dict(
        name="mae",
        crop=dict(area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), filter="bicubic"),
        flip_p=0.5,
        mask_ratio=0.75,
        norm_pix=True,
        decoder=dict(width=96, depth=4, heads=3),
    )
    config.data = dict(
        source=dict(name="photos", length=16384, side=96),
        workers=2,
        threads=1,
        prefetch=2,
        unreadable=100,
    )
    config.optim = dict(
        name="adamw",
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        no_decay=(r".*/(bias|scale|gamma_[12])",),
        frozen=("encoder/pos_embed",),
        schedule=dict(
            name="cosine",
            base=1.5e-4 * batch / 256,
            minimum=0.0,
            warmup_epochs=epochs * 40 / 800,
        ),
    )
    config.mesh = dict(fsdp=1)
    config.log = dict(every=10, save=640, keep=2, tensorboard=False)
    config.eval = dict(epochs=0.0, images=0)
    config.xray = dict(share=0.01, least=50, images=64)
    config.init = dict(path="", zoo="")
    return config
