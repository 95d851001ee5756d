"""How a report looks: one colour and marker per run, and how numbers are printed."""

import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

# Okabe and Ito's colours, which colour-blind readers can tell apart, then a light and
# a dark shade of each for further runs of the family. The marker says it again.
FAMILIES = {
    "cl": ("o", ("#0072B2", "#56B4E9", "#00446B")),
    "mim": ("s", ("#D55E00", "#E69F00", "#8A3C00")),
    "hybrid": ("D", ("#009E73", "#5CC9A7", "#00523B")),
    "supervised": ("^", ("#B0568E", "#CC79A7", "#70355A")),
    "reference": ("x", ("#5A5A5A", "#8C8C8C", "#333333")),
}

RC = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#8A8F98",
    "axes.grid": True,
    "axes.labelcolor": "#1F2328",
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": "cycler('color', ['#0072B2'])",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # the one that matplotlib brings along
    "font.size": 9,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.9,
    "lines.markersize": 4.5,
    "text.color": "#1F2328",
    "text.parse_math": False,  # a "$" in the name of a run is a "$"
    "xtick.color": "#57606A",
    "xtick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.color": "#57606A",
    "ytick.labelsize": 8.5,
    "ytick.major.size": 3,
}


@dataclass(frozen=True)
class Look:
    """The colour and marker of one run, the same in every figure."""

    color: str
    marker: str

    @property
    def line(self) -> str:
        """Published values are dashed; what was measured here is solid."""
        return "--" if self.marker == "x" else "-"

    @property
    def glyph(self) -> str:
        """The marker as a character, for the page."""
        return dict(zip("osD^x", "●■◆▲✕", strict=True))[self.marker]


def looks(runs: Iterable[tuple[str, str]]) -> dict[str, Look]:
    """A look for each (run name, family); a family "" takes the next unused one.

    Raises:
      ValueError: a family that is not in `FAMILIES`, or two runs of one name.
    """
    result, used = {}, dict.fromkeys(FAMILIES, 0)
    for name, family in runs:
        if family and family not in FAMILIES:
            raise ValueError(
                f"run {name!r} is of family {family!r}; use one of "
                f"{', '.join(FAMILIES)}, or leave it out"
            )
        if name in result:
            raise ValueError(f"two runs are called {name!r}; give each its own name")
        family = family or min(used, key=used.get)
        marker, shades = FAMILIES[family]
        result[name] = Look(shades[used[family] % len(shades)], marker)
        used[family] += 1
    return result


def number(value: float, error: float | None = None) -> str:
    """Four significant digits, or as many as the standard error makes meaningful.

    The error has one digit, or two if it begins with 1 or 2.
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if error is not None and math.isfinite(error) and error > 0:
        first = math.floor(math.log10(error))
        places = min(6, max(0, (1 if error < 3 * 10**first else 0) - first))
        return f"{value:.{places}f} ± {error:.{places}f}".replace("-", "−")
    size = abs(value)
    if size and not 1e-3 <= size < 1e6:
        return f"{value:.3e}".replace("-", "−")
    places = max(0, 3 - math.floor(math.log10(size))) if size else 0
    text = f"{value:.{min(places, 6)}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def words(name: str) -> str:
    """`attention_distance` -> `Attention distance`; `k-NN accuracy` stays."""
    text = name.replace("_", " ").strip()
    plain = text.split(" ")[0].isalpha()
    return text[:1].upper() + text[1:] if plain else text


def slug(text: str) -> str:
    """A file name of lower-case ASCII letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", text.replace("λ", "lambda"))
    plain = plain.encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "figure"


def wrap(text: str, width: int) -> str:
    """The text in lines of at most `width` characters, broken between words."""
    return "\n".join(textwrap.wrap(text, width)) or text
