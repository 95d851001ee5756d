"""The bytes of a file: mapped where it lies, or fetched out of a bucket."""

import mmap
import os

from etils import epath

from clvsmim.formats._text import shown

ENDINGS = (".pth", ".pt", ".tar", ".bin", ".safetensors", ".npz", ".onnx")


def map_file(path: str) -> mmap.mmap:
    """Read-only, so that nothing is read before it is used, and nothing twice.

    Raises:
      ValueError: no such file, a folder, an empty file. OSError: it cannot be read.
    """
    place = epath.Path(path).expanduser()
    if place.is_dir():
        inside = sorted(x.name for x in place.iterdir() if x.name.endswith(ENDINGS))
        raise ValueError(f"it is a folder; name a file in it: {shown(inside)} is there")
    if "://" in path:
        if not place.exists():
            raise ValueError("no such file")
        return _in_memory(place.read_bytes())
    if not os.path.isfile(place):  # a pipe would wait for its other end
        raise ValueError("no such file")
    with open(place, "rb") as file:
        _refuse_empty(os.fstat(file.fileno()).st_size)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _in_memory(content: bytes) -> mmap.mmap:
    _refuse_empty(len(content))
    data = mmap.mmap(-1, len(content))
    data.write(content)
    return data


def _refuse_empty(size: int) -> None:
    if not size:
        raise ValueError("it is empty; fetch it again")
