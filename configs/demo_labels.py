"""Labels on the demo's images: a probe and a fine-tuning of a run, or from scratch.

    clvsmim train --config=configs/demo_labels.py:probe,runs/cl --workdir=runs/probed
    clvsmim train --config=configs/demo_labels.py:finetune,runs/cl --workdir=runs/tuned

Without a run (`:probe`, `:finetune`) the encoder is the demo's, untrained: what the
labels alone teach.

    clvsmim train --config=configs/demo_labels.py:probe --workdir=runs/untrained
    clvsmim train --config=configs/demo_labels.py:finetune --workdir=runs/scratch

256 labelled crops, sixteen of each photograph, and 15 epochs, a quarter of a minute on
two CPU cores; evaluated on 1024 crops of the parts that are never trained on. No
published result: it exists to see whether pre-training helps where labels are few
(benchmarks/labels.py).
"""

from ml_collections import ConfigDict

from clvsmim.configs import demo, linear_probe

VARIANTS = ("probe", "finetune")
LABELS, HELD_OUT = 256, 1024  # crops


def get_config(what: str = "probe") -> ConfigDict:
    """STAGE or STAGE,RUN; RUN is a workdir of `clvsmim train`."""
    stage, _, run = what.partition(",")
    if stage not in VARIANTS:
        raise ValueError(
            f"configs/demo_labels.py:{stage} does not exist; known: {list(VARIANTS)}"
        )
    probe, plain = stage == "probe", demo.get_config("moco_v3")
    config = ConfigDict({"seed": 0, "batch": 64, "epochs": 15.0})
    linear_probe.start_from(config, run, plain.encoder.to_dict())
    if not run:
        config.input, config.data = plain.input, plain.data
    if "length" in config.data.source:  # made here, as many as one asks for
        config.data.source.update(length=LABELS, test_length=HELD_OUT)
    config.encoder.drop_path = 0.0 if probe else 0.1
    config.encoder.final_norm = probe
    side = max(config.encoder.image)
    config.objective = dict(
        name="classify",
        classes=linear_probe.classes(config),
        tune="head" if probe else "all",
        blocks=config.encoder.depth if probe else "last",
        pool="patches",
        norm="batch" if probe else "layer",
        head_std=0.01,
        rates=(1.0,),
        crop=dict(area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), filter="bilinear"),
        eval_crop=dict(resize=round(side / 0.875), filter="bilinear"),
        flip_p=0.5,
        rand_augment=None,
        erasing=None,
        mix=None,
        smoothing=0.0,
        average=0.0,
    )
    schedule = dict(name="cosine", minimum=0.0, warmup_epochs=0.0 if probe else 1.5)
    if probe:
        rule = dict(name="sgd", momentum=0.9, weight_decay=0.0)
        schedule["base"] = 0.1
    else:
        rule = dict(name="adamw", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05)
        rule |= dict(clip=5.0, no_decay=(r".*/(bias|scale|gamma_[12])",))
        schedule["base"] = 1e-3
    config.optim = rule | dict(schedule=schedule)
    config.mesh = dict(fsdp=1)
    config.log = dict(every=10, save=30, keep=1, tensorboard=False)
    config.eval = dict(epochs=5.0, images=0)
    config.xray = dict(share=0.0, least=50, images=64)
    return config
