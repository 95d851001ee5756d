"""A .npz of arrays, as np.savez and np.savez_compressed write it: no pickles."""

import io
import math
import tokenize
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from clvsmim.formats._text import short

# What numpy's reader of a header lets through when it is no header.
HEADER = (ValueError, LookupError, TypeError, SyntaxError, tokenize.TokenError)
HEADER += (RecursionError, MemoryError)


def read(
    entries: Mapping[str, memoryview],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: view}, {name: what is no number}); ValueError: a damaged array."""
    tensors, other = {}, {}
    for entry, raw in entries.items():
        name = entry.removesuffix(".npy")
        if name == entry:
            raise ValueError(f"{short(entry)} is no .npy file, as all in an .npz are")
        array = _array(name, raw)
        if array.dtype.kind in "US":
            other[name] = short(str(array.tolist()))
        else:
            tensors[name] = array
    return tensors, other


def _array(name: str, raw: memoryview) -> np.ndarray:
    """A view of what follows the header of one .npy file."""
    file = io.BytesIO(raw[:20_000])  # headers are shorter
    try:
        version = np.lib.format.read_magic(file)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = header(file)
    except HEADER as error:
        raise ValueError(f"the header of {short(name)} is damaged") from error
    if dtype == np.dtype("V2"):  # so numpy names the bfloat16 that JAX users save
        dtype = np.dtype(ml_dtypes.bfloat16)
    elif dtype.kind not in "fiubcUS":
        raise ValueError(f"{short(name)} holds {dtype}, not numbers: refused")
    start, size = file.tell(), math.prod(shape)
    if min(shape, default=0) < 0 or len(raw) - start != size * dtype.itemsize:
        raise ValueError(f"{short(name)}: its shape does not fit its size")
    flat = np.frombuffer(raw, dtype, size, start)
    return flat.reshape(shape, order="F" if fortran else "C")
