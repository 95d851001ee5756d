"""MoCo v3 (Chen et al. 2021) on the embedded photographs, as published for ViTs.

    clvsmim train --config=configs/photos_moco_v3.py --workdir=runs/photos_moco_v3

As in the paper and its code: fixed sin-cos positions, patch projection frozen at
random, heads, views, AdamW with decay on every trainable tensor, learning rate
1.5e-4 x batch / 256, cosine. Ours: a ViT-Ti on 64-pixel images in patches of 8, blur
in proportion to the image, batch 256, 100 epochs with the warmup in proportion (40 of
300). There is no published result on this data; meant for one accelerator.
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
        position="moco_sincos",
        relative="none",
        layer_scale=0.0,
        qkv_bias="qkv",
        drop_path=0.0,
        final_norm=True,
        prefix=1,
        init="moco_v3",
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
        blur_sigma=(0.1 * 64 / 224, 2.0 * 64 / 224),
        solarize_threshold=128,
        flip_p=0.5,
    )
    config.objective = dict(
        name="moco_v3",
        crop=dict(area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), filter="bilinear"),
        view_1=dict(blur_p=1.0, solarize_p=0.0, **view),
        view_2=dict(blur_p=0.1, solarize_p=0.2, **view),
        projector=(4096, 4096, 256),
        predictor=(4096, 256),
        tau=0.2,
        momentum=0.99,
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
        b2=0.999,
        eps=1e-8,
        weight_decay=0.1,
        frozen=("encoder/patch_embed/.*", "encoder/pos_embed"),
        schedule=dict(
            name="cosine",
            base=1.5e-4 * batch / 256,
            minimum=0.0,
            warmup_epochs=epochs * 40 / 300,
        ),
    )
    config.mesh = dict(fsdp=1)
    config.log = dict(every=10, save=640, keep=2, tensorboard=False)
    config.eval = dict(epochs=0.0, images=0)
    config.xray = dict(share=0.01, least=50, images=64)
    config.init = dict(path="", zoo="")
    return config
