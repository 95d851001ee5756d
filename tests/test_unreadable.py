"""Files as they come: broken ones, and the modes that images can have."""

import functools
import io

import numpy as np
import pytest
from PIL import Image
from sets import encoded, picture
from test_data import Toy, same, take, view

from clvsmim import build
from clvsmim.data import Unreadable, crops, folder, pipeline

JPEG = encoded(picture(0))
BROKEN = {
    "empty.jpg": b"",
    "words.jpg": b"this is no image",
    "short.jpg": JPEG[: len(JPEG) // 2],
    "head.jpg": JPEG[:30],
    "short.png": encoded(picture(0), "PNG")[:400],
    "crc.png": encoded(picture(0), "PNG").replace(b"IDAT", b"IDAX"),
    "short.gif": encoded(picture(0), "GIF")[:60],
    "short.webp": encoded(picture(0), "WEBP")[:60],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_unreadable_by_name(name, tmp_path):
    with pytest.raises(Unreadable, match=f"cannot read the image .*{name}: .*replace"):
        crops.to_image(crops.open_image(name, BROKEN[name]))
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(Unreadable, match=f"cannot read the image .*{name}: .*replace"):
        crops.read_image(tmp_path / name)


def opened(image, format, **options):
    return crops.to_array(crops.open_image("x", encoded(image, format, **options)))


def test_modes_become_rgb():
    """Without a warning: these are errors here."""
    colour = np.asarray(picture(3))
    grey = np.asarray(picture(3).convert("L"))
    grey3 = np.stack([grey] * 3, -1)
    alpha = np.dstack([colour, grey])
    expected = {
        "grey": (opened(Image.fromarray(grey), "PNG"), grey3),
        "alpha": (opened(Image.fromarray(alpha), "PNG"), colour),
        "grey, alpha": (opened(picture(3).convert("LA"), "PNG"), grey3),
        "16 bits": (
            opened(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
            grey3,
        ),
        "1 bit": (
            opened(Image.fromarray(grey > 99), "PNG"),
            np.where(grey3 > 99, 255, 0),
        ),
        "CMYK": (opened(picture(3).convert("CMYK"), "TIFF"), colour),
    }
    for name, (got, want) in expected.items():
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_cmyk_jpeg():
    difference = opened(picture(3).convert("CMYK"), "JPEG", quality=95) - np.asarray(
        picture(3), np.int32
    )
    assert np.abs(difference).mean() < 6


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_palette_with_transparency(transparency):
    palette = picture(3).quantize(16)
    got = opened(palette, "PNG", transparency=transparency)
    np.testing.assert_array_equal(got, np.asarray(palette.convert("RGB")))


def test_an_animation_is_its_first_frame():
    frames = [picture(i).quantize(64) for i in range(3)]
    got = opened(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(got, np.asarray(frames[0].convert("RGB")))


# ------------------------------------------------------------------- replacement

BAD = ("03.jpg", "07.jpg", "08.jpg")
VIEWS = (view("one"), view("two"))


@pytest.fixture
def source(tmp_path):
    """Twelve images, three of them broken in three ways."""
    for i in range(12):
        (tmp_path / f"{i:02d}.jpg").write_bytes(encoded(picture(i)))
    for name, broken in zip(BAD, ("empty", "words", "short"), strict=True):
        (tmp_path / name).write_bytes(BROKEN[f"{broken}.jpg"])
    numbers = {"train": "", "test": "", "lengths": (0, 0), "classes": 0}
    return folder.make(split="train", path=str(tmp_path), **numbers)


@pytest.fixture
def train(source):
    return functools.partial(pipeline.batches, source, VIEWS, batch=4, seed=5)


def test_broken_images_are_replaced_and_named_once(source, train, capfd):
    steps = take(train(shuffle=False), 6)  # two epochs
    found = np.concatenate([b["index"] for b in steps])
    whole = np.isin(np.arange(24) % 12, (3, 7, 8), invert=True)
    np.testing.assert_array_equal(found[whole], (np.arange(24) % 12)[whole])
    assert not np.isin(found, (3, 7, 8)).any()
    assert len(set(found[~whole])) > 2  # not one image for all
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    for name in BAD:
        (line,) = (x for x in lines if name in x)
        assert "another image takes its place" in line
    for step in steps:  # the crops are those of the image named
        for row, index in enumerate(step["index"]):
            assert step["views"][0][row].any(), index


def test_law_the_replacement_is_a_function_of_seed_and_position(train):
    expected = take(train(), 9)
    assert same(expected[4:], take(train(start=4), 5))
    assert same(expected, take(train(threads=3), 9))
    assert same(expected[:4], take(train(workers=2), 4))
    parts = [take(train(process=p, processes=2), 9) for p in range(2)]
    for step, halves in zip(expected, zip(*parts, strict=True), strict=True):
        whole = np.concatenate([h["views"][1] for h in halves])
        np.testing.assert_array_equal(step["views"][1], whole)
    other = take(train(seed=6, shuffle=False), 9)
    mine = take(train(shuffle=False), 9)
    assert not same([b["index"] for b in mine], [b["index"] for b in other])


def test_a_crop_of_a_replacement_is_the_view_of_it(source, train):
    (step,) = take(train(shuffle=False), 1)
    index = int(step["index"][3])
    image = crops.to_image(source[index]["image"])
    for crop, one in zip(step["views"], VIEWS, strict=True):
        want = one(image, pipeline.generator(5, 3, one.name))
        np.testing.assert_array_equal(crop[3], want)


def test_too_many_broken_images_end_it(train):
    take(train(shuffle=False, unreadable=3), 6)
    with pytest.raises(
        ValueError, match="3 images .* data.unreadable allows 2; the last: .*08.jpg"
    ):
        take(train(shuffle=False, unreadable=2), 6)
    with pytest.raises(ValueError, match="allows 0; the last: .*03.jpg"):
        take(train(shuffle=False, unreadable=0), 1)


def test_a_source_without_one_whole_image_ends_it(tmp_path):
    for name, data in BROKEN.items():
        (tmp_path / name).write_bytes(data)
    source = folder.make(
        split="train", path=str(tmp_path), train="", test="", lengths=(0, 0), classes=0
    )
    with pytest.raises(ValueError, match="of 1000 images of .* none can be read"):
        take(pipeline.batches(source, VIEWS, batch=4, seed=5), 1)


def test_too_many_are_named_from_a_worker_too(train):
    with pytest.raises(ValueError, match="data.unreadable allows 0; the last: .*jpg"):
        take(train(workers=1, unreadable=0), 3)


def test_what_is_wrong_with_a_source_is_not_replaced(source):
    wrong = folder.make(
        split="train", path=source.name, train="", test="", lengths=(99, 0), classes=1
    )
    with pytest.raises(
        ValueError, match="12 images found, data.source.lengths says 99"
    ):
        take(pipeline.batches(wrong, VIEWS, batch=4, seed=0), 1)


def test_evaluation_leaves_them_out_or_stops(source):
    steps = take(pipeline.eval_batches(source, VIEWS[0], batch=4, unreadable=3), 3)
    index, weight = (np.concatenate([b[k] for b in steps]) for k in ("index", "weight"))
    np.testing.assert_array_equal(index, np.arange(12))
    np.testing.assert_array_equal(np.flatnonzero(weight == 0), [3, 7, 8])
    with pytest.raises(ValueError, match="allows 0; the last: .*03.jpg"):
        list(pipeline.eval_batches(source, VIEWS[0], batch=4))


# --------------------------------------------------------------- repeats, draft


def test_repeats_draw_an_image_some_times_in_a_row():
    train = functools.partial(pipeline.batches, Toy(12), VIEWS, batch=4, seed=5)
    once, thrice = (take(train(repeats=r), 6) for r in (1, 3))
    order, repeated = (
        np.concatenate([b["index"] for b in steps]).reshape(2, 12)
        for steps in (once, thrice)
    )
    np.testing.assert_array_equal(repeated, np.repeat(order[:, :4], 3, 1))
    crop = np.concatenate([b["views"][0] for b in thrice])
    assert len({x.tobytes() for x in crop}) == 24  # each time another crop
    assert same(thrice[4:], take(train(repeats=3, start=4), 2))


def test_repeats_of_an_epoch_that_does_not_divide():
    """Seven samples an epoch: two images three times, and one once."""
    steps = take(pipeline.batches(Toy(7), VIEWS, batch=7, seed=5, repeats=3), 3)
    counts = [sorted(np.unique(b["index"], return_counts=True)[1]) for b in steps]
    assert counts == [[1, 3, 3]] * 3


def large(seed=1):
    return encoded(picture(seed, (900, 700)), quality=92)


def test_draft_is_close_and_draws_the_same(tmp_path, monkeypatch):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(large(i))
    (tmp_path / "4.png").write_bytes(encoded(picture(4, (900, 700)), "PNG"))
    source = folder.make(
        split="train", path=str(tmp_path), train="", test="", lengths=(0, 0), classes=0
    )
    make = functools.partial(pipeline.batches, source, batch=5, seed=3, shuffle=False)
    views = tuple(view(n, size=(96, 96), area=(0.08, 1)) for n in "ab")
    exact, fast = (take(make(views, draft=d), 4) for d in (False, True))
    for a, b in zip(exact, fast, strict=True):
        for x, y in zip(a["views"], b["views"], strict=True):
            difference = np.abs(x.astype(int) - y).mean((1, 2, 3))
            assert 0 < difference.max() <= 2 and difference[4] == 0  # the PNG
    alone = take(make(views[1:], draft=True), 4)  # a view does not see the others
    assert same([b["views"][1] for b in fast], [b["views"][0] for b in alone])
    assert same(fast, take(make(views, draft=True, threads=3), 4))


@pytest.mark.parametrize(
    "area, shrink", [((1.0, 1.0), 4), ((0.15, 0.15), 2), ((0.02, 0.02), 1)]
)
def test_shrink_leaves_the_box_no_smaller_than_the_result(area, shrink):
    """A box of 700, 271 and 99 pixels for a result of 112."""
    one = view("a", size=(112, 112), area=area, aspect=(1.0, 1.0))
    assert one.shrink((700, 700), np.random.default_rng(0)) == shrink


def test_section_data():
    good = {"source": {}, "workers": 0, "threads": 1, "prefetch": 2}
    build.loader_section(**good)
    for wrong in ({"repeats": 0}, {"unreadable": -1}, {"threads": -1}):
        with pytest.raises(ValueError, match=f"data.{next(iter(wrong))}="):
            build.loader_section(**good | wrong)


def test_filters_are_those_of_pillow():
    """A photograph's crop is Pillow's antialiased resize of the cut, to the bit."""
    image = Image.open(io.BytesIO(large()))
    for filter in ("bilinear", "bicubic"):
        one = view("a", filter=filter, size=(64, 48))
        box = crops.random_box(
            image.size, one.area, one.aspect, np.random.default_rng(1)
        )
        want = image.crop(box).resize((48, 64), Image.Resampling[filter.upper()])
        np.testing.assert_array_equal(one(image, np.random.default_rng(1)), want)
