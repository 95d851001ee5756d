"""MAE (He et al. 2022) on ImageNet-1k, as published: B/16, L/16 and H/14.

    clvsmim train --config=configs/mae.py:B --workdir=runs/mae_B
    clvsmim train --config=configs/mae.py:L --workdir=runs/mae_L
    clvsmim train --config=configs/mae.py:H --workdir=runs/mae_H
    clvsmim train --config=configs/mae.py:B,1600ep --workdir=runs/mae_B_1600
    clvsmim train --config=configs/mae.py:L,1600ep --workdir=runs/mae_L_1600
    clvsmim train --config=configs/mae.py:H,1600ep --workdir=runs/mae_H_1600

SIZE is the example of the authors' README, 800 epochs; SIZE,1600ep is what the released
weights were trained for. Batch 4096, 75% of the patches removed, a decoder of 8 blocks
512 wide, pixels normalised per patch, AdamW with betas .9 and .95, no decay on vectors
(CLS and mask token are decayed), learning rate 1.5e-4 x batch / 256, 40 epochs of
warmup, cosine to 0, no clipping, no drop path.

Results, linear probe / fine-tuned, % of top-1:
    B, 1600 epochs: 67.8 / 83.6 (MAE's README; 68.0 / 83.6 in the paper);
        66.9 / - (the official PyTorch code, re-run: MultiMAE issue 1)
    L, 1600 epochs: 76.0 / 85.9 (MAE's README; 75.8 / 85.9 in the paper)
    H, 1600 epochs: 77.2 / 86.9 (MAE's README; 76.6 / 86.9 in the paper)
    B, 800 epochs: 65.1 / - (CrossMAE issue 4)
    L, 800 epochs: - / 85.4 (MAE's README)
    H, 800 epochs: none published

Cost, an estimate from the products alone at 40% of the peak of TPU v5e, in chip-hours
(divide by the chips): B 212, L 450, H 1053; twice that for 1600 epochs. With 16 images
a chip, B is bound by memory instead: 272 at the least (docs/tpu.md). B sees a quarter
of the patches, but the host makes whole images: count on its CPUs. Where B does
not fit on few chips, --config.encoder.remat=True, as L and H have it. Parameters,
moments and gradients of H take 10.5 GB; --config.mesh.fsdp=8 splits them.
"""

from ml_collections import ConfigDict

from clvsmim.vit import SIZES

VARIANTS = ("B", "L", "H", "B,1600ep", "L,1600ep", "H,1600ep")


def get_config(variant: str = "B") -> ConfigDict:
    """SIZE or SIZE,1600ep; every number can be overridden with --config.key=value."""
    if variant not in VARIANTS:
        known = list(VARIANTS)
        raise ValueError(f"configs/mae.py:{variant} does not exist; known: {known}")
    size, _, long = variant.partition(",")
    config = ConfigDict({"seed": 0, "batch": 4096, "epochs": 1600.0 if long else 800.0})
    batch = config.get_ref("batch")
    config.encoder = dict(
        image=(224, 224),
        patch=14 if size == "H" else 16,
        **SIZES[size],
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
        remat=size in ("L", "H"),
        scan=False,
    )
    config.input = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.objective = dict(
        name="mae",
        crop=dict(area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), filter="bicubic"),
        flip_p=0.5,
        mask_ratio=0.75,
        norm_pix=True,
        decoder=dict(width=512, depth=8, heads=16),
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
        workers=64,  # the encoder sees a quarter of an image, its host all of it
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
        no_decay=(r".*/(bias|scale)",),
        frozen=("encoder/pos_embed",),
        schedule=dict(
            name="cosine",
            base=1.5e-4 * batch / 256,
            minimum=0.0,
            warmup_epochs=40.0,
        ),
    )
    config.mesh = dict(fsdp=1)
    config.log = dict(every=20, save=312, keep=2, tensorboard=False)
    config.eval = dict(epochs=0.0, images=0)
    config.xray = dict(share=0.01, least=50, images=64)
    config.init = dict(path="", zoo="")
    return config
