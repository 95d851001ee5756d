"""Damaged and hostile files, as they are read: refused in one line, or sound.

A file with checksums (PyTorch's zip, .npz) is read as it was written or not at all,
but for the names in an .npz, which have none.
One without (safetensors, ONNX, PyTorch before 1.6), or whose checksums were made
again after the change, may have other numbers and names, which are for the rules of
its family to judge; no tensor of it reaches beyond the file, and no part is missing.
With those of test_mutated_networks.py, which go through the rules, they are 2,000.
"""

import contextlib
import io
import pickle
import random
import re
import signal
import sys
import threading
import zipfile

import numpy as np
import pytest

from clvsmim.formats._read import read

FILES = 1400
SECONDS = 20  # for one file, which takes milliseconds: more is a hang
SEALED = {"x.pth", "x.npz", "packed.npz"}  # files with checksums
CODE = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec"}
CODE |= {"pickle.find_class", "marshal.loads", "ctypes.dlopen", "socket.connect"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{name: content} of small files, each by the library that the format is of."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sound")
    tensors = {
        f"module.blocks.{i}.{name}": torch.randn(shape)
        for i in range(2)
        for name, shape in {"qkv.weight": (12, 4), "qkv.bias": (12,)}.items()
    }
    tensors |= {
        "half": torch.ones(5).bfloat16(),
        "index": torch.arange(9).reshape(3, 3),
    }
    whole = {"epoch": 3, "model": tensors | {"t": tensors["index"].t()}}
    torch.save(whole, folder / "x.pth")
    torch.save(whole, folder / "old.pth", _use_new_zipfile_serialization=False)
    arrays = {k: v.float().numpy() for k, v in tensors.items()}
    np.savez(folder / "x.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    with contextlib.suppress(ImportError):
        import safetensors.torch

        safetensors.torch.save_file(tensors, folder / "x.safetensors", {"by": "pt"})
    with contextlib.suppress(ImportError):
        import onnx

        constants = [onnx.numpy_helper.from_array(v, k) for k, v in arrays.items()]
        graph = onnx.helper.make_graph([], "g", [], [], constants)
        onnx.save(onnx.helper.make_model(graph), folder / "x.onnx")
    return {p.name: (read(str(p)), p.read_bytes()) for p in folder.iterdir()}


def flipped(data, draw):
    """One to eight bytes, anywhere, get another value."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
    return bytes(data)


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def moved(data, draw):
    """A piece is left out, doubled, made zero, or put elsewhere."""
    a, b = sorted(draw.randrange(len(data)) for _ in range(2))
    piece, rest = data[a:b], data[:a] + data[b:]
    c = draw.randrange(len(rest) + 1)
    return draw.choice(
        (
            rest,
            data[:b] + piece + data[b:],
            data[:a] + bytes(b - a) + data[b:],
            rest[:c] + piece + rest[c:],
        )
    )


def renamed(data, draw):
    """One of the words in it, wherever it stands or in one place only."""
    word = draw.choice(re.findall(rb"[A-Za-z_.]{3,}", data))
    other = bytes(draw.choice(b"abcxyz._/0\n\\") for _ in word)
    return data.replace(word, other, draw.choice((1, -1)))


def resized(data, draw):
    """One of the numbers that shapes and offsets are made of."""
    number = draw.choice((2, 3, 4, 5, 9, 12, 48))
    spelt = {
        "opcode": lambda n: b"K" + n.to_bytes(1, "little"),
        "text": lambda n: str(n).encode(),
        "byte": lambda n: n.to_bytes(1, "little"),
    }
    spell = spelt[draw.choice(list(spelt))]
    return data.replace(
        spell(number), spell(draw.randrange(256)), draw.choice((1, 2, -1))
    )


def sealed_again(data, draw):
    """One entry of a zip is changed, and the zip written with its new checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        content = {name: file.read(name) for name in file.namelist()}
    name = draw.choice([x for x in content if x.endswith((".pkl", ".npy"))])
    change = draw.choice((flipped, cut, moved, renamed, resized))
    content[name] = change(content[name], draw)
    return zipped(content)


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, data in content.items():
            out.writestr(name, data)
    return file.getvalue()


def hostile(data, draw):
    """A pickle of opcodes thrown together, in place of the one that was there."""
    parts = [
        *(bytes([code]) for code in b"()]}.012NabeoRstu\x81\x85\x86\x87\x88\x90\x94"),
        *(b"cposix\nsystem\n", b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n"),
        *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"Q"),
        *(b"cnumpy\ndtype\n", b"cargparse\nNamespace\n", b"(iposix\nsystem\n"),
        *(
            b"X\4\0\0\0true",
            b"K\3",
            b"J\xff\xff\xff\xff",
            b"q\0",
            b"h\0",
            b"r\0\0\0\x7f",
        ),
        *(b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x93", b"\x82\1", b"G" + bytes(8)),
    ]
    made = b"".join(draw.choice(parts) for _ in range(draw.choice((9, 99, 999))))
    start = draw.choice((b"\x80\2", pickle.dumps({"model": {}}, 2)[:-1]))
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        content = {name: file.read(name) for name in file.namelist()}
    return zipped(content | {"x/data.pkl": start + made + b"."})


PLAIN = (flipped, cut, moved, renamed, resized)
KINDS = {name: (*PLAIN, sealed_again) for name in SEALED} | {
    "x.pth": (*PLAIN, sealed_again, hostile, hostile)
}


def mutated(written, number):
    """(name of the sound file, what was done to it, content)."""
    draw = random.Random(number)
    name = draw.choice(sorted(written))
    change = draw.choice(KINDS.get(name, PLAIN))
    content = change(written[name][1], draw)
    return name, change, content


RAN = []
WATCHED = threading.local()


def watch(event, args):
    if getattr(WATCHED, "now", False) and event in CODE:
        RAN.append(event)


sys.addaudithook(watch)


@contextlib.contextmanager
def no_code_and_no_hang():
    def late(*_):
        raise AssertionError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    WATCHED.now = True
    try:
        yield
    finally:
        WATCHED.now = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not RAN


def outcome(path):
    """What was read, or the line that refuses it."""
    with no_code_and_no_hang():
        try:
            file = read(path)
        except ValueError as error:
            line = str(error)
            assert line.startswith(f"cannot read {path}: ") and line.isprintable()
            assert len(line) < 700
            return None
        for name, array in file.tensors.items():
            assert name.isprintable()
            array.tobytes()
        return file


def same(a, b, named):
    """Whether two files hold the same; `named`: under the same names."""
    if not named:
        return list(described(a).values()) == list(described(b).values())
    return a.other == b.other and described(a) == described(b)


def described(file):
    return {k: (v.shape, v.dtype, v.tobytes()) for k, v in file.tensors.items()}


def check(written, numbers, folder):
    """How many files were refused, and how many read, of which kind."""
    counts = {True: 0, False: 0}
    for number in numbers:
        name, change, content = mutated(written, number)
        path = folder / name
        path.write_bytes(content)
        file = outcome(str(path))
        counts[file is None] += 1
        if file is None:
            continue
        checked = name in SEALED and change not in (sealed_again, hostile)
        if checked or change is cut:
            named = name == "x.pth" or change is not renamed  # entries of .npz
            assert same(file, written[name][0], named), f"{number}: {name} has changed"
        elif name != "packed.npz":
            assert max(x.nbytes for x in file.tensors.values()) <= len(content), number
    return counts


def test_the_watch_sees_code(tmp_path):
    with pytest.raises(AssertionError), no_code_and_no_hang():
        exec("1")
    RAN.clear()


def test_mutated_files_are_refused_or_sound(written, tmp_path):
    counts = check(written, range(FILES), tmp_path)
    print(counts)
    assert min(counts.values()) > 0.1 * FILES  # neither is vacuous
