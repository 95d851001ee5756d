"""What a linear probe and a fine-tuning say of an encoder, as Series.

They are trainings of their own (configs/linear_probe.py, configs/finetune.py); in the
folders `probe` and `finetune` of the encoder's workdir its report finds them.
"""

import json
import re

import numpy as np
from etils import epath

from clvsmim import log
from clvsmim.meta import read_meta
from clvsmim.metrics import Axis, Series

NAMES = {"probe": "linear probe accuracy", "finetune": "fine-tuning accuracy"}
SOURCE = {"probe": "Fig. 10a, 12a", "finetune": "Fig. 12a"}
CHOSEN = "at the best of {} learning rates, chosen on the same images"


def series(workdir: str) -> list[Series]:
    """Accuracies on held-out images of the trainings in a workdir that have ended."""
    return [found for folder in NAMES for found in read(f"{workdir}/{folder}", folder)]


def read(workdir: str, kind: str) -> list[Series]:
    """The last evaluation of a `classify` run; [] if there is none or it goes on.

    One number, or one per block. Of several learning rates the best counts, and the
    notes say so.
    """
    path = epath.Path(f"{workdir}/log.jsonl")
    records = log.read(path) if path.exists() else []
    records = [r for r in records if any(k.startswith("eval/top1") for k in r)]
    about = read_meta(workdir)
    if not records or about is None or records[-1]["step"] < about["steps"]:
        return []
    record = records[-1]
    best: dict[str, list[float]] = {}
    for key, value in record.items():
        found = re.fullmatch(r"eval/top1(?:/(\w+)/rate_[^/]+)?", key)
        if found:
            best.setdefault(found[1] or "", []).append(value)
    rates = max(map(len, best.values()))
    notes = (CHOSEN.format(rates),) if rates > 1 else ()
    numbers = [re.fullmatch(r"block_(\d+)", block) for block in best]
    axes, values = (), np.array([max(found) for found in best.values()])
    if all(numbers):
        axes = (Axis("depth", tuple((int(n[1]), "mlp") for n in numbers)),)
    else:
        values = values[0]
    n = record["eval/images"]
    return [
        Series(
            name=NAMES[kind],
            axes=axes,
            values=100 * values,
            stderr=100 * np.sqrt(values * (1 - values) / max(n - 1, 1)),
            kind="depth" if axes else "curve",
            unit="%",
            source=SOURCE[kind],
            count=n,
            notes=notes,
        )
    ]


def recipe(workdir: str) -> str:
    """What two label runs must share for their numbers to be compared: all but the
    encoder, the seed, and which of its parameters decay. "" where there is none."""
    about = read_meta(workdir)
    if about is None:
        return ""
    config = about["config"]
    shared = {k: config[k] for k in ("batch", "epochs", "objective", "eval")}
    rule = {k: v for k, v in config["optim"].items() if k not in ("no_decay", "frozen")}
    shared |= {"optim": rule, "source": config["data"]["source"]}
    return json.dumps(shared, sort_keys=True)
