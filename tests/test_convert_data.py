"""Rewriting a data set keeps every byte, notices damage, and goes on where it was."""

import hashlib
import json
import pathlib
import re
import struct

import pytest
import sets
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from clvsmim import convert_data
from clvsmim.data import folder
from clvsmim.data import tfds as tfds_source
from clvsmim.data.crops import to_array

# What TensorFlow 2.21 wrote of the three records below.
RECORDED = bytes.fromhex(
    "000000000000000029039807d8ea82a20700000000000000bbd79f11636c76736d696de54307b1"
    "2800000000000000ff70164a000102030405060708090a0b0c0d0e0f101112131415161718191a"
    "1b1c1d1e1f202122232425262775118983"
)
RECORDS = [b"", b"clvsmim", bytes(range(40))]
SPLITS = {"train": sets.records(7), "validation": sets.records(3, start=50)}


def crc32c(data):
    """Bit by bit, from the polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def framed(record):
    """A record of a TFRecord file."""

    def masked(data):
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    size = struct.pack("<Q", len(record))
    return size + masked(size) + record + masked(record)


def write_tfrecord(path, rows):
    pathlib.Path(path).write_bytes(b"".join(map(framed, rows)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS directory of TFRecord files with their checksums."""
    root = tmp_path_factory.mktemp("tfrecords")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sets.WRITERS, "tfrecord", write_tfrecord)
        return sets.prepare(root, "tfrecord", SPLITS)


@pytest.fixture
def source(prepared, tmp_path):
    """A copy of it to damage."""
    folder = tmp_path / "old" / "tiny_pets" / "1.0.0"
    folder.mkdir(parents=True)
    for path in prepared.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "tiny_pets" / "1.0.0"


def shards(folder):
    """{file name: examples} of the ArrayRecord files of a folder, by name."""
    paths = sorted(pathlib.Path(folder).glob("*.array_record-*-of-?????"))
    return {p.name: ArrayRecordReader(str(p)).read_all() for p in paths}


def shard(split, i, form="tfrecord"):
    return f"tiny_pets-{split}.{form}-{i:05d}-of-00002"


def test_records_are_those_that_tensorflow_wrote(tmp_path):
    path = epath.Path(tmp_path / "x")
    path.write_bytes(RECORDED)
    assert list(convert_data.records(path)) == RECORDS
    assert b"".join(map(framed, RECORDS)) == RECORDED


def test_the_same_bytes_in_the_same_order_and_shards(source, target):
    convert_data.convert(str(source), str(target))
    found = shards(target)
    assert [len(rows) for rows in found.values()] == [4, 3, 2, 1]
    assert sum(list(found.values())[:2], []) == SPLITS["train"]
    assert sum(list(found.values())[2:], []) == SPLITS["validation"]
    names = {p.name for p in target.iterdir()} - set(found)
    assert names == {"dataset_info.json", "features.json", "label.labels.txt"}
    before, after = (
        json.loads((folder / "dataset_info.json").read_text())
        for folder in (source, target)
    )
    assert after == before | {"fileFormat": "array_record"}


def test_tfds_and_our_source_read_it(source, target):
    convert_data.convert(str(source), str(target))
    split = tfds.builder_from_directory(str(target)).as_data_source("validation")
    assert [int(x["label"]) for x in split] == [2, 0, 1]
    assert split[1]["file_name"] == b"51.jpg" and split[1]["image"].shape == (30, 40, 3)
    ours = tfds_source.make(
        split="test",
        dataset="tiny_pets",
        train="train",
        test="validation",
        lengths=(7, 3),
        classes=3,
        dir=str(target.parents[1]),
    )
    assert [ours[i]["label"] for i in range(3)] == [2, 0, 1]
    assert ours.class_names == sets.NAMES


DAMAGE = {
    "cut": (lambda b: b[:-5], "record 3 at byte", "ends early"),
    "cut in a length": (lambda b: b + b"\1\0\0", "record 4 at byte", "ends early"),
    "flipped bit": (
        lambda b: b[:30] + bytes([b[30] ^ 4]) + b[31:],
        "record 0",
        "check",
    ),
    "flipped length": (lambda b: bytes([b[0] ^ 1]) + b[1:], "record 0", "checksum"),
    "lost record": (lambda b: b[: -len(framed(SPLITS["train"][3]))], "3", "says 4"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_with_the_record_and_leaves_no_data_set(
    source, target, damage
):
    change, *parts = DAMAGE[damage]
    path = source / shard("train", 0)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        convert_data.convert(str(source), str(target))
    name = shard("train", 0, "array_record" if damage == "lost record" else "tfrecord")
    for part in (name, *parts):
        assert part in str(error.value)
    assert not (target / "dataset_info.json").exists() and not shards(target)


def test_finished_files_stay_and_unfinished_ones_are_written_again(source, target):
    bad = source / shard("train", 1)
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="record 2 "):
        convert_data.convert(str(source), str(target))
    first = target / shard("train", 0, "array_record")
    half = target / f"{shard('train', 1, 'array_record')}.part"
    assert list(shards(target)) == [first.name] and half.exists()
    stamp = first.stat().st_mtime_ns
    bad.write_bytes(whole)
    convert_data.convert(str(source), str(target))
    assert first.stat().st_mtime_ns == stamp and not half.exists()
    assert sum(list(shards(target).values())[:2], []) == SPLITS["train"]
    with pytest.raises(ValueError, match="holds a data set already"):
        convert_data.convert(str(source), str(target))


def test_another_data_set_is_not_mixed_in(source, target):
    bad = source / shard("validation", 1)
    bad.write_bytes(bad.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends early"):
        convert_data.convert(str(source), str(target))
    info = source / "dataset_info.json"
    info.write_text(info.read_text().replace("1.0.0", "1.0.1"))
    with pytest.raises(ValueError, match="unfinished conversion of other data"):
        convert_data.convert(str(source), str(target))


@pytest.mark.parametrize(
    "name", [shard("validation", 1), "features.json"], ids=["shard", "features"]
)
def test_a_missing_file_is_noticed_before_anything_is_written(source, target, name):
    (source / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}"):
        convert_data.convert(str(source), str(target))
    assert not target.exists()


def test_what_is_array_record_already(source, target):
    convert_data.convert(str(source), str(target))
    with pytest.raises(ValueError, match="array_record files, there is nothing to"):
        convert_data.convert(str(target), str(target.parent / "again"))


def test_from_a_bucket_into_a_bucket(prepared, target, monkeypatch):
    bucket = sets.upload(prepared, "gs://a/tiny_pets/1.0.0", monkeypatch)
    convert_data.convert("gs://a/tiny_pets/1.0.0", "gs://a/new/1.0.0")
    convert_data.convert(str(prepared), str(target))
    files = {p.rpartition("/")[2]: p for p in bucket.find("gs://a/new/1.0.0")}
    assert set(files) == {p.name for p in target.iterdir()}
    for path in target.iterdir():
        assert bucket.cat_file(files[path.name]) == path.read_bytes(), path.name


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"name": "x", ', "does not describe a data set: .*line 1"),
        ('{"name": "tiny_pets"}', "does not describe a data set: no 'splits'"),
        ('{"splits": [{"name": "train"}]}', "does not describe a data set: no 'name'"),
        ("[]", "does not describe a data set"),
    ],
)
def test_a_description_that_is_none_is_named(source, target, text, message):
    (source / "dataset_info.json").write_text(text)
    where = re.escape(str(source / "dataset_info.json"))
    with pytest.raises(ValueError, match=f"{where} {message}"):
        convert_data.convert(str(source), str(target))
    assert not target.exists()


@pytest.fixture
def photos(tmp_path):
    """train/ and val/ with three classes; a file that is no image beside them."""
    folder.class_folders.cache_clear()
    folder.list_images.cache_clear()
    root = tmp_path / "photos"
    for split, count in (("train", 5), ("val", 2)):
        for k, name in enumerate(sets.NAMES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                data = sets.encoded(sets.picture(10 * k + i))
                (root / split / name / f"{i}.JPEG").write_bytes(data)
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    return root


def test_a_folder_keeps_the_bytes_of_its_files(photos, target, monkeypatch):
    monkeypatch.setattr(convert_data, "SHARD", 4)
    convert_data.convert(str(photos), str(target))
    builder = tfds.builder_from_directory(str(target))
    raw = {"image": tfds.decode.SkipDecoding()}
    for split, count in (("train", 15), ("val", 6)):
        rows = list(builder.as_data_source(split, decoders=raw))
        assert len(rows) == count
        for row in rows:
            path = row["file_name"].decode()
            assert row["image"] == (photos / split / path).read_bytes()
            assert sets.NAMES[int(row["label"])] == path.split("/")[0]
        found = [row["file_name"] for row in rows]
        assert found == sorted(
            found, key=lambda name: hashlib.blake2b(name, digest_size=16).hexdigest()
        )
        assert len({name.split(b"/")[0] for name in found[:4]}) > 1
    assert [len(rows) for rows in shards(target).values()] == [4, 4, 4, 3, 4, 2]
    assert builder.info.features["image"]._encoding_format == "jpeg"
    assert builder.as_data_source("val")[0]["image"].shape == (30, 40, 3)


def test_a_folder_and_its_conversion_are_the_same_data_set(photos, target):
    """Every kind of file, however deep, and nothing that is hidden."""
    train = photos / "train"
    for i, ending in enumerate(folder.ENDINGS):
        path = train / sets.NAMES[i % 3] / "deep" / "er" / f"x{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".jpg": "JPEG", ".tif": "TIFF"}.get(ending, ending[1:])
        path.write_bytes(sets.encoded(sets.picture(90 + i), kind))
    for name in (".ipynb_checkpoints/a.jpg", "cat/._0.jpg", "ant/notes.txt"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).write_bytes(b"x")
    convert_data.convert(str(photos), str(target))
    for split, count in (("train", 15 + len(folder.ENDINGS)), ("test", 6)):
        one = folder.make(split=split, path=str(photos))
        two = tfds_source.make(
            split=split,
            dataset="tiny_pets",
            train="train",
            test="val",
            lengths=(0, 0),
            classes=0,
            dir=str(target.parents[1]),
        )
        assert two.class_names == one.class_names == ("ant", *sets.NAMES)
        found = [
            sorted((to_array(x["image"]).tobytes(), x["label"]) for x in source)
            for source in (one, two)
        ]
        assert len(found[0]) == count and found[0] == found[1]


def test_a_folder_without_images_or_with_a_class_in_one_split(photos, target):
    (photos / "val" / "cow").mkdir()
    (photos / "val" / "cow" / "0.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="val/cow/0.png is in no class folder"):
        convert_data.convert(str(photos), str(target))
    (photos / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty has no images in it"):
        convert_data.convert(str(photos / "empty"), str(target))
    with pytest.raises(ValueError, match="no folder"):
        convert_data.convert(str(photos / "nowhere"), str(target))
    assert not target.exists()


@pytest.mark.parametrize("label", [0, 1, 127, 128, 999, 2**40])
def test_an_example_is_what_protocol_buffers_make_of_it(label):
    given = {"image": bytes(300), "label": label, "file_name": "ä.png"}
    want = sets.tf_example_pb2.Example.FromString(convert_data.example(**given))
    found = want.features.feature
    assert found["image"].bytes_list.value[:] == [bytes(300)]
    assert found["label"].int64_list.value[:] == [label]
    assert found["file_name"].bytes_list.value[:] == ["ä.png".encode()]
