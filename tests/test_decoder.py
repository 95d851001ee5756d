"""MAE's decoder, measured behind the encoder: commands, files, claims, figures."""

import dataclasses

import jax
import numpy as np
import pytest
import runs
from models import MAE, tiny, tiny_mae, tiny_moco_v3

from clvsmim import (
    analysis,
    analyze,
    build,
    claims,
    files,
    measure,
    merge,
    present,
    views,
)
from clvsmim.measure import Settings
from clvsmim.metrics import DECODER, Axis, Series, continued
from clvsmim.objectives import hybrid
from clvsmim.report import Run, Section, figures, style, write

METRICS = ("distance", "nmi", "displacement", "fourier", "probe")
SETTINGS = Settings(
    images=16, train_images=16, batch=8, group=8, metrics=METRICS, every=1
)
ENCODER, BLOCKS = 2, 4  # depth of the tiny encoder, and of its decoder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """An MAE run that was analyzed."""
    folder = tmp_path_factory.mktemp("decoder") / "mae"
    runs.run(folder, "mae", epochs=0.25)
    analyze.analyze(str(folder), str(folder / "analysis"), SETTINGS)
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """They are drawn once, in `workdir`: each is a compilation."""
    monkeypatch.setattr(analyze, "save_pictures", lambda *args: [])


@pytest.fixture(scope="module")
def series(workdir):
    found = analysis.read_series(f"{workdir}/analysis")["series"]
    return {s.name: s for s in found}


def test_its_blocks_go_on_where_the_encoders_end(series):
    inner = {n: s for n, s in series.items() if n.startswith(DECODER)}
    assert {n[len(DECODER) :] for n in inner} >= {
        "attention distance",
        "normalized mutual information",
        "relative displacement",
        "delta log amplitude at the highest frequency",
    }
    assert not [n for n in inner if "probe" in n]  # it needs the labels of the encoder
    for name, found in inner.items():
        own, whole = found.axes[0], series[name[len(DECODER) :]].axes[0]
        assert own.name == whole.name and found.count == 16
        assert own.positions[0] == ENCODER + (own.name == "block")
        assert own.positions[-1] == ENCODER + BLOCKS
    moves = inner["decoder: relative displacement"]
    assert moves.axes[0].values == (3, 4, 5, 6)
    assert moves.axes[1].values == ("attn", "mlp")
    depth = inner["decoder: delta log amplitude at the highest frequency"].axes[0]
    blocks = [(block, "mlp") for block in (3, 4, 5, 6)]
    assert depth.values == ((2, "embed"), *blocks)
    assert depth.labels[:2] == ("2 embed", "3 mlp")
    assert inner["decoder: attention distance"].axes[1].values == (1, 2, 3)  # heads


def test_the_numbers_are_those_of_its_residual_stream(workdir, series):
    run = analyze.load(str(workdir))
    model, variables = run.objective.decoder(run.params, run.extra)
    source = build.make_source(run.config["data"], "test")
    part = measure.Part(source, measure.eval_view((16, 16)), 16)
    images, _ = analyze.few(part, range(16))
    colour = run.config["input"]

    @jax.jit
    def stream(images):
        x = jax.vmap(lambda image: views.normalise(image, **colour))(images)
        return model.apply(variables, x)[1]["residual"]

    tokens = np.stack(stream(images)).astype(np.float64)[:, :, 1:]  # no CLS
    steps = np.linalg.norm(tokens[1:] - tokens[:-1], axis=-1)
    relative = (steps / np.linalg.norm(tokens[:-1], axis=-1)).mean(axis=(1, 2))
    found = series["decoder: relative displacement"].values
    np.testing.assert_allclose(found, relative.reshape(BLOCKS, 2), rtol=1e-4)


def test_the_claims_about_it_are_measured(workdir, series):
    model = present.measured(f"{workdir}/analysis")
    assert model.method == "mae"
    models = [model, dataclasses.replace(model, method="simmim")]  # as if
    verdicts = {v.id: v for v in claims.judge(models)}
    for number in (17, 18, 19):
        assert verdicts[number].verdict == "one seed: not judged", number
        assert np.isfinite(verdicts[number].margin)
    moves = series["decoder: relative displacement"].values.mean(axis=0)
    np.testing.assert_allclose(verdicts[18].values["MAE"], [moves[0] / moves[1]])
    name = "delta log amplitude at the highest frequency"
    out, inner = series[name].values[-1], series[DECODER + name].values[1:].mean()
    np.testing.assert_allclose(verdicts[19].values["MAE"], [[out, inner]])
    alone = {v.id: v.verdict for v in claims.judge(models[:1])}
    assert alone[17] == "not measured: needs a SimMIM run"
    without = {v.id: v.verdict for v in claims.judge(models[1:])}
    assert without[18] == without[19] == "not measured: needs an MAE run"


def test_the_report_has_both_in_one_panel(workdir):
    out = workdir / "analysis"
    text = present.one(str(out)).read_text()
    files = {p.name for p in (out / "figures").iterdir()}
    assert "relative-displacement.png" in files
    assert not [n for n in files if n.startswith("decoder-relative")]
    # What is no line over depth has a figure of its own.
    curves = [n for n in files if n.startswith("decoder-")]
    assert len(curves) >= 1
    for name in ("relative-displacement", "decoder-relative-displacement"):
        assert f'href="data/{name}.csv"' in text
        assert (out / "data" / f"{name}.csv").exists()
    assert text.count("Shaded: the blocks of the decoder") >= 4
    assert "MAE (MIM)" in text and "width 48, depth 4, 3 heads" in text
    assert "reconstruction" in text


def line(name, block, values, heads=0):
    shape = (len(block), heads) if heads else (len(block),)
    axes = [Axis("block", tuple(block))]
    axes += [Axis("head", tuple(range(1, heads + 1)))] if heads else []
    return Series(
        name=name,
        axes=tuple(axes),
        values=np.broadcast_to(np.reshape(values, (-1,) + (1,) * bool(heads)), shape),
        stderr=None,
        kind="depth",
        unit="",
        source="",
        count=1,
    )


def test_a_panel_goes_on_to_the_last_block_with_a_shaded_hand_over():
    drawn = {
        "a": line("x", (1, 2), (1.0, 2.0), heads=3),
        "b": line("x", (1, 2, 3), (2.0, 1.0, 0.0)),
    }
    behind = {"a": continued(line("x", (1, 2, 3), (5.0, 6.0, 7.0), heads=2), 2)}
    looks = style.looks([("a", "mim"), ("b", "cl")])
    (ax,) = figures._lines(drawn, looks, "depth", behind).axes
    points = [np.column_stack(x.get_data()).astype(int).tolist() for x in ax.lines]
    assert [[1, 1], [2, 2]] in points and [[1, 2], [2, 1], [3, 0]] in points
    assert [[3, 5], [4, 6], [5, 7]] in points
    colour = {str(p): x.get_color() for p, x in zip(points, ax.lines, strict=True)}
    assert colour[str([[1, 1], [2, 2]])] == colour[str([[3, 5], [4, 6], [5, 7]])]
    borders = [x.get_xdata()[0] for x in ax.lines if len(set(x.get_xdata())) == 1]
    assert borders == [2.5]  # between the encoder's block 2 and the decoder's first
    assert [t.get_text() for t in ax.texts] == ["decoder"]
    (plain,) = figures._lines(drawn, looks, "depth", {}).axes
    assert len(plain.lines) == 2 and not plain.texts


def test_a_decoder_of_one_run_leaves_the_others_as_they_are(tmp_path):
    """A quantity of two runs, of which one has a decoder: one figure."""
    own = line("x", (1, 2), (1.0, 2.0))
    tail = continued(line("x", (1,), (3.0,)), 2)
    both = [Run("a", "mim", [own, tail]), Run("b", "cl", [own])]
    section = Section("Depth", "What to look for.", ("x",))
    text = write(tmp_path, title="t", runs=both, sections=[section]).read_text()
    assert text.count("<figure") == 1
    rows = (tmp_path / "data" / "decoder-x.csv").read_text().splitlines()
    assert rows == ["run,block,value,stderr", "a,3,3.0,"]
    again = tmp_path / "unnamed"  # and so where no section names the quantity
    assert write(again, title="t", runs=both).read_text().count("<figure") == 1


def test_an_analysis_stopped_in_the_decoder_goes_on_there(
    workdir, tmp_path, monkeypatch, no_pictures
):
    folder, whole = str(workdir), workdir / "analysis"
    seen = []
    run = analysis.run

    def stop(encoder, *args, **more):
        for i, so_far in enumerate(run(encoder, *args, **more)):
            seen.append((type(encoder).__name__, i))
            if len(seen) == limit:
                raise KeyboardInterrupt
            yield so_far

    monkeypatch.setattr(analysis, "run", stop)
    limit = 6  # two batches of each part, and both of the decoder
    with pytest.raises(KeyboardInterrupt):
        analyze.analyze(folder, str(tmp_path), SETTINGS)
    assert [name for name, _ in seen] == 4 * ["ViT"] + 2 * ["Whole"]
    assert not (tmp_path / "series.json").exists()
    limit = 0
    seen.clear()
    analyze.analyze(folder, str(tmp_path), SETTINGS)
    assert [name for name, _ in seen] == ["Whole"]  # the batch that was not saved
    for name in ("state.npz", "decoder/state.npz"):
        runs.assert_identical(
            files.load_arrays(str(tmp_path / name)),
            files.load_arrays(str(whole / name)),
        )
    assert sorted(p.name for p in (tmp_path / "decoder").iterdir()) == ["state.npz"]
    analyze.analyze(folder, str(tmp_path), SETTINGS)
    assert len(seen) == 1  # all was there


def test_two_halves_merge_to_the_whole(workdir, series, tmp_path, no_pictures):
    folder, both = str(workdir), str(tmp_path / "both")
    halves = [str(tmp_path / half) for half in "ab"]
    for skip, out in zip((0, 8), halves, strict=True):
        analyze.analyze(folder, out, SETTINGS._replace(images=8, skip=skip))
    merge.merge(halves, both)
    found = {s.name: s for s in analysis.read_series(both)["series"]}
    inner = [name for name in series if name.startswith(DECODER)]
    assert [name for name in found if name.startswith(DECODER)] == inner
    for name, want in series.items():
        if name in inner:
            assert found[name].axes == want.axes and found[name].count == 16
            np.testing.assert_allclose(found[name].values, want.values, rtol=1e-9)
    merge.merge([both], str(tmp_path / "again"))  # what was merged can be again
    assert (tmp_path / "again" / "decoder" / "state.npz").exists()
    with pytest.raises(ValueError, match="8 test images are in both"):
        merge.merge([halves[0], halves[0]], both)


def test_without_a_metric_for_it_there_is_no_pass(workdir, tmp_path):
    """And none of another analysis is left over, to be merged."""
    stale = tmp_path / "decoder" / "state.npz"
    stale.parent.mkdir()
    stale.write_bytes(b"of another analysis")
    run = analyze.load(str(workdir))
    few = SETTINGS._replace(metrics=("probe", "knn"))
    assert analyze.behind(run, None, {}, str(tmp_path), few) == []
    assert not stale.exists()


def test_a_mixture_with_mae_has_one_and_is_no_hybrid_of_the_paper():
    encoder = tiny(MAE)
    mim, cl = tiny_mae(encoder), tiny_moco_v3(encoder)
    mixed = hybrid.make(encoder=encoder, lam=0.2, mim=mim, cl=cl)
    params, extra = build.abstract_params(mixed)
    model, _ = mixed.decoder(params, extra)
    assert model.spec.depth == 2
    section = {"name": "hybrid", "lam": 0.2, "mim": {"name": "mae"}}
    section["cl"] = {"name": "moco_v3"}
    assert present.method(section) == "hybrid with mae"
    assert present.title(section) == "hybrid with mae, λ = 0.2"
    section["mim"]["name"] = "simmim"
    assert present.method(section) == "hybrid"
