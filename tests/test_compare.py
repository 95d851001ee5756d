"""Two analyses side by side, and two halves added: the commands and their pages."""

import json
import shutil

import numpy as np
import pytest
import runs

from clvsmim import analysis, analyze, compare, merge, present
from clvsmim.measure import Settings

METRICS = ("nmi", "grams", "probe")
HALF = Settings(images=16, train_images=32, batch=16, group=8, metrics=METRICS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: workdir} of a SimMIM and a MoCo v3 run, both analyzed."""
    root = tmp_path_factory.mktemp("compare")
    for name in ("simmim", "moco_v3"):
        runs.run(root / name, name)
        analyze.analyze(str(root / name), str(root / name / "analysis"), HALF)
    return {name: root / name for name in ("simmim", "moco_v3")}


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    compare.main([*map(str, folders.values()), f"--out={out}"])
    return out


def test_both_stand_in_every_figure(page):
    text = (page / "report.html").read_text()
    assert "2 models side by side" in text
    rows = (page / "data" / "normalized-mutual-information.csv").read_text()
    assert {line.split(",")[0] for line in rows.splitlines()[1:]} == {
        "SimMIM (MIM)",
        "MoCo v3 (CL)",
    }
    for kind, count in (("csv", 5), ("json", 5)):
        assert len(list((page / "data").glob(f"*.{kind}"))) > count
    assert len(list((page / "figures").glob("*.png"))) > 5


def test_every_claim_is_in_the_table(page):
    text = (page / "report.html").read_text()
    assert "The paper&#39;s claims" in text and text.count("one seed: not judged") >= 4
    verdicts = json.loads((page / "data" / "claims.json").read_text())
    assert [v["id"] for v in verdicts] == list(range(1, 25))
    (nmi,) = (v for v in verdicts if v["id"] == 2)
    assert nmi["verdict"] == "one seed: not judged"


def test_models_of_the_same_images_are_compared_block_by_block(page, folders):
    (path,) = (page / "data").glob("cka-between-*.json")
    (series,) = json.loads(path.read_text()).values()
    values = np.array(series["values"])
    assert values.shape == (2, 2) and np.isfinite(values).all()
    alone = compare.grams(str(folders["simmim"] / "analysis"))
    own = compare.similarity(alone, alone, ("a", "b")).values
    np.testing.assert_allclose(np.diag(own), 1, rtol=1e-12)
    assert np.abs(values).max() < 1


def test_models_of_other_images_are_not(folders, tmp_path):
    a = compare.grams(str(folders["simmim"] / "analysis"))
    others = {
        "different images": a._replace(ids={"test": a.ids["test"] + 1}),
        "different data": a._replace(stamp=a.stamp | {"data": "x"}),
        "--group differs": a._replace(stamp=a.stamp | {"facts": {"group": 4}}),
        "not measured on both": a._replace(states={}),
    }
    for reason, b in others.items():
        with pytest.raises(ValueError, match=reason):
            compare.similarity(a, b, ("a", "b"))


def test_why_there_is_no_comparison_stands_in_the_report(folders, tmp_path):
    other = tmp_path / "other"
    settings = HALF._replace(images=8)
    analyze.analyze(str(folders["moco_v3"]), str(other), settings)
    path = compare.compare(
        [f"{folders['simmim']}/analysis", str(other)], str(tmp_path / "page")
    )
    assert "different images" in path.read_text()


def test_runs_of_one_method_have_the_name_of_their_folder(folders, tmp_path):
    copy = shutil.copytree(folders["simmim"], tmp_path / "again")
    path = compare.compare(
        [f"{folders['simmim']}/analysis", f"{copy}/analysis"], str(tmp_path / "page")
    )
    text = path.read_text()
    assert "SimMIM (MIM), simmim" in text and "SimMIM (MIM), again" in text
    assert "ambiguous: 2 MIM runs of seed 0" in text


def test_seeds_in_folders_of_the_same_name_are_told_apart(folders, tmp_path):
    for seed in "01":
        shutil.copytree(folders["simmim"], tmp_path / seed / "simmim")
    places = [f"{tmp_path}/{seed}/simmim/analysis" for seed in "01"]
    assert present.names([f"{folders['moco_v3']}/analysis", *places]) == [
        "MoCo v3 (CL)",
        "SimMIM (MIM), 0/simmim",
        "SimMIM (MIM), 1/simmim",
    ]


def test_mini_batches_that_begin_elsewhere_are_not_compared(folders, tmp_path):
    """Of the same images in all, but not the same ones together."""
    workdir = str(folders["simmim"])
    for name, change in (
        ("whole", {"images": 18}),
        ("a", {"images": 10}),
        ("b", {"images": 8, "skip": 10}),
    ):
        settings = HALF._replace(metrics=("nmi", "grams"), group=4, **change)
        analyze.analyze(workdir, str(tmp_path / name), settings)
    merge.merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "merged"))
    a, b = (compare.grams(str(tmp_path / name)) for name in ("whole", "merged"))
    with pytest.raises(ValueError, match="needs the same images"):
        compare.similarity(a, b, ("a", "b"))


@pytest.fixture(scope="module")
def halves(folders, tmp_path_factory):
    """Two analyses of 16 images each, and one of all 32."""
    root = tmp_path_factory.mktemp("halves")
    workdir = str(folders["simmim"])
    for name, change in (
        ("a", {}),
        ("b", {"skip": 16}),
        ("both", {"images": 32}),
    ):
        analyze.analyze(workdir, str(root / name), HALF._replace(**change))
    return root


def test_merged_halves_are_the_whole(halves, tmp_path, capsys):
    out = tmp_path / "merged"
    merge.main([f"{halves}/a", f"{halves}/b", f"--out={out}"])
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    found, want = (analysis.read_series(x) for x in (out, halves / "both"))
    assert found["images"] == 32
    assert [s.name for s in found["series"]] == [s.name for s in want["series"]]
    for a, b in zip(found["series"], want["series"], strict=True):
        if a.name.startswith("token "):  # of six images of three classes, not a sum
            continue
        np.testing.assert_allclose(a.values, b.values, rtol=1e-9, atol=1e-12)
    assert {p.name for p in out.iterdir()} >= {
        *("state.npz", "series.json", "pictures.npz", "report.html", "figures"),
    }


def test_a_merged_analysis_is_not_taken_for_another(halves, folders, tmp_path):
    out = str(tmp_path / "merged")
    merge.merge([f"{halves}/a", f"{halves}/b"], out)
    analyze.analyze(str(folders["simmim"]), out, HALF._replace(images=32))
    assert analysis.read_series(out)["skip"] == 0


MISTAKES = {
    "one": (["{a}"], "two or more"),
    "no out": (["{a}", "{b}"], "--out is missing"),
    "the same images": (["{a}", "{both}", "--out={new}"], "16 test images are in both"),
    "another model": (["{a}", "{moco}", "--out={new}"], "differ in encoder"),
    "nothing there": (["{a}", "{new}", "--out={new}"], "no analysis in"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_belong_together_is_refused(halves, folders, tmp_path, mistake):
    argv, reason = MISTAKES[mistake]
    places = {name: halves / name for name in ("a", "b", "both")}
    places |= {"moco": folders["moco_v3"], "new": tmp_path / "new"}
    with pytest.raises(ValueError, match=reason):
        merge.main([arg.format(**places) for arg in argv])
    assert not (tmp_path / "new").exists()


def test_comparing_one_or_the_same_twice(folders, tmp_path):
    (a, _) = map(str, folders.values())
    with pytest.raises(ValueError, match="two or more analyses to compare, got 1"):
        compare.main([a])
    with pytest.raises(ValueError, match="is there twice"):
        compare.main([a, f"{a}/analysis"])
    with pytest.raises(ValueError, match="no analysis in"):
        compare.main([a, str(tmp_path)])


def test_damaged_states_are_named(halves, tmp_path):
    copy = shutil.copytree(halves / "a", tmp_path / "copy")
    (copy / "state.npz").write_bytes((copy / "state.npz").read_bytes()[:2000])
    with pytest.raises(ValueError, match="state.npz holds no readable states"):
        merge.main([str(halves / "b"), str(copy), f"--out={tmp_path}/new"])
