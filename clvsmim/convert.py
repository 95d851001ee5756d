"""Open a checkpoint of any library, and write it as a run of ours or for another one.

    clvsmim convert mae_pretrain_vit_base_full.pth runs/mae
    clvsmim convert facebook/dinov2-base runs/dinov2
    clvsmim convert runs/simmim simmim.safetensors --to=simmim
    clvsmim convert zoo:mini_mae mini.safetensors --to=hf_vitmae

SOURCE is a file (.pth .pt .bin .safetensors .npz .onnx, or the .index.json of several),
a folder that Hugging Face's `save_pretrained` wrote, the name of a repository there, a
workdir, or "zoo:NAME". A DEST that is a folder becomes a run that can be analyzed,
compared, probed, fine-tuned and started from. FILE.safetensors or FILE.npz with
--to=FAMILY is for that library, with the JSON files that it wants beside it. What was
found is printed; nothing is overwritten, and nothing is left of a conversion that
failed. docs/checkpoints.md has the families and their traps.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from etils import epath

from clvsmim import (
    build,
    cli,
    foreign,
    formats,
    handover,
    meta,
    packed,
    plugin,
    trained,
)
from clvsmim.files import save_arrays, write_whole
from clvsmim.measure import eval_view

ENDINGS = (".safetensors", ".npz")
HUB = r"[\w.-]+/[\w.-]+"


def main(argv: Sequence[str]) -> None:
    values, rest = cli.parse(__doc__, argv, _flags, positional="SOURCE DEST")
    if len(rest) != 2:
        raise ValueError(f"expected SOURCE and DEST, got {len(rest)} arguments")
    options = {
        "format": values.format,
        "branch": values.branch,
        "heads": values.heads,
        "decoder_heads": values.decoder_heads,
        "image": tuple(int(n) for n in values.image),
        "partial": tuple(values.partial),
        "ignore": tuple(values.ignore),
    }
    print(convert(*rest, to=values.to, options=options))


def _flags(values: flags.FlagValues) -> None:
    own = {"flag_values": values}
    what = "the family to write for, where DEST is a file: "
    families = ", ".join(plugin.names("formats"))
    flags.DEFINE_string("to", "", what + families, **own)
    flags.DEFINE_string("format", "", "the family, if it is not recognised", **own)
    what = "which of two encoders in a file: base, momentum, teacher, student, or a key"
    flags.DEFINE_string("branch", "", what, **own)
    what = "attention heads, which shapes do not tell"
    flags.DEFINE_integer("heads", 0, what, lower_bound=0, **own)
    what = "the same of MAE's decoder"
    flags.DEFINE_integer("decoder_heads", 0, what, lower_bound=0, **own)
    what = "rows,columns in pixels, if the position table is of no square image"
    flags.DEFINE_list("image", [], what, **own)
    what = "expressions of our parameters that may be missing: encoder/ln_final/.*"
    flags.DEFINE_list("partial", [], what, **own)
    what = "expressions of tensors in the file to leave out"
    flags.DEFINE_list("ignore", [], what, **own)


class Network(NamedTuple):
    """What was found in a SOURCE.

    Attributes:
      about: for meta.json: config, encoder, input, where it is from.
      params, extra: {"encoder", "heads"}, all that there was.
      pool: what a classifier reads, "cls" or "patches"; "" without one.
      decoder_heads: of MAE's decoder, 0 without one.
      text: for the user.
      opened: of a file, to give back the very same tensors; None of a run.
      run, workdir: of a run; None and "" of a file.
    """

    about: dict[str, Any]
    params: Any
    extra: Any
    pool: str
    decoder_heads: int
    text: str
    opened: formats.Opened | None = None
    run: trained.Trained | None = None
    workdir: str = ""


def convert(source: str, dest: str, *, to: str = "", options: dict[str, Any]) -> str:
    """Read `source`, write `dest`; returns the report.

    Args:
      to: a module of `formats`, if `dest` is a file.
      options: keywords of `formats.open_file`.

    Raises:
      ValueError: one line: what is wrong with either, or `dest` is there already.
    """
    file = dest.endswith(ENDINGS)
    if file and not to:
        known = ", ".join(plugin.names("formats"))
        raise ValueError(
            f"{dest} is a file for another library: give --to=, of {known}"
        )
    if to and not file:
        raise ValueError(
            f"--to={to} writes a file: end {dest} in .safetensors or .npz, or leave "
            "--to out to make a run of ours"
        )
    if to:
        plugin.find("formats", to)
    free(dest)
    network = read(source, options)
    if file:
        return "\n".join([network.text, *export(network, dest, to)])
    with whole_folder(dest) as part:
        pack(network, part)
    return f"{network.text}\nwrote {dest}: a run, float32; {dest}/meta.json says whence"


def read(source: str, options: dict[str, Any]) -> Network:
    """What is in a run, a file, a folder or a repository."""
    place = packed.place(source)
    if meta.read_meta(place) is not None:
        if any(options.values()):
            given = ", ".join(f"--{k}" for k, v in options.items() if v)
            raise ValueError(f"{source} is a run, which needs no {given}")
        return of_run(source)
    file, name = foreign.find(place), ""
    if not file:
        file, name = fetched(source), source
    try:
        opened = formats.open_file(file, **options)
    except ValueError as error:
        raise ValueError(foreign.as_flags(str(error))) from error
    run = trained.adopted(file, opened, name)
    about = {
        "config": run.config,
        "encoder": opened.encoder,
        "input": run.config["input"],
        "parameters": opened.report.parameters,
        "step": 0,
        "steps": 0,
        "seconds": 0,
        "file": run.file,
        "versions": meta.versions(),
    }
    heads = (opened.objective or {}).get("decoder", {}).get("heads", 0)
    own = {"pool": run.file["pool"], "decoder_heads": heads, "text": run.file["report"]}
    return Network(about, opened.params, opened.extra, **own, opened=opened)


def of_run(source: str) -> Network:
    """A workdir, or a packed run."""
    place = packed.place(source)
    about, run = meta.read_meta(place), trained.load(source)
    config, encoder = about["config"], about["encoder"]
    rows, columns = encoder["image"]
    text = (
        f"{source}: a run of clvsmim, {config['objective']['name']}, step {run.step}\n"
        f"  ViT of width {encoder['width']}, depth {encoder['depth']}, "
        f"{encoder['heads']} heads, patch {encoder['patch']}, {rows} x {columns} px, "
        f"{build.count(run.params['encoder']):,} parameters"
    )
    if run.file:
        text += f"\n  converted from {run.file['path']}\n{run.file['report']}"
    objective = config["objective"]
    heads = objective["decoder"]["heads"] if "decoder" in objective else 0
    # Of a file, whose classifier a run keeps but does not read.
    pool = objective.get("pool") or (run.file or {}).get("pool", "")
    params, extra = run.params, run.extra
    if packed.is_packed(place):  # what no objective of ours reads is there too
        found, _ = packed.read(place)
        params, extra = (
            {part: found[field].get(part, {}) for part in ("encoder", "heads")}
            for field in ("params", "extra")
        )
    own = {"pool": pool, "decoder_heads": heads, "text": text}
    return Network(about, params, extra, **own, run=run, workdir=place)


def pack(network: Network, folder: str) -> None:
    """Write a run, in float32, so that nothing is lost."""
    if network.run:
        packed.pack(network.run, network.workdir, folder, np.float32)
        return
    whole = {"params": network.params, "extra": network.extra}
    packed.write(folder, whole, network.about, dict.fromkeys(packed.LOGS, b""))


def export(network: Network, dest: str, to: str) -> list[str]:
    """Write a file for another library; returns lines about it."""
    encoder = network.about["encoder"]
    found = formats.export(
        network.params,
        network.extra,
        encoder,
        to,
        pool=network.pool,
        decoder_heads=network.decoder_heads,
        origin=network.opened.origin if network.opened else None,
    )
    lines = []
    if found.left:
        left = ", ".join(sorted({name.rsplit("/", 1)[0] for name in found.left}))
        lines.append(f"  left out, for {to} has no place for it: {left}")
    view = prepared(network)
    if not found.config:
        lines += lost_colour(view, to)
    texts = {
        str(epath.Path(dest).parent / name): json.dumps(content, indent=2) + "\n"
        for name, content in handover.beside(found.config, encoder, view, to).items()
    }
    for path in texts:
        free(path)
    with removed_if_it_fails(dest, *texts):
        for path, text in texts.items():
            write_whole(path, text.encode())
        if dest.endswith(".npz"):
            save_arrays(dest, found.tensors)
        else:
            write_whole(dest, handover.safetensors(found.tensors))
    lines.append(f"wrote {dest}: {len(found.tensors)} tensors for {to}")
    return lines + [f"wrote {path}" for path in texts]


def lost_colour(view: foreign.Transform, to: str) -> list[str]:
    """A line where the code of a family normalises otherwise, and no file tells it."""
    usual = plugin.find("formats", to)().evaluation.colour
    if (view.mean, view.std) == (usual["mean"], usual["std"]):
        return []
    return [
        f"  left out, for {to} has no place for it: input mean {view.mean}, std "
        f"{view.std}; its code has {usual['mean']} and {usual['std']}"
    ]


def prepared(network: Network) -> foreign.Transform:
    """How images are prepared: as the file's family does, or as we evaluate."""
    file = network.about.get("file")
    known = foreign.transform_of(file) if file else None
    if known:
        return known
    view = eval_view(network.about["encoder"]["image"])
    colour = {key: tuple(x) for key, x in network.about["input"].items()}
    size = tuple(view.size)
    return foreign.Transform(size, view.resize, view.filter, view.floor, **colour)


# Where to write


def free(dest: str) -> None:
    """Raise ValueError if something is there that would be overwritten."""
    place = epath.Path(dest)
    if place.is_dir() and not any(place.iterdir()):
        return
    if place.exists():
        raise ValueError(
            f"{dest} is there already; name another one, or remove it first"
        )


@contextlib.contextmanager
def whole_folder(dest: str) -> Iterator[str]:
    """A folder to write to, which then takes its name; gone if that fails."""
    part = epath.Path(f"{dest.rstrip('/')}.part")
    if part.exists():
        part.rmtree()
    try:
        meta.check_writable(str(part), "DEST")
        yield str(part)
        if epath.Path(dest).exists():
            epath.Path(dest).rmdir()  # `free` saw that it is empty
        part.rename(dest)
    except BaseException:
        if part.exists():
            part.rmtree()
        raise


@contextlib.contextmanager
def removed_if_it_fails(*paths: str) -> Iterator[None]:
    """Remove files of which one is of no use without the others."""
    try:
        yield
    except BaseException:
        for path in paths:
            for name in (path, f"{path}.part"):
                epath.Path(name).unlink(missing_ok=True)
        raise


# Hugging Face


def fetched(source: str) -> str:
    """The file of weights of a repository, downloaded by Hugging Face's client.

    Raises:
      ValueError: no such path here, and no repository that can be read.
    """
    if not re.fullmatch(HUB, source):
        raise ValueError(
            f"{source} is no file, no workdir, and no repository of Hugging Face "
            "(owner/name)"
        )
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ValueError(
            f"{source} is no file or workdir here; to look for it at Hugging Face: "
            "pip install 'clvsmim[convert]'"
        ) from error
    try:
        there = hub.HfApi().list_repo_files(source)
        names = [n for n in foreign.INSIDE if n in there] or sorted(
            n for n in there if re.search(r"\.(safetensors|pth|npz|onnx|bin)$", n)
        )
        for beside in ("config.json", "preprocessor_config.json"):
            if beside in there:
                hub.hf_hub_download(source, beside)
        if names:
            file = hub.hf_hub_download(source, names[0])
            for shard in foreign.shards(file) if file.endswith(foreign.INDEX) else ():
                hub.hf_hub_download(source, epath.Path(shard).name)
            return file
    except Exception as error:  # of the network, of the client, of the server
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"{source} is no file or workdir here, and Hugging Face's client cannot "
            f"fetch it ({type(error).__name__}: {reason[0][:200]})"
        ) from error
    raise ValueError(
        f"the repository {source} has no file of weights, but {', '.join(there[:8])}"
    )


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
