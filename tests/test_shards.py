"""A checkpoint in several files, opened by its index: whole, or one line."""

import json
import pathlib
import warnings

import numpy as np
import pytest
import torchvision_stub

from clvsmim import convert, foreign, formats
from clvsmim.formats._read import read

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder that transformers wrote, and the names and numbers of its network."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("shards")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchvision_stub.install()
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
        more = {"num_attention_heads": 3, "image_size": 32, "patch_size": 8}
        model = transformers.ViTModel(
            transformers.ViTConfig(**sizes, **more), add_pooling_layer=False
        )
        model.save_pretrained(folder / "one")
        model.save_pretrained(folder / "many", max_shard_size="100KB")
    assert {p.name for p in folder.glob("many/*.safe*")} == {INDEX, FIRST, SECOND}
    return folder


@pytest.fixture
def copy(theirs, tmp_path):
    """Its files as {name: content}, and a function that writes them and opens them."""
    files = {p.name: p.read_bytes() for p in (theirs / "many").iterdir()}

    def write(files, name=INDEX):
        for there, content in files.items():
            (tmp_path / there).write_bytes(content)
        return str(tmp_path / name)

    return files, write


def assert_same(got, want):
    assert set(got) == set(want)
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x)


def test_an_index_opens_all_that_it_names(theirs):
    path = str(theirs / "many" / INDEX)
    file = read(path)
    assert_same(file.tensors, read(f"{theirs}/one/model.safetensors").tensors)
    assert file.kind == "sharded safetensors"
    opened = formats.open_file(path)
    assert opened.family == "hf_vit" and opened.encoder["norm_eps"] == 1e-12
    assert "a sharded safetensors file" in str(opened.report)


def test_shards_of_pytorch(theirs, tmp_path):
    torch = pytest.importorskip("torch")
    whole = read(f"{theirs}/one/model.safetensors").tensors
    shards = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    where = {name: shards[i % 3] for i, name in enumerate(whole)}
    for shard in shards:
        own = [name for name in whole if where[name] == shard]
        part = {name: torch.tensor(np.array(whole[name])) for name in own}
        torch.save(part, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same(read(str(index)).tensors, whole)
    with pytest.raises(ValueError, match=r"open pytorch_model\.bin\.index\.json bes"):
        read(str(tmp_path / shards[1]))


def test_a_folder_of_shards_is_a_source(theirs, copy, tmp_path):
    convert.main([str(theirs / "many"), str(tmp_path / "run")])
    files, write = copy
    path = write(files)
    assert foreign.find(str(tmp_path)) == path
    assert foreign.name_of(path) == tmp_path.name
    before = foreign.sha256(path)
    changed = files[SECOND][:-1] + bytes([files[SECOND][-1] ^ 1])
    assert foreign.sha256(write({SECOND: changed})) != before


def test_one_shard_alone_names_the_index(theirs, copy):
    files, write = copy
    with pytest.raises(ValueError, match=f"one shard of several; open {INDEX} beside"):
        read(write(files, FIRST))
    alone = (theirs / "one" / "model.safetensors").read_bytes()
    assert read(write({(n := "model-00001-of-00001.safetensors"): alone}, n)).tensors


def moved(files, **changes):
    """The index with other lines in its weight_map; None takes one out."""
    index = json.loads(files[INDEX])
    where = index["weight_map"] | changes
    where = {k: v for k, v in where.items() if v is not None}
    return files | {INDEX: json.dumps(index | {"weight_map": where}).encode()}


NAME = "layernorm.bias"
CASES = {
    "a shard is not there": (
        lambda f: {k: v for k, v in f.items() if k != SECOND},
        f"its shard {SECOND}: no such file",
    ),
    "a shard is cut off": (
        lambda f: f | {SECOND: f[SECOND][:-9]},
        f"its shard {SECOND}: .*cut off",
    ),
    "a tensor is not there": (
        lambda f: moved(f, x=FIRST),
        f"its shard {FIRST} lacks x$",
    ),
    "a tensor is in no index": (
        lambda f: moved(f, **{NAME: None}),
        f"holds {NAME}, which the index does not place there",
    ),
    "a tensor is elsewhere": (
        lambda f: moved(f, **{NAME: FIRST if where(f) == SECOND else SECOND}),
        rf"lacks {NAME}|holds {NAME}",
    ),
    "up": (lambda f: moved(f, x="../x.safetensors"), r"the shard '\.\./x.*beside it"),
    "root": (lambda f: moved(f, x="/etc/passwd"), "the shard '/etc/passwd'; expected"),
    "back": (lambda f: moved(f, x="a\\b"), "the shard .*; expected a file beside it"),
    "dots": (lambda f: moved(f, x=".."), r"the shard '\.\.'; expected a file"),
    "a number": (lambda f: moved(f, x=3), "the shard '3'; expected a file beside it"),
    "itself": (lambda f: moved(f, x=INDEX), f"its shard {INDEX}: it is JSON text"),
    "no map": (lambda f: f | {INDEX: b"{}"}, "no weight_map"),
    "a list": (lambda f: f | {INDEX: b"[1]"}, "no weight_map"),
    "pointer": (
        lambda f: f | {INDEX: b"version https://git-lfs.github.com/spec/v1\noid"},
        "Git LFS pointer, not the file",
    ),
    "page": (lambda f: f | {INDEX: b"\n<!DOCTYPE html>"}, "it is a web page"),
    "cut": (lambda f: f | {INDEX: f[INDEX][:-9]}, "it is no JSON"),
    "deep": (lambda f: f | {INDEX: b"[" * 200_000}, "damaged|no JSON"),
}


def where(files):
    return json.loads(files[INDEX])["weight_map"][NAME]


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_whole_is_one_line(copy, case):
    files, write = copy
    change, message = CASES[case]
    with pytest.raises(ValueError, match=message) as caught:
        read(write(change(files)))
    line = str(caught.value)
    assert line.startswith("cannot read ") and line.isprintable() and len(line) < 700


def test_all_shards_are_fetched_from_the_hub(theirs, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    fetched = []

    def download(source, name):
        fetched.append(name)
        return str(theirs / "many" / name)

    there = [p.name for p in (theirs / "many").iterdir()]
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "HfApi", lambda: HubOf(there))
    assert pathlib.Path(convert.fetched("owner/name")).name == INDEX
    assert fetched == ["config.json", INDEX, FIRST, SECOND]


class HubOf:
    """Stands for the hub's list of one repository."""

    def __init__(self, names):
        self.names = names

    def list_repo_files(self, source):
        return self.names
