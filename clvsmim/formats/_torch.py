"""What torch.save wrote, without torch: a pickle, and the numbers beside it.

Since PyTorch 1.6 the file is a zip with one entry per storage, whose checksums are
compared. Before, it is a row of pickles followed by the storages, with no checksum:
there a changed number is not noticed, a changed structure is.
"""

import io
import math
import mmap
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from clvsmim.formats import _numpy, _pickles
from clvsmim.formats._pickles import PERSISTENT, Made, Name
from clvsmim.formats._text import short, shown

Tensors = tuple[dict[str, np.ndarray], dict[str, str]]

PICKLE = "data.pkl"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the number below
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

STORAGES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
}
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()}
UNTYPED = {"torch.UntypedStorage", "torch.storage.UntypedStorage"}
DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 "
DTYPES += "uint64 bool complex64 complex128 float8_e4m3fn float8_e5m2"
DTYPES = {f"torch.{name}" for name in DTYPES.split()}

# Calls that give their first argument, or their first argument's call of the third.
WRAPPERS = {"torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"}
WRAPPERS |= {"torch._utils._rebuild_parameter_with_state"}
SUBCLASS = "torch._tensor._rebuild_from_type_v2"
REBUILD = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
READ = {*STORAGES, *UNTYPED, *DTYPES, *WRAPPERS, SUBCLASS, *REBUILD, *_numpy.NAMES}
READ |= {*_pickles.DICTS, "torch.Size", "torch.Tensor"}

# Settings and counters that lie beside the weights: named to the user, never read.
SKIPPED = """
argparse.Namespace types.SimpleNamespace easydict.EasyDict yacs.config.CfgNode
pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath
pathlib.PureWindowsPath pathlib._local.PosixPath pathlib._local.WindowsPath
datetime.datetime datetime.date datetime.timedelta collections.Counter
collections.deque
torch.device torch.strided torch.serialization._get_layout typing.Any
omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig
omegaconf.base.ContainerMetadata omegaconf.base.Metadata omegaconf.nodes.AnyNode
ml_collections.config_dict.config_dict.ConfigDict
pytorch_lightning.utilities.parsing.AttributeDict
lightning_fabric.utilities.data.AttributeDict
lightning.fabric.utilities.data.AttributeDict
"""
BUILTINS = (
    "set frozenset complex range xrange slice int long float str unicode bytes bool "
)
BUILTINS += "list tuple object"
ALLOWED = frozenset(READ | set(SKIPPED.split())).union(
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")  # the second: pickles of protocol 2
    for name in BUILTINS.split()
)
DEEPEST = 50  # a state dict is 1 deep, with its optimizer 4
LONGEST = 500  # characters of a name, with all keys on the way


def read_zip(entries: Mapping[str, memoryview]) -> Tensors:
    """Of the file that torch.save writes today.

    Raises:
      ValueError: a program (TorchScript), a pickle that asks for anything but tensors
        and plain settings, or a tensor that does not lie in its storage.
    """
    root, *more = (x[: -len(PICKLE)] for x in entries if x.endswith(f"/{PICKLE}"))
    if more:
        raise ValueError(
            f"it holds several files of torch.save: {shown([root, *more])}"
        )
    if f"{root}constants.pkl" in entries:
        raise ValueError(
            "it holds a TorchScript program, not only weights: refused; where you "
            "trust it, torch.save(torch.jit.load(FILE).state_dict(), ...)"
        )
    if bytes(entries.get(f"{root}byteorder", b"little")) != b"little":
        raise ValueError("it was written on a big-endian machine: not read here")
    pickle = io.BytesIO(entries[root + PICKLE])
    tree, stored = _pickles.load(pickle, ALLOWED)
    storages = {}
    for dtype, key, size in map(_storage, stored):
        raw = entries.get(f"{root}data/{key}")
        if raw is None or len(raw) != size * dtype.itemsize:
            raise ValueError(
                f"its storage {short(key)} should have {size * dtype.itemsize} bytes, "
                f"has {'none' if raw is None else len(raw)}"
            )
        storages[key] = raw
    return _split(tree, storages)


def read_legacy(data: mmap.mmap) -> Tensors:
    """Of the file that torch.save wrote before 1.6; errors as above."""
    data.seek(0)
    magic, protocol, system, tree, keys = (
        _pickles.load(data, ALLOWED) for _ in range(5)
    )
    listed = isinstance(keys[0], list) and all(isinstance(x, str) for x in keys[0])
    if magic[0] != MAGIC or protocol[0] != PROTOCOL or not listed:
        raise ValueError("it begins as a file of torch.save does and goes on otherwise")
    if not (isinstance(system[0], dict) and system[0].get("little_endian") is True):
        raise ValueError("it was written on a big-endian machine: not read here")
    described = {key: (dtype, size) for dtype, key, size in map(_storage, tree[1])}
    if sorted(keys[0]) != sorted(described):
        raise ValueError("its list of storages is not that of its tensors")
    storages, place, view = {}, data.tell(), memoryview(data)
    for key in keys[0]:
        dtype, size = described[key]
        end = place + 8 + size * dtype.itemsize
        if int.from_bytes(data[place : place + 8], "little") != size or end > len(data):
            raise ValueError(f"its storage {short(key)} is damaged or cut off")
        storages[key] = view[place + 8 : end]
        place = end
    if place != len(data):
        raise ValueError(f"{len(data) - place} bytes follow its last storage: refused")
    return _split(tree[0], storages)


def _storage(kept: Made) -> tuple[np.dtype, str, int]:
    """(dtype, key, number of elements) that a persistent id stands for."""
    match kept.args:
        case (("storage", Name(kind), str() as key, str(), int() as size, *view),):
            if view not in ([], [None]):
                raise ValueError("it has views of storages (PyTorch before 0.4)")
            if size >= 0 and (kind in STORAGES or kind in UNTYPED):
                return np.dtype(STORAGES.get(kind, np.uint8)), key, size
    raise ValueError("its pickle keeps something elsewhere that is no storage: refused")


def _split(tree: Any, storages: Mapping[str, memoryview]) -> Tensors:
    """What is a tensor, and what else there was, both by the keys on the way."""
    tensors, other, known = {}, {}, {}
    for name, value, first in _leaves(tree, "", {}, DEEPEST):
        if name in tensors or name in other:
            raise ValueError(f"{short(name)} stands there twice: refused")
        if first:
            other[name] = short(f"the same as {first}")
            continue
        if id(value) not in known:  # one object may have many names
            try:
                known[id(value)] = _value(value, storages)
            except ValueError as error:
                raise ValueError(f"{short(name)}: {error}") from error
        found = known[id(value)]
        (tensors if isinstance(found, np.ndarray) else other)[name] = found
    return tensors, other


def _leaves(
    node: Any, name: str, seen: dict[int, str], deep: int
) -> Iterator[tuple[str, Any, str]]:
    """(keys joined by "/", value, "") of all that is no container of others.

    A container is entered once; the second time there is its first name instead of
    "". So the time is that of the file's length, whatever refers to whatever.
    """
    if len(name) > LONGEST:
        raise ValueError(f"a name of {len(name)} characters, {short(name)}: refused")
    if not isinstance(node, dict | list | tuple):
        yield name, node, ""
        return
    if node and id(node) in seen:
        yield name, node, seen[id(node)]
        return
    seen[id(node)] = name
    if not isinstance(node, dict) and all(isinstance(x, _pickles.Plain) for x in node):
        yield name, node, ""
        return
    if not deep:
        raise ValueError(f"{short(name)} lies deeper than {DEEPEST} levels: refused")
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        inner = f"{name}/{key}" if name else str(key)
        yield from _leaves(child, inner, seen, deep - 1)


def _value(value: Any, storages: Mapping[str, memoryview]) -> np.ndarray | str:
    """The array of a tensor or of a numpy array; else what it is, in a few words."""
    value = _inside(value)
    match value:
        case Made(name) if name in REBUILD:
            return _tensor(value, storages)
        case Made(name) if name in _numpy.ARRAY:
            return _numpy.array(value)
        case Made(name) if name in _numpy.SCALAR:
            return short(repr(_numpy.scalar(value)))
        case Made(name) | Name(name):
            return f"{name}, not read"
    return short(reprlib.repr(value))


def _inside(value: Any) -> Any:
    """The tensor of a parameter, or of a subclass."""
    for _ in range(4):  # each around the other at most
        match value:
            case Made(name, (inner, *_)) if name in WRAPPERS:
                value = inner
            case Made(name, args) if name == SUBCLASS:
                value = _unwrapped(args)
    return value


def _unwrapped(args: tuple) -> Made:
    match args:
        case (Name(function), Name(), tuple() as inner, *_):
            return Made(function, inner)
    raise ValueError("a tensor subclass that is not described as such")


def _tensor(made: Made, storages: Mapping[str, memoryview]) -> np.ndarray:
    """A view of the storage, with the tensor's own offset, shape and strides."""
    match made.args:
        case (Made(name, _) as kept, int() as offset, shape, strides, *rest) if (
            name == PERSISTENT
        ):
            pass
        case _:
            raise ValueError("a tensor that is not described as such")
    dtype, key, _ = _storage(kept)
    if made.name.endswith("_v3"):
        dtype = _dtype_v3(rest)
    shape, strides = _numpy.counts(_size(shape)), _numpy.counts(_size(strides))
    if offset < 0 or len(shape) != len(strides):
        raise ValueError("its shape and strides do not fit each other")
    size = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    room = len(storages[key]) // dtype.itemsize
    if size and not (last < room and size <= room):
        raise ValueError(
            f"shape {short(str(shape))} with strides {short(str(strides))} from "
            f"{offset} does not lie in its storage of {room}"
        )
    if not size:
        return np.zeros(shape, dtype)
    steps = [s * dtype.itemsize for s in strides]
    return np.ndarray(shape, dtype, storages[key], offset * dtype.itemsize, steps)


def _size(value: Any) -> Any:
    match value:
        case Made("torch.Size", (inner, *_)):
            return inner
    return value


def _dtype_v3(rest: list) -> np.dtype:
    """Of (requires_grad, hooks, dtype, ...): the type that an untyped storage has."""
    match rest:
        case (_, _, Name(full), *_) if full in DTYPES:
            short_name = full.removeprefix("torch.")
            return np.dtype(getattr(ml_dtypes, short_name, short_name))
    raise ValueError("a tensor of an unknown type")
