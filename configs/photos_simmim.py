"""SimMIM (Xie et al. 2022) on the embedded photographs, as published for ViTs.

    clvsmim train --config=configs/photos_simmim.py --workdir=runs/photos_simmim

As in the paper's code: shared relative position bias and no absolute one, layer scale,
no k bias, drop path 0.1, 60% of the 2 x 2-patch cells hidden, AdamW without decay on
vectors and CLS, learning rate 1e-4 x batch / 512, gradients clipped at 5, x0.1 at 7/8
of the run, the scheduler one step late. Ours: a ViT-Ti on 64-pixel images in patches of
8, batch 256, 100 epochs with warmup and milestone in proportion (10 and 700 of 800).
There is no published result on this data; meant for one accelerator.
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
    config.objective = dict(
        name="simmim",
        crop=dict(area=(0.67, 1.0), aspect=(3 / 4, 4 / 3), filter="bilinear"),
        flip_p=0.5,
        mask_unit=16,
        mask_ratio=0.6,
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
            warmup_epochs=epochs * 10 / 800,
            milestones=(700 / 800,),
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
