"""Train, probe, fine-tune and measure an encoder for each weight λ of a hybrid.

    clvsmim sweep --lambdas=0,.2,.4,.6,1 --config=configs/photos_hybrid.py \\
        --out=runs/sweep

λ = 0 is masked image modelling alone, λ = 1 contrastive learning alone (Fig. 12 of the
paper). Writes a workdir for each λ, with the workdirs of its probe and fine-tuning and
its analysis inside, and one report of all. Stopped, it goes on where it was. Keys of
the probe's and the fine-tuning's recipes are changed with --probe_set=epochs=10 and
--finetune_set=batch=256, as often as needed; an empty --probe= or --finetune= leaves it
out.
"""

import ast
import copy
import importlib.resources
import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from clvsmim import analyze, build, cli, compare, hosts, labelled, plugin, train
from clvsmim.measure import Settings

Recipe = Callable[[str], ConfigDict]  # of a workdir whose encoder it starts from
PAPER = {0: (18.2, 81.90), 0.2: (61.6, 82.29), 0.4: (62.3, 81.95), 0.6: (61.9, 81.62)}
PAPER |= {1: (58.1, 81.34)}  # Fig. 12a: linear and fine-tuning, ViT-B on ImageNet-1k


def main(argv: Sequence[str]) -> None:
    values, _ = cli.parse(__doc__, argv, _flags)
    labels = {
        kind: recipe(getattr(values, kind), getattr(values, f"{kind}_set"))
        for kind in labelled.NAMES
        if getattr(values, kind)
    }
    lams = numbers(values.lambdas)
    settings = Settings(images=values.images)
    hosts.start(values)
    print(sweep(cli.config_of(values), values.out, lams, labels, settings))


def _flags(values: flags.FlagValues) -> None:
    own = {"flag_values": values}
    cli.define_config(values)
    hosts.define_flags(values)
    flags.DEFINE_string("out", "sweep", "folder for the runs and the report", **own)
    flags.DEFINE_string("lambdas", "0,.2,.4,.6,1", "weights of CL, by commas", **own)
    flags.DEFINE_integer(
        "images", Settings().images, "how many to measure", lower_bound=1, **own
    )
    files = {"probe": "linear_probe.py:paper", "finetune": "finetune.py:simmim"}
    for kind, file in files.items():
        what = f"recipe of the {labelled.NAMES[kind]}, FILE.py:PROTOCOL"
        flags.DEFINE_string(kind, f"configs/{file}", what, **own)
        flags.DEFINE_multi_string(
            f"{kind}_set", [], f"key=value, of the {kind}'s recipe", **own
        )


def sweep(
    config: ConfigDict,
    out: str,
    lams: Sequence[float],
    labels: dict[str, Recipe],
    settings: Settings,
) -> epath.Path:
    """Run everything that is not done yet; returns the path of report.html.

    Args:
      config: of a hybrid; its `objective.lam` is replaced.
      labels: {"probe": ..., "finetune": ...} -> the config of such a run, given the
        workdir of an encoder.

    Raises:
      ValueError: the config is of no hybrid, or one of the runs cannot work.
    """
    if "lam" not in config.objective:
        raise ValueError(
            "the objective of --config has no lam; a sweep over lambda needs a hybrid, "
            "for example configs/photos_hybrid.py"
        )
    configs = {f"{out}/lambda_{lam:g}": with_lam(config, lam) for lam in lams}
    for own in configs.values():  # refuse the last one before the first has trained
        build.build(own)
    for workdir, own in configs.items():
        name = f"λ = {own.objective.lam:g}"
        train.train(own, workdir, name=name)
        for kind, recipe in labels.items():
            about = f"{labelled.NAMES[kind].removesuffix(' accuracy')}, {name}"
            train.train(recipe(workdir), f"{workdir}/{kind}", name=about)
        analyze.analyze(workdir, f"{workdir}/analysis", settings)
    return report(out, lams)


def with_lam(config: ConfigDict, lam: float) -> ConfigDict:
    """A copy of the config of a hybrid with another λ."""
    own = copy.deepcopy(config)
    own.objective.lam = lam
    return own


def numbers(text: str) -> list[float]:
    """Different numbers from 0 to 1, ascending."""
    try:
        found = [float(x) for x in text.split(",") if x.strip()]
    except ValueError as error:
        raise ValueError(f"--lambdas={text}: expected numbers, by commas") from error
    if not found or len(set(found)) < len(found) or not all(0 <= x <= 1 for x in found):
        raise ValueError(f"--lambdas={text}: expected different numbers from 0 to 1")
    return sorted(found)


def recipe(which: str, changes: Sequence[str]) -> Recipe:
    """`workdir -> config`, by the recipe FILE.py:PROTOCOL with changed keys.

    Raises:
      ValueError: there is no such file, protocol or key.
    """
    file, _, protocol = which.partition(":")
    get_config = load(file).get_config
    values = dict(map(setting, changes))

    def get(workdir: str) -> ConfigDict:
        config = get_config(f"{protocol},{workdir}" if workdir else protocol)
        known = config.to_dict(preserve_field_references=False)
        for key in values:
            _check_key(key, known, which)
        config.update_from_flattened_dict(values)
        return config

    get("")  # its mistakes show before anything is trained
    return get


def load(file: str) -> object:
    """The module of a recipe; configs/X.py is also found inside the package."""
    path = pathlib.Path(file)
    if not path.exists() and path.parent == pathlib.Path("configs"):
        path = importlib.resources.files("clvsmim.configs") / path.name
    if not path.is_file():
        raise ValueError(f"there is no recipe {file}; try configs/linear_probe.py")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def setting(change: str) -> tuple[str, object]:
    """("optim.clip", 5.0) of "optim.clip=5.0"; what is no Python literal is a text."""
    key, equals, value = change.partition("=")
    if not equals:
        raise ValueError(f"{change!r}: expected key=value, for example epochs=10")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _check_key(key: str, known: dict, which: str) -> None:
    for name in key.split("."):
        if not isinstance(known, dict) or name not in known:
            raise ValueError(plugin.unknown(f"key {key!r} of {which}, at", name, known))
        known = known[name]


def report(out: str, lams: Sequence[float]) -> epath.Path:
    """The page about all runs in `out`."""
    workdirs = [f"{out}/lambda_{lam:g}" for lam in lams]
    found = {
        lam: {s.name: s for s in labelled.series(workdir)}
        for lam, workdir in zip(lams, workdirs, strict=True)
    }
    return compare.compare(
        [f"{workdir}/analysis" for workdir in workdirs],
        out,
        title="From masked image modelling to contrastive learning",
        lead=LEAD,
        first=[labels_section(found)] if any(found.values()) else [],
    )


LEAD = (
    "One encoder trained with the loss (1 - λ) L_MIM + λ L_CL, everything else alike. "
    "The paper (Fig. 12) finds the mixture better than both ends in linear probing and "
    "in fine-tuning, and its late blocks like those of contrastive learning while its "
    "early ones stay like those of masked image modelling."
)


def labels_section(found: dict[float, dict]) -> Any:
    """Fig. 12a: a table and, where there are both, one against the other."""
    from clvsmim.report import Gallery, Section, Table  # matplotlib is slow to import

    probe, tuned = labelled.NAMES.values()
    rows = [
        (
            f"{lam:g}",
            *(percent(series.get(name)) for name in (probe, tuned)),
            *("{:.1f}, {:.2f}".format(*PAPER[x]) for x in PAPER if np.isclose(x, lam)),
        )
        for lam, series in found.items()
    ]
    rows = [(*row, *[""] * (4 - len(row))) for row in rows]
    columns = ("λ", probe, tuned, "paper, ViT-B on ImageNet-1k: linear, fine-tuning")
    text = (
        "Of one training each. A probe of several blocks is given at the last one; at "
        "every block it stands with the other probes below."
    )
    points = [(lam, s[probe], s[tuned]) for lam, s in found.items() if len(s) == 2]
    picture = [Gallery("Fig. 12a", "", ("",), ((plane(points),),))] if points else []
    return Section(
        "What the mixture is worth",
        text,
        tables=(Table("", columns, rows),),
        galleries=picture,
    )


def at_last(series: object) -> tuple[float, float]:
    """(accuracy, standard error) at the last block, in percent."""
    pairs = np.ravel(series.values), np.ravel(series.stderr)
    return tuple(float(x[-1]) for x in pairs)


def percent(series: object) -> str:
    return "{:.1f} ± {:.1f}".format(*at_last(series)) if series else ""


def plane(points: Sequence[tuple]) -> np.ndarray:
    """Linear probing against fine-tuning, a dot per λ, as an image."""
    from clvsmim.report import canvas

    with canvas.figure(canvas.WIDE) as (figure, axes):
        figure.set_dpi(150)
        (x, dx), (y, dy) = (
            np.transpose([at_last(point[i]) for point in points]) for i in (1, 2)
        )
        axes.plot(x, y, color=canvas.GREY, lw=0.8, zorder=1)
        axes.errorbar(x, y, xerr=dx, yerr=dy, fmt="none", color=canvas.GREY, lw=0.8)
        look = {"cmap": "viridis", "edgecolors": canvas.GREY, "zorder": 4}
        shades = axes.scatter(x, y, c=[p[0] for p in points], **look)
        for (lam, *_), place in zip(points, zip(x, y, strict=True), strict=True):
            text = axes.annotate(
                f"λ = {lam:g}", place, xytext=(5, 5), textcoords="offset points"
            )
            text.set_path_effects(canvas.OUTLINE)  # the points may lie close together
        figure.colorbar(shades, label="λ, the weight of contrastive learning")
        axes.set(xlabel="linear probe accuracy (%)", ylabel="fine-tuning accuracy (%)")
        axes.margins(0.15)
    return canvas.to_array(figure)


if __name__ == "__main__":
    import sys

    cli.run(sys.modules["__main__"])
