"""Rewrite a data set as ArrayRecord, which training reads at random places.

    clvsmim convert-data ~/old/imagenet2012/5.1.0 ~/data/imagenet2012/5.1.0
    clvsmim convert-data ~/ILSVRC/CLS-LOC gs://bucket/data/imagenet/1.0.0

SRC is a TFDS directory of TFRecord files, or a folder with a subfolder of images per
class, or with such folders named train, val, validation or test. DST becomes a TFDS
directory. Examples keep their bytes and nothing is encoded anew: of TFRecord files the
examples are copied in their order, checksums checked; of a folder the files of images
go in as they are, the same ones with the same labels as in training on the folder, in
an order that depends on nothing but their names and mixes the classes. Either may be
gs://. Neither needs TensorFlow.

Stopped, it goes on: finished files stay, an unfinished one is written again. The last
file written is dataset_info.json, so a directory that has it is complete.
"""

import hashlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import google_crc32c
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tqdm import tqdm

from clvsmim import cli, meta
from clvsmim.data import folder

INFO, FEATURES, PLAN = "dataset_info.json", "features.json", "unfinished.json"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # where info has none
# One record per chunk, to be read alone; images are compressed already, and to try
# again makes writing three times slower.
OPTIONS = "group_size:1,uncompressed"
SPLITS = ("train", "val", "validation", "test")
FORMATS = {"jpeg": {".jpg", ".jpeg"}, "png": {".png"}}  # what TFDS has names for
SHARD = 2048  # images of a folder per file: some 200 MB of ImageNet


@dataclass(frozen=True)
class Shard:
    """A file to write: its name in DST, and how many examples to get from where."""

    name: str
    count: int
    read: Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Plan:
    """All that DST will hold.

    Attributes:
      shards: the examples.
      info: dataset_info.json, written last.
      finish: `(folder) -> None` writes the other files.
      digest: of what SRC holds, so that a conversion of something else is not resumed.
    """

    shards: tuple[Shard, ...]
    info: dict[str, Any]
    finish: Callable[[epath.Path], None]
    digest: str


def main(argv: Sequence[str]) -> None:
    _, rest = cli.parse(__doc__, argv, lambda values: None, positional="SRC DST")
    if len(rest) != 2:
        raise ValueError(f"expected SRC and DST, got {len(rest)} arguments")
    convert(*rest)


def convert(src: str, dst: str) -> None:
    """Write the data set in `src` to `dst`, from where an earlier call was stopped.

    Raises:
      ValueError: `src` is no data set or is damaged, with the file and the record;
        `dst` cannot be written or holds something else.
    """
    source, target = epath.Path(src).expanduser(), epath.Path(dst).expanduser()
    if not source.is_dir():
        raise ValueError(
            f"there is no folder {src}; the first argument is what to read"
        )
    if (target / INFO).exists():
        raise ValueError(f"{dst} holds a data set already; choose another DST")
    tfds = (source / INFO).exists()
    plan = of_tfrecords(source) if tfds else of_folder(source, target)
    meta.check_writable(str(target), "DST")
    begin(plan, target)
    total = sum(shard.count for shard in plan.shards)
    with tqdm(total=total, unit="image", unit_scale=True, file=sys.stderr) as bar:
        for shard in plan.shards:
            if (target / shard.name).exists():
                bar.update(shard.count)
            else:
                write(shard, target, bar.update)
    plan.finish(target)
    _write_text(target / INFO, json.dumps(plan.info, indent=2) + "\n")
    (target / PLAN).unlink()
    sizes = ", ".join(f"{s['name']} {_count(s)}" for s in plan.info["splits"])
    print(f"{dst}: {sizes} in {len(plan.shards)} files")


def begin(plan: Plan, target: epath.Path) -> None:
    """Note in `target` what is being written there, or refuse to mix two things."""
    note = target / PLAN
    if note.exists() and json.loads(note.read_text())["digest"] != plan.digest:
        raise ValueError(
            f"{target} holds an unfinished conversion of other data; delete it"
        )
    _write_text(note, json.dumps({"digest": plan.digest}))


def write(shard: Shard, target: epath.Path, done: Callable[[int], Any]) -> None:
    """Write one file; it has its name only when it is whole.

    Raises:
      ValueError: it has not as many examples as dataset_info.json says.
    """
    part, remote = target / f"{shard.name}.part", "://" in str(target)
    with tempfile.TemporaryDirectory() as folder:
        # The writer knows local files only.
        local = epath.Path(folder) / shard.name if remote else part
        writer, count = ArrayRecordWriter(str(local), OPTIONS), 0
        try:
            for example in shard.read():
                writer.write(example)
                count += 1
                done(1)
        finally:
            writer.close()
        if count != shard.count:
            raise ValueError(
                f"what {shard.name} is made of has {count} examples and "
                f"{INFO} says {shard.count}; copy or prepare it again"
            )
        if remote:
            with local.open("rb") as read, part.open("wb") as write:
                shutil.copyfileobj(read, write, 2**24)
    part.replace(target / shard.name)


# From TFRecord files


def of_tfrecords(source: epath.Path) -> Plan:
    """The plan for a TFDS directory: a file for each file.

    Raises:
      ValueError: it holds no TFRecord files, not all of them, or no features.json.
    """
    info, names = _info(source / INFO), {path.name for path in source.iterdir()}
    digest = _digest(json.dumps(info))
    form = info.get("fileFormat", "tfrecord")
    if form != "tfrecord":
        raise ValueError(f"{source} holds {form} files, there is nothing to convert")
    if FEATURES not in names:
        raise ValueError(
            f"{source} has no {FEATURES}, without which nobody knows what its examples "
            "hold; TFDS writes it since version 4: prepare the data set again"
        )
    shards = []
    for split in info["splits"]:
        template = split.get("filepathTemplate", TEMPLATE)
        new = template.replace("tfrecord", "{FILEFORMAT}")
        lengths = [int(n) for n in split.get("shardLengths", ())]
        for i, count in enumerate(lengths):
            fill = partial(_fill, info["name"], split["name"], i, len(lengths))
            old = fill(template, "tfrecord")
            if old not in names:
                raise ValueError(f"{source} has no {old}; copy or prepare it again")
            read = partial(records, source / old)
            shards.append(Shard(fill(new, "array_record"), count, read))
        split["filepathTemplate"] = new
    if not shards:
        raise ValueError(f"{source / INFO} names no files; prepare the data set again")
    used = {INFO, *(shard.read.args[0].name for shard in shards)}

    def finish(target: epath.Path) -> None:
        for name in names - used:
            if (source / name).is_file():  # features, names of labels
                (target / name).write_bytes((source / name).read_bytes())

    info["fileFormat"] = "array_record"
    return Plan(tuple(shards), info, finish, digest)


def _info(path: epath.Path) -> dict[str, Any]:
    """A dataset_info.json, which says which files there are."""
    try:
        info = json.loads(path.read_text())
        if not all(split["name"] for split in info["splits"]) or not info["name"]:
            raise ValueError("an empty name")
    except (ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} does not describe a data set: {what}; copy or prepare it again"
        ) from error
    return info


def _fill(name: str, split: str, i: int, n: int, template: str, form: str) -> str:
    """The name of a file of a TFDS directory."""
    return template.format(
        DATASET=name,
        SPLIT=split,
        FILEFORMAT=form,
        SHARD_X_OF_Y=f"{i:05d}-of-{n:05d}",
        SHARD_INDEX=f"{i:05d}",
        NUM_SHARDS=f"{n:05d}",
    )


def records(path: epath.Path) -> Iterator[bytes]:
    """The records of a TFRecord file, one by one.

    Each is a length (8 bytes, little endian), its checksum, the data, their checksum.

    Raises:
      ValueError: a checksum is wrong or the file ends early; with the record's number.
    """
    with path.open("rb") as file:
        number = at = 0
        while head := file.read(12):
            where = f"{path}, record {number} at byte {at}"
            (size,) = struct.unpack("<Q", _checked(head, 8, where))
            yield _checked(file.read(size + 4), size, where)
            number, at = number + 1, at + 16 + size


def _checked(data: bytes, size: int, where: str) -> bytes:
    """The first `size` bytes, if their checksum follows them: CRC32C, rotated."""
    if len(data) < size + 4:
        raise ValueError(f"{where}: the file ends early; copy it again")
    crc = google_crc32c.value(data[:size])
    crc = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if data[size:] != struct.pack("<I", crc):
        raise ValueError(f"{where}: the checksum is wrong; copy the file again")
    return data[:size]


# From a folder of images


def of_folder(source: epath.Path, target: epath.Path) -> Plan:
    """The plan for a folder of images; features image, label, file_name.

    Images and labels are those of the source `folder`.

    Raises:
      ValueError: a split without images, or with one that is in no class of the first.
    """
    splits = {name: source / name for name in SPLITS if (source / name).is_dir()}
    roots = {k: os.fspath(v) for k, v in (splits or {"train": source}).items()}
    print(f"listing {', '.join(roots.values())}", file=sys.stderr, flush=True)
    names = folder.class_folders(next(iter(roots.values()))) or folder.FLAT
    found = {split: folder.list_images(root, names) for split, root in roots.items()}
    for split, root in roots.items():
        if not len(found[split][0]):
            raise ValueError(
                f"{root} has no images in it ({', '.join(folder.ENDINGS)})"
            )
    versioned = re.fullmatch(r"\d+\.\d+\.\d+", target.name)
    name = target.parent.name if versioned else target.name
    name = re.sub(r"\W+", "_", name)
    shards, entries, listing, endings = [], [], [], set()
    for split, (paths, labels) in found.items():
        files = list(zip(map(os.fsdecode, paths), labels.tolist(), strict=True))
        files.sort(key=lambda file: _digest(file[0]))
        parts = [files[i : i + SHARD] for i in range(0, len(files), SHARD)]
        for i, part in enumerate(parts):
            file = _fill(name, split, i, len(parts), TEMPLATE, "array_record")
            read = partial(_examples, roots[split], part)
            shards.append(Shard(file, len(part), read))
        lengths = [str(len(part)) for part in parts]
        entry = {"name": split, "shardLengths": lengths, "filepathTemplate": TEMPLATE}
        entries.append(entry)
        listing += [(split, file[0]) for file in files]
        endings |= {os.path.splitext(file[0])[1].lower() for file in files}
    info = {
        "name": name,
        "version": target.name if versioned else "1.0.0",
        "description": f"The images of {source}, by clvsmim convert-data.",
        "fileFormat": "array_record",
        "splits": entries,
    }
    form = next((k for k, v in FORMATS.items() if endings <= v), None)
    finish = partial(_save_features, names, form)
    return Plan(tuple(shards), info, finish, _digest(json.dumps(listing)))


def _examples(root: str, files: Sequence[tuple[str, int]]) -> Iterator[bytes]:
    for name, label in files:
        image = (epath.Path(root) / name).read_bytes()
        yield example(image=image, label=label, file_name=name)


def example(*, image: bytes, label: int, file_name: str) -> bytes:
    """A serialised tf.train.Example of bytes, an integer and a text.

    Example {1: Features {1: map of name and Feature {1: bytes list or 3: integers}}}.
    """
    features = {
        "file_name": _field(1, _field(1, os.fsencode(file_name))),
        "image": _field(1, _field(1, image)),
        "label": _field(3, _field(1, _varint(label))),
    }
    entries = (
        _field(1, _field(1, name.encode()) + _field(2, value))
        for name, value in features.items()
    )
    return _field(1, b"".join(entries))


def _field(number: int, data: bytes) -> bytes:
    """A field of a protocol buffer whose wire type is 2: a length and so many bytes."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the eighth set on all but the last."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _save_features(names: Sequence[str], form: str | None, target: epath.Path) -> None:
    from tensorflow_datasets import features  # slow to import

    features.FeaturesDict(
        {
            "file_name": features.Text(),
            "image": features.Image(encoding_format=form),
            "label": features.ClassLabel(names=names),
        }
    ).save_config(target)


def _count(split: dict[str, Any]) -> int:
    return sum(map(int, split["shardLengths"]))


def _digest(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest()


def _write_text(path: epath.Path, text: str) -> None:
    """A reader sees the old text, if any, or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
