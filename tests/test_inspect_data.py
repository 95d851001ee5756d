"""What inspect-data says of a config is what training will do with it."""

import functools
import io
import itertools
import json
import time

import jax
import numpy as np
import pytest
import runs
import sets
from PIL import Image

from clvsmim import build, cli, inspect_data
from clvsmim.data import photos, pipeline

QUICK = {"images": 32, "seconds": 0.1, "rows": 4, "asked": 0.0}
# The kinds of pictures that each method makes of an image; "" is a mask.
COLUMNS = {
    "moco_v3": ("moco_v3, view 1", "moco_v3, view 2"),
    "simmim": ("simmim, view 1", ""),
    "mae": ("mae, view 1", ""),
    "hybrid": ("moco_v3, view 1", "moco_v3, view 2", "simmim, view 1", ""),
    "classify": ("classify, view 1",),
}


def config(name, **changes):
    """In one process and one thread, so that a test starts nothing."""
    return runs.config(name, data__workers=0, data__threads=0, **changes)


@functools.cache
def looked(name):
    """(columns, targets, settings, objective, source) of a method."""
    settings = build.plain(config(name))
    encoder = build.make_encoder(settings["encoder"])
    method = build.make_objective(encoder, settings["input"], settings["objective"])
    source = build.make_source(settings["data"], "train")
    _, columns, targets = inspect_data.look(source, method, settings, rows=4)
    return columns, targets, settings, method, source


def test_every_method_is_in_the_table_of_this_file():
    assert set(COLUMNS) == set(runs.OBJECTIVES)


@pytest.mark.parametrize("name", COLUMNS)
def test_each_view_and_mask_is_a_column_with_its_recipe(name):
    columns, targets, settings, *_ = looked(name)
    starts = [c.caption.split("\n")[0] for c in columns]
    assert starts == [start or "what of it is masked" for start in COLUMNS[name]]
    for column in columns:
        assert column.images.shape == (4, 16, 16, 3)
        assert 0 <= column.images.min() < column.images.max() <= 1
        assert "area" in column.caption or "hidden" in column.caption
    assert (targets is not None) == (name == "classify")


def test_each_view_of_moco_has_its_own_recipe():
    first, second = (c.caption for c in looked("moco_v3")[0])
    assert "blur p 1," in first and "solarize p" not in first
    assert "blur p 0.1," in second and "solarize p 0.2" in second


def test_the_views_are_those_of_the_first_step():
    """The first rows of the batch, as the step makes it."""
    (column, _), _, settings, method, source = looked("simmim")
    seed, batch = settings["seed"], settings["batch"]
    stream = pipeline.batches(source, method.views, batch=batch, seed=seed, threads=0)
    key = jax.random.fold_in(jax.random.key(seed), 0)
    prepare = jax.jit(functools.partial(method.prepare, train=True))
    image = np.asarray(prepare(key, next(stream))["image"])
    mean, std = (np.array(settings["input"][k]) for k in ("mean", "std"))
    want = np.clip(image[:4] * std + mean, 0, 1)
    np.testing.assert_allclose(column.images, want, atol=1e-5)


@pytest.mark.parametrize("name", ["simmim", "mae"])
def test_hidden_patches_are_grey_and_the_others_are_the_view(name):
    (view, mask), _, settings, *_ = looked(name)
    side = settings["encoder"]["patch"]
    cells = (mask.images[:, ::side, ::side] * 255).round() == 190
    hidden = cells.all(-1).repeat(side, 1).repeat(side, 2)
    assert (mask.images[hidden] * 255 == 190).all()
    np.testing.assert_allclose(mask.images[~hidden], view.images[~hidden], atol=0.002)
    assert f"{hidden.mean():.0%} of the patches hidden" in mask.caption
    assert 0.5 < hidden.mean() < 0.9


def test_mixed_labels_are_told_by_their_shares():
    _, targets, _, _, source = looked("classify")
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-5)
    shares = np.zeros(source.num_classes)
    shares[[3, 5]] = 0.3, 0.7
    names = source.class_names
    assert inspect_data.target(shares, names) == f"0.70 {names[5]}\n0.30 {names[3]}"
    assert inspect_data.target(np.eye(16)[2], names) == f"1.00 {names[2]}"


@pytest.fixture
def folder(tmp_path):
    """A recipe whose images lie in train/ and val/: 9 cats, 3 dogs, no owl, one file
    of which is broken."""
    for split, counts in (("train", (9, 3, 0)), ("val", (2, 2, 2))):
        for name, count in zip(sets.NAMES, counts, strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                data = sets.encoded(sets.picture(i, (40 + i, 30)), "PNG")
                (tmp_path / split / name / f"{i}.png").write_bytes(data)
    broken = tmp_path / "train" / "cat" / "4.png"
    broken.write_bytes(broken.read_bytes()[:60])
    found = config("simmim", batch=4)
    found.data.source = {
        "name": "folder",
        "path": str(tmp_path),
        "train": "train",
        "test": "val",
        "lengths": (0, 0),
        "classes": 0,
    }
    return found


def test_counts_sizes_and_what_is_wrong_with_a_folder(folder, tmp_path):
    facts = inspect_data.inspect(folder, f"{tmp_path}/out", **QUICK | {"asked": 1e7})
    train, test = facts["splits"]["train"], facts["splits"]["test"]
    assert (train["images"], train["classes"], train["opened"]) == (12, 3, 12)
    assert (test["images"], test["per_class"]["median"]) == (6, 2)
    assert (train["per_class"]["fewest"], train["per_class"]["most"]) == ("owl", "cat")
    assert train["width"]["max"] == 48 and train["height"]["min"] == 30
    (bad,) = train["unreadable"]
    assert "train/cat/4.png" in bad
    assert facts["steps_per_epoch"] == 3 and facts["steps"] == 9
    unreadable, slow = facts["problems"][0], facts["problems"][-1]
    assert "1 of 12 images opened are unreadable" in unreadable and bad in unreadable
    assert "train: 1 of 3 classes have no image, such as owl" in facts["problems"]
    assert "the step takes 10000000: use a host of" in slow
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == facts
    text = inspect_data.lines(facts)
    assert [line[0] == "!" for line in text].count(True) == len(facts["problems"])
    assert all("\n" not in line for line in text)


def test_the_classes_of_a_folder_are_counted_whole(folder):
    source = build.make_source(build.plain(folder)["data"], "train")
    found = inspect_data.describe(source, "train", images=2)
    assert found["opened"] == 2
    each = {k: found["per_class"][k] for k in ("of", "min", "max", "empty")}
    assert each == {"of": 12, "min": 0, "max": 9, "empty": 1}


def test_a_class_without_images_and_a_host_with_idle_cores():
    each = {"of": 5, "empty": 1, "fewest": "owl", "most": "cat"}
    split = {"images": 5, "classes": 3, "opened": 5, "unreadable": []}
    facts = {
        "splits": {"train": split | {"per_class": each}},
        "steps_per_epoch": 0,
        "speed": {
            "images_per_second": 100.0,
            "one_core": 80.0,
            "cores": 8,
            "workers": 1,
            "asked": 500.0,
        },
    }
    first, second, third = inspect_data.find_problems(facts, {"batch": 8})
    assert first == "train: 1 of 3 classes have no image, such as owl"
    assert second == "batch 8 is larger than the 5 images"
    assert "raise data.workers (1 now, 8 cores, 80 images/s each)" in third
    each["of"] = 4  # a sample proves no class to be empty
    facts["speed"]["asked"] = 100.0
    assert inspect_data.find_problems(facts, {"batch": 8}) == [second]


def test_a_split_that_is_not_there_is_a_problem_and_not_the_end(folder, tmp_path):
    folder.data.source.test = "nowhere"
    facts = inspect_data.inspect(folder, f"{tmp_path}/out", **QUICK)
    assert set(facts["splits"]) == {"train"}
    assert facts["problems"][0].startswith("no test split: ")


def test_labels_outside_the_classes_are_refused():
    source = photos.make(split="train", length=16, side=24)
    assert inspect_data.per_class([0, 0, 15], source)["most"] == "astronaut"
    for label in (-1, 16):
        with pytest.raises(
            ValueError, match=f"has the label {label}, expected 0 to 15"
        ):
            inspect_data.per_class([0, label, 3], source)


def test_the_clock_runs_from_the_first_batch_that_was_not_ready():
    def stream():
        for i in itertools.count():
            time.sleep(0.05 if i < 2 else 0.01)
            yield i

    start = time.monotonic()
    found = inspect_data.rate(stream(), ready=2, seconds=0.3, what="")
    assert 40 < found < 100
    assert time.monotonic() - start >= 0.4


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_writes_a_picture_with_a_row_per_image(tmp_path, capsys):
    demo = f"--config={runs.ROOT}/configs/demo.py:simmim"
    small = runs.overrides(data__workers=0, data__threads=0)
    argv = [demo, f"--out={tmp_path}", "--images=8", "--seconds=0.1", "--rows=2"]
    cli.run(inspect_data, [*argv, *small])
    out = capsys.readouterr().out
    assert (
        "train   64 images, 16 classes" in out and "steps   4 per epoch, 12 in" in out
    )
    assert f"open {tmp_path}/views.png" in out and "!" not in out
    with Image.open(io.BytesIO((tmp_path / "views.png").read_bytes())) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 400 and pixels.shape[1] > 600
    assert (pixels == 190).all(-1).mean() > 0.1  # the masks are on it
