"""Does pre-training help? A probe and a fine-tuning of a trained encoder, and the same
without it, for several seeds.

    python benchmarks/labels.py                # about 45 minutes on two CPU cores
    python benchmarks/labels.py --seeds=2 --out=runs/labels

For each seed it pre-trains the demo's MoCo v3 for `EPOCHS`, then runs the recipes of
configs/demo_labels.py from that encoder and from an untrained one of the same seed. The
images, the schedules and the number of epochs stand in these files and were fixed on
seed 100, before any of the seeds that count was run (docs/benchmarks.md). Prints top-1
on held-out crops, and the paired difference with its 95% interval (Student's t over
seeds). Stopped, it goes on where it was.
"""

import argparse

import numpy as np

from clvsmim import claims, log, train
from clvsmim.configs import demo, demo_labels

EPOCHS = 16.0  # of pre-training, 32 steps of 128 images each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", default="runs/labels")
    args = parser.parse_args()
    found = {stage: [] for stage in demo_labels.VARIANTS}
    for seed in range(args.seeds):
        config = demo.get_config("moco_v3")
        config.seed, config.epochs = seed, EPOCHS
        encoder = f"{args.out}/seed_{seed}/moco_v3"
        train.train(config, encoder)
        for stage, pairs in found.items():
            pairs.append([top1(stage, run, seed, args.out) for run in (encoder, "")])
    for stage, pairs in found.items():
        show(stage, 100 * np.array(pairs))


def top1(stage: str, run: str, seed: int, out: str) -> float:
    """Held-out accuracy after the recipe `stage`, from `run` or from scratch."""
    config = demo_labels.get_config(f"{stage},{run}")
    config.seed = seed
    workdir = f"{out}/seed_{seed}/{stage}{'' if run else '_scratch'}"
    train.train(config, workdir)
    return [r for r in log.read(f"{workdir}/log.jsonl") if "eval/top1" in r][-1][
        "eval/top1"
    ]


def show(stage: str, pairs: np.ndarray) -> None:
    """`pairs` (seeds, 2) in percent: pre-trained, from scratch."""
    print(f"\n{stage}: held-out top-1 (%)\n  seed   pre-trained   scratch   difference")
    for seed, (pre, scratch) in enumerate(pairs):
        print(f"  {seed:4}{pre:14.1f}{scratch:10.1f}{pre - scratch:13.1f}")
    gain = pairs[:, 0] - pairs[:, 1]
    print(f"  mean{pairs[:, 0].mean():14.1f}{pairs[:, 1].mean():10.1f}", end="")
    print(f"{gain.mean():13.1f}", end="")
    if len(gain) > 2:
        low, high = claims.interval(gain)
        print(f"   95% interval {low:.1f} to {high:.1f}", end="")
    print()


if __name__ == "__main__":
    main()
