"""The report: one page that loads nothing, with every number beside it."""

import base64
import csv
import html.parser
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clvsmim import report
from clvsmim.metrics import Axis, Series, taps
from clvsmim.report import figures, images, style, tables

DEPTH, HEADS = 4, 3
NAMES = ("MoCo <v3>", "Sim&MIM", "$hybrid$ λ=½")
HOSTILE = "<script>alert(1)</script>"


def series(name, axes, kind, seed, **fields):
    """Made-up numbers over `axes`, a {name: values}."""
    draw = np.random.default_rng(seed)
    shape = tuple(map(len, axes.values()))
    defaults = {"unit": "px", "source": "Fig. 3", "count": 64}
    return Series(
        name=name,
        axes=tuple(Axis(k, tuple(v)) for k, v in axes.items()),
        values=draw.normal(size=shape),
        stderr=draw.uniform(0.01, 0.1, size=shape),
        kind=kind,
        **{**defaults, **fields},
    )


def every_kind(seed):
    blocks, stream = range(1, DEPTH + 1), taps(DEPTH)
    matrix = series("depths", {"depth": stream, "to": stream}, "matrix", seed)
    return [
        series("heads", {"block": blocks, "head": range(1, HEADS + 1)}, "depth", seed),
        series("line", {"block": blocks}, "depth", seed, notes=(f"note {HOSTILE}",)),
        series("sites", {"block": blocks, "site": ("attn", "mlp")}, "depth", seed),
        series("stream", {"depth": stream}, "depth", seed, source=""),
        series("curve", {"rank": np.linspace(0.1, 1, 90).tolist()}, "curve", seed),
        series("family", {"depth": stream, "f": (0.1, 0.5, 1.0)}, "curve", seed),
        series("names", {"category": ("cat", "dog", "oven")}, "curve", seed),
        series("number", {}, "depth", seed),
        series("square", {"a": range(5), "b": ("x", "y")}, "matrix", seed),
        Series(**{**vars(matrix), "axes": (matrix.axes[0],) * 2, "stderr": None}),
        series("stack", {"block": blocks, "a": (1, 2), "b": (1, 2)}, "matrix", seed),
    ]


def log(seed):
    draw = np.random.default_rng(seed)
    lines = [
        {"step": 5 * i, "loss": float(draw.normal()), "lr": 0.1} for i in range(80)
    ]
    lines[3]["loss"] = float("nan")
    return [*lines, {"step": 400, "done": True}]


def runs():
    families = ("cl", "mim", "")
    return [
        report.Run(name, family, every_kind(i), log(i), {"seen": HOSTILE})
        for i, (name, family) in enumerate(zip(NAMES, families, strict=True))
    ]


def photo(side=32):
    return np.random.default_rng(0).uniform(size=(side, side, 3))


def galleries():
    mask = np.eye(4)
    triplet = (photo(), mask, np.round(photo() * 255).astype(np.uint8))
    maps = np.random.default_rng(1).uniform(size=(2, 2, 4, 4))
    return (
        report.reconstruction_gallery(HOSTILE, [triplet, triplet], caption=HOSTILE),
        report.attention_gallery(
            "maps", photo(), maps, [(0, 1), (3, 2)], rows=["block 1", HOSTILE]
        ),
    )


def write(folder):
    claims = report.Table("claims", ("id", "verdict"), [("1", "shows"), ("2", HOSTILE)])
    page = report.write(
        folder,
        title=f"Title {HOSTILE}",
        lead=HOSTILE,
        runs=runs(),
        sections=[
            report.Section("How far?", HOSTILE, ("heads", "line", "absent")),
            report.Section("Claims", tables=(claims,), galleries=galleries()),
        ],
        notes=(HOSTILE,),
    )
    return pathlib.Path(page)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"))


class Tags(html.parser.HTMLParser):
    """(tag, attributes) of a page, in order."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, name):
        return [attrs for tag, attrs in self.found if tag == name]


def test_the_page_loads_nothing(page):
    text = page.read_text("utf-8")
    tags = Tags(text)
    assert not re.search(r"https?:|url\(|@import", text)
    assert not any(tags.all(t) for t in ("script", "link", "iframe", "object", "video"))
    assert tags.all("img")
    for image in tags.all("img"):
        start = "data:image/png;base64,"
        assert image["src"].startswith(start) and image["alt"]
        Image.open(io.BytesIO(base64.b64decode(image["src"][len(start) :]))).verify()
    for link in tags.all("a"):
        target = link["href"]
        if target.startswith("#"):
            assert f'id="{target[1:]}"' in text
        else:
            assert (page.parent / target).is_file()


def test_names_and_texts_are_escaped(page):
    text = page.read_text("utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "MoCo <v3>" not in text and "MoCo &lt;v3&gt;" in text
    assert "$hybrid$ λ=½" in text


def test_two_writes_are_equal_byte_by_byte(page, tmp_path):
    again = write(tmp_path / "nested" / "again")
    files = sorted(p.relative_to(page.parent) for p in page.parent.rglob("*.*"))
    there = sorted(p.relative_to(again.parent) for p in again.parent.rglob("*.*"))
    assert files == there and len(files) > 50
    for name in files:
        assert (page.parent / name).read_bytes() == (again.parent / name).read_bytes()


@pytest.mark.parametrize("name", [s.name for s in every_kind(0)])
def test_json_and_csv_hold_every_number_exactly(page, name):
    expected = {r.name: next(s for s in r.series if s.name == name) for r in runs()}
    stored = json.loads((page.parent / f"data/{name}.json").read_text("utf-8"))
    text = (page.parent / f"data/{name}.csv").read_text("utf-8")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert list(stored) == list(expected) == list(NAMES)
    for run, want in expected.items():
        got = Series.from_json(stored[run])
        assert got.axes == want.axes and got.notes == want.notes
        np.testing.assert_array_equal(got.values, want.values)
        rows = [line for line in lines if line["run"] == run]
        values = np.array([float(line["value"]) for line in rows])
        np.testing.assert_array_equal(values.reshape(want.values.shape), want.values)
        if want.stderr is not None:
            np.testing.assert_array_equal(got.stderr, want.stderr)
            errors = np.array([float(line["stderr"]) for line in rows])
            np.testing.assert_array_equal(errors, want.stderr.ravel())
    assert len({tuple(line.values()) for line in lines}) == len(lines)


def test_equal_axes_of_a_matrix_keep_a_column_each(page):
    with (page.parent / "data/depths.csv").open() as file:
        header = next(csv.reader(file))
    assert header == ["run", "depth", "depth 2", "value", "stderr"]


def test_logs_are_drawn_and_stored(page):
    stored = json.loads((page.parent / "data/log-loss.json").read_text("utf-8"))
    want = [line["loss"] for line in log(0)[:-1]]
    got = stored[NAMES[0]]
    assert got["step"] == [5 * i for i in range(80)]
    assert got["value"][3] is None
    np.testing.assert_array_equal(np.delete(want, 3), [v for v in got["value"] if v])
    assert (page.parent / "figures/log-lr-sim-mim.png").is_file()
    assert not list(page.parent.glob("data/log-done*"))  # a flag, not a number


def test_nothing_measured_is_left_out(page):
    text = page.read_text("utf-8")
    for one in every_kind(0):
        assert f"<h3>{style.words(one.name)}</h3>" in text
    assert f"note {HOSTILE}".replace("<", "&lt;").replace(">", "&gt;") in text


def test_published_values_and_gaps_are_drawn(tmp_path):
    heads = every_kind(0)[0]
    heads.values[1] = np.nan
    line = series("heads", {"block": range(1, 3)}, "depth", 1, count=0)
    reference = report.Run("published", "reference", [line])
    found = [report.Run("ours", "cl", [heads, heads]), reference]
    path = report.write(tmp_path, title="t", runs=found)
    text = path.read_text("utf-8")
    assert "–" in text and "Training" not in text


def test_bad_input_is_refused(tmp_path):
    one, other = every_kind(0)[0], every_kind(1)[0]
    run = report.Run("a", "cl", [one])

    def refuse(words, *runs, **more):
        with pytest.raises(ValueError, match=words):
            report.write(tmp_path, title="t", runs=runs, **more)

    refuse("two runs are called 'a'", run, run)
    refuse("family 'clx'", report.Run("a", "clx"))
    refuse("two different series 'heads'", report.Run("a", "cl", [one, other]))
    curve = Series(**{**vars(one), "kind": "curve"})
    refuse("one kind", run, report.Run("b", "mim", [curve]))
    both = [report.Section(x, series=("heads",)) for x in "xy"]
    refuse("two sections", run, sections=both)
    cube = series("cube", {"a": (1,), "b": (1,), "c": (1,)}, "curve", 0)
    refuse("3 axes", report.Run("a", "cl", [cube]))
    with pytest.raises(ValueError, match="2 images for 3 columns"):
        report.Gallery("g", "", ("a", "b", "c"), ((photo(), photo()),))


def test_the_query_is_framed_where_it_is():
    """At patch * (row, column); a frame at 14 pixels per patch would drift away."""
    cell, query = 16, (9, 13)
    flat = images.attention_map(np.ones((14, 14)), query, cell)
    blank = images.attention_map(np.ones((14, 14)), (0, 0), cell)
    changed = np.argwhere((flat != blank).any(-1))
    inside = changed[(changed >= cell).any(1)]
    assert inside.min(0).tolist() == [cell * 9, cell * 13]
    assert inside.max(0).tolist() == [cell * 10 - 1, cell * 14 - 1]
    with pytest.raises(ValueError, match="outside the grid"):
        images.attention_map(np.ones((14, 14)), (0, 14), cell)


def test_each_map_is_scaled_to_its_own_range():
    small, large = np.eye(4) * 1e-6, np.eye(4) * 0.7 + 0.3
    a, b = (images.attention_map(m, (0, 0), 16) for m in (small, large))
    np.testing.assert_array_equal(a, b)
    assert a[24, 24].tolist() == [239, 248, 33]  # the last colour of plasma


def test_masked_patches_are_grey():
    mask = np.array([[1, 0], [0, 0]])
    shown = images.masked(photo(8), mask)
    assert (shown[:4, :4] == images.GREY).all()
    np.testing.assert_array_equal(shown[4:], images.to_uint8(photo(8))[4:])
    with pytest.raises(ValueError, match="does not divide"):
        images.masked(photo(8), np.ones((3, 3)))


def test_numbers_in_words():
    assert style.number(110.4922) == "110.5"
    assert style.number(-0.00012345) == "−1.234e−04"
    assert style.number(3.0) == "3" and style.number(0.0) == "0"
    assert style.number(110.4922, 0.31) == "110.5 ± 0.3"
    assert style.number(0.4290, 0.0112) == "0.429 ± 0.011"
    assert style.number(float("nan")) == "–"
    assert style.words("k-NN accuracy") == "k-NN accuracy"
    assert style.slug("CKA: λ=0.2 / é") == "cka-lambda-0-2-e"


def test_one_colour_per_run_and_shades_in_a_family():
    pairs = [("a", "cl"), ("b", "cl"), ("c", "mim"), ("d", "")]
    looks = style.looks(pairs)
    assert len({look.color for look in looks.values()}) == 4
    assert looks["a"].marker == looks["b"].marker != looks["c"].marker


def test_the_mean_of_nothing_is_nan():
    values = np.array([[1.0, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(tables.mean(values, 1), [1.0, np.nan])


def test_a_matrix_has_one_scale_for_all_runs():
    found = {str(i): every_kind(i)[-3] for i in range(3)}
    low, high = figures._limits(found.values())
    every = np.concatenate([s.values.ravel() for s in found.values()])
    assert (low, high) == (every.min(), every.max())


def test_matplotlib_is_not_imported_with_the_package():
    code = "import sys, clvsmim, clvsmim.metrics; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_quantity_that_nobody_has_a_number_of_is_words_only(tmp_path):
    gone = series("gone", {"block": (1, 2)}, "depth", 0, notes=("why not",))
    gone.values[:] = np.nan
    path = report.write(tmp_path, title="x", runs=[report.Run(name="a", series=[gone])])
    assert "why not" in path.read_text() and not list(tmp_path.glob("figures/gone*"))
    there = series("gone", {"block": (1, 2)}, "depth", 1)
    looks = style.looks([("a", ""), ("b", "")])
    with_both = figures.panels({"a": gone, "b": there}, looks)
    assert with_both[0].png == figures.panels({"b": there}, looks)[0].png


@pytest.mark.parametrize(
    ("axis", "origin"), [("block", "lower"), ("depth", "lower"), ("row", "upper")]
)
def test_depth_grows_upwards_and_maps_lie_as_the_image_does(axis, origin):
    axes = {axis: (0, 1, 2), "column": (0, 1, 2)}
    figure = figures._matrix(series("map", axes, "matrix", 0), (0.0, 1.0))
    assert figure.axes[0].images[0].origin == origin
