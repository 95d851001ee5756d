"""A checkpoint file of another library where a trained run is expected.

`formats` opens it; here is which file a path means, which images its network wants, and
what is remembered of where a network came from.
"""

import hashlib
import re
from typing import Any

from etils import epath

from clvsmim import formats, packed
from clvsmim.formats import Opened
from clvsmim.formats._preprocess import Transform, view
from clvsmim.formats._shards import INDEX, placed

__all__ = [
    "INDEX",
    "Opened",
    "Transform",
    "as_flags",
    "facts",
    "find",
    "name_of",
    "open_run",
    "shards",
    "transform_of",
    "view",
]
# What Hugging Face's libraries call the file in a folder, the best one first.
INSIDE = tuple(
    name + index
    for name in ("model.safetensors", "pytorch_model.bin")
    for index in ("", INDEX)
)
PLAIN_NAMES = ("model", "pytorch_model", "checkpoint", "weights")
FLAGS = ("format", "branch", "heads", "decoder_heads", "image", "partial", "ignore")


def find(path: str) -> str:
    """The file that `path` means: itself, or the one in a folder of Hugging Face.

    "" where it is neither: a workdir, a packed run, or nothing at all.
    """
    place = epath.Path(path)
    if place.is_file():
        return str(path)
    if not place.is_dir() or (place / "meta.json").exists():
        return ""
    return next((str(place / name) for name in INSIDE if (place / name).exists()), "")


def as_flags(text: str) -> str:
    """A message or report of `formats`, its keywords spelt as on the command line."""
    return re.sub(rf"(?<![^\s(])({'|'.join(FLAGS)})=", r"--\1=", text)


def open_run(path: str, *, heads: int = 0) -> Opened:
    """The network in a file, where there are no flags to say more about it.

    Raises:
      ValueError: as `formats.open_file`, with where those flags are.
    """
    try:
        return formats.open_file(path, heads=heads)
    except ValueError as error:
        line = as_flags(str(error))
        asked = any(f"--{flag}=" in line for flag in FLAGS)
        hint = "; `clvsmim convert FILE FOLDER` takes these flags, then use FOLDER"
        raise ValueError(f"{line}{hint if asked else ''}") from error


def facts(path: str, opened: Opened, source: str = "") -> dict[str, Any]:
    """What is remembered of a file: plain values, for meta.json and series.json."""
    found, report = opened.transform, as_flags(str(opened.report))
    return {
        "path": source or str(path),
        "name": name_of(source or path),
        "sha256": sha256(path),
        "family": opened.family,
        "title": opened.report.title,
        "report": f"{report}\n  images here: {found or 'as those of our runs'}",
        "transform": found._asdict() if found else None,
        "pool": (opened.objective or {}).get("pool", ""),
    }


def sha256(path: str) -> str:
    """Of a file; of an index, that of the digests of its shards, by name."""
    if not path.endswith(INDEX):
        return packed.sha256(path)
    digests = "".join(map(packed.sha256, shards(path)))
    return hashlib.sha256(digests.encode()).hexdigest()


def shards(index: str) -> list[str]:
    """The files that an index names, sorted."""
    place = epath.Path(index)
    return [str(place.parent / name) for name in sorted(placed(place.read_bytes()))]


def transform_of(file: dict[str, Any]) -> Transform | None:
    """The evaluation transform among `facts`, also after a round trip through JSON."""
    if not file["transform"]:
        return None

    def plain(x: Any) -> Any:
        return tuple(x) if isinstance(x, list | tuple) else x

    return Transform(**{key: plain(x) for key, x in file["transform"].items()})


def name_of(path: str) -> str:
    """What to call a file's network: its name, or its folder's if that says more."""
    place = epath.Path(path)
    name = re.sub(
        r"(\.pth|\.pt|\.tar|\.bin|\.safetensors|\.npz|\.onnx|\.index\.json)+$",
        "",
        place.name,
    )
    return place.parent.name or name if name in PLAIN_NAMES else name
