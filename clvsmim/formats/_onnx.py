"""The constants of an ONNX graph, under the names that they had in PyTorch.

An exporter transposes the weights of linear layers and calls them "onnx::MatMul_90"
or "val_12", and stores equal constants once; the nodes that use them still say which
layer they stand for. The package `onnx` parses the file. There are no checksums.
"""

import math
import mmap
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from clvsmim.formats._map import map_file
from clvsmim.formats._text import short

SCOPES = "pkg.torch.onnx.name_scopes"  # "['', 'blocks', 'blocks.0', 'linear']"
EXTERNAL = 1  # a tensor's data_location: in a file of its own


def read(data: mmap.mmap, path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: array}, {the file's name for a constant: what became of it}).

    Raises:
      ValueError: the package is not installed, no ONNX, a damaged constant, or one
        in another file that is not there or lies outside of the folder.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ValueError("it needs: pip install 'clvsmim[convert]'") from error
    try:
        graph = onnx.ModelProto.FromString(data[:]).graph
    except DecodeError as error:
        raise ValueError("it is damaged, or no ONNX file") from error
    found = _constants(onnx, graph, path)
    tensors, stands_for = dict(found), {}
    for node in graph.node:
        for theirs, ours, array in _uses(node, found):
            if ours not in found:
                tensors[ours] = array
                stands_for[theirs] = f"stands for {ours}"
    other = {}
    for name, array in found.items():
        if "." not in name and (name in stands_for or array.dtype.kind in "iub"):
            del tensors[name]  # no parameter has such a name: a step of the program
            other[name] = stands_for.get(name, f"{array.size} integers of the program")
    return tensors, other


def _constants(onnx: Any, graph: Any, path: str) -> dict[str, np.ndarray]:
    """Every initializer, and what only passes one on under a second name."""
    files: dict[str, mmap.mmap] = {}
    found: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        if not isinstance(tensor.name, str):  # the library then gives bytes
            raise ValueError(f"a constant with the name {tensor.name[:40]!r}: refused")
        if tensor.name in found:
            raise ValueError(f"{short(tensor.name)} stands there twice: refused")
        try:
            found[tensor.name] = _array(onnx, tensor, path, files)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{short(tensor.name)}: {error}") from error
    for node in graph.node:
        if node.op_type == "Identity" and node.input and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def _array(onnx: Any, tensor: Any, path: str, files: dict) -> np.ndarray:
    if tensor.data_location == EXTERNAL:
        return _external(onnx, tensor, path, files)
    array = onnx.numpy_helper.to_array(tensor)
    if array.dtype == object:
        raise ValueError("text, not numbers: refused")
    return array


def _external(onnx: Any, tensor: Any, path: str, files: dict) -> np.ndarray:
    """A view of the file beside this one that holds the numbers."""
    facts = {item.key: item.value for item in tensor.external_data}
    name = facts.get("location", "")
    if (
        not name
        or name[0] in "~/\\"  # a home, or absolute
        or ":" in name  # a bucket, or a drive of Windows
        or ".." in re.split(r"[/\\]", name)
    ):
        raise ValueError(f"its numbers lie in {short(name)!r}, outside: refused")
    if name not in files:
        try:
            files[name] = map_file(os.path.join(os.path.dirname(path), name))
        except (OSError, ValueError) as error:
            raise ValueError(f"its numbers lie in {short(name)}: {error}") from error
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    start, size = int(facts.get("offset", 0)), math.prod(tensor.dims)
    bytes_ = int(facts.get("length", size * dtype.itemsize))
    if min(start, *tensor.dims, 0) < 0 or bytes_ != size * dtype.itemsize:
        raise ValueError("its shape does not fit its size")
    if start + bytes_ > len(files[name]):
        raise ValueError(f"{short(name)} is cut off: fetch it again")
    return np.frombuffer(files[name], dtype, size, start).reshape(tensor.dims)


def _uses(node: Any, found: dict) -> Iterator[tuple[str, str, np.ndarray]]:
    """(constant, the parameter that it stands for at this node, as PyTorch has it)."""
    module = _module(node)
    for i, name in enumerate(node.input if module else ()):
        owner, _, leaf = name.rpartition(".")
        if name not in found or f"{owner}.".startswith(f"{module}."):
            continue
        if node.op_type in ("MatMul", "Gemm") and i == 1 and found[name].ndim == 2:
            yield name, f"{module}.weight", _as_linear(node, found[name])
        elif owner and not f"{module}.".startswith(f"{owner}."):
            yield name, f"{module}.{leaf}", found[name]


def _as_linear(node: Any, array: np.ndarray) -> np.ndarray:
    """(out, in): what a Gemm may have already, and a MatMul never."""
    kept = any(a.name == "transB" and a.i for a in node.attribute)
    return array if kept else array.T


def _module(node: Any) -> str:
    """The module that made a node, "blocks.0.attn.qkv"; "": the file does not say.

    As "/blocks/blocks.0/attn/qkv/MatMul", its name, or as the scopes beside it.
    """
    for item in node.metadata_props:
        if item.key == SCOPES:
            return ([""] * 2 + re.findall(r"'([^']*)'", item.value))[-2]
    parts = node.name.strip("/").split("/")[:-1]
    pairs = zip(parts, [*parts[1:], ""], strict=False)  # "blocks", then "blocks.0"
    return ".".join(part for part, next_ in pairs if not next_.startswith(f"{part}."))
