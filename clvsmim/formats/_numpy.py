"""numpy's arrays and numbers in a pickle, as `Made` and no more: see _pickles.py."""

import math
from typing import Any

import numpy as np

from clvsmim.formats._pickles import Made

ARRAY = {f"numpy.{x}.multiarray._reconstruct" for x in ("core", "_core")}
SCALAR = {f"numpy.{x}.multiarray.scalar" for x in ("core", "_core")}
NAMES = {*ARRAY, *SCALAR, "numpy.ndarray", "numpy.dtype", "_codecs.encode"}


def counts(value: Any) -> tuple[int, ...]:
    """A shape or strides, which are tuples of numbers from 0."""
    if isinstance(value, tuple) and all(type(x) is int and x >= 0 for x in value):
        return value
    raise ValueError("a shape or strides that are no counts")


def array(made: Made) -> np.ndarray:
    match made.state:
        case (int(), tuple() as shape, Made() as dtype, bool() as fortran, data):
            shape, dtype, data = counts(shape), _dtype(dtype), _bytes(data)
            if len(data) == math.prod(shape) * dtype.itemsize:
                array = np.frombuffer(data, dtype)
                return array.reshape(shape, order="F" if fortran else "C")
    raise ValueError("a numpy array that is damaged, or not of numbers")


def scalar(made: Made) -> Any:
    match made.args:
        case (Made() as dtype, data):
            dtype, data = _dtype(dtype), _bytes(data)
            if len(data) == dtype.itemsize:
                return np.frombuffer(data, dtype)[0].item()
    raise ValueError("a numpy number that is damaged")


def _dtype(made: Made) -> np.dtype:
    match made.name, made.args, made.state:
        case "numpy.dtype", (str() as code, *_), (int(), "<" | ">" | "|" as order, *_):
            if len(code) == 2 and code[0] in "fiubc" and code[1] in "1248":
                return np.dtype(order + code)
    raise ValueError("a numpy array of something else than numbers")


def _bytes(value: Any) -> bytes:
    """Bytes, which older pickles spell as text."""
    match value:
        case bytes():
            return value
        case str() | Made("_codecs.encode", (str(), "latin1")):
            text = value if isinstance(value, str) else value.args[0]
            return text.encode("latin1")
    raise ValueError("a numpy array without its bytes")
