"""Tiny data sets as TFDS leaves them on the disk, written without TensorFlow."""

import io
import json
import pathlib
import struct
import typing

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

NAMES = ("cat", "dog", "owl")


def picture(seed, size=(40, 30)):
    """A smooth random image, so that JPEG keeps it."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image, format="JPEG", **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def example(**features):
    """A serialised `tf.train.Example` of bytes and integers."""
    found = tf_example_pb2.Example()
    for key, value in features.items():
        kind = "bytes_list" if isinstance(value, bytes) else "int64_list"
        getattr(found.features.feature[key], kind).value.append(value)
    return found.SerializeToString()


def records(count, start=0, broken=()):
    """Examples whose label is i % 3; those of `broken` hold no image."""
    return [
        example(
            image=b"no image" if i in broken else encoded(picture(i)),
            label=i % len(NAMES),
            file_name=f"{i}.jpg".encode(),
        )
        for i in range(start, start + count)
    ]


def write_array_record(path, rows):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()


def write_tfrecord(path, rows):
    """The checksums are left 0: nothing reads them."""
    none = bytes(4)
    parts = (struct.pack("<Q", len(r)) + none + r + none for r in rows)
    pathlib.Path(path).write_bytes(b"".join(parts))


WRITERS = {"array_record": write_array_record, "tfrecord": write_tfrecord}


def prepare(root, format, splits, name="tiny_pets", shards=2, features=None):
    """Write a TFDS data set and return its folder.

    Args:
      splits: {"train": examples}; each split in `shards` files.
      features: by default an image, its label of three names and a file name.
    """
    folder = pathlib.Path(root) / name / "1.0.0"
    folder.mkdir(parents=True)
    features = features or {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=NAMES),
        "file_name": tfds.features.Text(),
    }
    tfds.features.FeaturesDict(features).save_config(folder)
    found = []
    for split, rows in splits.items():
        parts = np.array_split(np.arange(len(rows)), shards)
        for i, part in enumerate(parts):
            file = f"{name}-{split}.{format}-{i:05d}-of-{shards:05d}"
            WRITERS[format](folder / file, [rows[j] for j in part])
        found.append(
            {
                "name": split,
                "numBytes": str(sum(map(len, rows))),
                "shardLengths": [str(len(part)) for part in parts],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": "1.0.0", "fileFormat": format, "splits": found}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


class Bucket(MemoryFileSystem):
    """A bucket that lies in memory."""

    protocol = ("gs", "gcs", "memory")
    store: typing.ClassVar = {}
    pseudo_dirs: typing.ClassVar = [""]


def upload(folder, url, monkeypatch):
    """Copy a folder into a bucket that every gs:// path now leads to."""
    bucket = Bucket()
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: bucket)
    for path in folder.rglob("*"):
        if path.is_file():
            key = path.relative_to(folder).as_posix()
            bucket.pipe_file(f"{url}/{key}", path.read_bytes())
    return bucket
