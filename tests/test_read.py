"""Files of weights: what other libraries wrote, and what only looks like it."""

import argparse
import collections
import gzip
import io
import json
import os
import pathlib
import pickle
import re
import struct
import tarfile
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from clvsmim.formats import _map
from clvsmim.formats._read import File, read


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def state(torch):
    """Every type, shared storages, odd strides, no elements, no dimensions."""
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    floats = (torch.float64, torch.float16, torch.bfloat16, torch.complex64)
    ints = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    types = {str(t): torch.randn(5).to(t) for t in floats}
    types |= {str(t): torch.arange(5).to(t) for t in ints}
    return types | {
        "module.base": base,
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "größe 🙂": torch.ones(2),
    }


def equal(ours, theirs):
    theirs = theirs.detach()
    if theirs.dtype.itemsize == 2 and theirs.dtype.is_floating_point:
        assert ours.dtype.name in str(theirs.dtype)
        ours, theirs = ours.astype(np.float32), theirs.float()
    np.testing.assert_array_equal(ours, theirs.numpy(), strict=True)


HOW = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
}


@pytest.mark.parametrize("how", HOW)
def test_pytorch(how, torch, tmp_path):
    tensors = state(torch)
    path = str(tmp_path / "a file.pth.tar")
    args = argparse.Namespace(arch="vit_base", lr=0.1, where=pathlib.Path("/data"))
    whole = {
        "epoch": 300,
        "best": np.float64(83.25),
        "state_dict": collections.OrderedDict(tensors),
        "args": args,
        "table": np.arange(6.0).reshape(2, 3).T,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "betas": (0.9, 0.95)},
        "milestones": collections.Counter([30, 60]),
        "by name": collections.defaultdict(list, {"w": torch.ones(1)}),
        "kinds": {int, float},
    }
    torch.save(whole, path, **HOW[how])
    file = read(path)
    assert isinstance(file, File) and (file.path, file.kind) == (path, "PyTorch")
    for name, tensor in tensors.items():
        equal(file.tensors[f"state_dict/{name}"], tensor)
    assert len(file.tensors) == len(tensors) + 3
    np.testing.assert_array_equal(file.tensors["by name/w"], np.ones(1))
    np.testing.assert_array_equal(file.tensors["table"], whole["table"])
    np.testing.assert_array_equal(file.tensors["optimizer/state/0/exp_avg"], np.ones(3))
    assert file.other.pop("kinds").endswith("set, not read")  # by its protocol's name
    assert file.other == {
        "epoch": "300",
        "best": "83.25",
        "args": "argparse.Namespace, not read",
        "optimizer/betas": "(0.9, 0.95)",
        "milestones": "collections.Counter, not read",
    }
    assert not any(x.flags.writeable for x in file.tensors.values())


def test_pytorch_before_16_is_whole_or_refused(torch, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(9)}, path, **HOW["legacy"])
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert "1 bytes follow its last storage" in refused(path)
    path.write_bytes(content[:-1])
    assert "its storage" in refused(path) and "cut off" in refused(path)


def test_pytorch_keeps_what_is_shared_shared(torch, tmp_path):
    path = str(tmp_path / "x.pth")
    base = torch.randn(4, 4)
    heads = {"a": base, "b": base[1:], "again": {"x": base}}
    torch.save({"model": heads, "ema": heads}, path)
    file = read(path)
    assert np.shares_memory(file.tensors["model/a"], file.tensors["model/b"])
    assert np.shares_memory(file.tensors["model/a"], file.tensors["model/again/x"])
    assert len(file.tensors) == 3 and file.other == {"ema": "the same as model"}


def test_pytorch_newer_types_and_subclasses(torch, tmp_path):
    path = str(tmp_path / "x.pth")
    half = torch.arange(4.0).to(torch.float8_e4m3fn)
    wide = torch.arange(4).to(torch.uint16)
    named = torch.nn.Parameter(torch.ones(2))
    named.note = "attributes make it a parameter with a state"
    buffer = torch.nn.Buffer(torch.ones(3))
    torch.save({"half": half, "wide": wide, "named": named, "buffer": buffer}, path)
    tensors = read(path).tensors
    assert tensors["half"].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(tensors["half"].astype(float), np.arange(4))
    np.testing.assert_array_equal(tensors["wide"], np.arange(4, dtype=np.uint16))
    np.testing.assert_array_equal(tensors["named"], np.ones(2))
    np.testing.assert_array_equal(tensors["buffer"], np.ones(3))


def test_pytorch_without_checksums(torch, tmp_path):
    path = str(tmp_path / "x.pth")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(4.0)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    np.testing.assert_array_equal(read(path).tensors["w"], np.arange(4.0))


def test_pytorch_packed_again_by_a_zip_program(torch, tmp_path):
    path = str(tmp_path / "x.pth")
    torch.save({"w": torch.arange(400.0)}, path)
    with zipfile.ZipFile(path) as old:
        content = {x: old.read(x) for x in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)
    np.testing.assert_array_equal(read(path).tensors["w"], np.arange(400.0))


def test_tensors_are_views_of_the_mapped_file(torch, tmp_path):
    path = str(tmp_path / "x.pth")
    torch.save({"w": torch.arange(9.0)}, path)
    base = read(path).tensors["w"]
    while isinstance(base, np.ndarray):
        base = base.base
    assert type(base.obj if isinstance(base, memoryview) else base).__name__ == "mmap"


def test_safetensors(torch, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    path = str(tmp_path / "x.safetensors")
    tensors = {k: v.clone().contiguous() for k, v in state(torch).items()}
    library.save_file(tensors, path, metadata={"format": "pt"})
    file = read(path)
    assert file.kind == "safetensors" and file.other == {"format": "pt"}
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        equal(file.tensors[name], tensor)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    path = str(tmp_path / "x.npz")
    arrays = {
        "Transformer/encoderblock_0/query/kernel": np.arange(24.0).reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "scalar": np.float32(3),
        "half": np.arange(4).astype(ml_dtypes.bfloat16),
    }
    save(path, **arrays, note="made by hand")
    file = read(path)
    assert file.kind == "npz" and file.other == {"note": "made by hand"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.tensors[name], array)
        assert file.tensors[name].dtype == array.dtype


@pytest.fixture(scope="module")
def network(torch):
    nn = torch.nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.proj(self.qkv(x)[..., 8:16])

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(8), Attention()
            self.gamma = nn.Parameter(torch.full((8,), 0.1))

        def forward(self, x):
            return x + self.gamma * self.attn(self.norm(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4, 4)
            self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
            self.blocks = nn.Sequential(Block(), Block())
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
            return self.head(self.blocks(x)[:, 0])

    torch.manual_seed(0)
    return Network().eval()


EXPORTS = {
    "torchscript": {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}}},
    "dynamo": {"dynamo": True, "dynamic_shapes": ({0: "batch"},)},
    "not optimised": {"dynamo": True, "optimize": False, "external_data": False},
}
SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in list(EXPORTS)[1:]]


@pytest.mark.parametrize("how", ["torchscript", *SLOW])
@pytest.mark.filterwarnings("ignore")  # torch's exporters have many
def test_onnx_has_the_names_of_pytorch(how, torch, network, tmp_path):
    """Also of transposed weights, and of the two norms, which are stored once."""
    pytest.importorskip("onnx")
    if EXPORTS[how]["dynamo"]:
        pytest.importorskip("onnxscript")
    path = str(tmp_path / "x.onnx")
    torch.onnx.export(
        network, (torch.randn(2, 3, 8, 8),), path, input_names=["x"], **EXPORTS[how]
    )
    file = read(path)
    assert file.kind == "ONNX"
    expected = network.state_dict()
    assert set(file.tensors) == set(expected)
    assert not set(file.tensors) & set(file.other)
    for name, tensor in expected.items():
        equal(file.tensors[name], tensor)


def onnx_file(folder, **external):
    """A graph of one constant, by onnx's own writer; with its numbers elsewhere."""
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32), "a.weight")
    if external:
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in external.items():
            weight.external_data.add(key=key, value=str(value))
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    path = folder / "x.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    (folder / "x.data").write_bytes(np.arange(8, dtype=np.float32).tobytes())
    return str(path)


def test_onnx_numbers_in_a_second_file(tmp_path):
    path = onnx_file(tmp_path, location="x.data", offset=8, length=24)
    np.testing.assert_array_equal(read(path).tensors["a.weight"], np.arange(2.0, 8.0))


def test_onnx_names_that_are_no_text(tmp_path):
    path = pathlib.Path(onnx_file(tmp_path))
    path.write_bytes(path.read_bytes().replace(b"a.weight", b"\xff.weight"))
    assert "a constant with the name b'\\xff.weight'" in refused(path)


@pytest.mark.parametrize(
    "external, words",
    [
        ({"location": "../x.data"}, "outside: refused"),
        ({"location": "/etc/passwd"}, "outside: refused"),
        ({"location": "~/x.data"}, "outside: refused"),
        ({"location": "gs://bucket/x.data"}, "outside: refused"),
        ({"location": "C:x.data"}, "outside: refused"),
        ({"location": "gone"}, "lie in gone: no such file"),
        ({"location": "x.data", "offset": 16}, "x.data is cut off"),
        ({"location": "x.data", "length": 20}, "shape does not fit"),
        ({"location": "x.data", "offset": -4}, "shape does not fit"),
    ],
)
def test_onnx_numbers_that_are_not_there(external, words, tmp_path):
    assert words in refused(onnx_file(tmp_path, **external))


def refused(path):
    """The one line that a file is refused with."""
    with pytest.raises(ValueError) as caught:
        read(str(path))
    line = str(caught.value)
    assert line.startswith(f"cannot read {path}: ") and line.isprintable()
    assert len(line) < 600
    return line


def tar_file():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    return content.getvalue()


def npy_file(array, **options):
    content = io.BytesIO()
    np.save(content, array, **options)
    return content.getvalue()


def zip_of(files, how=zipfile.ZIP_STORED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", how) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return content.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 343249461\n"
LOOKALIKES = {
    "empty": (b"", "it is empty"),
    "page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "it is a web page"),
    "old page": (b"<HTML><body>Sign in</body></HTML>", "it is a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "XML message"),
    "pointer": (LFS, "a Git LFS pointer, not the file; run git lfs pull"),
    "json": (b'{"error": "not found"}', "it is JSON text"),
    "gzip": (gzip.compress(b"x" * 100), "it is gzip; unpack it first"),
    "tar": (tar_file(), "it is a tar archive; unpack it first"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 50, "HDF5"),
    "npy": (npy_file(np.ones(3)), "a single .npy array"),
    "text": (b"hello", "expected PyTorch, safetensors, .npz or ONNX, it begins with"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    "zip": (zip_of({"README": b"x"}), "a zip file of README: expected"),
    "no zip": (b"PK\x05\x06" + b"\0" * 18, "an empty zip file"),
    "magic": (b"PK\x03\x04", "zip directory is damaged or cut off"),
}


@pytest.mark.parametrize("name", LOOKALIKES)
@pytest.mark.parametrize("ending", [".pth", ".safetensors", ".onnx"])
def test_what_is_no_file_of_weights_is_named(name, ending, tmp_path):
    content, words = LOOKALIKES[name]
    path = tmp_path / f"x{ending}"
    path.write_bytes(content)
    if name == "text" and ending == ".safetensors":
        words = "its header is damaged"
    if name == "text" and ending == ".onnx":
        pytest.importorskip("onnx")
        words = "it is damaged, or no ONNX file"
    assert words in refused(path)


def test_a_folder_and_no_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "a folder; name a file in it: model.safetensors" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "gone.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "no such file" in refused(tmp_path / "pipe.pth")


def test_a_file_in_a_bucket(torch, tmp_path, monkeypatch):
    """A path with a scheme is fetched through epath, whatever is behind it."""
    torch.save({"w": torch.arange(3.0)}, tmp_path / "x.pth")
    real = _map.epath.Path
    monkeypatch.setattr(
        _map.epath, "Path", lambda x: real(x.replace("gs://bucket", str(tmp_path)))
    )
    file = read("gs://bucket/x.pth")
    np.testing.assert_array_equal(file.tensors["w"], np.arange(3.0))
    assert not file.tensors["w"].flags.writeable


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.onnx").write_bytes(b"\x08\x07")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert "pip install 'clvsmim[convert]'" in refused(tmp_path / "x.onnx")


class Call:
    """Pickles as a call of any function, and so runs it where a pickle is loaded."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


class State(str):
    """Has a `__setstate__`, which a pickle's BUILD would call."""

    def __setstate__(self, state):
        pathlib.Path(self).touch()


HOSTILE = {
    "posix.system": lambda mark: Call(os.system, f"touch {mark}"),
    "exec": lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"),
    "eval": lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
    "getattr": lambda mark: Call(getattr, "x", "upper"),
    "pathlib.Path.touch": lambda mark: Call(pathlib.Path.touch, mark),
    "test_read.Call": lambda mark: [Call],
    "test_read.State": lambda mark: State(str(mark)),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(name, how, torch, tmp_path):
    path, mark = tmp_path / "x.pth", tmp_path / "mark"
    content = {"model": {"w": torch.ones(2)}, "args": HOSTILE[name](mark)}
    torch.save(content, path, **HOW[how])
    line = refused(path)
    asked = re.search("it asks for (.*): refused", line).group(1)
    expected = {name, f"builtins.{name}", f"__builtin__.{name}"}
    if "Path" in name:  # protocol 2 gets a method with the function getattr
        expected |= {"__builtin__.getattr"}
    assert asked in expected
    assert not mark.exists()


def test_whole_modules_and_programs_are_refused(torch, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    line = refused(path)
    assert "torch.nn.modules.linear.Linear" in line
    assert "save it again as torch.save(model.state_dict()" in line
    torch.save({"sparse": torch.eye(2).to_sparse()}, path)
    assert "torch._utils._rebuild_sparse_tensor" in refused(path)


def forged(folder, data, **storages):
    """A file as torch.save lays it out, around a pickle of ours."""
    files = {"x/data.pkl": data, "x/byteorder": b"little", "x/version": b"3"}
    files |= {f"x/data/{key}": content for key, content in storages.items()}
    path = folder / "forged.pth"
    path.write_bytes(zip_of(files))
    return path


class Stored:
    """What torch.save's pickler asks to keep elsewhere."""

    def __init__(self, *pid):
        self.pid = pid


def pickled(torch, value, protocol=2):
    content = io.BytesIO()
    pickler = pickle.Pickler(content, protocol)
    pickler.persistent_id = lambda x: x.pid if isinstance(x, Stored) else None
    pickler.dump(value)
    return content.getvalue()


def tensor(torch, shape, strides, offset=0, size=6, key="k", kind=None, tag="storage"):
    stored = Stored(tag, kind or torch.FloatStorage, key, "cpu", size)
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, stored, offset, shape, strides, False, {})


ABSURD = {
    "behind its end": ({"shape": (2, 3), "strides": (3, 1), "offset": 1}, "not lie in"),
    "strides": ({"shape": (2, 3), "strides": (4, 1)}, "not lie in"),
    "2^60": ({"shape": (2**60,), "strides": (1,)}, "not lie in"),
    "2^60 of one": ({"shape": (2**60,), "strides": (0,)}, "not lie in"),
    "2^80": ({"shape": (2**80, 2**80), "strides": (0, 0)}, "not lie in"),
    "no elements": ({"shape": (0, 2**80), "strides": (1, 1)}, "w: "),
    "negative size": ({"shape": (-2, 3), "strides": (3, 1)}, "no counts"),
    "negative stride": ({"shape": (2, 3), "strides": (-3, 1)}, "no counts"),
    "negative offset": ({"shape": (2,), "strides": (1,), "offset": -1}, "do not fit"),
    "a bool": ({"shape": (True,), "strides": (1,)}, "no counts"),
    "text": ({"shape": ("2",), "strides": (1,)}, "no counts"),
    "fewer strides": ({"shape": (2, 3), "strides": (1,)}, "do not fit each other"),
    "70 dimensions": ({"shape": (1,) * 70, "strides": (1,) * 70}, "w: "),
    "storage": ({"shape": (2,), "strides": (1,), "size": 7}, "should have 28 bytes"),
    "huge storage": ({"shape": (2,), "strides": (1,), "size": 2**70}, "bytes, has 24"),
    "no storage": ({"shape": (2,), "strides": (1,), "key": "../k"}, "has none"),
    "wrong id": ({"shape": (2,), "strides": (1,), "tag": "module"}, "no storage"),
    "wrong class": ({"shape": (2,), "strides": (1,), "kind": dict}, "no storage"),
    "class text": ({"shape": (2,), "strides": (1,), "kind": "Float"}, "no storage"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_tensors_are_refused(name, torch, tmp_path):
    how, words = ABSURD[name]
    data = pickled(torch, {"w": tensor(torch, **how)})
    assert words in refused(forged(tmp_path, data, k=bytes(24)))


def test_the_forger_can_write_what_is_sound(torch, tmp_path):
    """So that the test above refuses for the right reason."""
    numbers = np.arange(6, dtype=np.float32)
    data = pickled(torch, {"w": tensor(torch, (2, 2), (3, 2))})
    path = forged(tmp_path, data, k=numbers.tobytes())
    np.testing.assert_array_equal(read(str(path)).tensors["w"], [[0, 2], [3, 5]])
    assert torch.load(path)["w"].tolist() == [[0, 2], [3, 5]]


def laughs(depth):
    """A list of two references to a list of two references to ..."""
    value = [[]]
    for _ in range(depth):
        value = [value, value]
    return value


FORGED = {
    "INST": (b"(X\7\0\0\0touch xiposix\nsystem\n.", "INST"),
    "INST of an allowed class": (b"(iargparse\nNamespace\n.", "INST"),
    "OBJ": (b"(cargparse\nNamespace\no.", "OBJ"),
    "EXT1": (b"\x82\x01.", "EXT1"),
    "EXT4": (b"\x84\x01\0\0\0.", "EXT4"),
    "PERSID": (b"Pstorage\n.", "PERSID"),
    "text": (b"S'" + b"\xff" * 10**5 + b"'\n.", "damaged"),
    "an unknown word": (b"I1\n.", "INT"),
    "a buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "keywords": (b"cargparse\nNamespace\n)}\x92.", "NEWOBJ_EX"),
    "a state for a list": (b"]}b.", "sets the state of a list"),
    "a state for text": (b"X\1\0\0\0a}b.", "sets the state of a str"),
    "items for text": (b"X\1\0\0\0aK\1a.", "adds items to a str"),
    "a call of a call": (b"cargparse\nNamespace\n)R)R.", "calls what is no function"),
    "a call of text": (b"X\1\0\0\0a)R.", "calls what is no function"),
    "arguments in a list": (b"cargparse\nNamespace\n]R.", "calls what is no function"),
    "a name with a newline": (b"\x8c\2os\x8c\3a\nb\x93.", "it asks for os.a\\nb"),
    "a name of numbers": (b"K\1K\2\x93.", "what is no name"),
    "a tuple as a key": (b"}(K\1t\x85K\2s.", "a tuple as a key"),
    "a list as a key": (b"}]K\2s.", "a list as a key"),
    "a deep tuple as a key": (b"}" + b")" + b"\x85" * 10**5 + b"K\2s.", "a tuple as a"),
    "a key without a value": (b"}(K\1u.", "a key without a value"),
    "an odd key": (b"}X\3\0\0\0a\nbK\2s.", "no tensors"),
    "laughs as a name": (pickle.dumps(laughs(60), 2)[:-1] + b"h\0\x93.", "no name"),
    "laughs as a state": (
        b"\x80\2\x8f" + pickle.dumps(laughs(60), 2)[2:-1] + b"b.",
        "no tensors",
    ),
    "one list, often": (
        b"](](" + b"K\1" * 10**4 + b"eq\0" + b"h\0" * 10**4 + b"e.",
        "no tensors",
    ),
    "an unknown opcode": (b"\xff.", "unknown"),
    "no end": (b"}", "pickle exhausted"),
    "no bytes": (b"X\xff\xff\xff\x7fa", "expected 2147483647 bytes"),
    "an empty stack": (b".", "damaged"),
    "no mark": (b"u.", "damaged"),
    "an unknown memo": (b"h\7.", "damaged"),
    "a memo of 2^31": (b"}r\xff\xff\xff\x7f.", "no tensors"),
    "deep lists": (b"]" * 10**4 + b"a" * (10**4 - 1) + b".", "deeper than 50 levels"),
    "deep dictionaries": (
        b"}K\1" * 10**4 + b"K\2" + b"s" * 10**4 + b".",
        "deeper than 50 levels",
    ),
    "a huge tuple": (b"(" + b"K\1" * 10**5 + b"t.", "no tensors"),
    "a huge number": (
        b"\x8b\xa0\x86\1\0" + b"\x7f" * 10**5 + b".",
        "no tensors|digits",
    ),
    "laughs": (pickle.dumps({"x": laughs(60)}, 2), "deeper than 50 levels"),
    "shallow laughs": (pickle.dumps({"x": laughs(40)}, 2), "no tensors"),
    "itself": (b"}q\0X\1\0\0\0ah\0s.", "no tensors"),
    "a deep parameter": (
        b"ctorch._utils\n_rebuild_parameter\nq\0"
        + b"h\0" * 9999
        + b")"
        + b"R\x85" * 9999
        + b"R.",
        "no tensors",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_pickles_are_refused(name, tmp_path):
    data, words = FORGED[name]
    line = refused(forged(tmp_path, data))
    assert any(word in line for word in words.split("|")), line


def test_names_that_are_no_names(torch, tmp_path):
    for key in ("a\nb", "\x1b[2J", "\ud800"):
        torch.save({key: torch.ones(1)}, tmp_path / "x.pth")
        assert "it uses the name" in refused(tmp_path / "x.pth")
    torch.save({"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)}, tmp_path / "x.pth")
    assert "a/b stands there twice" in refused(tmp_path / "x.pth")
    torch.save({"a" * 600: torch.ones(1)}, tmp_path / "x.pth")
    assert "a name of 600 characters" in refused(tmp_path / "x.pth")
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    assert "it holds no tensors, but epoch" in refused(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_directories_that_lie(tmp_path):
    path = tmp_path / "x.npz"
    one = npy_file(np.ones(3))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", one)
        file.writestr("a.npy", npy_file(np.zeros(3)))
    assert "names a.npy twice" in refused(path)
    for name in ("../a.npy", "/a.npy", "b/../../a.npy", "..\\a.npy"):
        path.write_bytes(zip_of({name: one}))
        assert "leads elsewhere: refused" in refused(path)
    assert list(tmp_path.parent.glob("a.npy")) == []


def test_a_comment_that_swallows_the_next_entries(tmp_path):
    path = tmp_path / "x.npz"
    data = bytearray(zip_of({f"{i}.npy": npy_file(np.ones(3)) for i in range(3)}))
    first, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    second = data.index(b"PK\1\2", first + 4)
    struct.pack_into("<H", data, first + 32, end - second)  # its comment's length
    path.write_bytes(data)
    assert "zip directory is damaged: 1 entries are left" in refused(path)


def test_zip_bombs(tmp_path):
    path = tmp_path / "x.npz"
    zeros = npy_file(np.zeros(10**6))
    path.write_bytes(zip_of({"a.npy": zeros}, zipfile.ZIP_DEFLATED))
    assert read(str(path)).tensors["a"].shape == (10**6,)  # zeros may be many
    size = struct.pack("<I", len(zeros))
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 2**29)))
    assert "bytes that would grow to 536870912: refused" in refused(path)


def test_an_entry_that_grows_beyond_what_the_directory_says(tmp_path):
    path = tmp_path / "x.npz"
    data = zip_of({"a.npy": bytes(2**26)}, zipfile.ZIP_DEFLATED)
    path.write_bytes(data.replace(struct.pack("<I", 2**26), struct.pack("<I", 99)))
    tracemalloc.start()
    try:
        assert "the zip entry a.npy is damaged" in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_entries_that_share_their_bytes(tmp_path):
    """A directory that names one entry a thousand times costs no thousandfold time."""
    content = zip_of({"a.npy": npy_file(np.ones(999))})
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    entry = content[start:end]
    names = [entry.replace(b"a.npy", b"%05d" % i) for i in range(1000)]
    directory = b"".join(names)
    tail = struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, 1000, 1000, len(directory), start, 0
    )
    (tmp_path / "x.npz").write_bytes(content[:start] + directory + tail)
    assert "lie on top of each other" in refused(tmp_path / "x.npz")


def test_npz_of_objects(tmp_path):
    path, mark = tmp_path / "x.npz", tmp_path / "mark"
    np.savez(path, a=np.array([Call(os.system, f"touch {mark}")], dtype=object))
    assert "a holds object, not numbers: refused" in refused(path)
    assert not mark.exists()


def npy_header(text, body=b""):
    text = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + body


NPY = {
    "negative": (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }",
        "not fit",
    ),
    "2^60": (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }",
        "its shape does not fit",
    ),
    "code": ("__import__('os').system('true')", "the header of a is damaged"),
    "deep": ("(" * 100, "the header of a is damaged"),
    "words": ("hello", "the header of a is damaged"),
}


@pytest.mark.parametrize("name", NPY)
def test_npz_with_absurd_headers(name, tmp_path):
    text, words = NPY[name]
    (tmp_path / "x.npz").write_bytes(zip_of({"a.npy": npy_header(text, bytes(4))}))
    assert words in refused(tmp_path / "x.npz")


def st(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SAFETENSORS = {
    "cut": (st({"a": entry()}, bytes(7)), "a ends behind the file"),
    "longer": (st({"a": entry()}, bytes(9)), "do not fill the file"),
    "gap": (st({"a": entry(offsets=(4, 12))}, bytes(12)), "do not fill the file"),
    "overlap": (st({"a": entry(), "b": entry()}, bytes(8)), "do not fill the file"),
    "size": (st({"a": entry(shape=(3,))}, bytes(8)), "does not fit its 8 bytes"),
    "2^60": (st({"a": entry(shape=(2**60, 0))}, b""), "does not fit its 8 bytes"),
    "negative": (st({"a": entry(shape=(-2, -1))}, bytes(8)), "no count"),
    "fraction": (st({"a": entry(shape=(2.0,))}, bytes(8)), "no count"),
    "type": (st({"a": entry("F31")}, bytes(8)), "unknown type F31"),
    "twice": (
        st(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "names something twice",
    ),
    "words": (st(b"{hello}"), "its header is damaged"),
    "deep": (st(b'{"a":' + b"[" * 10**5), "its header is damaged"),
    "entry": (st({"a": [1]}), "not described as a tensor"),
    "length": (struct.pack("<Q", 2**40) + b"{}", "header is damaged, or longer"),
    "remarks": (st({"__metadata__": 3, "a": entry()}, bytes(8)), "no dictionary"),
    "name": (st({"a\nb": entry()}, bytes(8)), "it uses the name"),
    "nothing": (st({}), "holds no tensors, but nothing"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_with_absurd_headers(name, tmp_path):
    content, words = SAFETENSORS[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    assert words in refused(tmp_path / "x.safetensors")
