"""Crops and the laws of the pipeline."""

import functools
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from PIL import Image

from clvsmim.data import WorkerLost, crops, photos, pipeline

DRAWS = 20_000


def view(name, **changes):
    numbers = {
        "name": name,
        "size": (8, 10),
        "area": (0.2, 1.0),
        "aspect": (3 / 4, 4 / 3),
        "filter": "bilinear",
    }
    return crops.RandomResizedCrop(**numbers | changes)


@dataclass(frozen=True)
class Toy:
    """Noise images that carry their index in every pixel's low bits."""

    length: int
    name: str = "toy"
    num_classes: int = 3
    class_names: tuple[str, ...] = ("a", "b", "c")

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        return {"image": image, "label": index % 3, "index": index, "extra": -index}


def take(steps, count):
    """The first batches of an iterator, which is then closed."""
    result = list(itertools.islice(steps, count))
    steps.close()
    return result


def same(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


TWO = (view("one"), view("two"))
train = functools.partial(pipeline.batches, Toy(7), TWO, batch=4, seed=5)


# ------------------------------------------------------------------------ crops


def boxes(size, area, aspect, count=DRAWS):
    rng = np.random.default_rng(0)
    return np.array([crops.random_box(size, area, aspect, rng) for _ in range(count)])


def uniform_within(values, low, high, slack):
    """In the range up to rounding, and the first two moments within 3 sigma."""
    assert values.min() >= low - slack and values.max() <= high + slack
    unit = (values - low) / (high - low)
    assert abs(unit.mean() - 1 / 2) <= 3 * math.sqrt(1 / 12 / len(unit))
    assert abs((unit**2).mean() - 1 / 3) <= 3 * math.sqrt(4 / 45 / len(unit))


def test_crop_ranges():
    """Nothing is rejected at these areas, so both draws show undistorted."""
    side = 3000
    found = boxes((side, side), (0.08, 0.7), (3 / 4, 4 / 3))
    width, height = found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]
    uniform_within(width * height / side**2, 0.08, 0.7, 1e-3)
    uniform_within(np.log(width / height), -math.log(4 / 3), math.log(4 / 3), 1e-2)
    uniform_within(found[:, 0] / (side - width), 0.0, 1.0, 0.0)
    uniform_within(found[:, 1] / (side - height), 0.0, 1.0, 0.0)


@pytest.mark.parametrize("size", [(500, 375), (30, 21), (100, 220)])
def test_crop_of_published_recipes_is_inside(size):
    for area in ((0.08, 1.0), (0.67, 1.0), (0.2, 1.0)):
        left, upper, right, lower = boxes(size, area, (3 / 4, 4 / 3), 2000).T
        assert left.min() >= 0 and upper.min() >= 0
        assert (right > left).all() and (lower > upper).all()
        assert right.max() <= size[0] and lower.max() <= size[1]


@pytest.mark.parametrize(
    "size, box",
    [((1000, 9), (494, 0, 506, 9)), ((9, 1000), (0, 494, 9, 506)), ((1, 1), None)],
)
def test_crop_falls_back_to_the_centre(size, box):
    """No box of these areas fits; the widest allowed one in the middle is taken."""
    found = boxes(size, (0.9, 1.0), (3 / 4, 4 / 3), 5)
    np.testing.assert_array_equal(found, [box or (0, 0, 1, 1)] * 5)


def test_crop_is_the_box_resized():
    image = photos.read_photo(photos.SCENES["cat"][0][0])
    for filter, pillow in crops.FILTERS.items():
        crop = view("a", filter=filter)
        box = crops.random_box(
            image.size, crop.area, crop.aspect, np.random.default_rng(3)
        )
        expected = image.crop(box).resize((10, 8), pillow)
        got = crop(image, np.random.default_rng(3))
        assert got.shape == (8, 10, 3) and got.dtype == np.uint8
        np.testing.assert_array_equal(got, expected)


def test_center_crop():
    """451 x 300 to 96 x 64 (96.2 is cut off), then 60 x 48 from the middle."""
    image = photos.read_photo(photos.SCENES["cat"][0][0])
    crop = crops.CenterCrop(name="eval", size=(48, 60), resize=64, filter="bicubic")
    wide = image.resize((96, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crop(image), wide.crop((18, 8, 78, 56)))
    tall = crop(image.transpose(Image.Transpose.ROTATE_90), np.random.default_rng(0))
    assert tall.shape == (48, 60, 3)
    whole = crops.CenterCrop(name="e", size=(64, 64), resize=64, filter="bilinear")
    np.testing.assert_array_equal(whole(wide.crop((0, 0, 64, 64))).shape, (64, 64, 3))


def test_views_are_values():
    assert view("a") == view("a") and hash(view("a")) == hash(view("a"))
    assert view("a") != view("a", area=(0.3, 1.0))
    assert pickle.loads(pickle.dumps(view("a"))) == view("a")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"filter": "nearest"}, "unknown filter 'nearest', expected one of: bilinear"),
        ({"area": (8, 100)}, "area is .8, 100., expected .low, high."),
        ({"aspect": (2, 1)}, "aspect is .2, 1., expected"),
    ],
)
def test_views_check_their_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        view("a", **changes)
    with pytest.raises(ValueError, match="resize must be at least as large"):
        crops.CenterCrop(name="e", size=(9, 9), resize=8, filter="bilinear")


def test_unreadable_images_are_named(tmp_path):
    words = tmp_path / "words.png"
    words.write_text("no image")
    with pytest.raises(ValueError, match="cannot read the image .*words.png"):
        crops.read_image(words)
    with pytest.raises(ValueError, match="cannot read the image .*missing.png"):
        crops.read_image(tmp_path / "missing.png")
    Image.fromarray(Toy(1)[0]["image"]).save(tmp_path / "whole.png")
    short = tmp_path / "short.png"
    short.write_bytes((tmp_path / "whole.png").read_bytes()[:400])
    with pytest.raises(ValueError, match="cannot read the image .*short.png"):
        crops.read_image(short)
    lazy = Image.open(short)
    with pytest.raises(ValueError, match="cannot read the image .*short.png"):
        crops.to_image(lazy)
    lazy.close()


# --------------------------------------------------------------------- pipeline


def test_batches_have_the_promised_form():
    (first,) = take(train(), 1)
    assert [v.shape for v in first["views"]] == [(4, 8, 10, 3)] * 2
    assert all(v.dtype == np.uint8 for v in first["views"])
    for name in ("label", "index", "extra"):
        assert first[name].dtype == np.int32 and first[name].shape == (4,)
    np.testing.assert_array_equal(first["label"], first["index"] % 3)


def test_every_epoch_holds_every_image_in_another_order():
    order = np.concatenate([b["index"] for b in take(train(), 7)]).reshape(4, 7)
    np.testing.assert_array_equal(np.sort(order, 1), np.tile(np.arange(7), (4, 1)))
    assert len({tuple(epoch) for epoch in order}) == 4
    plain = take(train(shuffle=False), 2)
    np.testing.assert_array_equal(plain[1]["index"], [4, 5, 6, 0])


def test_neighbouring_seeds_share_no_epoch():
    """A seed that is only added to the epoch repeats its neighbour, an epoch late."""
    orders = [
        np.concatenate([b["index"] for b in take(train(seed=seed), 14)]).reshape(8, 7)
        for seed in (5, 6)
    ]
    assert not any((a == b).all() for a, b in itertools.product(*orders))


def test_law_start_equals_skipping():
    assert same(take(train(), 9)[5:], take(train(start=5), 4))


@pytest.mark.parametrize("processes", [2, 4])
def test_law_processes_make_one_global_batch(processes):
    parts = [take(train(process=p, processes=processes), 5) for p in range(processes)]
    joined = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *step)
        for step in zip(*parts, strict=True)
    ]
    assert same(joined, take(train(), 5))


def test_law_resuming_on_other_hosts():
    """Two steps on one host, then three on two: as if nothing had happened."""
    late = [take(train(process=p, processes=2, start=2), 3) for p in range(2)]
    joined = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *step)
        for step in zip(*late, strict=True)
    ]
    assert same(take(train(), 2) + joined, take(train(), 5))


def test_law_workers_and_threads_change_nothing():
    expected = take(train(threads=0), 5)
    assert same(expected, take(train(threads=3, prefetch=1), 5))
    assert same(expected, take(train(workers=2), 5))


def test_law_positions_do_not_depend_on_the_batch_size():
    """The same stream of crops, cut into batches of another size."""
    small, large = take(train(batch=2), 6), take(train(batch=6), 2)
    streams = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *part)
        for part in (small, large)
    ]
    assert same(*streams)


def test_law_a_view_does_not_see_the_others():
    both = take(train(), 3)
    for j in range(2):
        alone = take(pipeline.batches(Toy(7), TWO[j : j + 1], batch=4, seed=5), 3)
        assert same([b["views"][j] for b in both], [b["views"][0] for b in alone])


def test_views_epochs_and_seeds_get_other_crops():
    steps = take(train(shuffle=False), 4)
    one, two = (np.concatenate([b["views"][j] for b in steps]) for j in range(2))
    assert not any(same(a, b) for a, b in zip(one, two, strict=True))
    assert not any(same(one[i], one[i + 7]) for i in range(7))
    other = take(train(shuffle=False, seed=6), 4)
    other = np.concatenate([b["views"][0] for b in other])
    assert not any(same(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"processes": 3}, "batch of 4 cannot be split over 3 processes"),
        ({"process": 2, "processes": 2}, "process is 2, expected 0 to 1"),
    ],
)
def test_batches_check_their_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        train(**changes)


def test_batches_check_views_and_source():
    with pytest.raises(ValueError, match=r"named \['a', 'a'\].*name of its own"):
        pipeline.batches(Toy(7), (view("a"), view("a")), batch=4, seed=0)
    with pytest.raises(ValueError, match="the source 'toy' has no images"):
        pipeline.batches(Toy(0), TWO, batch=4, seed=0)


@pytest.mark.parametrize("processes", [1, 2])
def test_eval_reads_every_image_once(processes):
    part = functools.partial(
        pipeline.eval_batches, Toy(7), view("eval"), batch=4, processes=processes
    )
    parts = [list(part(process=p)) for p in range(processes)]
    steps = [
        jax.tree.map(lambda *rows: np.concatenate(rows), *step)
        for step in zip(*parts, strict=True)
    ]
    assert [s["views"][0].shape for s in steps] == [(4, 8, 10, 3)] * 2
    weight = np.concatenate([s["weight"] for s in steps])
    np.testing.assert_array_equal(weight, np.float32([1, 1, 1, 1, 1, 1, 1, 0]))
    assert weight.dtype == np.float32
    index = np.concatenate([s["index"] for s in steps])
    np.testing.assert_array_equal(index[weight == 1], np.arange(7))


def test_padding_costs_no_image():
    """Ten of the twelve rows: the last batch of a large one must not take as long."""
    read = []

    class Counted(Toy):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    for processes, expected in ((1, [0, 1]), (2, [0, 1, 1])):
        read.clear()
        for p in range(processes):
            part = {"process": p, "processes": processes}
            stream = pipeline.eval_batches(
                Counted(2), view("e"), batch=12, threads=0, **part
            )
            (step,) = stream
            rows = 12 // processes
            assert step["views"][0].shape == (rows, 8, 10, 3)
            assert step["weight"].sum() == (2 if not p else 0)
            assert all(
                step[k].shape == (rows,) and step[k].dtype == np.int32
                for k in ("label", "index", "extra")
            )
        assert read == expected


def test_eval_limit():
    steps = list(pipeline.eval_batches(Toy(7), view("e"), batch=4, limit=4))
    assert len(steps) == 1 and steps[0]["weight"].sum() == 4
    assert len(list(pipeline.eval_batches(Toy(7), view("e"), batch=4, limit=99))) == 2
    with pytest.raises(ValueError, match="nothing to read from 'toy'.*limit 0"):
        pipeline.eval_batches(Toy(7), view("e"), batch=4, limit=0)


# ---------------------------------------------------------------------- workers


def test_a_killed_worker_is_one_error():
    stream = train(workers=2)
    next(stream)
    mine = [p for p in multiprocessing.active_children() if "grain" in p.name]
    assert len(mine) == 2
    os.kill(mine[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerLost, match="killed .out of memory.*lower data.workers"):
        take(stream, 1000)
    stream.close()
    assert not any(p.is_alive() for p in mine)


ORPHANS = """
import multiprocessing, os, pathlib, signal, sys
from clvsmim.data import crops, pipeline, shape_texture

if __name__ == "__main__":
    source = shape_texture.make(split="train", length=8, side=16, label="shape")
    crop = crops.CenterCrop(name="a", size=(8, 8), resize=8, filter="bilinear")
    stream = pipeline.batches(source, (crop,), batch=2, seed=0, workers=2)
    next(stream), next(stream)
    workers = (str(p.pid) for p in multiprocessing.active_children())
    pathlib.Path(sys.argv[1]).write_text(" ".join(workers))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_the_one_that_started_them_is_killed(tmp_path):
    script, pids = tmp_path / "orphans.py", tmp_path / "pids"
    script.write_text(ORPHANS)
    run = subprocess.run([sys.executable, script, pids], stderr=subprocess.DEVNULL)
    assert run.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in pids.read_text().split()]
    assert len(workers) == 2
    until = time.monotonic() + 5
    while (left := [*filter(alive, workers)]) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def alive(pid):
    """Not ended; one that nobody has waited for yet has."""
    found = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    )
    return found.stdout.strip()[:1] not in ("", "Z")
