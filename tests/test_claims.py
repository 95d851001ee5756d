"""The claims: their words, their arithmetic on made-up curves, and their verdicts."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from clvsmim import claims, report
from clvsmim.claims import Measured
from clvsmim.metrics import Axis, Series, block_axis, taps

WORDS = """
| 1 | attention distance, mean of last third | CL > MIM | Fig. 3 |
| 2 | NMI, mean of last third | CL < MIM | Fig. 4 |
| 3 | NMI of CL's last block / CL's maximum over blocks | < 1/3 | Fig. 4 (collapse at the end) |
| 4 | unbiased CKA between heads, mean of last third | CL > MIM | Fig. 5a |
| 5 | unbiased CKA between depths, mean over last-third pairs | CL > MIM | Fig. 5b |
| 6 | unbiased CKA between positions, mean of last third | CL > MIM | Fig. 5c |
| 7 | mean over ranks of token-level log singular value, last block minus embedding | MIM > 0 >= CL | Fig. 7 |
| 8 | same, image level | CL > MIM | Fig. 7 |
| 9 | translation share of attention updates, mean of last third | CL > MIM | Fig. 6 |
| 10 | delta log amplitude at the last block | MIM > CL | Fig. 8 |
| 11 | MIM's delta log amplitude, last block minus the maximum of the three before | < 0 | Fig. 8 (last blocks act as decoder) |
| 12 | shape bias (cue conflict) | CL > MIM | Fig. 9 |
| 13 | accuracy lost to energy-normalised noise, top quarter of frequencies | CL > MIM | Fig. 9 |
| 14 | linear probe at the last block | CL > MIM | Fig. 1, 10 |
| 15 | linear probe, mean of first third | MIM > CL | Fig. 10 |
| 16 | block of MIM's best probe | not in the last quarter | Fig. 10 |
| 17 | relative displacement, slope over depth | SimMIM < 0, MAE not | Fig. 11 |
| 18 | MAE decoder: attention displacement / MLP displacement | > 1 | Fig. 11 |
| 19 | MAE: delta log amplitude, decoder blocks against encoder output | lower | Fig. 11 |
| 20 | linear probe of the best interior λ against both ends | higher than both | Fig. 12a |
| 21 | fine-tuning accuracy, same | higher than both | Fig. 12a |
| 22 | hybrid NMI | first third on MIM's side of the CL-MIM midpoint, last third on CL's | Fig. 12b |
| 23 | hybrid delta log amplitude | same pattern | Fig. 12c |
| 24 | probe lost when the last third's attention branches are removed, minus when its MLP branches are | CL > 0 > MIM | talk: self-attention matters in CL, MLPs in MIM |
"""  # noqa: E501

DISTANCE = "attention distance"
NMI = "normalized mutual information"
HEADS, POSITIONS = "CKA between heads", "CKA between positions"
DEPTHS = "CKA between depths, matrix"
TOKENS = "token-level log singular value, mean over ranks"
IMAGES = "image-level log singular value, mean over ranks"
UPDATES = "translation share of attention updates"
AMPLITUDE = "delta log amplitude at the highest frequency"
PROBE, TUNED = "ridge probe accuracy", "fine-tuning accuracy"
MOVES = "relative displacement"
CL, MIM, MAE = "moco_v3", "simmim", "mae"
X = 99  # stands where a claim must not look


def curve(name, values):
    """A Series over blocks (L,), or over the axes the metric really has."""
    values = np.asarray(values, float)
    blocks = Axis("block", (*range(1, len(np.atleast_1d(values)) + 1),))
    axes, kind = (blocks,), "depth"
    if name == TUNED:
        axes, kind = (), "curve"
    elif name in (DISTANCE, NMI):  # three heads, whose mean is `values`
        axes += (Axis("head", (1, 2, 3)),)
        values = values[:, None] + np.array([-0.25, 0.0, 0.25])
    elif name.endswith(MOVES):
        axes += (Axis("site", ("attn", "mlp")),)
        values = values if values.ndim == 2 else np.stack([values, values], 1)
    elif name == DEPTHS:
        axes, kind = (blocks, blocks), "matrix"
    elif name == TOKENS:
        axes = (Axis("depth", taps((len(values) - 1) // 2)),)
    elif name in (IMAGES, PROBE) or name.endswith(AMPLITUDE):
        axes = (block_axis(len(values)),)
    return Series(
        name=name,
        axes=axes,
        values=values,
        stderr=None,
        kind=kind,
        unit="",
        source="",
        count=8,
    )


def matrix(late):
    """(6, 6), with `late` between the two blocks of the last third."""
    values = np.full((6, 6), X) + np.diag([100 * late] * 6)  # no pair: not looked at
    values[4, 5] = values[5, 4] = late
    return values


def pair(name, high, low, margin):
    """CL above MIM by `margin`, and the other way round."""
    return (
        {CL: {name: high}, MIM: {name: low}},
        {CL: {name: low}, MIM: {name: high}},
        (margin, -margin),
    )


def swapped(case):
    """MIM above CL."""
    shows, opposite, margins = case
    return opposite, shows, margins


# {id: (runs that show it, runs that show the opposite, the margins of both)}. A third
# of six blocks is two.
# CL is below MIM first and above it last: a side is MIM's, not the upper one.
NMIS = {CL: {NMI: [4, 4, X, X, 6, 6]}, MIM: {NMI: [8, 8, X, X, 0, 0]}}
AMPLITUDES = {
    CL: {AMPLITUDE: [X, 4, 4, X, X, 0, 0]},
    MIM: {AMPLITUDE: [X, 8, 8, X, X, 6, 6]},
}
HALF, WHOLE, ZERO = ("hybrid", 0.5), ("hybrid", 1.0), ("hybrid", 0.0)
CASES = {
    1: pair(DISTANCE, [X, X, X, X, 30, 40], [X, X, X, X, 10, 20], 20),
    2: swapped(pair(NMI, [X, X, X, X, 6, 4], [X, X, X, X, 1, 3], 3)),
    3: (
        {CL: {NMI: [2, 6, 8, 6, 4, 2]}},
        {CL: {NMI: [2, 6, 8, 6, 4, 6]}},
        (1 / 3 - 2 / 8, 1 / 3 - 6 / 8),
    ),
    4: pair(HEADS, [X, X, X, X, 0.5, 0.7], [X, X, X, X, 0.1, 0.3], 0.4),
    5: pair(DEPTHS, matrix(0.75), matrix(0.25), 0.5),
    6: pair(POSITIONS, [X, X, X, X, 0.5, 0.7], [X, X, X, X, 0.1, 0.3], 0.4),
    7: (
        {CL: {TOKENS: [2, *[X] * 11, -1]}, MIM: {TOKENS: [2, *[X] * 11, 4]}},
        {CL: {TOKENS: [2, *[X] * 11, 3]}, MIM: {TOKENS: [2, *[X] * 11, 4]}},
        (2, -1),
    ),
    8: pair(IMAGES, [2, *[X] * 5, 7], [3, *[X] * 5, 7], 1),
    9: pair(UPDATES, [X, X, X, X, 0.5, 0.7], [X, X, X, X, 0.1, 0.3], 0.4),
    10: swapped(pair(AMPLITUDE, [X] * 6 + [-2], [X] * 6 + [-5], 3)),
    11: (
        {MIM: {AMPLITUDE: [X, X, X, 5, 1, 2, 3]}},
        {MIM: {AMPLITUDE: [X, X, X, 5, 1, 2, 6]}},
        (2, -1),
    ),
    14: pair(PROBE, [X] * 6 + [70], [X] * 6 + [45], 25),
    15: swapped(pair(PROBE, [X, 20, 30, *[X] * 4], [X, 10, 20, *[X] * 4], 10)),
    16: (
        {MIM: {PROBE: [X, 1, 2, 3, 9, 8, 7]}},  # block 4 of 6
        {MIM: {PROBE: [X, 1, 2, 3, 7, 8, 9]}},  # block 6
        (0.5, -1.5),
    ),
    17: (
        {MIM: {MOVES: [6, 5, 4, 3, 2, 1]}, MAE: {MOVES: [1, 1, 2, 2, 3, 3]}},
        {MIM: {MOVES: [6, 5, 4, 3, 2, 1]}, MAE: {MOVES: [9, 7, 5, 3, 1, -1]}},
        (16 / 35, -2),
    ),
    18: (
        {MAE: {f"decoder: {MOVES}": [[3, 1], [3, 3]]}},
        {MAE: {f"decoder: {MOVES}": [[1, 3], [1, 1]]}},
        (0.5, -0.5),
    ),
    19: (
        {MAE: {AMPLITUDE: [X, X, -2], f"decoder: {AMPLITUDE}": [X, -3, -5]}},
        {MAE: {AMPLITUDE: [X, X, -2], f"decoder: {AMPLITUDE}": [X, -2, 0]}},
        (2, -1),
    ),
    20: (
        {
            CL: {PROBE: [X, 1, 58]},
            MIM: {PROBE: [X, 1, 18]},
            ("hybrid", 0.2): {PROBE: [X, 1, 61]},
            HALF: {PROBE: [X, 1, 62]},
        },
        {
            CL: {PROBE: [X, 1, 58]},
            MIM: {PROBE: [X, 1, 63]},
            ("hybrid", 0.2): {PROBE: [X, 1, 61]},
            HALF: {PROBE: [X, 1, 62]},
        },
        (4, -1),
    ),
    21: (
        {
            CL: {TUNED: 81.3},
            MIM: {TUNED: 81.9},
            ("hybrid", 0.2): {TUNED: 82.3},
            HALF: {TUNED: 82.0},
        },
        {
            CL: {TUNED: 81.3},
            MIM: {TUNED: 81.9},
            ("hybrid", 0.2): {TUNED: 80.9},
            HALF: {TUNED: 80.0},
        },
        (0.4, -1),
    ),
    22: (
        {**NMIS, HALF: {NMI: [7, 9, X, X, 5, 5]}},
        {**NMIS, HALF: {NMI: [7, 9, X, X, 2, 2]}},  # still MIM in the last third
        (2, -1),
    ),
    23: (
        {**AMPLITUDES, HALF: {AMPLITUDE: [X, 9, 9, X, X, 1, 1]}},
        {**AMPLITUDES, HALF: {AMPLITUDE: [X, 5, 5, X, X, 1, 1]}},  # CL in the first
        (2, -1),
    ),
}
ABSENT = {
    12: "images of conflicting shape and texture",
    13: "accuracy under noise of one frequency",
    24: "probes of encoders without some branches",
}


def trained(found, seed):
    """{method or (method, λ): {name: values}} -> runs of one seed."""
    for method, series in found.items():
        name, lam = (method, None) if isinstance(method, str) else method
        drawn = [curve(*item) for item in series.items()]
        yield Measured(method=name, seed=seed, series=drawn, lam=lam)


def seeds(*found):
    """One set of runs per seed 0, 1, ..."""
    return list(itertools.chain(*(trained(x, seed) for seed, x in enumerate(found))))


def of(number, runs):
    """The verdict on one claim."""
    return next(v for v in claims.judge(runs) if v.id == number)


def distances(margins, start=10):
    """Runs of claim 1, one seed per margin."""
    return [
        {CL: {DISTANCE: [start + m] * 6}, MIM: {DISTANCE: [start] * 6}} for m in margins
    ]


def test_the_words_are_those_fixed_before_looking():
    want = [line.strip("| ").split(" | ") for line in WORDS.strip().split("\n")]
    got = [[str(v.id), v.statistic, v.claim, v.source] for v in claims.judge(runs=[])]
    assert got == want and len(got) == 24


def test_every_claim_is_measured_or_says_what_is_lacking():
    assert sorted([*claims.MEASURES, *claims.LACKING]) == list(range(1, 25))
    assert set(CASES) == set(claims.MEASURES)


@pytest.mark.parametrize("number", CASES)
def test_each_claim_can_show_fail_and_stay_open(number):
    shows, opposite, margins = CASES[number]
    found = of(number, seeds(*[shows] * 3))
    assert found.verdict == "shows" and found.seeds == (0, 1, 2)
    np.testing.assert_allclose(found.margins, [margins[0]] * 3, rtol=1e-12)
    found = of(number, seeds(*[opposite] * 3))
    assert found.verdict == "opposite"
    np.testing.assert_allclose(found.margins, [margins[1]] * 3, rtol=1e-12)
    found = of(number, seeds(shows, opposite, shows))
    assert found.verdict == "does not show"
    assert found.interval[0] < 0 < found.interval[1]


@pytest.mark.parametrize("number", CASES)
def test_without_runs_a_claim_says_which_it_needs(number):
    shows, _, _ = CASES[number]
    assert of(number, []).verdict.startswith("not measured: needs ")
    for gone in shows:
        rest = {k: v for k, v in shows.items() if k != gone}
        found = of(number, seeds(*[rest] * 3))
        assert found.verdict.startswith("not measured: needs "), found.verdict
        assert found.margin is None and found.values == {}


@pytest.mark.parametrize("number", CASES)
def test_a_missing_or_broken_series_is_told_and_never_judged(number):
    shows, _, _ = CASES[number]
    for method, series in shows.items():
        for name, values in series.items():
            rest = {k: v for k, v in series.items() if k != name}
            found = of(number, seeds({**shows, method: rest}))
            assert found.verdict.startswith("not measured: "), found.verdict
            assert f'no "{name}"' in found.verdict
            broken = {**series, name: np.full_like(values, np.nan, dtype=float)}
            found = of(number, seeds({**shows, method: broken}))
            assert found.verdict.startswith("not measured: "), found.verdict
            assert "no finite number" in found.verdict


def test_fine_tunings_by_different_recipes_are_not_compared():
    runs = seeds(*[CASES[21][0]] * 3)
    other = [dataclasses.replace(r, tuning=str(r.method)) for r in runs]
    assert of(21, other).verdict == "not judged: fine-tuned by different recipes"


@pytest.mark.parametrize("number", ABSENT)
def test_what_no_instrument_measures_says_so(number):
    everything = seeds(*[NMIS] * 3)
    assert of(number, everything).verdict == f"not measured: needs {ABSENT[number]}"


def test_what_is_needed_is_named():
    only = seeds({MIM: {NMI: [1, 2]}})
    assert of(2, only).verdict == "not measured: needs a MoCo v3 run"
    assert of(17, only).verdict == "not measured: needs an MAE run"
    assert of(22, only).verdict == (
        "not measured: needs a MoCo v3 run and a hybrid run with 0 < λ < 1"
    )


def test_the_interval_is_students():
    found = of(1, seeds(*distances([1, 2, 3])))
    assert found.margins == (1, 2, 3) and found.margin == 2
    half = 4.302652729911275 / math.sqrt(3)  # deviation 1
    np.testing.assert_allclose(found.interval, (2 - half, 2 + half), rtol=1e-6)
    assert found.verdict == "does not show"  # a normal interval would be above 0
    assert of(1, seeds(*distances([1.6, 2, 2.4]))).verdict == "shows"
    assert of(1, seeds(*distances([-1.6, -2, -2.4]))).verdict == "opposite"
    assert of(1, seeds(*distances([0, 0, 0]))).verdict == "does not show"


@pytest.mark.parametrize(
    ("freedom", "want"),
    [(2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (10, 2.228139)]
    + [(15, 2.131450), (20, 2.085963), (25, 2.059539), (30, 2.042272)],
)
def test_known_quantiles(freedom, want):
    assert claims.t95(freedom) == want


def test_every_quantile_is_where_the_distribution_says():
    """95% of the density of Student's t lies within, by Simpson's rule."""
    assert len(claims.T95) == 29 and claims.t95(500) == claims.t95(30)
    for freedom in range(2, 31):
        x = np.linspace(0, claims.t95(freedom), 2001)
        log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
        density = math.exp(log) / math.sqrt(freedom * math.pi)
        y = density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        area = (x[1] / 3) * (y[0] + y[-1] + 4 * y[1::2].sum() + 2 * y[2:-1:2].sum())
        assert abs(2 * area - 0.95) < 1e-7, freedom


@pytest.mark.parametrize(("count", "words"), [(1, "one seed"), (2, "2 seeds")])
def test_few_seeds_give_a_value_and_no_verdict(count, words):
    found = of(1, seeds(*distances([5] * count)))
    assert found.verdict == f"{words}: not judged" and found.interval is None
    assert found.margin == 5 and found.values == {
        "CL": [15] * count,
        "MIM": [10] * count,
    }


def test_methods_are_paired_by_seed():
    """Seeds differ much more than methods do; in another order nothing changes."""
    runs = [
        r
        for seed, (start, m) in enumerate([(10, 1.0), (50, 1.1), (90, 1.2)])
        for r in trained(distances([m], start)[0], seed)
    ]
    for order in (runs, runs[::-1]):
        found = of(1, order)
        np.testing.assert_allclose(found.margins, [1.0, 1.1, 1.2])
        assert found.verdict == "shows" and found.seeds == (0, 1, 2)


def test_a_seed_that_one_method_lacks_is_left_out_and_named():
    runs = [*seeds(*distances([5] * 3)), *trained({CL: {DISTANCE: [99] * 6}}, 7)]
    found = of(1, runs)
    assert found.seeds == (0, 1, 2) and found.margins == (5, 5, 5)
    assert found.left_out == ("seed 7: no run of the same seed (MIM)",)
    assert "left out: seed 7" in claims.measured(found)
    one_broken = seeds(*distances([5, np.nan, 5, 5]))
    found = of(1, one_broken)
    assert found.seeds == (0, 2, 3) and found.verdict == "shows"
    assert found.left_out == ("seed 1: no finite number (CL)",)


def test_no_common_seed_is_not_measured():
    a, b = ({k: v} for k, v in distances([5])[0].items())
    found = of(1, seeds(a, b))
    assert found.verdict == (
        "not measured: no run of the same seed (MIM); no run of the same seed (CL)"
    )


def test_two_runs_of_one_seed_are_not_judged():
    runs = seeds(*distances([5] * 3))
    found = of(1, [*runs, *trained({MIM: {DISTANCE: [0] * 6}}, 1)])
    assert found.verdict == "not judged, ambiguous: 2 MIM runs of seed 1"
    other = {"hybrid": {DISTANCE: [0] * 6}, "supervised": {DISTANCE: [0] * 6}}
    assert of(1, [*runs, *seeds(other, other), *seeds(other)]).verdict == "shows"


def test_the_hybrid_is_the_one_of_the_paper_else_the_first():
    def chosen(*lams):
        hybrids = {("hybrid", lam): {NMI: [7, 9, X, X, 1, 1]} for lam in lams}
        return [*of(22, seeds({**NMIS, **hybrids})).values]

    assert chosen(0.6, 0.2, 0.4) == ["CL", "MIM", "hybrid (λ = 0.2)"]
    assert chosen(0.6, 0.4) == ["CL", "MIM", "hybrid (λ = 0.6)"]
    assert chosen(0.0, 1.0, None) == []  # the ends are no hybrids


def test_the_ends_of_lambda_are_not_interior():
    shows, _, _ = CASES[20]
    found = of(20, seeds({**shows, WHOLE: {PROBE: [X] * 3}, ZERO: {PROBE: [X] * 3}}))
    assert found.margin == 4
    assert [*found.values] == ["CL", "MIM", "hybrid (λ = 0.2)", "hybrid (λ = 0.5)"]


def test_one_lambda_is_best_for_all_seeds():
    """The best of each seed would be chosen by its noise."""
    ends = {CL: {PROBE: [X, 50]}, MIM: {PROBE: [X, 10]}}
    runs = seeds(
        *[
            ends | {("hybrid", 0.2): {PROBE: [X, a]}, HALF: {PROBE: [X, b]}}
            for a, b in [(50, 52), (53, 51), (50, 54)]
        ]
    )
    assert of(20, runs).margins == (2, 1, 4)


@pytest.mark.parametrize(
    ("blocks", "want"), [(1, 1), (2, 1), (4, 1), (5, 2), (6, 2), (8, 3), (12, 4)]
)
def test_thirds(blocks, want):
    assert claims.third(blocks) == want


@pytest.mark.parametrize(("blocks", "late"), [(2, 1.0), (6, 4.5), (12, 9.5)])
def test_thirds_are_of_each_runs_own_blocks(blocks, late):
    deep = {CL: {DISTANCE: [*range(blocks)]}, MIM: {DISTANCE: [0, 0]}}
    assert of(1, seeds(deep)).values["CL"] == [late]


@pytest.mark.parametrize(
    ("blocks", "border"), [(2, 1), (4, 3), (6, 4), (8, 6), (10, 7), (12, 9)]
)
def test_the_last_quarter_begins_after_three(blocks, border):
    for best in range(1, blocks + 1):
        values = [X, *(float(b == best) for b in range(1, blocks + 1))]
        found = of(16, seeds(*[{MIM: {PROBE: values}}] * 3))
        assert found.verdict == ("shows" if best <= blocks * 3 / 4 else "opposite")
        assert (found.margin > 0) == (best <= border)
        assert found.values == {"MIM": [[best, blocks]] * 3}


def test_blocks_are_neither_embedding_nor_half_a_block():
    axis = Axis("depth", taps(2))
    taken = claims.per_block(
        Series(**{**vars(curve(IMAGES, range(5))), "axes": (axis,)})
    )
    np.testing.assert_array_equal(taken, [2, 4])
    np.testing.assert_array_equal(claims.per_block(curve(PROBE, [7, 8, 9])), [8, 9])
    np.testing.assert_allclose(claims.per_block(curve(NMI, [7, 8, 9])), [7, 8, 9])


def test_too_few_blocks_give_no_number():
    two = {MIM: {AMPLITUDE: [0, 1, 2], DEPTHS: np.ones((2, 2))}}
    two[CL] = two[MIM]
    for number, who in ((5, "CL, MIM"), (11, "MIM")):
        found = of(number, seeds(two))
        assert found.verdict == f"not measured: no finite number ({who})"
    flat = {CL: {NMI: [0, 0]}}
    assert of(3, seeds(flat)).verdict == "not measured: no finite number (CL)"


def test_the_published_probes_show_the_claims_about_probes():
    """Read off Fig. 10 and 12a (%): twelve blocks, and the last block by λ."""
    moco = "5.1 10.2 17.4 28.4 40.0 47.7 54.6 58.6 62.2 66.2 69.4 71.7"
    simmim = "14.9 25.9 35.5 43.2 48.6 53.6 56.7 56.8 56.0 52.9 48.3 45.3"
    runs = seeds(
        {
            m: {PROBE: [X, *map(float, x.split())]}
            for m, x in ((CL, moco), (MIM, simmim))
        }
    )
    got = {number: of(number, runs).margin for number in (14, 15, 16)}
    assert got == pytest.approx({14: 71.7 - 45.3, 15: 29.875 - 15.275, 16: 1.5})
    by_lam = {CL: 58.1, MIM: 18.2}
    by_lam |= {("hybrid", 0.2): 61.6, ("hybrid", 0.4): 62.3, ("hybrid", 0.6): 61.9}
    found = of(20, seeds({method: {PROBE: [X, v]} for method, v in by_lam.items()}))
    assert found.margin == pytest.approx(62.3 - 58.1)


def test_a_gap_in_the_curve_of_a_best_block_is_no_best_block():
    gap = {MIM: {PROBE: [X, 1, np.nan, 3]}}
    assert of(16, seeds(gap)).verdict == "not measured: no finite number (MIM)"


def test_a_cell_says_values_margin_and_seeds():
    found = claims.table(seeds(*distances([1.5, 2, 2.5]))).rows[0]
    assert found == (
        "1",
        "attention distance, mean of last third: CL > MIM",
        "CL 12, MIM 10 px; margin 2 (0.7579 to 3.242), n = 3",
        "shows",
        "Fig. 3",
    )
    one = claims.table(seeds(CASES[22][0])).rows[21]
    assert one[2] == (
        "CL 4 / 6, MIM 8 / 0, hybrid (λ = 0.5) 8 / 5 (first third / last third); "
        "margin 2, n = 1"
    )
    assert one[3] == "one seed: not judged"


def test_json_is_plain_and_exact():
    runs = seeds(*distances([0.1, 0.2, 0.7]), *[CASES[22][0]] * 2)
    verdicts = claims.judge(runs)
    plain = json.loads(json.dumps(claims.to_json(verdicts), allow_nan=False))
    assert [p["id"] for p in plain] == list(range(1, 25))
    first = plain[0]
    assert first["margins"] == list(verdicts[0].margins)
    assert first["interval"] == list(verdicts[0].interval)
    assert first["seeds"] == [0, 1, 2] and set(first["values"]) == {"CL", "MIM"}
    assert plain[11]["interval"] is None


def test_series_read_from_json_are_judged_alike():
    for number, (shows, _, _) in CASES.items():
        runs = seeds(*[shows] * 3)
        stored = [
            Measured(
                r.method,
                r.seed,
                [
                    Series.from_json(json.loads(json.dumps(s.to_json())))
                    for s in r.series
                ],
                r.lam,
            )
            for r in runs
        ]
        assert of(number, stored) == of(number, runs)


def test_the_page_shows_every_claim_and_colours_the_verdicts(tmp_path):
    def together(*cases):
        methods = {method for case in cases for method in case}
        return {
            m: {k: v for case in cases for k, v in case.get(m, {}).items()}
            for m in sorted(methods)
        }

    one, two, open_ = CASES[1][0], CASES[2][1], CASES[14]
    found = [together(one, two, open_[i]) for i in (0, 1, 0)]
    section = report.Section("Claims", tables=[claims.table(seeds(*found))])
    path = report.write(tmp_path, title="t", runs=[], sections=[section])
    text = path.read_text("utf-8")
    assert text.count('data-head="verdict"') == 24
    for verdict in ("shows", "opposite", "does not show"):
        assert f'<td data-cell="{verdict}"' in text
    assert "not measured: needs an MAE run" in text


def test_runs_measured_on_different_images_are_not_judged():
    runs = [
        claims.Measured(method=method, seed=seed, series=(), images=method)
        for method in ("moco_v3", "simmim")
        for seed in range(3)
    ]
    verdicts = {v.id: v.verdict for v in claims.judge(runs)}
    assert verdicts[1] == "not judged: measured on different images"
    assert verdicts[3].startswith("not measured")  # of CL alone
