"""Files of weights, whoever wrote them, as numpy arrays by name. No code is run.

What kind of file it is, is seen from its first bytes, not from its name. Nothing here
needs torch or safetensors; only .onnx needs the package of that name.
"""

import mmap
import struct
import warnings
from typing import NamedTuple

import numpy as np

from clvsmim.formats import _npz, _onnx, _safetensors, _shards, _torch, _zip
from clvsmim.formats._map import map_file
from clvsmim.formats._text import short, shown


class File(NamedTuple):
    """What a file holds.

    Attributes:
      path: as it was given.
      kind: "PyTorch", "safetensors", "npz" or "ONNX"; "sharded ..." of an index.
      tensors: by the dictionary keys on the way, joined by "/"; read-only, and views
        of the mapped file where the format has them uncompressed.
      other: what else was there, in a few words: {"epoch": "300", "args":
        "argparse.Namespace, not read"}.
    """

    path: str
    kind: str
    tensors: dict[str, np.ndarray]
    other: dict[str, str]


# How files begin that are often taken for weights: compared in lower case.
LOOKALIKES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file; run git lfs pull",
    b"<!doctype": "a web page, not what it links to; download the file itself",
    b"<html": "a web page, not what it links to; download the file itself",
    b"<?xml": "an XML message, as servers send for an error; download it again",
    b"{": "JSON text; name the file of weights that it belongs to",
    b"[": "text; name the file of weights that it belongs to",
    b"\x1f\x8b": "gzip; unpack it first: gunzip, or tar -xzf",
    b"bzh": "bzip2; unpack it first: bunzip2, or tar -xjf",
    b"\xfd7zxz": "xz; unpack it first: unxz, or tar -xJf",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it first: unzstd",
    b"\x89hdf": "HDF5, as Keras writes it; not read here",
    b"\x93numpy": "a single .npy array; put all arrays into one file with np.savez",
    b"pk\x05\x06": "an empty zip file",
}
KINDS = "PyTorch, safetensors, .npz or ONNX"
DAMAGE = (LookupError, TypeError, OverflowError, RecursionError, MemoryError)
DAMAGE += (struct.error,)


def read(path: str) -> File:
    """Read a file of weights; in a bucket too (gs://...).

    Of `model.safetensors.index.json`, and of `pytorch_model.bin.index.json`, all the
    files that it names.

    PyTorch's zip files and .npz carry checksums, which are compared. safetensors,
    ONNX and PyTorch before 1.6 have none: a changed number is not noticed there.

    Raises:
      ValueError: in one line: no such file, not one of these kinds, damaged, or asking
        for anything but tensors and plain settings.
    """
    try:
        with warnings.catch_warnings():  # parsers warn of what is refused anyway
            warnings.simplefilter("ignore")
            kind, (tensors, other) = _parsed(path)
        _check_names(tensors, other)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot read {path}: {short(reason)}") from error
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {short(str(error), 400)}") from error
    except DAMAGE as error:  # every check above has its own words; this is the rest
        what = "too large" if isinstance(error, MemoryError) else "damaged"
        raise ValueError(f"cannot read {path}: it is {what}") from error
    for array in tensors.values():
        array.flags.writeable = False
    return File(path, kind, tensors, other)


def _parsed(path: str) -> tuple[str, _torch.Tensors]:
    data = map_file(path)
    if path.endswith(_shards.INDEX):
        _refuse_lookalike(data, but=(b"{", b"["))
        return _shards.read(path, data[:], lambda shard: _one(shard, map_file(shard)))
    if index := _shards.index_of(path):
        raise ValueError(f"it is one shard of several; open {index} beside it instead")
    return _one(path, data)


def _one(path: str, data: mmap.mmap) -> tuple[str, _torch.Tensors]:
    _refuse_lookalike(data)
    if _safetensors.header_end(data):
        return "safetensors", _safetensors.read(data)
    if data[:4] == b"PK\x03\x04":
        entries = _zip.entries(data)
        if any(name.endswith("/data.pkl") for name in entries):
            return "PyTorch", _torch.read_zip(entries)
        if any(name.endswith(".npy") for name in entries):
            return "npz", _npz.read(entries)
        raise ValueError(f"a zip file of {shown(entries)}: expected {KINDS}")
    if data[: len(_torch.LEGACY)] == _torch.LEGACY:
        return "PyTorch", _torch.read_legacy(data)
    if data[:1] == b"\x80":
        raise ValueError("a pickle that torch.save did not write: refused")
    if path.endswith(".onnx"):  # has no beginning of its own
        return "ONNX", _onnx.read(data, path)
    if path.endswith(".safetensors"):
        return "safetensors", _safetensors.read(data)
    raise ValueError(f"expected {KINDS}, it begins with {data[:12]!r}")


def _refuse_lookalike(data: mmap.mmap, but: tuple[bytes, ...] = ()) -> None:
    if _safetensors.header_end(data):
        return
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, what in LOOKALIKES.items():
        if start.startswith(beginning) and beginning not in but:
            raise ValueError(f"it is {what}")
    if data[257:262] == b"ustar":
        raise ValueError("it is a tar archive; unpack it first: tar -xf")


def _check_names(tensors: dict[str, np.ndarray], other: dict[str, str]) -> None:
    if not tensors:
        raise ValueError(f"it holds no tensors, but {shown(other)}")
    for name in (*tensors, *other):
        if not name.isprintable() or len(name) > _torch.LONGEST:
            raise ValueError(f"it uses the name {short(name)!r}: refused")
