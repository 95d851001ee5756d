"""CIFAR-10, five methods and two sizes, for one accelerator: a Colab TPU or a GPU.

    clvsmim train --config=configs/cifar10.py:moco_v3 --workdir=runs/moco_v3
    clvsmim train --config=configs/cifar10.py:simmim --workdir=runs/simmim
    clvsmim train --config=configs/cifar10.py:mae --workdir=runs/mae
    clvsmim train --config=configs/cifar10.py:hybrid --workdir=runs/hybrid
    clvsmim train --config=configs/cifar10.py:supervised --workdir=runs/sup
    clvsmim train --config=configs/cifar10.py:moco_v3,S --workdir=runs/moco_v3_S
    clvsmim train --config=configs/cifar10.py:simmim,S --workdir=runs/simmim_S
    clvsmim train --config=configs/cifar10.py:mae,S --workdir=runs/mae_S
    clvsmim train --config=configs/cifar10.py:hybrid,S --workdir=runs/hybrid_S
    clvsmim train --config=configs/cifar10.py:supervised,S --workdir=runs/sup_S

METHOD is a ViT-Ti, METHOD,S a ViT-S with 12 heads. docs/data.md has the two lines that
prepare the data (170 MB).

The rules are the published ones for ImageNet: networks, optimizers, learning rate per
image of the batch, share of the warmup. What the 32 pixels change, ours all of it:
- patches of 4 pixels, 8 x 8 of them: 16 would leave 4 tokens.
- Crops for MoCo v3 and with labels cover at least 20% of the area, not 8%, which are 9
  pixels across.
- Blur in proportion to the image, at most 0.29 pixels: in effect none, as SimCLR does
  on CIFAR. The cells that SimMIM hides are 2 x 2 patches, as at 224 pixels.
- MAE's decoder is half as wide as the encoder and 4 blocks deep, heads of 32.
- Batch 512 and 300 epochs for every method, so that they can be compared.
- Labels: DeiT, without repeated augmentation, which needs more than 50 000 images, and
  without the moving average; the whole image in evaluation.

No published result with these settings.

Cost, an estimate from the products alone at 40% of the peak of one TPU v5e chip, in
minutes for Ti / S: moco_v3 20 / 73, simmim 7 / 27, mae 2 / 9, hybrid 27 / 100,
supervised 7 / 27. Small products reach less, and the images (15 million, one or more
crops each) take an hour or two of a CPU core: expect two to four times as much.
"""

from ml_collections import ConfigDict

from clvsmim.vit import SIZES

METHODS = ("moco_v3", "simmim", "mae", "hybrid", "supervised")
VARIANTS = (*METHODS, *(f"{method},S" for method in METHODS))


def get_config(variant: str = "moco_v3") -> ConfigDict:
    """The run METHOD or METHOD,S; override any number with --config.key=value."""
    if variant not in VARIANTS:
        known = list(VARIANTS)
        raise ValueError(f"configs/cifar10.py:{variant} does not exist; known: {known}")
    method, _, size = variant.partition(",")
    config = ConfigDict({"seed": 0, "batch": 512, "epochs": 300.0})
    config.encoder = encoder(method, size or "Ti", image=32, patch=4)
    config.input = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    config.objective = objective(
        method, config.encoder.width, image=32, patch=4, area=(0.2, 1.0), resize=32
    )
    config.data = dict(
        source=dict(
            name="tfds",
            dataset="cifar10",
            train="train",
            test="test",
            lengths=(50000, 10000),
            classes=10,
            dir="",
        ),
        workers=4,
        threads=1,
        prefetch=2,
        unreadable=100,
    )
    config.optim = optimizer(method, config.get_ref("batch"), config.get_ref("epochs"))
    config.mesh = dict(fsdp=1)
    config.log = dict(every=20, save=970, keep=2, tensorboard=False)  # 10 epochs
    config.eval = dict(epochs=10.0 if method == "supervised" else 0.0, images=0)
    config.xray = dict(share=0.01, least=50, images=64)
    config.init = dict(path="", zoo="")
    return config


def encoder(method: str, size: str, *, image: int, patch: int) -> dict:
    """Each method's own kind of ViT; a hybrid has SimMIM's."""
    relative = method in ("simmim", "hybrid")
    positions = {"moco_v3": "moco_sincos", "mae": "mae_sincos", "supervised": "learned"}
    inits = {"moco_v3": "moco_v3", "mae": "mae", "supervised": "timm"}
    return dict(
        image=(image, image),
        patch=patch,
        **SIZES["S_moco" if size == "S" else size],
        stem="patch",
        position=positions.get(method, "none"),
        relative="shared" if relative else "none",
        layer_scale=0.1 if relative else 0.0,
        qkv_bias="qv" if relative else "qkv",
        drop_path=0.0 if method in ("moco_v3", "mae") else 0.1,
        final_norm=True,
        prefix=1,
        init=inits.get(method, "simmim"),
        dtype="bfloat16",
        remat=False,
        scan=False,
    )


def objective(
    method: str,
    width: int,
    *,
    image: int,
    patch: int,
    area: tuple[float, float],
    resize: int,
) -> dict:
    """The section `objective`.

    Args:
      width: of the encoder, for MAE's decoder.
      area: of the crops of MoCo v3 and with labels.
      resize: of the shorter side before the crop in the middle, for evaluation.
    """
    aspect = (3 / 4, 4 / 3)
    view = dict(
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        jitter_p=0.8,
        grey_p=0.2,
        blur_sigma=(0.1 * image / 224, 2.0 * image / 224),
        solarize_threshold=128,
        flip_p=0.5,
    )
    moco_v3 = dict(
        name="moco_v3",
        crop=dict(area=area, aspect=aspect, filter="bilinear"),
        view_1=dict(blur_p=1.0, solarize_p=0.0, **view),
        view_2=dict(blur_p=0.1, solarize_p=0.2, **view),
        projector=(4096, 4096, 256),
        predictor=(4096, 256),
        tau=0.2,
        momentum=0.99,
    )
    simmim = dict(
        name="simmim",
        crop=dict(area=(0.67, 1.0), aspect=aspect, filter="bilinear"),
        flip_p=0.5,
        mask_unit=2 * patch,
        mask_ratio=0.6,
    )
    mae = dict(
        name="mae",
        crop=dict(area=(0.2, 1.0), aspect=aspect, filter="bicubic"),
        flip_p=0.5,
        mask_ratio=0.75,
        norm_pix=True,
        decoder=dict(width=width // 2, depth=4, heads=width // 64),
    )
    supervised = dict(
        name="classify",
        classes=10,
        tune="all",
        blocks="last",
        pool="cls",
        norm="none",
        head_std=0.02,
        rates=(1.0,),
        crop=dict(area=area, aspect=aspect, filter="bicubic"),
        eval_crop=dict(resize=resize, filter="bicubic"),
        flip_p=0.5,
        rand_augment=dict(ops=2, p=0.5, magnitude=9.0, spread=0.5),
        erasing=dict(p=0.25, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)),
        mix=dict(mixup=0.8, cutmix=1.0, switch_p=0.5),
        smoothing=0.1,
        average=0.0,
    )
    hybrid = dict(name="hybrid", lam=0.2, mim=simmim, cl=moco_v3)
    found = dict(
        moco_v3=moco_v3, simmim=simmim, mae=mae, hybrid=hybrid, supervised=supervised
    )
    return found[method]


def optimizer(method: str, batch: int, epochs: float) -> dict:
    """The section `optim`: each method's published rule; a hybrid has SimMIM's."""
    adamw = dict(name="adamw", b1=0.9, b2=0.999, eps=1e-8)
    vectors = r".*/(bias|scale|gamma_[12])"
    stepped = adamw | dict(
        weight_decay=0.05,
        clip=5.0,
        no_decay=(vectors, "encoder/cls_token"),
        schedule=dict(
            name="milestones",
            base=1e-4 * batch / 512,
            start=5e-7 * batch / 512,
            # Of 800 epochs in SimMIM, of 100 in the paper's Table A.1.
            warmup_epochs=epochs * 10 / (100 if method == "hybrid" else 800),
            milestones=(700 / 800,),
            factor=0.1,
            lag=1,
        ),
    )
    found = dict(
        moco_v3=adamw
        | dict(
            weight_decay=0.1,
            frozen=("encoder/patch_embed/.*", "encoder/pos_embed"),
            schedule=dict(
                name="cosine",
                base=1.5e-4 * batch / 256,
                minimum=0.0,
                warmup_epochs=epochs * 40 / 300,
            ),
        ),
        simmim=stepped,
        hybrid=stepped,
        mae=adamw
        | dict(
            b2=0.95,
            weight_decay=0.05,
            no_decay=(vectors,),
            frozen=("encoder/pos_embed",),
            schedule=dict(
                name="cosine",
                base=1.5e-4 * batch / 256,
                minimum=0.0,
                warmup_epochs=epochs * 40 / 800,
            ),
        ),
        supervised=adamw
        | dict(
            weight_decay=0.05,
            no_decay=(vectors, "encoder/(cls_token|pos_embed)"),
            schedule=dict(
                name="timm_cosine",
                base=5e-4 * batch / 512,
                start=1e-6,
                minimum=1e-5,
                warmup_epochs=epochs * 5 / 300,
                lag=1,
                per="epoch",
            ),
        ),
    )
    return found[method]
