"""Add analyses of one encoder on different images.

    clvsmim analyze runs/simmim --images=5120 --out=a
    clvsmim analyze runs/simmim --images=5120 --skip=5120 --out=b
    clvsmim merge a b --out=both

Means over images are those of all, exactly. Mini-batches of CKA begin anew in each, so
let --skip be a multiple of --group; what is measured on the first images only (token
spectra on 64) is then measured on as many of each.

Refuses, with the reason, what does not belong together: other weights, data, settings
or versions, or images that are in both.
"""

from collections.abc import Sequence

from absl import flags
from etils import epath

from clvsmim import analysis, cli, files, meta
from clvsmim.analysis import Analysis
from clvsmim.analyze import decoder_of
from clvsmim.metrics import Series, continued


def main(argv: Sequence[str]) -> None:
    values, rest = cli.parse(__doc__, argv, _flags, positional="A B ...")
    if len(rest) < 2:
        raise ValueError(f"expected two or more analyses to merge, got {len(rest)}")
    if not values.out:
        raise ValueError("--out is missing: the folder for the merged analysis")
    merge(rest, values.out)
    from clvsmim import present  # matplotlib is slow to import

    print(present.one(values.out))


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", "", "folder for the result", flag_values=values)


def merge(folders: Sequence[str], out: str) -> None:
    """Write the analysis of the images of all `folders` to `out`.

    Pictures are those of the first: they show single images.

    Raises:
      ValueError: a folder holds no analysis, or the analyses do not belong together.
    """
    places = [analysis.find(folder) for folder in folders]
    inner, first = [decoder_of(place) for place in places], places[0]
    whole, series = added(folders, places)
    decoder = None
    if epath.Path(f"{inner[0]}/state.npz").exists():
        decoder, more = added(folders, inner)
        series += [continued(s, decoder.stamp["behind"]) for s in more]
    meta.check_writable(out, "--out")
    found = analysis.read_series(first)
    about = {k: found[k] for k in ("config", "workdir", "step", "file") if k in found}
    pictures = epath.Path(first) / "pictures.npz"
    if pictures.exists():
        files.write_whole(f"{out}/pictures.npz", pictures.read_bytes())
    known = {s.name for s in series}  # not sums: what was measured on single images
    series += [s for s in found["series"] if s.name not in known]
    analysis.save(f"{out}/state.npz", whole)
    if decoder:
        analysis.save(f"{decoder_of(out)}/state.npz", decoder)
    count = len(next(iter(whole.ids.values())))
    # Not the first so many images: no later measurement is taken for this one.
    asked = {"stamp": whole.stamp, "images": count, "skip": None}
    analysis.write_series(out, series, asked | about)


def added(
    folders: Sequence[str], places: Sequence[str]
) -> tuple[Analysis, list[Series]]:
    """The merge of the states in all `places`, and what it says."""
    whole, _ = analysis.load(f"{places[0]}/state.npz")
    stamp = whole.stamp
    facts = stamp["facts"] | {"grid": tuple(stamp["facts"]["grid"])}
    metrics = analysis.make_metrics(stamp["metrics"], facts)
    for folder, place in zip(folders[1:], places[1:], strict=True):
        other, _ = analysis.load(f"{place}/state.npz")
        try:
            whole = analysis.merge(metrics, whole, other)
        except ValueError as error:
            raise ValueError(f"{folders[0]} and {folder}: {error}") from error
    return whole, analysis.series(metrics, whole.states)


if __name__ == "__main__":
    import sys

    cli.run(sys.modules["__main__"])
