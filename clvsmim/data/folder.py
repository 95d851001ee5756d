"""A folder of images: `train/dog/1.jpg`, or `train/1.jpg` where there are no classes.

Every image under the folder of a split counts, however deep. Its label is the place of
the first folder on its way among the folders of the training split, sorted by name, so
that a class without test images does not shift the others. Hidden files and folders
are left out. The order is that of the names, whatever the file system says.
"""

import functools
import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from clvsmim.data._files import Files, Opened, role
from clvsmim.data.crops import unreadable

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
FLAT = ("all",)  # the class of a folder without classes


def make(
    *,
    split: str,
    path: str,
    train: str = "train",
    test: str = "val",
    lengths: tuple[int, int] = (0, 0),
    classes: int = 0,
) -> Files:
    """The images of a folder.

    Args:
      split: "train" or "test".
      path: local or gs://.
      train, test: the folder of each split in `path`; "" is `path` itself, which may
        serve as both.
      lengths: numbers of images in the two, `classes` of labels. What is given needs
        no look at the folder until the first image is read, and is checked then; 0
        counts. A folder without class folders has one class.

    Raises:
      ValueError: now, lengths that cannot be; when the folder is looked at, one that
        is not there, has no image, or is not as told.
    """
    name, length = role(split, train, test, lengths)
    opened = functools.partial(_open, path, name, train)
    where = f"folder {name or '.'}"
    return Files(name=path, where=where, open=opened, length=length, classes=classes)


def section(path: str) -> dict[str, object]:
    """The section `data.source` of any folder of images.

    With folders train and val (or validation, valid, test) inside these are the splits;
    any other folder is both at once.

    Raises:
      ValueError: there is no such folder.
    """
    names = class_folders(os.path.expanduser(path))
    tests = [n for n in ("val", "validation", "valid", "test") if n in names]
    splits = ("train", tests[0]) if tests and "train" in names else ("", "")
    return {
        "name": "folder",
        "path": path,
        "train": splits[0],
        "test": splits[1],
        "lengths": (0, 0),
        "classes": 0,
    }


def _open(path: str, split: str, train: str) -> Opened:
    root, first = (
        os.path.expanduser(f"{path}/{name}").rstrip("/") for name in (split, train)
    )
    classes = class_folders(first) or FLAT
    names, labels = list_images(root, classes)

    def read(index: int) -> tuple[str, bytes, int]:
        file = f"{root}/{os.fsdecode(names[index])}"
        try:
            return file, epath.Path(file).read_bytes(), int(labels[index])
        except OSError as error:
            raise unreadable(file, error) from error

    return Opened(read, len(names), classes, labels)


@functools.cache
def class_folders(root: str) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted."""
    found = (x for x in _existing(root).iterdir() if not x.name.startswith("."))
    return tuple(sorted(x.name for x in found if x.is_dir()))


@functools.cache
def list_images(root: str, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Paths in a folder (n,) as bytes and labels int32 (n,), sorted by path."""
    find = walk_remote if "://" in os.fspath(_existing(root)) else walk
    found = (name for name in find(root) if name.lower().endswith(ENDINGS))
    names = sorted(os.fsencode(name) for name in found if not _hidden(name))
    if classes == FLAT:
        return np.array(names, "S"), np.zeros(len(names), np.int32)
    place = {os.fsencode(name): i for i, name in enumerate(classes)}
    tops = [name.partition(b"/")[0] for name in names]
    for name, top in zip(names, tops, strict=True):
        if top not in place:
            raise ValueError(
                f"{root}/{os.fsdecode(name)} is in no class folder of the training "
                f"split, which are {', '.join(classes[:5])}"
                f"{', ...' * (len(classes) > 5)}"
            )
    return np.array(names, "S"), np.array([place[top] for top in tops], np.int32)


def walk(root: str) -> Iterator[str]:
    """Every file under a local folder, relative to it; links are followed."""
    for folder, _, files in os.walk(root, followlinks=True):
        inside = os.path.relpath(folder, root)
        yield from files if inside == "." else (f"{inside}/{name}" for name in files)


def walk_remote(root: str) -> Iterator[str]:
    """The same of a bucket."""
    top = _key(root)
    for folder, _, files in epath.Path(root).walk():
        inside = _key(folder)[len(top) + 1 :]
        yield from (f"{inside}/{name}" for name in files) if inside else files


def _key(path: str | os.PathLike) -> str:
    """A path without its "gs://", which not every backend puts before a folder."""
    return os.fspath(path).partition("://")[2].strip("/") or os.fspath(path).strip("/")


def _hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def _existing(root: str) -> epath.Path:
    found = epath.Path(root)
    if not found.is_dir():
        raise ValueError(
            f"there is no folder {root}; data.source.path is the folder that holds "
            "those of data.source.train and data.source.test"
        )
    return found
