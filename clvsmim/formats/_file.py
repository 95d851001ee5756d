"""A file on disk as one of our networks."""

from etils import epath

from clvsmim.formats._about import read_about
from clvsmim.formats._open import Opened, open_tensors
from clvsmim.formats._read import read


def open_file(
    path: str,
    *,
    format: str = "",
    branch: str = "",
    heads: int = 0,
    decoder_heads: int = 0,
    image: tuple[int, ...] = (),
    partial: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
) -> Opened:
    """Read a .pth, .safetensors, .npz or .onnx file, and `open_tensors` what it holds.

    A config.json beside it (Hugging Face, timm) is read too: it tells heads, epsilons
    and activations, which shapes do not.

    Raises:
      ValueError: one line: no file of tensors, or as `open_tensors`.
    """
    file = read(path)
    beside = epath.Path(path).parent / "config.json"
    about = read_about(beside.read_bytes()) if beside.exists() else {}
    opened = open_tensors(
        file.tensors,
        format=format,
        branch=branch,
        heads=heads,
        decoder_heads=decoder_heads,
        image=image,
        partial=partial,
        ignore=ignore,
        about=about,
        source=str(path),
    )
    report = opened.report
    report.found.insert(0, f"a {file.kind} file")
    report.dropped.update(
        {name: f"no tensor: {what}" for name, what in file.other.items()}
    )
    return opened
