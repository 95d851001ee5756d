"""Fine-tuning: all of a trained encoder learns the classes, with a new head.

    clvsmim train --config=configs/finetune.py:simmim,runs/mim --workdir=runs/tuned

fine-tunes the run in runs/mim on its own data and image size. A checkpoint file of
another library stands there too; a third part is a folder of images with train/ and
val/, instead of the run's data (a file has ImageNet's without it):

    clvsmim train --config=configs/finetune.py:mae,FILE,DIR --workdir=runs/tuned

Without a run it is a
ViT-B/16 on ImageNet-1k, whose weights --config.init.path=... names (without these it
starts from scratch, with the initial weights of pre-training):

    clvsmim train --config=configs/finetune.py:simmim --workdir=runs/simmim
    clvsmim train --config=configs/finetune.py:mae --workdir=runs/mae
    clvsmim train --config=configs/finetune.py:deit --workdir=runs/deit

Protocols:
- simmim: SimMIM's, which Park et al. 2023 use for every method (Table A.1). Bias tables
  per block, the final norm replaced by the mean of the patches and a new LayerNorm,
  AdamW at 1.25e-3 per 512 images, batch 2048, 100 epochs, layer decay 0.65, clipped at
  5. Published for ViT-B, 800 epochs: 83.8 (SimMIM's README).
- mae: by size, for ViT-B / L / H: 5e-4 / 1e-3 / 1e-3 per 256 images, batch 1024, 100 /
  50 / 50 epochs, layer decay 0.65 / 0.75 / 0.75, drop path 0.1 / 0.2 / 0.3. Published:
  83.6 / 85.9 / 86.9 (its README).
- deit: MoCo v3's, which is DeiT's recipe for 150 epochs without layer decay and without
  repeated augmentation; CLS after the final norm. Published for ViT-B, 300 epochs: 83.2
  (MoCo v3's README).

A batch is mixed with one lambda over all devices; the originals draw one per device.
Cost, counted: ViT-B 105 GFLOP an image and step, 13 x 10^18 for 100 epochs of
ImageNet-1k, 4 hours at 10^15 FLOP/s (eight A100 at 40% of their peak) if the data keep
up.
"""

from ml_collections import ConfigDict

from clvsmim import optim
from clvsmim.configs import linear_probe

VARIANTS = ("simmim", "mae", "deit")
OF = dict(  # whose encoder it is, where no run says so
    simmim=linear_probe.OF["simmim"],
    mae=linear_probe.OF["mae"],
    deit=linear_probe.OF["moco_v3"],
)
# Of MAE, by the smallest width that it is for.
SIZES = {
    1280: dict(base=1e-3, epochs=50.0, layer_decay=0.75, drop_path=0.3),
    1024: dict(base=1e-3, epochs=50.0, layer_decay=0.75, drop_path=0.2),
    0: dict(base=5e-4, epochs=100.0, layer_decay=0.65, drop_path=0.1),
}


def get_config(what: str = "simmim") -> ConfigDict:
    """PROTOCOL, PROTOCOL,RUN or PROTOCOL,RUN,DIR; RUN is a workdir or a file."""
    protocol, _, run = what.partition(",")
    if protocol not in OF:
        raise ValueError(
            f"configs/finetune.py:{protocol} does not exist; known: {list(OF)}"
        )
    config = ConfigDict({"seed": 0, "batch": 2048 if protocol == "simmim" else 1024})
    linear_probe.start_from(config, run, linear_probe.ENCODER | OF[protocol])
    size = next(row for width, row in SIZES.items() if config.encoder.width >= width)
    config.epochs = dict(simmim=100.0, mae=size["epochs"], deit=150.0)[protocol]
    config.encoder.drop_path = size["drop_path"] if protocol == "mae" else 0.1
    config.encoder.final_norm = protocol == "deit"
    if config.encoder.relative == "shared":
        config.encoder.relative = "per_block"
    side = max(config.encoder.image)
    config.objective = dict(
        name="classify",
        classes=linear_probe.classes(config),
        tune="all",
        blocks="last",
        pool="cls" if protocol == "deit" else "patches",
        norm="none" if protocol == "deit" else "layer",
        head_std=dict(simmim=0.02 * 0.001, mae=2e-5, deit=0.02)[protocol],
        rates=(1.0,),
        average=0.0,
        **augmentation(side),
    )
    if protocol == "mae" and side > 224:  # the whole image, as in MAE
        config.objective.eval_crop.resize = side
    batch, epochs = config.get_ref("batch"), config.get_ref("epochs")
    config.optim = dict(
        name="adamw",
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,
        no_decay=no_decay(config.encoder),
        **rule(protocol, batch, epochs, size),
    )
    config.mesh = dict(fsdp=1)
    config.log = dict(every=10, save=500, keep=2, tensorboard=False)
    config.eval = dict(epochs=10.0, images=0)
    config.xray = dict(share=0.01, least=50, images=64)
    return config


def augmentation(side: int) -> dict:
    """What DeiT, SimMIM and MAE do to an image of `side` pixels and its label."""
    return dict(
        crop=dict(area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), filter="bicubic"),
        eval_crop=dict(resize=round(side / 0.875), filter="bicubic"),
        flip_p=0.5,
        rand_augment=dict(ops=2, p=0.5, magnitude=9.0, spread=0.5),
        erasing=dict(p=0.25, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)),
        mix=dict(mixup=0.8, cutmix=1.0, switch_p=0.5),
        smoothing=0.1,
    )


def no_decay(encoder: ConfigDict) -> tuple[str, ...]:
    """Vectors, CLS token and positions, where the encoder has them."""
    own = ["encoder/cls_token"] if encoder.prefix else []
    own += ["encoder/pos_embed"] if encoder.position != "none" else []
    return (optim.VECTORS, *own)


def rule(protocol: str, batch: int, epochs: float, size: dict) -> dict:
    """Layer decay, clipping and schedule."""
    if protocol == "mae":
        schedule = dict(
            name="cosine",
            base=size["base"] * batch / 256,
            minimum=1e-6,
            warmup_epochs=epochs * 5 / size["epochs"],
        )
        return dict(layer_decay=size["layer_decay"], schedule=schedule)
    if protocol == "deit":
        return dict(schedule=deit_schedule(batch, epochs * 5 / 150))
    schedule = dict(
        name="timm_cosine",
        base=1.25e-3 * batch / 512,
        start=2.5e-7 * batch / 512,
        minimum=2.5e-7 * batch / 512,
        warmup_epochs=epochs * 20 / 100,
        lag=1,
        per="step",
    )
    return dict(clip=5.0, layer_decay=0.65, schedule=schedule)


def deit_schedule(batch: int, warmup_epochs: float) -> dict:
    """Changed once per epoch, one epoch late; start and minimum are absolute."""
    return dict(
        name="timm_cosine",
        base=5e-4 * batch / 512,
        start=1e-6,
        minimum=1e-5,
        warmup_epochs=warmup_epochs,
        lag=1,
        per="epoch",
    )
