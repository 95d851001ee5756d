"""colab/pretrain.ipynb: executed from top to bottom, in a rehearsal of seconds."""

import copy

import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError
from PIL import Image
from test_notebooks import PRETRAIN, Session, assert_drawn, fill

from clvsmim import labelled, log, timeline
from clvsmim.meta import read_meta
from clvsmim.report import style

RUNS = "runs/photos/x1"
NAMES = {
    "MoCo v3 (CL)": "moco_v3",
    "SimMIM (MIM)": "simmim",
    "hybrid, λ = 0.2": "hybrid_0.2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def whole(folder):
    with Session(PRETRAIN, folder) as session:
        session.run()
        yield session


@pytest.fixture
def session(whole):
    """As it was after the first execution, but for its kernel."""
    kept = copy.deepcopy(whole.notebook.cells)
    yield whole
    for cell, before in zip(whole.notebook.cells, kept, strict=True):
        cell.update(before)


def test_from_top_to_bottom(session, folder):
    assert_drawn(session, "views", "live", "xrays", "accuracies", "panels")
    assert len(session.pictures("views")) == 1  # the hybrid's has them all
    # A curve per loss and four maps each; the hybrid has three losses.
    assert len(session.pictures("live")) == 5 + 5 + 7
    assert len(session.pictures("xrays")) == len(timeline.NAMES) * len(NAMES)
    assert len(session.pictures("panels")) == 3
    path, workdirs = session.text("report").strip().split("\n")
    assert (folder / path).exists()
    runs = [f"{RUNS}/{name}" for name in NAMES.values()]
    assert workdirs == f"WORKDIRS: {', '.join(runs)}"


def test_xrays_are_dense(session, folder):
    """There is something to watch in a short training, too."""
    for name in NAMES.values():
        found, _ = timeline.split(log.read(f"{folder}/{RUNS}/{name}/xray.jsonl"))
        assert [r["step"] for r in found] == [0, 2, 4, 6, 8, 10, 12]


def test_accuracies(session, folder):
    """The tables have what was evaluated last, of each run and of an untrained one."""
    _, probe, probes, tuned, tunings = session.text("accuracies").split("**")
    assert (probe, tuned) == tuple(labelled.NAMES.values())
    assert len(session.pictures("accuracies")) == 2
    for text, stage in ((probes, "probe"), (tunings, "finetune")):
        for title, name in (NAMES | {"untrained": "untrained_moco_v3"}).items():
            workdir = f"{folder}/{RUNS}/{name}/{stage}"
            (series,) = labelled.read(workdir, stage)
            cell = style.number(float(series.values), float(series.stderr))
            assert f"| {title} | {cell} |" in text
            path = read_meta(workdir)["config"]["init"]["path"]
            assert path == ("" if title == "untrained" else f"{RUNS}/{name}")


def test_what_is_there_is_not_trained_again(session, folder):
    logs = sorted(folder.glob(f"{RUNS}/**/log.jsonl"))
    before = [path.stat().st_mtime_ns for path in logs]
    drawn = session.pictures("live")
    session.run("train", "live", "labels")
    assert len(before) == 3 + 2 * 4
    assert before == [path.stat().st_mtime_ns for path in logs]
    again = session.pictures("live")
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True))


def test_drawn_while_it_trains(session, monkeypatch):
    """Each drawing takes the place of the one before."""
    told, process = [], session.client.process_message

    def listen(message, *where):
        told.append(message["msg_type"])
        return process(message, *where)

    monkeypatch.setattr(session.client, "process_message", listen)
    session.run("train", "live", METHODS="simmim", LONGER=20)  # 240 steps
    drawn = [kind for kind in told if kind in ("clear_output", "display_data")]
    assert len(drawn) >= 4
    assert drawn == ["clear_output", "display_data"] * (len(drawn) // 2)
    assert len(session.pictures("live")) == 5


@pytest.mark.slow
def test_an_untrained_one_of_each_kind(session, folder):
    """MAE's encoder has positions, SimMIM's a bias: two baselines, told apart."""
    fill(session.cells["labels"], LABELS="probe")
    places = ("train", "live", "xrays", "labels", "accuracies")
    session.run(*places, METHODS="simmim, mae")
    assert len(session.pictures("live")) == 5 + 5
    _, _, table, *_ = session.text("accuracies").split("**")
    assert table.count("untrained") == 2
    for title in ("untrained, as of SimMIM (MIM)", "untrained, as of MAE (MIM)"):
        assert f"| {title} | " in table
    kinds = [
        read_meta(f"{folder}/{RUNS}/untrained_{x}/probe") for x in ("simmim", "mae")
    ]
    assert [k["encoder"]["position"] for k in kinds] == ["none", "mae_sincos"]


@pytest.mark.slow
def test_own_folder(session, tmp_path):
    """The recipe for real data, on noise in two folders."""
    draw = np.random.default_rng(0)
    for i in range(48):
        split, label = ("train", "val")[i % 3 == 0], "ab"[i % 2]
        place = tmp_path / "noise" / split / label
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    places = ("train", "download", "views", "live", "labels", "accuracies")
    session.run(*places, DATA=str(tmp_path / "noise"), METHODS="simmim")
    assert "train   32 images, 2 classes" in session.text("views")
    assert len(session.pictures("live")) == 5
    assert_drawn(session, "views", "accuracies")
    # A probe of every block, as in the paper's Fig. 10a.
    assert "| depth | SimMIM (MIM) | untrained |" in session.text("accuracies")


def test_prepared_data(session):
    """Both data sets have a recipe for every method, with the λ of the form."""
    methods = "moco_v3, simmim, hybrid, mae"
    for data in ("cifar10", "imagenette"):
        session.run("train", DATA=data, METHODS=methods, LAMBDA=0.4, LONGER=3)
        told = session.text("train").strip().split("\n")
        assert len(told) == 4
        assert told[2] == f"hybrid, λ = 0.4: runs/{data}/x3/hybrid_0.4"


def test_a_training_that_fails_speaks_up(session, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CellExecutionError, match="cannot be written"):
        session.run(
            "train", "live", DATA="photos", METHODS="simmim", FOLDER=f"{tmp_path}/file"
        )
