"""A checkpoint in several files, and the index that Hugging Face puts beside them."""

import json
import re
from collections.abc import Callable
from typing import Any

from etils import epath

from clvsmim.formats._text import short, shown

INDEX = ".index.json"
SHARD = r"(.+)-\d{5}-of-(\d{5})\.(safetensors|bin)"


def index_of(path: str) -> str:
    """The index that a shard belongs to, by the names of both; "" of a whole file."""
    hit = re.fullmatch(SHARD, epath.Path(path).name)
    return f"{hit[1]}.{hit[3]}{INDEX}" if hit and int(hit[2]) > 1 else ""


def placed(index: bytes) -> dict[str, set[str]]:
    """{shard: names of its tensors}.

    Raises:
      ValueError: no such index, or one that leads out of its folder.
    """
    try:
        found: Any = json.loads(index)
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error}); fetch it again") from error
    where = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(where, dict) or not where:
        raise ValueError("it has no weight_map, as the index of a checkpoint has")
    shards: dict[str, set[str]] = {}
    for name, shard in where.items():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*", shard):
            raise ValueError(
                f"it names the shard {short(str(shard))!r}; expected a file beside it"
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def read(path: str, index: bytes, one: Callable) -> tuple[str, tuple[dict, dict]]:
    """(kind, (tensors, other)) of all shards together, each tensor from its own.

    Args:
      path: of the index.
      one: reads a file: path -> (kind, (tensors, other)).

    Raises:
      ValueError: a shard that cannot be read or is not there, or whose tensors are not
        those that the index says.
    """
    kind, tensors, other = "", {}, {}
    for shard, names in placed(index).items():
        try:
            kind, (there, more) = one(str(epath.Path(path).parent / shard))
        except ValueError as error:
            raise ValueError(f"its shard {shard}: {error}") from error
        if missing := sorted(names - there.keys()):
            raise ValueError(f"its shard {shard} lacks {shown(missing)}")
        if strange := sorted(there.keys() - names):
            raise ValueError(
                f"its shard {shard} holds {shown(strange)}, which the index does not "
                "place there"
            )
        tensors |= there
        other |= more
    return f"sharded {kind}", (tensors, other)
