"""The paper's findings as claims, worded before looking, and what trained models say.

A claim is about one number, its margin: positive where the claim holds. Each training
seed gives one margin; methods that are compared are paired by seed. The verdict comes
from the 95% interval of the mean margin over at least three seeds.

"First third" and "last third" are of the encoder's blocks, rounded to whole blocks and
at least one: 4 of 12, 2 of 6, 1 of 2. CL is MoCo v3, MIM is SimMIM.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clvsmim.metrics import Series
from clvsmim.report import Table, style

METHODS = {"CL": "moco_v3", "MIM": "simmim", "MAE": "mae"}
NEEDS = {
    "CL": "a MoCo v3 run",
    "MIM": "a SimMIM run",
    "MAE": "an MAE run",
    "hybrid": "a hybrid run with 0 < λ < 1",
    "hybrids": "hybrid runs of several λ",
}
PAPER_LAM = 0.2  # the hybrid of Fig. 12b, c
MIN_SEEDS = 3
COLUMNS = ("", "claim", "measured", "verdict", "paper")
CAPTION = (
    "CL is MoCo v3, MIM is SimMIM. Values are means over training seeds. The margin is "
    "positive where the claim holds; in brackets is its 95% t-interval over at least "
    "three seeds, paired: above 0 it shows, below 0 the opposite. The claims were "
    "worded before anything was measured, and none is left out."
)

# Two-sided 95% quantiles of Student's t for 2, 3, ..., 30 degrees of freedom.
T95 = (
    *(4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157),
    *(2.228139, 2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816),
    *(2.100922, 2.093024, 2.085963, 2.079614, 2.073873, 2.068658, 2.063899, 2.059539),
    *(2.055529, 2.051831, 2.048407, 2.045230, 2.042272),
)


@dataclass(frozen=True)
class Measured:
    """A trained model and what was measured of it.

    Attributes:
      method: "moco_v3", "simmim", "mae", "hybrid"; others take no part.
      seed: of the training.
      series: what was measured, no name twice.
      lam: weight of CL, for a hybrid.
      images: names the images that it was measured on.
      tuning: says how it was fine-tuned, if it was.
    """

    method: str
    seed: int
    series: Sequence[Series]
    lam: float | None = None
    images: str = ""
    tuning: str = ""


@dataclass(frozen=True)
class Measure:
    """How a claim is measured.

    Attributes:
      roles: the runs it needs, keys of `NEEDS`.
      series: names of the quantities it reads of each run.
      read: those Series -> a number, or a tuple of as many as `parts`; NaN if the
        encoder has too few blocks.
      margin: {role: (seeds,) or (seeds, parts)} -> (seeds,), > 0 where it holds.
      unit: of the numbers.
      parts: names of the numbers, where there are several.
    """

    roles: tuple[str, ...]
    series: tuple[str, ...]
    read: Callable[..., Any]
    margin: Callable[[Mapping[str, np.ndarray]], np.ndarray]
    unit: str = ""
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A claim and what the runs say of it.

    Attributes:
      id, statistic, claim, source: the claim, in the words of `WORDS`.
      verdict: "shows", "does not show", "opposite", or why it was not judged.
      seeds: those that every role has.
      values: {role: one number (or list, see `parts`) per seed}.
      margins: one per seed.
      margin: their mean, None if there is none.
      interval: its 95% interval, None for fewer than three seeds.
      unit, parts: of the values, as in `Measure`.
      left_out: seeds that could not be used, and why.
    """

    id: int
    statistic: str
    claim: str
    source: str
    verdict: str
    seeds: tuple[int, ...] = ()
    values: Mapping[str, list] = dataclasses.field(default_factory=dict)
    margins: tuple[float, ...] = ()
    margin: float | None = None
    interval: tuple[float, float] | None = None
    unit: str = ""
    parts: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def table(runs: Sequence[Measured]) -> Table:
    """All claims, one a row, in the words and the order of the list."""
    rows = [row(verdict) for verdict in judge(runs)]
    return Table("The paper's claims", COLUMNS, rows, CAPTION)


def judge(runs: Sequence[Measured]) -> list[Verdict]:
    """A verdict on every claim, also on those that these runs cannot decide."""
    return [assess(number, runs) for number in CLAIMS]


def to_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Plain dicts, lists, strings and finite numbers."""
    return [dataclasses.asdict(verdict) for verdict in verdicts]


def assess(number: int, runs: Sequence[Measured]) -> Verdict:
    """What the runs say of one claim."""
    words = (number, *CLAIMS[number])
    if number in LACKING:
        return Verdict(*words, f"not measured: needs {LACKING[number]}")
    measure = MEASURES[number]
    roles = {role: cast(role, runs) for role in measure.roles}
    needed = [NEEDS[role] for role, found in roles.items() if not found]
    if needed:
        return Verdict(*words, f"not measured: needs {' and '.join(needed)}")
    found = {name: runs for one in roles.values() for name, runs in one.items()}
    twice = ambiguous(found)
    if twice:
        return Verdict(*words, f"not judged, ambiguous: {', '.join(twice)}")
    if len({run.images for runs in found.values() for run in runs}) > 1:
        return Verdict(*words, "not judged: measured on different images")
    tunings = {run.tuning for runs in found.values() for run in runs}
    if measure.series == TUNED and len(tunings) > 1:
        return Verdict(*words, "not judged: fine-tuned by different recipes")
    return weigh(words, measure, found)


def weigh(
    words: tuple, measure: Measure, found: Mapping[str, Sequence[Measured]]
) -> Verdict:
    """The verdict where every role has runs: {name: runs of different seeds}."""
    values, lost = gather(measure, found)
    left_out = tuple(f"seed {seed}: {why}" for seed, why in lost.items())
    if not values:
        why = "; ".join(dict.fromkeys(lost.values()))
        return Verdict(*words, f"not measured: {why}", left_out=left_out)
    arrays = {name: np.array([v[name] for v in values.values()]) for name in found}
    margins = measure.margin(arrays)
    limits = interval(margins) if len(margins) >= MIN_SEEDS else None
    return Verdict(
        *words,
        verdict=decide(limits, len(margins)),
        seeds=tuple(values),
        values={name: array.tolist() for name, array in arrays.items()},
        margins=tuple(margins.tolist()),
        margin=float(margins.mean()),
        interval=limits,
        unit=measure.unit,
        parts=measure.parts,
        left_out=left_out,
    )


def cast(role: str, runs: Sequence[Measured]) -> dict[str, list[Measured]]:
    """{name: runs} of a role, {} if there are none; hybrids have a name per λ.

    The role "hybrid" is played by the λ of the paper, else by the first that is given.
    """
    if role in METHODS:
        found = [run for run in runs if run.method == METHODS[role]]
        return {role: found} if found else {}
    hybrids = [r for r in runs if r.method == "hybrid" and r.lam and 0 < r.lam < 1]
    lams = list(dict.fromkeys(run.lam for run in hybrids))
    if role == "hybrid":
        lams = [PAPER_LAM] if PAPER_LAM in lams else lams[:1]
    elif len(lams) < 2:
        return {}
    return {
        f"hybrid (λ = {lam:g})": [run for run in hybrids if run.lam == lam]
        for lam in sorted(lams)
    }


def ambiguous(found: Mapping[str, Sequence[Measured]]) -> list[str]:
    """What there is several times: another size or other data, and none to prefer."""
    return [
        f"{count} {name} runs of seed {seed}"
        for name, runs in found.items()
        for seed in sorted({run.seed for run in runs})
        if (count := sum(run.seed == seed for run in runs)) > 1
    ]


def gather(
    measure: Measure, found: Mapping[str, Sequence[Measured]]
) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """{seed: {name: numbers}} where all have them, {seed: why not} of the others."""
    values, lost = {}, {}
    for seed in sorted({run.seed for runs in found.values() for run in runs}):
        numbers = {
            name: numbers_of(measure, next((r for r in runs if r.seed == seed), None))
            for name, runs in found.items()
        }
        wrong = {name: x for name, x in numbers.items() if isinstance(x, str)}
        if wrong:
            lost[seed] = reasons(wrong)
        else:
            values[seed] = numbers
    return values, lost


def reasons(wrong: Mapping[str, str]) -> str:
    """{name: why not} -> `why not (names), why not (names)`."""
    whose = {why: [n for n, x in wrong.items() if x == why] for why in wrong.values()}
    return ", ".join(f"{why} ({', '.join(names)})" for why, names in whose.items())


def numbers_of(measure: Measure, run: Measured | None) -> np.ndarray | str:
    """The numbers of one run, or in words why there are none."""
    if run is None:
        return "no run of the same seed"
    series = {s.name: s for s in run.series}
    absent = [name for name in measure.series if name not in series]
    if absent:
        return "no " + " and ".join(f'"{name}"' for name in absent)
    with np.errstate(all="ignore"):
        numbers = np.array(measure.read(*(series[name] for name in measure.series)))
    return numbers if np.isfinite(numbers).all() else "no finite number"


def interval(margins: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean of >= 3 numbers: mean -+ t * deviation / sqrt(n)."""
    half = t95(len(margins) - 1) * margins.std(ddof=1) / math.sqrt(len(margins))
    return float(margins.mean() - half), float(margins.mean() + half)


def t95(freedom: int) -> float:
    """The two-sided 95% quantile of Student's t for >= 2 degrees of freedom; above 30
    that of 30, at most 4.3% more."""
    return T95[min(freedom, 30) - 2]


def decide(limits: tuple[float, float] | None, seeds: int) -> str:
    """The verdict of an interval of the margin; None is too few seeds."""
    if limits is None:
        return "one seed: not judged" if seeds == 1 else f"{seeds} seeds: not judged"
    low, high = limits
    return "shows" if low > 0 else "opposite" if high < 0 else "does not show"


def row(verdict: Verdict) -> tuple[str, ...]:
    """The cells of one claim."""
    claim = f"{verdict.statistic}: {verdict.claim}"
    return str(verdict.id), claim, measured(verdict), verdict.verdict, verdict.source


def measured(verdict: Verdict) -> str:
    """Such as `CL 12.1, MIM 10.2 px; margin 1.9 (1.5 to 2.3), n = 3`."""
    if verdict.margin is None:
        return ""
    values = ", ".join(f"{k} {mean(v)}" for k, v in verdict.values.items())
    unit = f" {verdict.unit}" if verdict.unit else ""
    parts = f" ({' / '.join(verdict.parts)})" if verdict.parts else ""
    margin = style.number(verdict.margin)
    if verdict.interval:
        low, high = map(style.number, verdict.interval)
        margin += f" ({low} to {high})"
    lost = f"; left out: {', '.join(verdict.left_out)}" if verdict.left_out else ""
    return f"{values}{unit}{parts}; margin {margin}, n = {len(verdict.seeds)}{lost}"


def mean(values: Sequence) -> str:
    """The mean over seeds; of several parts, each: `0.4 / 0.1`."""
    return " / ".join(map(style.number, np.atleast_1d(np.mean(values, axis=0))))


# What is read of a run. Each takes Series and returns numbers.


def third(blocks: int) -> int:
    """How many blocks a third is."""
    return max(1, round(blocks / 3))


def per_block(series: Series) -> np.ndarray:
    """(L,): at each block, or at each block's output; the mean over further axes.

    The embedding is no block, and the stream between attention and MLP no output.
    """
    at = [not isinstance(v, tuple) or v[1] == "mlp" for v in series.axes[0].values]
    values = series.values[at]
    return values.reshape(len(values), -1).mean(axis=1)


def last(series: Series) -> float:
    """At the last block."""
    return per_block(series)[-1]


def number(series: Series) -> float:
    """The one number that it is."""
    return float(series.values)


def last_third(series: Series) -> float:
    """The mean of the last third."""
    x = per_block(series)
    return x[-third(len(x)) :].mean()


def first_third(series: Series) -> float:
    """The mean of the first third."""
    x = per_block(series)
    return x[: third(len(x))].mean()


def thirds(series: Series) -> tuple[float, float]:
    """The means of the first and of the last third."""
    return first_third(series), last_third(series)


def last_of_peak(series: Series) -> float:
    """The last block as a share of the largest."""
    x = per_block(series)
    return x[-1] / x.max() if x.max() > 0 else math.nan


def last_pairs(series: Series) -> float:
    """The mean over pairs of two different blocks of the last third."""
    late = series.values[-third(len(series.values)) :, -third(len(series.values)) :]
    n = len(late)
    return (late.sum() - late.trace()) / np.float64(n * (n - 1))


def since_embedding(series: Series) -> float:
    """The last block's output minus the embedding."""
    return last(series) - series.values[series.axes[0].values.index((0, "embed"))]


def last_drop(series: Series) -> float:
    """The last block minus the largest of the three before."""
    x = per_block(series)
    return x[-1] - x[-4:-1].max() if len(x) >= 4 else math.nan


def best_block(series: Series) -> tuple[float, float]:
    """The block of the largest value (the first of equals), and how many there are."""
    x = per_block(series)
    return (x.argmax() + 1.0 if np.isfinite(x).all() else math.nan), float(len(x))


def slope(series: Series) -> float:
    """The slope of a least-squares line over the blocks, per block."""
    x = per_block(series)
    at = np.arange(len(x)) - (len(x) - 1) / 2
    return at @ x / (at @ at)


def attention_over_mlp(series: Series) -> float:
    """Mean displacement by attention / by MLPs, over all blocks."""
    attention, mlp = series.values.mean(axis=0)
    return attention / mlp


def output_and_decoder(encoder: Series, decoder: Series) -> tuple[float, float]:
    """The encoder's last block, and the mean over the decoder's blocks."""
    return last(encoder), per_block(decoder).mean()


# Margins. Each takes {role: an entry per seed} and returns one number per seed.


def above(higher: str, lower: str) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """The margin of `higher` > `lower`."""
    return lambda v: v[higher] - v[lower]


def before_last_quarter(v: Mapping[str, np.ndarray]) -> np.ndarray:
    """Blocks to the border between the last quarter and the rest, which lies between
    two blocks: block 9 of 12 has 0.5, block 10 has -0.5."""
    best, blocks = v["MIM"].T
    return np.floor(blocks * 3 / 4) + 0.5 - best


def best_lam(v: Mapping[str, np.ndarray]) -> np.ndarray:
    """The λ of the best mean over seeds, one for all seeds, minus the better end. The
    choice favours the claim a little."""
    inside = [x for name, x in v.items() if name not in METHODS]
    return max(inside, key=np.mean) - np.maximum(v["CL"], v["MIM"])


def crosses(v: Mapping[str, np.ndarray]) -> np.ndarray:
    """How far the hybrid is on MIM's side of the midpoint in the first third and on
    CL's in the last: the smaller of both."""
    (hybrid,) = (x for name, x in v.items() if name not in METHODS)
    side = np.sign(v["MIM"] - v["CL"])
    first, late = ((hybrid - (v["CL"] + v["MIM"]) / 2) * side).T
    return np.minimum(first, -late)


# What is claimed: id | statistic | claim | where the paper has it.
WORDS = """
1 | attention distance, mean of last third | CL > MIM | Fig. 3
2 | NMI, mean of last third | CL < MIM | Fig. 4
3 | NMI of CL's last block / CL's maximum over blocks | < 1/3 | \
Fig. 4 (collapse at the end)
4 | unbiased CKA between heads, mean of last third | CL > MIM | Fig. 5a
5 | unbiased CKA between depths, mean over last-third pairs | CL > MIM | Fig. 5b
6 | unbiased CKA between positions, mean of last third | CL > MIM | Fig. 5c
7 | mean over ranks of token-level log singular value, last block minus embedding | \
MIM > 0 >= CL | Fig. 7
8 | same, image level | CL > MIM | Fig. 7
9 | translation share of attention updates, mean of last third | CL > MIM | Fig. 6
10 | delta log amplitude at the last block | MIM > CL | Fig. 8
11 | MIM's delta log amplitude, last block minus the maximum of the three before | \
< 0 | Fig. 8 (last blocks act as decoder)
12 | shape bias (cue conflict) | CL > MIM | Fig. 9
13 | accuracy lost to energy-normalised noise, top quarter of frequencies | \
CL > MIM | Fig. 9
14 | linear probe at the last block | CL > MIM | Fig. 1, 10
15 | linear probe, mean of first third | MIM > CL | Fig. 10
16 | block of MIM's best probe | not in the last quarter | Fig. 10
17 | relative displacement, slope over depth | SimMIM < 0, MAE not | Fig. 11
18 | MAE decoder: attention displacement / MLP displacement | > 1 | Fig. 11
19 | MAE: delta log amplitude, decoder blocks against encoder output | lower | Fig. 11
20 | linear probe of the best interior λ against both ends | higher than both | Fig. 12a
21 | fine-tuning accuracy, same | higher than both | Fig. 12a
22 | hybrid NMI | first third on MIM's side of the CL-MIM midpoint, last third on \
CL's | Fig. 12b
23 | hybrid delta log amplitude | same pattern | Fig. 12c
24 | probe lost when the last third's attention branches are removed, minus when its \
MLP branches are | CL > 0 > MIM | talk: self-attention matters in CL, MLPs in MIM
"""
CLAIMS = {
    int(number): words
    for number, *words in (line.split(" | ") for line in WORDS.strip().split("\n"))
}

# What nothing here measures yet.
LACKING = {
    12: "images of conflicting shape and texture",
    13: "accuracy under noise of one frequency",
    24: "probes of encoders without some branches",
}

BOTH, WITH_HYBRID = ("CL", "MIM"), ("CL", "MIM", "hybrid")
CL_ABOVE, MIM_ABOVE = above("CL", "MIM"), above("MIM", "CL")
NMI = ("normalized mutual information",)
AMPLITUDE = ("delta log amplitude at the highest frequency",)
PROBE = ("ridge probe accuracy",)
TUNED = ("fine-tuning accuracy",)
TOKENS = ("token-level log singular value, mean over ranks",)
IMAGES = ("image-level log singular value, mean over ranks",)
UPDATES = ("translation share of attention updates",)
MOVES = ("relative displacement",)
DECODER_MOVES, DECODER_AMPLITUDE = (f"decoder: {x}" for x in MOVES + AMPLITUDE)
THIRDS = ("first third", "last third")

MEASURES = {
    1: Measure(BOTH, ("attention distance",), last_third, CL_ABOVE, "px"),
    2: Measure(BOTH, NMI, last_third, MIM_ABOVE),
    3: Measure(("CL",), NMI, last_of_peak, lambda v: 1 / 3 - v["CL"]),
    4: Measure(BOTH, ("CKA between heads",), last_third, CL_ABOVE),
    5: Measure(BOTH, ("CKA between depths, matrix",), last_pairs, CL_ABOVE),
    6: Measure(BOTH, ("CKA between positions",), last_third, CL_ABOVE),
    7: Measure(BOTH, TOKENS, since_embedding, lambda v: np.minimum(v["MIM"], -v["CL"])),
    8: Measure(BOTH, IMAGES, since_embedding, CL_ABOVE),
    9: Measure(BOTH, UPDATES, last_third, CL_ABOVE),
    10: Measure(BOTH, AMPLITUDE, last, MIM_ABOVE),
    11: Measure(("MIM",), AMPLITUDE, last_drop, lambda v: -v["MIM"]),
    14: Measure(BOTH, PROBE, last, CL_ABOVE, "%"),
    15: Measure(BOTH, PROBE, first_third, MIM_ABOVE, "%"),
    16: Measure(
        ("MIM",), PROBE, best_block, before_last_quarter, parts=("block", "blocks")
    ),
    17: Measure(
        ("MIM", "MAE"),
        MOVES,
        slope,
        lambda v: np.minimum(-v["MIM"], v["MAE"]),
        "per block",
    ),
    18: Measure(("MAE",), (DECODER_MOVES,), attention_over_mlp, lambda v: v["MAE"] - 1),
    19: Measure(
        ("MAE",),
        (*AMPLITUDE, DECODER_AMPLITUDE),
        output_and_decoder,
        lambda v: v["MAE"][:, 0] - v["MAE"][:, 1],
        parts=("encoder output", "decoder blocks"),
    ),
    20: Measure((*BOTH, "hybrids"), PROBE, last, best_lam, "%"),
    21: Measure((*BOTH, "hybrids"), TUNED, number, best_lam, "%"),
    22: Measure(WITH_HYBRID, NMI, thirds, crosses, parts=THIRDS),
    23: Measure(WITH_HYBRID, AMPLITUDE, thirds, crosses, parts=THIRDS),
}
