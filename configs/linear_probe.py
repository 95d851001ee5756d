"""Linear probes: how well a frozen encoder separates the classes, block by block.

    clvsmim train --config=configs/linear_probe.py:paper,runs/mim --workdir=runs/probe

probes the run in runs/mim on its own data and image size. A checkpoint file of another
library stands there too (docs/checkpoints.md); a third part is a folder of images with
train/ and val/, instead of the run's data (a file has ImageNet's without it):

    clvsmim train --config=configs/linear_probe.py:mae,FILE,DIR --workdir=runs/probe

Without a run it is a
ViT-B/16 on ImageNet-1k, whose weights --config.init.path=... names; without these the
encoder is an untrained one, and the first line says so:

    clvsmim train --config=configs/linear_probe.py:paper --workdir=runs/paper
    clvsmim train --config=configs/linear_probe.py:moco_v3 --workdir=runs/moco_v3
    clvsmim train --config=configs/linear_probe.py:mae --workdir=runs/mae
    clvsmim train --config=configs/linear_probe.py:simmim --workdir=runs/simmim

Protocols:
- paper: Park et al. 2023, Table A.1: SGD, base learning rate 1.0, batch 1024, 50
  epochs, cosine, no warmup. Not stated there, and chosen here: base is per 512 images,
  as in SimMIM; momentum 0.9; crops and flips; mean of the patches, and BatchNorm
  without affine part, because the scale of features varies over the blocks; every
  block at five learning rates in one run; weight decay 0 (Table A.1 has 0.05:
  --config.optim.weight_decay=0.05). The CLS token: --config.objective.pool=cls.
- moco_v3: CLS after the final norm, no BatchNorm, SGD at 3 per 256 images, 90 epochs,
  cosine per epoch. Published for ViT-B, 300 epochs: 76.7 (its README).
- mae: CLS after the final norm, BatchNorm, LARS at 0.1 per 256 images, batch 16384, 90
  epochs. Published for ViT-B, 1600 epochs: 68.0 (paper), 67.8 (its README).
- simmim: the paper's optimizer on block 8 of 12 alone, mean of the patches. Published
  for ViT-B: 56.7 (Table 6 of SimMIM; block and pooling by its authors, issue 14).

Cost: about a forward pass per image. ViT-B on ImageNet-1k, counted: 35 GFLOP each, 2 to
4 x 10^18 in all, an hour at 10^15 FLOP/s (eight A100 at 40% of their peak) if the data
keep up. The heads of one run share its forward passes.
"""

from ml_collections import ConfigDict

from clvsmim import build, transfer
from clvsmim.data import folder

IMAGENET = dict(
    name="tfds",
    dataset="imagenet2012",
    train="train",
    test="validation",
    lengths=(1281167, 50000),
    classes=1000,
    dir="",
)
ENCODER = dict(
    image=(224, 224),
    patch=16,
    width=768,
    depth=12,
    heads=12,
    stem="patch",
    position="none",
    relative="none",
    layer_scale=0.0,
    qkv_bias="qkv",
    drop_path=0.0,
    final_norm=True,
    prefix=1,
    init="timm",
    dtype="bfloat16",
    remat=False,
    scan=False,
)
SIMMIM = dict(relative="shared", layer_scale=0.1, qkv_bias="qv", init="simmim")
OF = dict(  # whose encoder it is, where no run says so
    paper=SIMMIM,
    moco_v3=dict(position="moco_sincos", init="moco_v3"),
    mae=dict(position="mae_sincos", init="mae"),
    simmim=SIMMIM,
)
VARIANTS = tuple(OF)


def get_config(what: str = "paper") -> ConfigDict:
    """PROTOCOL, PROTOCOL,RUN or PROTOCOL,RUN,DIR; RUN is a workdir or a file."""
    protocol, _, run = what.partition(",")
    if protocol not in OF:
        raise ValueError(
            f"configs/linear_probe.py:{protocol} does not exist; known: {list(OF)}"
        )
    mae = protocol == "mae"
    config = ConfigDict({"seed": 0})
    config.batch = 16384 if mae else 1024
    config.epochs = 90.0 if protocol in ("moco_v3", "mae") else 50.0
    start_from(config, run, ENCODER | OF[protocol])
    config.encoder.update(drop_path=0.0, remat=False, scan=False)  # it is frozen
    if protocol == "paper":  # a BatchNorm magnifies what bfloat16 rounds off
        config.encoder.dtype = "float32"
    side, depth = max(config.encoder.image), config.encoder.get_ref("depth")
    whole = protocol in ("moco_v3", "mae")  # the encoder with its final norm
    filter = "bicubic" if mae else "bilinear"
    crop = dict(area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), filter=filter)
    config.objective = dict(
        name="classify",
        classes=classes(config),
        tune="head",
        blocks="last"
        if whole
        else "all"
        if protocol == "paper"
        else (2 * depth + 2) // 3,
        pool="cls" if whole else "patches",
        norm="none" if protocol == "moco_v3" else "batch",
        head_std=0.01,
        rates=(1.0,) if whole else (0.1, 0.3, 1.0, 3.0, 10.0),
        crop=crop | dict(once=True) if mae else crop,
        eval_crop=dict(resize=round(side / 0.875), filter=filter),
        flip_p=0.5,
        rand_augment=None,
        erasing=None,
        mix=None,
        smoothing=0.0,
        average=0.0,
    )
    config.optim = optimizer(
        protocol, config.get_ref("batch"), config.get_ref("epochs")
    )
    config.mesh = dict(fsdp=1)
    config.log = dict(every=10, save=500, keep=2, tensorboard=False)
    config.eval = dict(epochs=10.0, images=0)
    config.xray = dict(share=0.0, least=50, images=64)  # the encoder does not change
    return config


def optimizer(protocol: str, batch: int, epochs: float) -> dict:
    """Whose rule and learning rate."""
    if protocol == "mae":
        return dict(
            name="lars",
            momentum=0.9,
            trust_coefficient=1e-3,
            weight_decay=0.0,
            no_trust=(r".*/bias",),
            schedule=dict(
                name="cosine",
                base=0.1 * batch / 256,
                minimum=0.0,
                warmup_epochs=epochs * 10 / 90,
            ),
        )
    moco_v3 = protocol == "moco_v3"
    return dict(
        name="sgd",
        momentum=0.9,
        weight_decay=0.0,
        schedule=dict(
            name="cosine",
            base=3 * batch / 256 if moco_v3 else 1.0 * batch / 512,
            minimum=0.0,
            warmup_epochs=0.0,
            per="epoch" if moco_v3 else "step",
        ),
    )


def start_from(config: ConfigDict, what: str, encoder: dict) -> None:
    """Encoder, input, data and init of "RUN" or "RUN,DIR", or of ImageNet without."""
    run, _, images = what.partition(",")
    config.encoder = dict(encoder)
    config.input = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.data = dict(
        source=dict(IMAGENET), workers=8, threads=1, prefetch=4, unreadable=100
    )
    if run:
        saved = transfer.settings_of(run)
        config.encoder, config.input = saved["encoder"], saved["input"]
        if "data" in saved:
            config.data = {k: v for k, v in saved["data"].items() if k != "repeats"}
    if images:
        config.data.source = folder.section(images)
        if not config.data.source.train:
            raise ValueError(f"{images} has no folders train and val (of classes)")
    config.init = dict(path=run, zoo="")


def classes(config: ConfigDict) -> int:
    """Of the data, as its source counts them."""
    return build.make_source(build.plain(config)["data"], "train").num_classes
