"""DeiT (Touvron et al. 2021): supervised from scratch on ImageNet-1k, as published.

    clvsmim train --config=configs/deit.py:S --workdir=runs/deit_s
    clvsmim train --config=configs/deit.py:B --workdir=runs/deit_b
    clvsmim train --config=configs/deit.py:Ti --workdir=runs/deit_ti

AdamW at 5e-4 per 512 images, batch 1024, 300 epochs, warmup 5, cosine changed once per
epoch; RandAugment, mixup and CutMix, erasing, label smoothing, drop path 0.1, each
image three times in a row. Published top-1: Ti 72.2, S 79.8, B 81.8 (the paper's Table
5). A moving average of the parameters is evaluated beside them, "average/top1"; it is
not the published number.

Cost of 300 epochs, counted: Ti 3, S 11, B 40 x 10^18 FLOP, which is 1, 3 and 11 hours
at 10^15 FLOP/s (eight A100 at 40% of their peak) if the data keep up.
"""

from ml_collections import ConfigDict

from clvsmim import optim
from clvsmim.configs import finetune, linear_probe
from clvsmim.vit import SIZES

VARIANTS = ("S", "B", "Ti")


def get_config(size: str = "S") -> ConfigDict:
    """The size: S, B or Ti."""
    if size not in VARIANTS:
        raise ValueError(
            f"configs/deit.py:{size} does not exist; known: {list(VARIANTS)}"
        )
    config = ConfigDict({"seed": 0, "batch": 1024, "epochs": 300.0})
    batch, epochs = config.get_ref("batch"), config.get_ref("epochs")
    config.encoder = linear_probe.ENCODER | SIZES[size]
    config.encoder.update(position="learned", drop_path=0.1)
    config.input = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.objective = dict(
        name="classify",
        classes=linear_probe.IMAGENET["classes"],
        tune="all",
        blocks="last",
        pool="cls",
        norm="none",
        head_std=0.02,
        rates=(1.0,),
        average=0.99996,
        **finetune.augmentation(side=224),
    )
    config.data = dict(
        source=dict(linear_probe.IMAGENET),
        workers=8,
        threads=1,
        prefetch=4,
        unreadable=100,
        repeats=3,
    )
    config.optim = dict(
        name="adamw",
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,
        no_decay=(optim.VECTORS, "encoder/cls_token", "encoder/pos_embed"),
        schedule=finetune.deit_schedule(batch, epochs * 5 / 300),
    )
    config.mesh = dict(fsdp=1)
    config.log = dict(every=10, save=500, keep=2, tensorboard=False)
    config.eval = dict(epochs=10.0, images=0)
    config.xray = dict(share=0.01, least=50, images=64)
    config.init = dict(path="", zoo="")
    return config
