"""Train three small encoders on photographs, measure them, show what they learned.

    clvsmim demo --out=demo

MoCo v3, SimMIM and their mixture train for about a minute each on two CPU cores (the
same encoder, the same images, another objective), are measured on held-out parts of the
photographs, and are shown side by side in one page. So are the encoders of the mini
zoo, which were trained for longer, and on which the paper's claims are judged. Stopped,
it goes on where it was.
"""

import platform
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags
from etils import epath

from clvsmim import analysis, analyze, build, cli, compare, packed, train
from clvsmim.configs import demo as recipe
from clvsmim.data import photos
from clvsmim.measure import Settings

NAMES = ("moco_v3", "simmim", "hybrid")
SETTINGS = Settings(
    images=512,
    train_images=2048,
    batch=128,
    metrics=(*analysis.METRICS, "lidar"),
)


def main(argv: Sequence[str]) -> None:
    values, _ = cli.parse(__doc__, argv, _flags)
    print(f"open {demo(values.out).resolve().as_uri()}")


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "out", "demo", "folder for the runs and the report", flag_values=values
    )


def demo(out: str, changes: dict[str, object] | None = None) -> epath.Path:
    """Train, measure, report; returns the path of report.html.

    Args:
      changes: config keys to override, for a shorter rehearsal.
    """
    begun = time.monotonic()
    for name in NAMES:
        config = recipe.get_config(name)
        config.update_from_flattened_dict(changes or {})
        train.train(config, f"{out}/{name}", name=name)
        analyze.analyze(f"{out}/{name}", f"{out}/{name}/analysis", SETTINGS)
    for name in packed.names():
        analyze.analyze(f"zoo:{name}", f"{out}/zoo/{name}", SETTINGS)
    path = report(out)
    print(f"{time.monotonic() - begun:.0f} seconds", file=sys.stderr)
    return path


def report(out: str) -> epath.Path:
    """The page about what the three runs in `out`, and those of the zoo, learned."""
    from clvsmim import present  # matplotlib is slow to import

    live = {f"{out}/{name}/analysis": "a minute" for name in NAMES}
    members = {f"{out}/zoo/{name}": "zoo" for name in packed.names()}
    drawn = live | {f: who for f, who in members.items() if is_drawn(f)}
    titles = [f"{present.title_of(analysis.read_series(f))}, {drawn[f]}" for f in drawn]
    return compare.compare(
        list(drawn),
        out,
        title="Three ways to learn without labels",
        lead=f"{LEAD} {ZOO}" if members else LEAD,
        notes=[machine(), floor()],
        names=titles if members else (),
        judged=list(members),
        chosen=CHOSEN if members else "",
    )


def is_drawn(member: str) -> bool:
    """Whether an analysed member of the zoo is drawn beside the live runs.

    Other seeds, and hybrids of another λ, are for the claims alone: no figure bears
    twelve lines.
    """
    config = analysis.read_series(member)["config"]
    objective, live = config["objective"], recipe.get_config("hybrid").objective
    return not config["seed"] and objective.get("lam", live.lam) == live.lam


LEAD = (
    "Three vision transformers of the same form saw crops of sixteen photographs for "
    "about a minute each. One learned by telling images apart (contrastive learning), "
    "one by filling in what was hidden (masked image modelling), one by both at once. "
    "A minute of training shows how the instruments work; it is far too short to judge "
    "the paper's claims, and where these curves disagree with it, that says nothing."
)

ZOO = (
    "Beside them stand the encoders of the mini zoo, which ship with the package: "
    "smaller ones, trained for longer on the same photographs (clvsmim zoo says how "
    "long). The claims of the paper are judged on these, over all their seeds."
)

CHOSEN = (
    "They are judged on the encoders of the mini zoo. Before its recipe was frozen, 4 "
    "configurations were tried and compared by training loss and k-NN accuracy on "
    "other images, never by what stands here: docs/mini-zoo.md."
)


def machine() -> str:
    """What the numbers were computed on."""
    devices, python = jax.devices(), platform.python_version()
    return (
        f"Run on {len(devices)} x {devices[0].device_kind} with jax {jax.__version__}, "
        f"Python {python}. Bands in figures are one standard error over images, for "
        "one training each; they say nothing about another seed."
    )


def floor() -> str:
    """What the data give away for nothing."""
    data = build.plain(recipe.get_config(NAMES[0]).data)
    train, test = (build.make_source(data, split) for split in photos.SPLITS)
    accuracy = photos.mean_rgb_ridge_floor(train, test)
    chance = 1 / train.num_classes
    return (
        f"Images are crops of {train.num_classes} photographed scenes that ship inside "
        "scikit-image and scikit-learn; the parts measured on were never trained on. "
        "The mean colour of every crop was evened out: a ridge probe on mean RGB alone "
        f"names the scene of {accuracy:.2%} of the held-out crops, chance being "
        f"{chance:.2%}. That is the floor for any probe of these encoders."
    )


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
