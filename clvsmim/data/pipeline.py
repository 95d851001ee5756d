"""Batches of crops, each a pure function of (seed, position), built on Grain.

The image at global position p = step * batch + row, its label and its crops do not
depend on the number of processes, of workers, or on the step a run was resumed at.
So a checkpoint needs no iterator state.
"""

import contextlib
import functools
import math
import multiprocessing
import os
import sys
import threading
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from clvsmim.data import HostView, Source, Unreadable, WorkerLost
from clvsmim.data.crops import open_image, to_image

Batch = dict[str, Any]
Example = dict[str, Any]  # an item of a source, and its crops under "views"
ENDLESS = 2**40  # steps before the stream ends
TRIES = 1000  # images drawn for one position before giving up


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
    repeats: int = 1,
    unreadable: int = 100,
    draft: bool = False,
) -> Generator[Batch, None, None]:
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
      repeats: each image comes so many times in a row, with other crops, and an epoch
        keeps its number of samples: it sees 1 / repeats of the images (DeiT).
      unreadable: so many images that cannot be read are each replaced by another one,
        drawn from (seed, position), and named once on stderr; per process.
      draft: decode a JPEG at 1/2, 1/4 or 1/8 where a crop is still no smaller than its
        result. Faster for photographs of many megapixels, and not quite the same.

    Returns:
      batches `{"views": tuple of uint8 (b, h, w, 3), "label": int32 (b,), "index":
      int32 (b,)}`, and any other integer that the source gives.

    Raises:
      ValueError: the batch does not divide, an empty source, views that share a name;
        while reading, one image more than `unreadable` that cannot be read.
      WorkerLost: while reading, a worker was killed.
    """
    rows = _rows(batch, process, processes)
    _check_views(views)
    if not len(source):
        raise ValueError(f"the source {source.name!r} has no images")
    if repeats < 1 or unreadable < 0:
        raise ValueError(
            f"repeats={repeats} must be >= 1, unreadable={unreadable} >= 0"
        )
    order = grain.MapDataset.range(len(source))
    if shuffle:
        order = order.shuffle(seed=_entropy(seed, "order"))
    example = functools.partial(
        _train_example,
        source=source,
        order=order,
        views=tuple(views),
        seed=seed,
        repeats=repeats,
        failed=Failures(source.name, unreadable),
        draft=draft,
    )
    make = functools.partial(_batch, example=example, batch=batch, first=process * rows)
    data = grain.MapDataset.range(ENDLESS)[start:]
    return _iterate(
        data.map(functools.partial(make, rows=rows)), workers, threads, prefetch
    )


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
    workers: int = 0,
    threads: int = 1,
    prefetch: int = 2,
    unreadable: int = 0,
) -> Generator[Batch, None, None]:
    """One pass in the order of the source; the last batch is padded.

    Args:
      source, view: what to read; a random view gets the same draws in every pass.
      batch, process, processes, workers, threads, prefetch: as in `batches`.
      start: the batch to begin at; equal to skipping that many.
      skip: leave out so many images, the first ones.
      limit: read only this many images of the rest, the first ones.
      copies: each image comes so many times in a row, with other draws each time.
      unreadable: so many images that cannot be read count as padding, and are named
        on stderr; one more is an error.

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
    example = functools.partial(
        _eval_example,
        source=source,
        view=view,
        count=count,
        skip=skip,
        copies=copies,
        failed=Failures(source.name, unreadable),
    )
    make = functools.partial(_batch, example=example, batch=batch, first=process * rows)
    data = grain.MapDataset.range(-(-count // batch))[start:]
    return _iterate(
        data.map(functools.partial(make, rows=rows, end=count)),
        workers,
        threads,
        prefetch,
    )


class Failures:
    """Names each image that cannot be read once, and counts them up to a limit."""

    def __init__(self, source: str, limit: int) -> None:
        self.source, self.limit = source, limit
        self.found: dict[str, None] = {}
        self.lock = threading.Lock()

    def add(self, error: Unreadable, instead: str) -> None:
        """Raises ValueError if it is one too many."""
        with self.lock:
            named = str(error) in self.found
            self.found[str(error)] = None
            if len(self.found) > self.limit:  # in each thread that meets one
                raise ValueError(
                    f"{len(self.found)} images of {self.source!r} cannot be read, and "
                    f"data.unreadable allows {self.limit}; the last: "
                    + "; ".join(list(self.found)[-3:])
                ) from error
            if not named:
                print(f"{error} ({instead})", file=sys.stderr, flush=True)

    def __reduce__(self) -> tuple:
        return Failures, (self.source, self.limit)  # a process counts for itself


def generator(seed: int, position: int, name: str) -> np.random.Generator:
    """The randomness of one view of the image at one position."""
    return np.random.default_rng((seed, position, zlib.crc32(name.encode())))


def _train_example(
    position: int,
    *,
    source: Source,
    order: grain.MapDataset,
    views: tuple[HostView, ...],
    seed: int,
    repeats: int,
    failed: Failures,
    draft: bool,
) -> Example:
    """The item at a position, or, while that cannot be read, another one."""
    epoch, place = divmod(position, len(source))
    index = order[epoch * len(source) + place // repeats]
    draws = functools.partial(generator, seed, position)
    for attempt in range(TRIES):
        try:
            item = source[index]
            return item | {"views": _crops(item["image"], views, draws, draft)}
        except Unreadable as error:
            failed.add(error, "another image takes its place")
            last = error
            index = int(draws(f"instead {attempt}").integers(len(source)))
    raise ValueError(
        f"of {TRIES} images of {source.name!r} none can be read; the last: {last}"
    )


def _crops(
    image: Any, views: tuple[HostView, ...], draws: Callable, draft: bool
) -> list[np.ndarray]:
    if draft and getattr(image, "format", None) == "JPEG" and image.fp:
        return _drafted(image, views, draws)
    image = to_image(image)
    return [view(image, draws(view.name)) for view in views]


def _drafted(
    image: Image.Image, views: tuple[HostView, ...], draws: Callable
) -> list[np.ndarray]:
    """Crops of a JPEG that is open but not decoded, of the smallest copy that does.

    Each view decides for itself, so that its crop does not depend on the others.
    """
    image.fp.seek(0)
    data, full = image.fp.read(), image.size

    @functools.cache
    def decoded(shrink: int) -> Image.Image:
        copy = open_image(image.filename, data)
        copy.draft(None, (full[0] // shrink, full[1] // shrink))
        return to_image(copy)

    crops = []
    for view in views:
        shrink = getattr(view, "shrink", None)
        times = shrink(full, draws(view.name)) if shrink else 1
        smaller = {"full": full} if times > 1 else {}
        crops.append(view(decoded(times), draws(view.name), **smaller))
    return crops


def _eval_example(
    position: int,
    *,
    source: Source,
    view: HostView,
    count: int,
    skip: int,
    copies: int,
    failed: Failures,
) -> Example:
    image, copy = divmod(min(position, count - 1), copies)
    weight = np.float32(position < count)
    try:
        item = source[skip + image]
        crop = view(to_image(item["image"]), generator(copy, item["index"], view.name))
    except Unreadable as error:
        failed.add(error, "it is left out")
        item = {"label": 0, "index": skip + image}
        crop, weight = np.zeros((*view.size, 3), np.uint8), np.float32(0)
    return item | {"views": [crop], "weight": weight}


def _batch(
    step: int,
    *,
    example: Callable,
    batch: int,
    first: int,
    rows: int,
    end: float = math.inf,
) -> Batch:
    """The rows of one process; each crop is copied once, to its place.

    Positions from `end` on are padding, which is decoded once at most.
    """
    result: Batch = {}
    for row in range(rows):
        position = step * batch + first + row
        if not row or position < end:
            item = example(position)
            crops = item.pop("views")
            item.pop("image", None)
        else:
            item["weight"] = np.float32(0)
        if not row:
            result["views"] = tuple(np.empty((rows, *x.shape), x.dtype) for x in crops)
            for key in item:
                kind = np.float32 if key == "weight" else np.int32
                result[key] = np.zeros(rows, kind)
        for array, crop in zip(result["views"], crops, strict=True):
            array[row] = crop
        for key, x in item.items():
            result[key][row] = x
    return result


def _iterate(
    data: grain.MapDataset, workers: int, threads: int, prefetch: int
) -> Generator[Batch, None, None]:
    """
    Raises:
      WorkerLost: a worker was killed.
    """
    read = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, prefetch)
    )
    steps = data.to_iter_dataset(read)
    if workers:
        _allow_flags()
        options = grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=max(1, prefetch)
        )
        steps = steps.mp_prefetch(options, _end_with_parent)
    with contextlib.closing(iter(steps)) as batches:
        try:
            yield from batches
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise WorkerLost(
                "a data worker was killed (out of memory?); lower data.workers, "
                "data.prefetch or the batch"
            ) from error


def _end_with_parent(worker: int, workers: int) -> None:
    """Let this worker process end when the one that started it is gone, even killed."""
    del worker, workers

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
