"""Files of a ViT that were changed, opened whole: refused in one line, or the same.

What has other names, shapes or types than a ViT is refused by the name of what is
wrong; of damaged bytes, what still opens is a network of the same structure.
"""

import random
import re

import numpy as np
import pytest
from test_formats import core
from test_mutated import PLAIN, no_code_and_no_hang, renamed, sealed_again

from clvsmim import formats, plugin
from clvsmim.formats import _rules

STRUCTURE, BYTES = 400, 200
TABLE = plugin.find("formats", "timm")().rules


def sound():
    """timm's names of a ViT of 2 blocks, and a classifier."""
    head = {"head.weight": np.ones((7, 8)), "head.bias": np.ones(7)}
    head = {name: x.astype(np.float32) for name, x in head.items()}
    return core(width=8, side=2, patch=2) | head


def npz(path, tensors):
    np.savez(path, **tensors)


def safetensors(path, tensors):
    pytest.importorskip("safetensors.numpy").save_file(tensors, path)


def pytorch(path, tensors):
    torch = pytest.importorskip("torch")
    torch.save({k: torch.from_numpy(x.copy()) for k, x in tensors.items()}, path)


WRITERS = {"x.npz": npz, "x.safetensors": safetensors, "x.pth": pytorch}


# Other structures: (tensors, the names of which one is wrong now)


def other_name(tensors, draw):
    """One letter or digit of a name is another one."""
    name = draw.choice(sorted(tensors))
    at = draw.choice([i for i, c in enumerate(name) if c != "."])
    letter = draw.choice([c for c in "abcdefgxyz0123" if c != name[at]])
    new = name[:at] + letter + name[at + 1 :]
    return without(tensors, name) | {new: tensors[name]}, {name, new}


def other_shape(tensors, draw):
    """The same numbers, on other axes."""
    name = draw.choice(sorted(tensors))
    x, size = tensors[name], tensors[name].size
    shapes = {x.shape[::-1], x.shape[1:] + x.shape[:1], (size,), (1, size), (size, 1)}
    shapes |= {(2, size // 2)} if size % 2 == 0 else set()
    shape = draw.choice(sorted(shapes - {x.shape}))
    return tensors | {name: np.ascontiguousarray(x.reshape(shape))}, {name}


def exchanged(tensors, draw):
    """Two of different shapes have each other's name."""
    one = draw.choice(sorted(tensors))
    rest = [n for n in sorted(tensors) if tensors[n].shape != tensors[one].shape]
    other = draw.choice(rest)
    return tensors | {one: tensors[other], other: tensors[one]}, {one, other}


def lost(tensors, draw):
    name = draw.choice(sorted(tensors))
    return without(tensors, name), {name}


def added(tensors, draw):
    """A part that no ViT of this family has."""
    name = draw.choice(("norm_pre.weight", "blocks.1.attn.q_norm.weight", "fc.bias"))
    return tensors | {name: np.ones(8, np.float32)}, {name}


def other_type(tensors, draw):
    name = draw.choice(sorted(tensors))
    return tensors | {name: tensors[name].astype(np.int64)}, {name}


def without(tensors, name):
    return {k: x for k, x in tensors.items() if k != name}


CHANGES = (other_name, other_name, other_shape, other_shape, exchanged, lost, added)
CHANGES += (other_type,)


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """What opening imports for the first time is code, but none of the file's."""
    path = str(tmp_path_factory.mktemp("sound") / "x.npz")
    npz(path, sound())
    assert formats.open_file(path, heads=2).family == "timm"


def opened(path):
    """The network, or the line that refuses it."""
    with no_code_and_no_hang():
        try:
            return formats.open_file(path, heads=2)
        except ValueError as error:
            line = str(error)
    assert line.startswith((f"{path}: ", f"cannot read {path}: "))
    assert line.isprintable() and len(line) < 2000
    return line


def spellings(name):
    """A name as messages have it, itself or our leaves."""
    found, numbers = _rules.match(name, TABLE)
    ours = [_rules.fill(leaf, numbers) for leaf in found.ours] if found else []
    return {blockless(x) for x in (name, *ours)}


def blockless(text):
    """All blocks as one: of two that differ it may be either that is wrong."""
    return re.sub(r"(?<=[._/])\d+(?=[./])", "*", text)


# The width is read off it, so that all others seem to be wrong.
TELLS = "blocks.0.norm1.weight"


@pytest.mark.parametrize("file", WRITERS)
def test_a_changed_structure_is_refused_by_name(file, tmp_path):
    path = str(tmp_path / file)
    WRITERS[file](path, sound())
    assert opened(path).family == "timm"
    share = range(sorted(WRITERS).index(file), STRUCTURE, len(WRITERS))
    for number in share:
        draw = random.Random(number)
        change = draw.choice(CHANGES)
        tensors, names = change(sound(), draw)
        WRITERS[file](path, tensors)
        line = opened(path)
        assert isinstance(line, str), f"{number}: {change.__name__} {names} opened"
        named = any(x in blockless(line) for n in names for x in spellings(n))
        others = TELLS in names and "of another shape" in line
        assert named or others, (number, change.__name__, names, line)


def test_damaged_bytes_are_refused_or_the_same_network(tmp_path):
    files = {}
    for file, write in WRITERS.items():
        write(str(tmp_path / file), sound())
        files[file] = (tmp_path / file).read_bytes()
    want, counts = opened(str(tmp_path / "x.npz")).encoder, {True: 0, False: 0}
    for number in range(BYTES):
        draw = random.Random(number)
        file = draw.choice(sorted(files))
        changes = (renamed, *PLAIN)
        changes += () if file == "x.safetensors" else (sealed_again,)
        (tmp_path / file).write_bytes(draw.choice(changes)(files[file], draw))
        found = opened(str(tmp_path / file))
        counts[isinstance(found, str)] += 1
        if not isinstance(found, str):
            report = found.report
            assert found.encoder == want, number
            assert len(report.matched) + len(report.dropped) >= len(sound()), number
    print(counts)
    assert min(counts.values()) > 0.05 * BYTES  # neither is vacuous
