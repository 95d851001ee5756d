"""The demo from end to end, and again, and after a kill."""

import json
import re
import shutil

import jax
import pytest
import runs

from clvsmim import analysis, analyze, demo, files, log, packed, train, zoo


@pytest.fixture(autouse=True, scope="module")
def small(tmp_path_factory):
    """One device, and few images to measure."""
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        few = {"images": 32, "train_images": 32, "group": 8}
        patch.setattr(demo, "SETTINGS", demo.SETTINGS._replace(**few))
        patch.setattr(demo, "floor", lambda: "the floor of the data")
        patch.setattr(packed, "ZOO", tmp_path_factory.mktemp("zoo"))  # none
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a finished demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    path = demo.demo(str(out), changes=runs.CHANGES)
    assert path == out / "report.html"
    return out


@pytest.fixture(scope="module")
def page(done):
    return (done / "report.html").read_text()


def text(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_the_page_loads_nothing_from_elsewhere(page):
    tags = r"<(?:script|link|iframe|img|source)[^>]*\b(?:src|href)=[\"']?(?:http|//)"
    assert re.findall(tags, page) == []
    loads = re.findall(r"\bsrc=\"([^\"]*)", page) + re.findall(r"url\(([^)]*)\)", page)
    assert all(url.strip("'\"").startswith(("data:", "#")) for url in loads)
    assert "@import" not in page


def test_it_shows_three_runs_side_by_side(page):
    shown = text(page)
    lam = demo.recipe.get_config("hybrid").objective.lam
    for name in ("MoCo v3 (CL)", "SimMIM (MIM)", f"hybrid, λ = {lam:g}"):
        assert name in shown
    assert shown.count("192 images in 12 steps") == 3
    assert "32 test images" in shown and "the floor of the data" in shown


def test_it_has_every_section(page):
    headings = [
        text(h).strip() for h in re.findall(r"<h[23][^>]*>(.*?)</h", page, re.S)
    ]
    for section in demo_sections():
        assert section in headings, headings
    assert any("training" in h.lower() for h in headings), headings
    for series in ("attention distance", "normalized mutual information"):
        assert series in text(page).lower()


def demo_sections():
    from clvsmim import present

    return [
        "Masked reconstructions",
        "Attention of two queries",
        *(section.title for section in present.SECTIONS),
    ]


def test_masked_reconstructions_are_those_of_the_two_that_make_them(done):
    for name in demo.NAMES:
        found = files.load_arrays(done / name / "analysis" / "pictures.npz")
        assert ("reconstruction" in found) == (name != "moco_v3")
        assert found["attention"].shape[0] == 2


# What training and measuring write, and drawing only reads.
OURS = ("*/checkpoints/*", "*/meta.json", "*/log.jsonl", "*/analysis/*")


def times(folder, *parts):
    paths = [p for part in parts for p in sorted(folder.glob(part))]
    return {p: p.stat().st_mtime_ns for p in paths}


def test_started_again_it_makes_only_what_is_missing(
    done, tmp_path, monkeypatch, capsys
):
    out = shutil.copytree(done, tmp_path / "out")
    (out / "report.html").unlink()
    shutil.rmtree(out / "simmim" / "analysis")
    kept = ("*/checkpoints/*", "moco_v3/analysis/*", "hybrid/analysis/*", "*/log.jsonl")
    before = times(out, *kept)
    assert len(before) > 10
    monkeypatch.setattr(train, "loop", None)
    demo.demo(str(out), changes=runs.CHANGES)
    assert times(out, *kept) == before
    assert (out / "report.html").read_bytes() == (done / "report.html").read_bytes()
    again, first = (analysis.read_series(f / "simmim/analysis") for f in (out, done))
    assert [s.to_json() for s in again["series"]] == [
        s.to_json() for s in first["series"]
    ]
    said = capsys.readouterr().err
    assert said.count("nothing left to do") == 3
    assert re.search(r"^\d+ seconds$", said, re.M)


def test_killed_in_the_middle_it_goes_on(done, tmp_path):
    class Stop(Exception):
        pass

    real = log.JsonlLog.write

    def write(self, record):
        real(self, record)
        if "hybrid" in str(self._path) and record["step"] == 8:
            raise Stop

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(log.JsonlLog, "write", write)
        demo.demo(str(out), changes=runs.CHANGES)
    assert not (out / "report.html").exists()
    assert (out / "simmim" / "analysis" / "series.json").exists()
    demo.demo(str(out), changes=runs.CHANGES)
    for name in demo.NAMES:
        assert runs.trace(out / name) == runs.trace(done / name)
        runs.assert_identical(runs.state(out / name), runs.state(done / name))
        folder = f"{name}/analysis"
        got, want = (analysis.read_series(f / folder) for f in (out, done))
        assert [s.to_json() for s in got["series"]] == [
            s.to_json() for s in want["series"]
        ]


def test_the_zoo_stands_beside_the_runs_and_is_what_is_judged(
    done, tmp_path, monkeypatch
):
    """Two packed seeds of one run: the first is drawn, the claims hear of both."""
    monkeypatch.setattr(packed, "ZOO", tmp_path / "zoo")
    (tmp_path / "zoo").mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        meta = tmp_path / zoo.pack(str(done / "simmim"), name) / "meta.json"
        about = json.loads(meta.read_text())
        about["config"]["seed"] = seed
        meta.write_text(json.dumps(about))
    out = shutil.copytree(done, tmp_path / "out")
    page = demo.demo(str(out), changes=runs.CHANGES).read_text()
    shown = text(page)
    drawn = ("SimMIM (MIM), a minute", "SimMIM (MIM), zoo")
    for name in (*drawn, "the mini zoo", "4 configurations were tried"):
        assert name in shown
    assert shown.count("192 images in 12 steps") == 4
    judged = json.loads((out / "data" / "claims.json").read_text())
    claim = next(c for c in judged if c["id"] == 16)
    assert claim["seeds"] == [0, 1] and claim["verdict"] == "2 seeds: not judged"


def test_the_report_alone_trains_and_measures_nothing(done, page, monkeypatch):
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(analyze, "analyze", None)
    before = times(done, *OURS)
    assert demo.report(str(done)) == done / "report.html"
    assert (done / "report.html").read_text() == page
    assert times(done, *OURS) == before


def test_other_settings_in_the_same_folder_are_refused(done):
    before = runs.snapshot(done)
    with pytest.raises(ValueError, match="moco_v3 holds another run: seed is 0 there"):
        demo.demo(str(done), changes=runs.CHANGES | {"seed": 1})
    assert runs.snapshot(done) == before


def test_the_command_says_what_to_open(done, monkeypatch, capsys):
    monkeypatch.setattr(demo, "demo", lambda out: demo.report(out))
    demo.main([f"--out={done}"])
    said = capsys.readouterr().out
    assert said.startswith("open ") and said.endswith(f"{done / 'report.html'}\n")


def test_the_floor_of_the_data_is_near_chance():
    source = {"name": "photos", "length": 320, "side": 24}
    train_, test = (
        demo.build.make_source(
            {"source": source, "workers": 0, "threads": 1, "prefetch": 2}, split
        )
        for split in ("train", "test")
    )
    assert demo.photos.mean_rgb_ridge_floor(train_, test) < 2 / 16
