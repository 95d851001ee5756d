"""Prepared TFDS data sets, as ArrayRecord and as TFRecord files."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import sets
import tensorflow_datasets
from sets import NAMES, picture, prepare, records, upload

from clvsmim.data import Unreadable, tfds, tfrecords
from clvsmim.data.crops import to_array

SOURCES = {"array_record": tfds, "tfrecord": tfrecords}


@pytest.fixture(scope="module", params=SOURCES)
def prepared(request, tmp_path_factory):
    """(module, folder of a set of 7 training and 4 test images)."""
    root = tmp_path_factory.mktemp(request.param)
    splits = {"train": records(7, broken=(5,)), "test": records(4, 7)}
    prepare(root, request.param, splits)
    return SOURCES[request.param], str(root)


def make(prepared, split="train", **changes):
    module, root = prepared
    numbers = {
        "dataset": "tiny_pets",
        "train": "train",
        "test": "test",
        "lengths": (0, 0),
        "classes": 0,
        "dir": root,
    }
    return module.make(split=split, **numbers | changes)


def test_items(prepared):
    source = make(prepared)
    assert source.name == "tiny_pets" and source.class_names == NAMES
    assert len(source) == 7 and source.num_classes == 3
    for i in (0, 3, 4, 6):  # of both files
        item = source[i]
        assert (item["label"], item["index"]) == (i % 3, i)
        assert item["image"].filename == f"tiny_pets/train[{i}]"
        difference = to_array(item["image"]) - np.asarray(picture(i), np.int32)
        assert np.abs(difference).mean() < 6  # JPEG; another picture: over 30
    with pytest.raises(Unreadable, match=r"cannot read the image tiny_pets/train\[5\]"):
        source[5]
    with pytest.raises(IndexError):
        source[7]


def test_splits(prepared):
    test = make(prepared, "test")
    assert [test[i]["label"] for i in range(len(test))] == [1, 2, 0, 1]
    part = make(prepared, train="train[30%:80%]")  # 2 to 5: from the middle of a file
    assert [part[i]["label"] for i in range(3)] == [2, 0, 1]
    assert len(part) == 4


def test_workers_open_their_own(prepared):
    source = make(prepared)
    assert source[0]["label"] == 0
    again = pickle.loads(pickle.dumps(source))
    assert (again.length, again.classes) == (7, 3) and "opened" not in vars(again)
    np.testing.assert_array_equal(
        to_array(again[4]["image"]), to_array(source[4]["image"])
    )


def test_what_is_given_needs_no_file(prepared):
    numbers = {"lengths": (1281167, 50000), "classes": 1000, "dir": "/nowhere"}
    source = make(prepared, dataset="imagenet2012", **numbers)
    assert len(source) == 1281167 and source.num_classes == 1000
    with pytest.raises(ValueError, match="file_format='array_record'"):
        source[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": (6, 0)}, "tiny_pets, train: 7 images found, .*lengths says 6"),
        ({"classes": 4}, "3 classes found, data.source.classes says 4"),
        ({"train": "tran"}, "cannot read the split 'tran' of tiny_pets.*train, test"),
        ({"label": "kind"}, "no 'kind' in an example; .*: file_name, image, label"),
        ({"split": "validation"}, "unknown split 'validation'"),
    ],
)
def test_what_is_given_is_checked(prepared, changes, message):
    with pytest.raises(ValueError, match=message):
        make(prepared, **changes)[0]


def test_without_labels(prepared):
    source = make(prepared, label="")
    assert source.class_names == ("all",) and source[4]["label"] == 0


def test_labels_that_are_plain_numbers(tmp_path):
    features = {
        "image": tensorflow_datasets.features.Image(),
        "label": tensorflow_datasets.features.Scalar(np.int64),
    }
    folder = prepare(tmp_path, "array_record", {"train": records(4)}, features=features)
    uncounted = make((tfds, str(folder.parents[1])))
    with pytest.raises(ValueError, match="does not say how many classes"):
        uncounted[0]
    counted = make((tfds, str(folder.parents[1])), classes=3)
    assert counted[2]["label"] == 2 and counted.class_names == ("0", "1", "2")
    with pytest.raises(ValueError, match="has the label 2, expected 0 to 1"):
        make((tfds, str(folder.parents[1])), classes=2)[2]


def test_the_other_format_is_named(prepared, tmp_path):
    module, root = prepared
    other = {tfds: tfrecords, tfrecords: tfds}[module]
    hint = {tfds: "convert-data .* DST", tfrecords: 'name="tfds"'}[other]
    with pytest.raises(ValueError, match=hint):
        len(make((other, root)))


def test_tensorflow_stays_out(prepared):
    """In a process of its own: another test may have imported it."""
    module, root = prepared
    lines = (
        "import sys",
        f"from {module.__name__} import make",
        f"s = make(split='train', dataset='tiny_pets', train='train', test='test', "
        f"lengths=(0, 0), classes=0, dir={root!r})",
        "s[0]['image'].load()",
        "assert len(s) == 7 and 'tensorflow' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


# --------------------------------------------------------------- TFRecord files


def test_a_bucket_gives_the_same(tmp_path, monkeypatch):
    prepare(tmp_path, "tfrecord", {"train": records(5), "test": records(2)})
    upload(tmp_path, "gs://bucket/sets", monkeypatch)
    local, remote = (
        make((tfrecords, d), train="train[1:]")
        for d in (str(tmp_path), "gs://bucket/sets")
    )
    assert len(remote) == len(local) == 4
    for i in (3, 0, 2):
        assert remote[i]["label"] == local[i]["label"] == (i + 1) % 3
        a, b = (to_array(source[i]["image"]) for source in (local, remote))
        np.testing.assert_array_equal(a, b)


def test_records_in_any_order(tmp_path):
    rows = [b"", b"abc", bytes(range(256)) * 300, b"d"]
    sets.write_tfrecord(tmp_path / "x", rows)
    found = tfrecords.Records(tmp_path / "x")
    assert len(found) == 4 and [found[i] for i in (3, 0, 2, 1)] == [
        rows[i] for i in (3, 0, 2, 1)
    ]
    sets.write_tfrecord(tmp_path / "none", [])
    assert len(tfrecords.Records(tmp_path / "none")) == 0


@pytest.mark.parametrize("cut", [1, 5, 16, 25])
def test_files_cut_off(tmp_path, cut):
    """Within the last checksum, the last record, its head, and the one before."""
    sets.write_tfrecord(tmp_path / "x", [b"abcd", b"efgh"])
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:-cut])
    with pytest.raises(ValueError, match=f"x .*cut off after {2 - -(-cut // 20)} rec"):
        tfrecords.Records(tmp_path / "x")
