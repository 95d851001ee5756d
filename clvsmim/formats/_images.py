"""How the images of one file are prepared: by the JSON beside it, else its family."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clvsmim.formats._evaluation import IMAGENET
from clvsmim.formats._preprocess import (
    Transform,
    checked,
    from_hf,
    from_timm,
    hf_colour,
    timm_colour,
    transform,
    view,
)
from clvsmim.formats._report import Report

PROCESSOR, CONFIG = "preprocessor_config.json", "config.json"


def images_of(
    family: str,
    image: Sequence[int],
    about: Mapping[str, Any],
    processor: Mapping[str, Any],
    out: Report,
) -> tuple[dict[str, tuple], Transform | None]:
    """({"mean", "std"} of the input, the evaluation transform), and where from.

    Mean and std are used whatever the size is; the resizing only where it makes what
    the network takes. None for a file of ours with nothing beside it: its run knows.

    Args:
      family: a module of `formats`.
      image: (rows, columns) that the network takes.
      about, processor: config.json (its part of timm), preprocessor_config.json.

    Raises:
      ValueError: a mean or std that cannot be.
    """
    timm = about.get("pretrained_cfg") or (about if "input_size" in about else {})
    where, colour, found = "", {}, None
    if processor:
        where = PROCESSOR
        colour, found = told(processor, where, from_hf, hf_colour, out)
    elif timm:
        where = f"timm's {CONFIG}"
        colour, found = told(timm, where, from_timm, timm_colour, out)
    usual = None if family == "ours" else transform(family, image)
    base = {"mean": usual.mean, "std": usual.std} if usual else IMAGENET
    line = f"input mean {(base | colour)['mean']}, std {(base | colour)['std']}"
    if len(colour) == 2:
        out.found.append(f"{line}, by {where}")
    else:
        why = f"a {PROCESSOR} or timm's {CONFIG} beside the file would tell"
        if where:
            why = f"{where} does not tell {'all of ' if colour else ''}them"
        out.assumed.append(f"{line}, the usual ones; {why}")
    colour = base | colour
    if found and found.crop == tuple(image):
        return colour, found
    if found:
        rows, columns = found.crop
        out.assumed.append(
            f"images resized as is usual, for {where} makes them {rows} x {columns} px"
        )
    return colour, usual._replace(**colour) if usual else None


def told(
    said: Mapping[str, Any],
    where: str,
    read: Callable[[dict], Transform],
    colour: Callable[[dict], dict],
    out: Report,
) -> tuple[dict[str, tuple], Transform | None]:
    """What one JSON file tells: of mean and std, and of the whole transform."""
    try:
        good = checked(said)
    except ValueError as error:
        raise ValueError(f"{where} beside it: {error}; mend or remove it") from error
    try:
        found = read(good)
        view(found)
    except ValueError as error:  # unknown, or sizes of which none can be cut
        out.assumed.append(f"images resized as is usual: {error}")
        return colour(good), None
    return {"mean": found.mean, "std": found.std}, found
