"""An encoder without an objective, as files hold it: measured, never trained as it is.

Probes, fine-tuning and pre-training start from one and have objectives of their own.
"""

from functools import partial

import jax

from clvsmim.data.crops import CenterCrop
from clvsmim.objectives import Objective, Tree, init_encoder
from clvsmim.views import normalise
from clvsmim.vit import ViT

NAME = "encoder"


def make(
    *,
    encoder: ViT,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    family: str,
    labels: bool,
) -> Objective:
    """The record that analyses need; its loss is an error.

    Args:
      mean, std: of the input, per channel, of pixels in [0, 1].
      family: the module of `formats` that its file was read by, for legends.
      labels: whether it learned labels (a fine-tuned file).
    """
    del family, labels
    size = encoder.spec.image
    view = CenterCrop(name=f"{NAME}/1", size=size, resize=max(size), filter="bilinear")
    return Objective(
        name=NAME,
        encoder=encoder,
        views=(view,),
        prepare=partial(prepare, tuple(mean), tuple(std)),
        init=partial(init, encoder),
        loss=loss,
        after=lambda params, extra, progress: extra,
    )


def prepare(
    mean: tuple, std: tuple, key: jax.Array, batch: dict, *, train: bool
) -> dict:
    """{"image": (B, rows, columns, 3) normalised}."""
    del key, train
    (images,) = batch["views"]
    return {"image": jax.vmap(lambda x: normalise(x, mean, std))(images)}


def init(
    encoder: ViT, key: jax.Array, inputs: dict, given: Tree = None
) -> tuple[Tree, Tree]:
    """The encoder alone."""
    variables = init_encoder(encoder, key, inputs["image"], given)
    return (
        {"encoder": variables["params"], "heads": {}},
        {"encoder": variables["stats"], "heads": {}},
    )


def loss(
    params: Tree,
    extra: Tree,
    inputs: dict,
    key: jax.Array,
    *,
    progress: jax.Array,
    train: bool,
) -> tuple:
    """There is none.

    Raises:
      ValueError: always.
    """
    raise ValueError(
        "objective.name='encoder' is a network from a file, which has no loss; train "
        "it by another config that starts from it: configs/finetune.py:mae,FILE, "
        "configs/linear_probe.py:paper,FILE, or --config.init.path=FILE"
    )
