"""Sources of images, crops made on the host, and the pipeline that batches them.

A source is a file here with `make(*, split, ...) -> Source`; a host view is a frozen
dataclass of `crops.py`, or any other picklable callable with a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


class Unreadable(ValueError):
    """One image cannot be decoded. The pipeline may put another one in its place."""


class WorkerLost(ValueError):
    """A worker process of the pipeline has died."""


class Source(Protocol):
    """Random access to labelled images; can be pickled.

    `source[i]` is `{"image": PIL image or uint8 array (h, w, 3), "label": int,
    "index": int}`, with further integers where a source has them, and always the same
    for the same i. The Pillow image may be one that was only opened: its pixels are
    decoded when a view asks for them. An image that cannot be read is `Unreadable`,
    with its name. Labels are 0 to `num_classes - 1`. A source that knows all labels
    without its images may have them as `labels`, an array (n,).
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class HostView(Protocol):
    """`(PIL image, numpy Generator) -> uint8 (h, w, 3)`; the name seeds the generator.

    Two views of one objective need two names, or they would make the same crop.
    """

    name: str

    def __call__(
        self, image: Image.Image, generator: np.random.Generator
    ) -> np.ndarray: ...
