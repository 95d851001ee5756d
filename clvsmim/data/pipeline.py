"""Batches of crops, each a pure function of (seed, position), built on Grain.

The image at global position p = step * batch + row, its label and its crops do not
depend on the number of processes, of workers, or on the step a run was resumed at.
So a checkpoint needs no iterator state.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from clvsmim.data import HostView, Source
from clvsmim.data.crops import to_image

Example = dict[str, Any]
# Positions before the stream ends; Grain's own endless repeat overflows when batched.
ENDLESS = 2**48


def batches(
    source: Source,
    views: Sequence[HostView],
    *,
    batch: int,
    seed: int,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    threads: int = 1,
    prefetch: int = 2,
    shuffle: bool = True,
) -> grain.DatasetIterator:
    """An endless iterator of training batches; call `close()` on it when done.

    Args:
      source: see `clvsmim.data.Source`.
      views: host views with different names; each makes one crop of every image. The
        crop of a view does not depend on which other views there are.
      batch: global batch size, a multiple of `processes`.
      seed: of the order and of the crops.
      start: the step to begin at; equal to skipping that many batches.
      process, processes: this process gets rows [process * b, (process + 1) * b) of
        every global batch, b = batch / processes.
      workers: worker processes; 0 works in this one.
      threads: threads per process, each making a whole batch; 0 does the work inside
        `next`.
      prefetch: batches that are ready or in the making, per process.
      shuffle: a new order every epoch; False keeps the order of the source.

    Returns:
      batches `{"views": tuple of uint8 (b, h, w, 3), "label": int32 (b,), "index":
      int32 (b,)}`, and any other integer that the source gives.

    Raises:
      ValueError: the batch does not divide, an empty source, views that share a name.
    """
    rows = _rows(batch, process, processes)
    _check_views(views)
    if not len(source):
        raise ValueError(f"the source {source.name!r} has no images")
    data = grain.MapDataset.source(source)
    if shuffle:
        data = data.shuffle(seed=_entropy(seed, "order"))
    crop = functools.partial(_train_example, views=tuple(views), seed=seed)
    data = data.repeat(ENDLESS // len(source)).map_with_index(crop)
    # A slice of batches, so one row of `data` is the rows of one process.
    data = data.batch(rows)[process::processes][start:]
    read = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, prefetch)
    )
    steps = data.to_iter_dataset(read)
    if workers:
        _allow_flags()
        options = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=max(1, prefetch)
        )
        steps = steps.mp_prefetch(options)
    return iter(steps)


def eval_batches(
    source: Source,
    view: HostView,
    *,
    batch: int,
    process: int = 0,
    processes: int = 1,
    start: int = 0,
    skip: int = 0,
    limit: int | None = None,
    copies: int = 1,
    threads: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator:
    """One pass in the order of the source; the last batch is padded.

    Args:
      source, view: what to read; a random view gets the same draws in every pass.
      batch, process, processes, threads, prefetch: as in `batches`.
      start: the batch to begin at; equal to skipping that many.
      skip: leave out so many images, the first ones.
      limit: read only this many images of the rest, the first ones.
      copies: each image comes so many times in a row, with other draws each time.

    Returns:
      batches like those of `batches`, with one view and "weight" float32 (b,): 1 for
      an image, 0 for padding (which repeats the last image). All processes get the
      same number of batches.
    """
    rows = _rows(batch, process, processes)
    count = len(source) - skip
    count = copies * (count if limit is None else min(limit, count))
    if count < 1:
        raise ValueError(
            f"nothing to read from {source.name!r}: {len(source)} images, limit "
            f"{limit}, {skip} left out"
        )
    padded = -(-count // batch) * batch
    example = functools.partial(
        _eval_example, source=source, view=view, count=count, skip=skip, copies=copies
    )
    data = grain.MapDataset.range(padded).map(example)
    data = data.batch(rows)[process::processes][start:]
    read = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, prefetch)
    )
    return iter(data.to_iter_dataset(read))


def generator(seed: int, position: int, name: str) -> np.random.Generator:
    """The randomness of one view of the image at one position."""
    return np.random.default_rng((seed, position, zlib.crc32(name.encode())))


def _train_example(
    position: int, item: Example, *, views: tuple[HostView, ...], seed: int
) -> Example:
    image = to_image(item["image"])
    crops = [view(image, generator(seed, position, view.name)) for view in views]
    return _example(item, crops)


def _eval_example(
    position: int, *, source: Source, view: HostView, count: int, skip: int, copies: int
) -> Example:
    image, copy = divmod(min(position, count - 1), copies)
    item = source[skip + image]
    crop = view(to_image(item["image"]), generator(copy, item["index"], view.name))
    weight = np.float32(position < count)
    return _example(item, [crop]) | {"weight": weight}


def _example(item: Example, crops: list[np.ndarray]) -> Example:
    numbers = {k: np.int32(v) for k, v in item.items() if k != "image"}
    return {"views": tuple(crops), **numbers}


def _entropy(seed: int, name: str) -> int:
    """32 bits from (seed, name): neighbouring seeds give unrelated orders."""
    state = np.random.SeedSequence((seed, zlib.crc32(name.encode())))
    return int(state.generate_state(1)[0])


def _allow_flags() -> None:
    """Grain's workers read absl flags, which raise in a notebook or a test."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _rows(batch: int, process: int, processes: int) -> int:
    if batch < 1 or batch % processes:
        raise ValueError(
            f"a batch of {batch} cannot be split over {processes} processes; "
            "make it a multiple of their number"
        )
    if not 0 <= process < processes:
        raise ValueError(f"process is {process}, expected 0 to {processes - 1}")
    return batch // processes


def _check_views(views: Sequence[HostView]) -> None:
    names = [view.name for view in views]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"the views are named {names}; there must be at least one, and each needs "
            "a name of its own, because the name seeds its crops"
        )
