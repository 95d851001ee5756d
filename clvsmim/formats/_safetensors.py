"""safetensors: a length, a JSON header, the numbers.

Read here and not with the library of that name, which copies each tensor (its numpy
interface has no views of the mapped file), knows no bfloat16 there, and opens local
files only. The format has no checksum: a changed number is not noticed, a changed
size, name or place is.
"""

import json
import math
import mmap
from typing import Any

import ml_dtypes
import numpy as np

from clvsmim.formats._text import short

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}
LONGEST = 100_000_000  # of a header, in bytes: what the format allows


def header_end(data: mmap.mmap) -> int:
    """Where the numbers begin, or 0: this is no safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return end if data[8:9] == b"{" and 10 <= end <= len(data) else 0


def read(data: mmap.mmap) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: view of the mapped file}, the file's own remarks).

    Raises:
      ValueError: a header that is no such JSON, sizes that do not fit the type and
        the shape, gaps or overlaps between the tensors, a file that is cut off.
    """
    first = header_end(data)
    if not 0 < first <= LONGEST:
        raise ValueError(
            "its header is damaged, or longer than the file: fetch it again"
        )
    header = _header(data[8:first])
    remarks = header.pop("__metadata__", {})
    if not isinstance(remarks, dict):
        raise ValueError("its __metadata__ is no dictionary")
    tensors, ends = {}, [(0, 0)]
    for name, entry in header.items():
        dtype, shape, begin, end = _described(name, entry)
        ends.append((begin, end))
        if end > len(data) - first:
            raise ValueError(f"{short(name)} ends behind the file, which is cut off")
        tensors[name] = np.frombuffer(
            data, dtype, math.prod(shape), first + begin
        ).reshape(shape)
    ends = [*sorted(ends), (len(data) - first,) * 2]
    if any(a[1] != b[0] for a, b in zip(ends, ends[1:], strict=False)):
        raise ValueError("its tensors do not fill the file one after the other")
    return tensors, {key: short(str(value)) for key, value in remarks.items()}


def _header(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            raise ValueError("names something twice")
        return made

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no dictionary")
    return header


def _described(name: str, entry: Any) -> tuple[Any, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of one entry of the header."""
    match entry:
        case {
            "dtype": str() as dtype,
            "shape": list() as shape,
            "data_offsets": [a, b],
        }:
            numbers = [*shape, a, b]
            if dtype not in DTYPES:
                raise ValueError(f"{short(name)} has the unknown type {short(dtype)}")
            if any(type(x) is not int or x < 0 for x in numbers):
                raise ValueError(f"{short(name)} has a size that is no count")
            if math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize == b - a:
                return DTYPES[dtype], tuple(shape), a, b
            raise ValueError(f"{short(name)}: its shape does not fit its {b - a} bytes")
    raise ValueError(f"{short(name)}: not described as a tensor is")
