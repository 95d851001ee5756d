"""TensorFlow Datasets in TFRecord files, read without TensorFlow, in any order.

A TFRecord file has no index. It is scanned once, in each process, when its first
image is read: of every record only the eight bytes of its length, which costs some
microseconds on a local disk. On gs:// the scan reads the whole file, so that there
`clvsmim convert-data` pays from the first epoch on. With the index the images come in
random order, and a run resumes exactly at every step, as with all other sources.
"""

import bisect
import functools
import itertools
import os
import threading
from typing import Any

import numpy as np
from etils import epath

from clvsmim.data._files import Files
from clvsmim.data.tfds import prepared

# Length (8 bytes, little-endian), its checksum (4), the record, its checksum (4).
HEAD, TAIL = 12, 4


def make(
    *,
    split: str,
    dataset: str,
    train: str,
    test: str,
    lengths: tuple[int, int],
    classes: int,
    dir: str,
    image: str = "image",
    label: str = "label",
) -> Files:
    """A split of a data set that TFDS prepared as TFRecord files; see `tfds.make`."""
    return prepared(
        _records, split, dataset, train, test, lengths, classes, dir, image, label
    )


def _records(builder: Any, split: str) -> Any:
    formats = {f.value for f in builder.info.available_file_formats()}
    if "tfrecord" not in formats:
        raise ValueError(
            f'it is prepared as {", ".join(formats)}; read it with name="tfds"'
        )
    builder.info.set_file_format(
        "tfrecord", override=True, override_if_initialized=True
    )
    return Shards(builder.info.splits[split].file_instructions)


class Shards:
    """The records of some files, one after the other; a file is opened when needed."""

    def __init__(self, instructions: list[Any]) -> None:
        """Instructions as TFDS has them: `filename`, `skip`, `take`."""
        self.parts = [x for x in instructions if x.take]
        self.ends = list(itertools.accumulate(x.take for x in self.parts))
        self.file = functools.cache(Records)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> bytes:
        number = bisect.bisect_right(self.ends, index)
        part = self.parts[number]
        place = index - self.ends[number] + part.take  # among those taken of the file
        return self.file(part.filename)[part.skip + place]


class Records:
    """One TFRecord file by position; a record is some bytes.

    Raises:
      ValueError: the file ends in the middle of a record, or is compressed.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = epath.Path(path)
        self.local = "://" not in os.fspath(path)
        self.lock = threading.Lock()
        self.file = self.path.open("rb")
        self.starts = self._scan()

    def _scan(self) -> np.ndarray:
        """(n + 1,) where each record starts, and where the last one ends."""
        size, start, starts = self.path.stat().length, 0, []
        while start < size:
            starts.append(start)
            head = self._bytes(start, min(HEAD, size - start))
            start += HEAD + TAIL + int.from_bytes(head[:8], "little")
            if len(head) < HEAD or start > size:
                raise ValueError(
                    f"{self.path} is no TFRecord file, compressed, or cut off after "
                    f"{len(starts) - 1} records; copy or prepare it again"
                )
        return np.array([*starts, start], np.int64)

    def _bytes(self, start: int, count: int) -> bytes:
        if self.local:
            return os.pread(self.file.fileno(), count, start)  # shares no position
        with self.lock:
            self.file.seek(start)
            return self.file.read(count)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> bytes:
        start, end = (int(x) for x in self.starts[index : index + 2])
        return self._bytes(start + HEAD, end - start - HEAD - TAIL)

    def __del__(self) -> None:
        if "file" in self.__dict__:
            self.file.close()
