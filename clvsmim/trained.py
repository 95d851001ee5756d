"""A trained network to measure: of a workdir, of a packed run, or of a file."""

import importlib
from typing import Any, NamedTuple

import jax

from clvsmim import build, foreign, meta, packed, tree
from clvsmim.checkpoint import restore_params
from clvsmim.objectives import Objective

Tree = Any


class Trained(NamedTuple):
    """A trained run as its workdir holds it, or the network in a file.

    `file` is `foreign.facts` of a file, None of a run.
    """

    config: dict[str, Any]
    objective: Objective
    params: Tree
    extra: Tree
    step: int
    file: dict[str, Any] | None = None

    @property
    def variables(self) -> Tree:
        """{"params", "stats"} of the encoder."""
        return {"params": self.params["encoder"], "stats": self.extra["encoder"]}

    @property
    def name(self) -> str:
        """For a line of progress."""
        return self.file["name"] if self.file else self.config["objective"]["name"]


def load(workdir: str) -> Trained:
    """The newest checkpoint of a run, or the network in a file; arrays on the host.

    Raises:
      ValueError: the folder holds no run, or a checkpoint of another architecture.
    """
    workdir = packed.place(workdir)
    found = check(workdir)
    if not found:
        file = foreign.find(workdir)
        return adopted(file, foreign.open_run(file))
    config = found["config"]
    # Whatever the training computed in: bfloat16 moves a Δ log amplitude by 0.04.
    exact = {**config["encoder"], "dtype": "float32", "remat": False}
    encoder = build.make_encoder(exact)
    objective = build.make_objective(encoder, config["input"], config["objective"])
    saved, step = restore_params(workdir)
    shapes = dict(
        zip(("params", "extra"), build.abstract_params(objective), strict=True)
    )
    if packed.is_packed(workdir):
        shapes = packed.kept(shapes)
        saved = packed.only(saved, shapes)
    whole = jax.device_get(tree.strict(shapes, saved, f"the checkpoint in {workdir}"))
    file = found.get("file")
    return Trained(config, objective, whole["params"], whole["extra"], step, file)


def check(workdir: str) -> dict[str, Any]:
    """The meta.json of a run; {} of a file.

    Raises:
      ValueError: it is neither.
    """
    place = packed.place(workdir)
    if foreign.find(place):
        return {}
    found = meta.read_meta(place)
    if found is None:
        raise ValueError(
            f"no run in {workdir}; expected a --workdir of clvsmim train, or a "
            "checkpoint file"
        )
    return found


def adopted(path: str, opened: foreign.Opened, source: str = "") -> Trained:
    """The network of a file as a run that nobody trained here.

    Args:
      path: of the file that `opened` came from.
      source: what to call it instead, e.g. the repository that it is from.
    """
    config = {
        "seed": 0,  # and no image: what they were, nobody knows
        "batch": 0,
        "encoder": opened.encoder,
        "input": opened.input,
        "objective": objective_of(opened),
    }
    encoder = build.make_encoder(config["encoder"])
    objective = build.make_objective(encoder, config["input"], config["objective"])
    shapes = dict(
        zip(("params", "extra"), build.abstract_params(objective), strict=True)
    )
    shapes = packed.kept(shapes)
    saved = packed.only({"params": opened.params, "extra": opened.extra}, shapes)
    whole = tree.strict(shapes, saved, path)
    file = foreign.facts(path, opened, source)
    return Trained(config, objective, whole["params"], whole["extra"], 0, file)


def objective_of(opened: foreign.Opened) -> dict[str, Any]:
    """The section `objective` of a file: of MAE and SimMIM, if the decoder came along,
    with their recipes' numbers where the file has none; else of an encoder alone."""
    found = opened.objective or {"name": "encoder"}
    if found["name"] in ("mae", "simmim"):
        recipe = importlib.import_module(f"clvsmim.configs.{found['name']}")
        section = build.plain(recipe.get_config().objective) | found
        if found["name"] == "simmim":
            section["mask_unit"] = cell(opened.encoder, section["mask_unit"])
        return section
    # A linear probe leaves its encoder as it was, and its sin-cos table too, which
    # fine-tuning would have changed.
    probe = opened.encoder["position"].endswith("sincos")
    labels = found["name"] == "classify" and not probe
    return {"name": "encoder", "family": opened.family, "labels": labels}


def cell(encoder: dict[str, Any], usual: int) -> int:
    """Pixels of a masked cell of SimMIM: the usual ones, if the image divides so."""
    patch, image = encoder["patch"], encoder["image"]
    fits = usual % patch == 0 and all(side % usual == 0 for side in image)
    return usual if fits and max(image) > usual else patch
