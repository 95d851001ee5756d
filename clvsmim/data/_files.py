"""What the sources that read files share: they are opened at the first image."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from clvsmim.data.crops import open_image


class Opened(NamedTuple):
    """The files of one split.

    `read(i) -> (name of image i, its file as bytes, its label)`. `class_names` is
    empty where the files do not say which classes there are, `labels` int32 (n,) are
    None where every image would have to be read for them.
    """

    read: Callable[[int], tuple[str, bytes, int]]
    length: int
    class_names: tuple[str, ...]
    labels: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Files:
    """A source behind `open`, which each process calls for itself, once, when it must.

    Attributes:
      name: of the data set.
      where: the split, for messages.
      open: finds the files; can be pickled.
      length, classes: how many images and classes there are; 0 opens the files to see.
    """

    name: str
    where: str
    open: Callable[[], Opened]
    length: int
    classes: int

    @functools.cached_property
    def opened(self) -> Opened:
        try:
            found = self.open()
        except ImportError as error:  # the reader of gs:// is not installed
            raise ValueError(
                f"cannot open {self.name}: {error}; pip install clvsmim[tpu]"
            ) from error
        self._check("images", "lengths", self.length, found.length)
        if found.class_names:
            self._check("classes", "classes", self.classes, len(found.class_names))
        elif not self.classes:
            raise ValueError(
                f"{self.name} does not say how many classes it has; set "
                "data.source.classes"
            )
        return found

    def _check(self, what: str, key: str, expected: int, found: int) -> None:
        if expected not in (0, found) or not found:
            raise ValueError(
                f"{self.name}, {self.where}: {found} {what} found, "
                f"data.source.{key} says {expected}; correct it (0 counts), or the data"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.opened.class_names or tuple(map(str, range(self.classes)))

    @property
    def num_classes(self) -> int:
        return self.classes or len(self.opened.class_names)

    @property
    def labels(self) -> np.ndarray | None:
        """int32 (n,), or None where every image would have to be read for them."""
        return self.opened.labels

    def __len__(self) -> int:
        return self.length or self.opened.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")  # ends a for loop
        index = int(index)
        name, data, label = self.opened.read(index)
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"{name} has the label {label}, expected 0 to {self.num_classes - 1}"
            )
        return {"image": open_image(name, data), "label": label, "index": index}

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files, but with what was counted: a worker that finds
        another number of images has to say so."""
        counted = {"length": len(self), "classes": self.num_classes}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | (
            counted if "opened" in self.__dict__ else {}
        )


def role(split: str, train: str, test: str, lengths: tuple[int, int]) -> tuple:
    """(real name, length) of the split "train" or "test"."""
    roles = {"train": train, "test": test}
    if split not in roles:
        raise ValueError(f"unknown split {split!r}, expected one of: train, test")
    if len(lengths) != 2 or min(lengths) < 0:
        raise ValueError(
            f"lengths={lengths}: expected the numbers of training and test images, "
            "0 for one that has to be counted"
        )
    return roles[split], lengths[list(roles).index(split)]
