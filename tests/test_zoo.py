"""Packed runs and the zoo of those that ship: whole, small, and refused in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import runs

from clvsmim import (
    analyze,
    build,
    checkpoint,
    claims,
    demo,
    log,
    meta,
    packed,
    present,
    timeline,
    train,
    tree,
    zoo,
)
from clvsmim.configs import demo_labels, mini_zoo
from clvsmim.measure import Settings


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A trained hybrid, which has heads to leave out and heads to keep."""
    workdir = tmp_path_factory.mktemp("zoo") / "hybrid"
    runs.run(workdir, "hybrid", xray__share=0.5, xray__least=6, xray__images=16)
    return workdir


@pytest.fixture
def member(hybrid, tmp_path, monkeypatch):
    """It, packed under a name in a zoo of its own."""
    monkeypatch.setattr(packed, "ZOO", tmp_path / "zoo")
    (tmp_path / "zoo").mkdir()
    return zoo.pack(str(hybrid), "tiny")


def test_it_is_the_run_in_half_precision(hybrid, member):
    got, want = analyze.load("zoo:tiny"), analyze.load(str(hybrid))
    assert (got.step, got.config) == (want.step, want.config) == (12, want.config)
    theirs = tree.named({"params": want.params, "extra": want.extra})
    ours = tree.named({"params": got.params, "extra": got.extra})
    assert {n for n in theirs if n.startswith("params/encoder/")} < set(ours)
    for name, x in ours.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, np.asarray(theirs[name], np.float16))
    left_out = {n.split("/")[3] for n in set(theirs) - set(ours)}
    assert left_out == {"projector", "predictor", "teacher", "teacher_stats"}
    assert any("/simmim/decoder/" in name for name in ours)


def test_its_logs_are_those_of_the_run(hybrid, member):
    assert log.read(f"{member}/log.jsonl") == log.read(f"{hybrid}/log.jsonl")
    assert len(log.read(f"{member}/log.jsonl")) == 12
    for a, b in zip(timeline.series(member), timeline.series(str(hybrid)), strict=True):
        np.testing.assert_array_equal(a.values, b.values)


def test_the_same_run_packs_to_the_same_bytes(hybrid, member):
    before = runs.snapshot(member)
    zoo.pack(str(hybrid), "tiny")
    assert runs.snapshot(member) == before


def test_it_is_measured_and_pictured_like_a_run(member, tmp_path):
    settings = Settings(images=16, batch=16, group=4, metrics=("nmi",))
    found = analyze.analyze("zoo:tiny", str(tmp_path / "out"), settings)
    assert found[0].count == 16 and np.isfinite(found[0].values).all()
    with np.load(tmp_path / "out" / "pictures.npz") as pictures:
        assert "reconstruction" in pictures.files
    about = json.loads((tmp_path / "out" / "series.json").read_text())
    assert about["workdir"] == member  # where its logs are


@pytest.mark.parametrize("init", [{"zoo": "tiny"}, {"path": "zoo:tiny"}])
def test_a_run_starts_from_it(init, member, tmp_path):
    config = runs.config("simmim")
    config.init = init
    program = build.build(config)
    where = build.init_section(**init)
    given = train.given_encoder(program, where, build.plain(config.input))
    want = analyze.load("zoo:tiny").params["encoder"]
    runs.assert_identical(
        {n: np.asarray(x) for n, x in tree.named(given["params"]).items()},
        tree.named(want),
    )


def test_a_recipe_takes_its_encoder_and_data(member):
    made = demo_labels.get_config("probe,zoo:tiny")
    assert tuple(made.encoder.image) == (16, 16) and made.init.path == "zoo:tiny"


def test_a_damaged_member_is_refused(member):
    path = packed.ZOO / "tiny" / "weights.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="weights.npz is damaged: another SHA-256"):
        checkpoint.restore_params(member)
    assert "DAMAGED" in zoo.listing()


def test_a_damaged_log_is_listed(member):
    assert "DAMAGED" not in zoo.listing()
    path = packed.ZOO / "tiny" / "log.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-1])
    assert "DAMAGED" in zoo.listing()


def test_what_ships_is_small():
    assert sum(f.stat().length for f in packed.ZOO.glob("*/*")) < 8e6


def test_what_is_not_there_is_said_in_one_line(member, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no 'tinny' in the zoo; known: tiny"):
        packed.place("zoo:tinny")
    monkeypatch.setattr(packed, "ZOO", tmp_path)
    with pytest.raises(ValueError, match="zoo:tiny: this installation has none of"):
        analyze.load("zoo:tiny")
    assert zoo.listing().startswith("the zoo is empty")
    assert packed.place("runs/simmim") == "runs/simmim"


def test_only_a_finished_run_is_packed(hybrid, member, tmp_path):
    for name in ("", "a/b"):
        with pytest.raises(ValueError, match="--name="):
            zoo.pack(str(hybrid), name)
    for packed_one in ("zoo:tiny", member):
        with pytest.raises(ValueError, match="is packed already; name its workdir"):
            zoo.pack(packed_one, "x")
    with pytest.raises(ValueError, match="no run in"):
        zoo.pack(str(tmp_path / "nothing"), "x")
    part = tmp_path / "part"
    runs.run(part, "hybrid")
    about = json.loads((part / "meta.json").read_text())
    (part / "meta.json").write_text(json.dumps(about | {"steps": 13}))
    with pytest.raises(ValueError, match="is at step 12 of 13; train it to the end"):
        zoo.pack(str(part), "x")


def test_the_untrained_encoder_is_what_the_members_start_from(member):
    zoo.pack_untrained("born")
    got = analyze.load("zoo:born")
    born = build.build(mini_zoo.get_config("simmim,0")).init().params["encoder"]
    want = {n: np.asarray(x, np.float16) for n, x in tree.named(born).items()}
    assert got.step == 0 and tree.named(got.params["encoder"]).keys() == want.keys()
    for name, x in tree.named(got.params["encoder"]).items():
        np.testing.assert_array_equal(x, want[name])
    assert re.search(r"born +untrained +0 +0 ", zoo.listing())


def test_seconds_count_every_start():
    first, later = {}, {"images_per_second": 9.0}
    starts = [(1.0, first), (5.0, later), (7.0, first), (8.5, later), (0.5, first)]
    times = [{"seconds": s, **more} for s, more in starts]
    assert packed.seconds(times) == 5.0 + 8.5 + 0.5
    assert packed.seconds([]) == 0.0


def start_of(member, steps, workdir):
    """Train the recipe of a shipped member for its first steps; their records.

    By the command, on one device and one core, as it was trained: with eight devices or
    two threads sums are rounded otherwise, and of that contrastive learning makes 1% of
    its loss within 50 steps.
    """
    theirs = meta.read_meta(packed.ZOO / member)["config"]
    method, lam = theirs["objective"]["name"], theirs["objective"].get("lam")
    method = {"hybrid": f"hybrid_{lam}", "classify": "supervised"}.get(method, method)
    recipe = f"{method},{theirs['seed']}"
    meta.check_same(member, theirs, build.plain(mini_zoo.get_config(recipe)))
    cores = sorted(os.sched_getaffinity(0))
    core = cores[os.getpid() % len(cores)]  # another one for a test beside this
    command = [sys.executable, "-m", "clvsmim.cli", "train", f"--workdir={workdir}"]
    process = subprocess.Popen(
        [*command, f"--config=configs/mini_zoo.py:{recipe}"],
        env=os.environ | {"XLA_FLAGS": ""},
        cwd=runs.ROOT,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        while process.poll() is None and len(losses(workdir, steps)) < steps // 10:
            time.sleep(1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=100)[1].decode()
    finally:
        process.kill()
    assert "SIGTERM: step" in said, said
    return losses(workdir, steps)


def losses(folder, steps):
    """Of a log, every tenth step."""
    return [
        r["loss"]
        for r in log.read(f"{folder}/log.jsonl")
        if "loss" in r and r["step"] <= steps
    ]


TRAINED = [n for n in packed.names() if not n.endswith("_untrained")]


@pytest.mark.slow
@pytest.mark.parametrize("member", TRAINED)
def test_a_member_is_what_its_recipe_makes(member, tmp_path):
    want = losses(packed.ZOO / member, 50)
    got = start_of(member, 50, tmp_path)
    assert len(want) == 5
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("method", mini_zoo.STEPS)
def test_every_member_has_one_encoder_and_differs_in_the_objective_alone(method):
    first, other = (mini_zoo.get_config(m) for m in ("moco_v3", f"{method},2"))
    assert other.seed == 2
    for section in ("encoder", "input", "data", "mesh", "log", "xray"):
        assert first[section] == other[section], section
    assert build.build(other).total == mini_zoo.STEPS[method]


def test_a_member_that_does_not_exist():
    with pytest.raises(ValueError, match="known: .'moco_v3', 'simmim'"):
        mini_zoo.get_config("moco")
    with pytest.raises(ValueError, match="expected a seed after the comma"):
        mini_zoo.get_config("mae,first")


def documented():
    """The rows of the table of claims in docs/mini-zoo.md."""
    lines = (runs.ROOT / "docs" / "mini-zoo.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [tuple(row) for row in cells if row and row[0].isdecimal()]


def test_the_docs_have_every_claim_in_its_words():
    want = claims.table([]).rows
    assert [(*r[:2], r[4]) for r in documented()] == [(*r[:2], r[4]) for r in want]


@pytest.mark.slow
def test_the_docs_have_what_the_demo_finds(tmp_path):
    """Verdicts word for word; numbers to the last digit but one of four."""
    folders = [str(tmp_path / name) for name in packed.names()]
    for name, folder in zip(packed.names(), folders, strict=True):
        analyze.analyze(f"zoo:{name}", folder, demo.SETTINGS)
    found = claims.table([present.measured(folder) for folder in folders]).rows
    number = re.compile(r"[\d.]+(?:e[−\d]+)?")
    for got, want in zip(found, documented(), strict=True):
        assert (got[3], number.sub("", got[2])) == (want[3], number.sub("", want[2]))
        a, b = ([x.strip(".") for x in number.findall(row[2])] for row in (got, want))
        a, b = ([float(x.replace("−", "-")) for x in row] for row in (a, b))
        np.testing.assert_allclose(a, b, rtol=2e-3)
