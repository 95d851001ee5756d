"""Files that a reader sees whole or not at all; local or in a bucket."""

import contextlib
from collections.abc import Iterator

import numpy as np
from etils import epath


def save_arrays(path: str, arrays: dict[str, np.ndarray], small: bool = False) -> None:
    """Write one .npz, whole or not at all; `small`: an eighth less, and slower."""
    save = np.savez_compressed if small else np.savez
    with _whole(path) as part, part.open("wb") as file:
        save(file, **arrays)


def load_arrays(path: str, within: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
    """Those of what `save_arrays` wrote whose names begin so; no pickles."""
    with epath.Path(path).open("rb") as raw, np.load(raw) as file:
        return {name: file[name] for name in file.files if name.startswith(within)}


def write_whole(path: str, data: bytes) -> None:
    """Write a file that a reader sees whole or not at all."""
    with _whole(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def _whole(path: str) -> Iterator[epath.Path]:
    """A file to write to, which then takes its name."""
    part = epath.Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    yield part
    part.replace(path)
