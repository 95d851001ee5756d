"""The paper's curves behind a public file, and what is expected of it."""

import dataclasses

import numpy as np
import pytest

from clvsmim import replay
from clvsmim.metrics import DECODER, Axis
from clvsmim.report import Run

FIELDS = replay.SIZE | {"image": (224, 224)}


def analysed(family="mae", objective=None, **encoder):
    """What series.json says of a file."""
    config = {"encoder": FIELDS | encoder, "objective": objective or {"name": "mae"}}
    return {"file": {"family": family}, "config": config}


@pytest.mark.parametrize("family", replay.TITLES)
def test_a_file_of_the_family_and_size_would_be_the_published_one(family):
    assert replay.public(analysed(family)) == family
    assert replay.public(analysed("hf_vitmae")) == "mae"
    assert replay.public(analysed(family) | {"file": None}) == ""
    for other in ({"width": 384}, {"image": [448, 448]}, {"patch": 14}, {"heads": 6}):
        assert replay.public(analysed(family, **other)) == ""
    tuned = {"name": "encoder", "labels": True}
    assert replay.public(analysed(family, tuned)) == ""
    assert replay.public(analysed("dino")) == ""


def verdicts(name, change=lambda name, x: x):
    """{(what is expected, of what): verdict} of the published curves."""
    series = replay.published(name).series
    series = [dataclasses.replace(s, values=change(s.name, s.values)) for s in series]
    return {row[:2]: row[3] for row in replay.rows(series, name)}


@pytest.mark.parametrize("name", replay.TITLES)
def test_the_published_curves_are_as_expected(name):
    assert set(verdicts(name).values()) == {"PASS"}
    assert len(verdicts(name)) > 4


FAULTS = {  # what is measured instead -> what must fail for it, and nothing else
    "moco_v3": {
        "backwards": (replay.DISTANCE, lambda x: x[::-1], 2),
        "uniform": (replay.NMI, lambda x: 0 * x, 3),
        "last block": (replay.NMI, lambda x: np.append(x[:-1], 0.04), 1),
        "early peak": (replay.DELTA, lambda x: np.append(-2.3, x[1:]), 2),
    },
    "simmim": {
        "lower": (replay.DELTA, lambda x: x - 0.3, 2),
        "no drop": (replay.DELTA, lambda x: np.append(x[:-1], x[-2]), 1),
        "late": (replay.PROBE, lambda x: np.sort(x), 2),
    },
    "mae": {
        "learned table": (replay.DELTA, lambda x: np.append(-2.5, x[1:]), 3),
        "decoder": (DECODER + replay.DELTA, lambda x: x + 0.2, 1),
    },
}


@pytest.mark.parametrize("name", FAULTS)
def test_another_network_fails(name):
    for series, change, count in FAULTS[name].values():
        found = verdicts(name, lambda n, x, s=series, f=change: f(x) if n == s else x)
        assert list(found.values()).count("FAIL") == count, (series, found)


def test_what_was_not_measured_is_said():
    series = [s for s in replay.published("moco_v3").series if s.name == replay.NMI]
    nan = dataclasses.replace(series[0], values=series[0].values * np.nan)
    for given in ([], [nan]):
        assert {row[3] for row in replay.rows(given, "moco_v3")} == {"not measured"}
    found = {row[1]: row[3] for row in replay.rows(series, "moco_v3")}
    assert found[replay.NMI] == "PASS" and found[replay.DELTA] == "not measured"


def test_heads_are_averaged():
    (series,) = (s for s in replay.published("moco_v3").series if s.name == replay.NMI)
    heads = np.stack([series.values + 0.3, series.values - 0.3], 1)
    axes = (*series.axes, Axis("head", (1, 2)))
    both = dataclasses.replace(series, values=heads, axes=axes)
    assert [r[3] for r in replay.rows([both], "moco_v3") if r[1] == replay.NMI] == [
        "PASS"
    ] * 4


def test_curves_stand_behind_what_was_measured_alone():
    measured = [s for s in replay.published("mae").series if s.name == replay.DELTA]
    run = Run("x", series=measured)
    own = [(run, analysed("mae"))]
    (behind,) = replay.backdrop(own, False, [(run, "out")])
    assert behind.name == "MAE in the paper" and behind.family == "reference"
    assert [s.name for s in behind.series] == [replay.DELTA]
    assert replay.backdrop([(run, analysed("dino"))], False, [(run, "")]) == []
    every = replay.backdrop([], True, [(run, "")])
    assert [r.name.split()[0] for r in every] == ["MoCo", "SimMIM", "MAE"]
    section = replay.section(own)
    assert "cannot be proven" in section.text and section.tables[0].rows[0][3] == "PASS"
    assert replay.section([(run, analysed("dino"))]) is None


def test_the_decoder_goes_on_where_the_encoder_ends():
    (decoder,) = (
        s for s in replay.published("mae").series if s.name.startswith(DECODER)
    )
    assert [block for block, _ in decoder.axes[0].values] == list(range(12, 21))
