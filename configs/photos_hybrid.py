"""The mixture (1 - lam) SimMIM + lam MoCo v3 (Park et al. 2023, section 5) on photos.

    clvsmim train --config=configs/photos_hybrid.py --workdir=runs/photos_hybrid
    clvsmim train --config=... --workdir=... --config.objective.lam=0.6

The authors published the idea, not the recipe. SimMIM's encoder and optimizer serve for
every lam in [0, 1], so that lam alone varies; the CL views are not masked and are other
crops than the MIM view; the CL loss keeps its factor 2 tau and both directions. Ours
too: a ViT-Ti on 64-pixel images in patches of 8, batch 256. There is no published
result on this data; meant for one accelerator.
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
        position="none",
        relative="shared",
        layer_scale=0.1,
        qkv_bias="qv",
        drop_path=0.1,
        final_norm=True,
        prefix=1,
        init="simmim",
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
        name="hybrid",
        lam=0.2,
        mim=dict(
            name="simmim",
            crop=dict(area=(0.67, 1.0), aspect=(3 / 4, 4 / 3), filter="bilinear"),
            flip_p=0.5,
            mask_unit=16,
            mask_ratio=0.6,
        ),
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
        weight_decay=0.05,
        clip=5.0,
        no_decay=(r".*/(bias|scale|gamma_[12])", "encoder/cls_token"),
        schedule=dict(
            name="milestones",
            base=1e-4 * batch / 512,
            start=5e-7 * batch / 512,
            warmup_epochs=epochs * 10 / 100,
            milestones=(7 / 8,),
            factor=0.1,
            lag=1,
        ),
    )
    config.mesh = dict(fsdp=1)
    config.log = dict(every=10, save=640, keep=2, tensorboard=False)
    config.eval = dict(epochs=0.0, images=0)
    config.xray = dict(share=0.01, least=50, images=64)
    config.init = dict(path="", zoo="")
    return config
