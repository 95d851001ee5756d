"""Imagenette (ten easy classes of ImageNet), five methods and two sizes, for one
accelerator: a Colab TPU or a GPU.

    clvsmim train --config=configs/imagenette.py:moco_v3 --workdir=runs/moco_v3
    clvsmim train --config=configs/imagenette.py:simmim --workdir=runs/simmim
    clvsmim train --config=configs/imagenette.py:mae --workdir=runs/mae
    clvsmim train --config=configs/imagenette.py:hybrid --workdir=runs/hybrid
    clvsmim train --config=configs/imagenette.py:supervised --workdir=runs/sup
    clvsmim train --config=configs/imagenette.py:moco_v3,S --workdir=runs/moco_v3_S
    clvsmim train --config=configs/imagenette.py:simmim,S --workdir=runs/simmim_S
    clvsmim train --config=configs/imagenette.py:mae,S --workdir=runs/mae_S
    clvsmim train --config=configs/imagenette.py:hybrid,S --workdir=runs/hybrid_S
    clvsmim train --config=configs/imagenette.py:supervised,S --workdir=runs/sup_S

METHOD is a ViT-Ti, METHOD,S a ViT-S with 12 heads. docs/data.md has the two lines that
prepare the data (330 MB).

The rules are the published ones for ImageNet, written out in cifar10.py: networks,
optimizers, learning rate per image of the batch, share of the warmup. What differs from
ImageNet's, ours all of it:
- Crops of 160 pixels, half of the files' 320, in 10 x 10 patches of 16. Patches are
  those of ImageNet, so attention distances in pixels can be compared.
- Blur in proportion to the image, at most 1.4 pixels. SimMIM hides 15 of 25 cells of 32
  pixels. Areas of the crops are the published ones.
- Evaluation cuts 160 from a shorter side of 183, as 224 from 256.
- MAE's decoder is half as wide as the encoder and 4 blocks deep, heads of 32.
- Batch 256 (36 steps an epoch) and 300 epochs for every method: 9469 images are few, so
  that the learning rate is small and long runs pay: --config.epochs=1000.
- Labels: DeiT, without repeated augmentation, which needs more images than these.

No published result with these settings.

Cost, an estimate from the products alone at 40% of the peak of one TPU v5e chip, in
minutes for Ti / S: moco_v3 6 / 22, simmim 2 / 8, mae 1 / 3, hybrid 8 / 30, supervised
2 / 8. Decoding costs more: 2.8 million JPEGs and their crops take four to eight hours
of a CPU core, so two to four hours on a Colab machine with two.
"""

from ml_collections import ConfigDict

from clvsmim.configs import cifar10

VARIANTS = cifar10.VARIANTS


def get_config(variant: str = "moco_v3") -> ConfigDict:
    """The run METHOD or METHOD,S; override any number with --config.key=value."""
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/imagenette.py:{variant} does not exist; known: {list(VARIANTS)}"
        )
    method, _, size = variant.partition(",")
    config = ConfigDict({"seed": 0, "batch": 256, "epochs": 300.0})
    config.encoder = cifar10.encoder(method, size or "Ti", image=160, patch=16)
    config.input = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.objective = cifar10.objective(
        method, config.encoder.width, image=160, patch=16, area=(0.08, 1.0), resize=183
    )
    config.data = dict(
        source=dict(
            name="tfds",
            dataset="imagenette/320px-v2",
            train="train",
            test="validation",
            lengths=(9469, 3925),
            classes=10,
            dir="",
        ),
        workers=4,
        threads=1,
        prefetch=2,
        unreadable=100,
    )
    config.optim = cifar10.optimizer(
        method, config.get_ref("batch"), config.get_ref("epochs")
    )
    config.mesh = dict(fsdp=1)
    config.log = dict(every=20, save=360, keep=2, tensorboard=False)  # 10 epochs
    config.eval = dict(epochs=10.0 if method == "supervised" else 0.0, images=0)
    config.xray = dict(share=0.01, least=50, images=64)
    config.init = dict(path="", zoo="")
    return config
