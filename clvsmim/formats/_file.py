"""A file on disk as one of our networks."""

from clvsmim.formats._about import beside
from clvsmim.formats._images import CONFIG, PROCESSOR
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
    and activations, which shapes do not. So is preprocessor_config.json (Hugging Face),
    which tells how images are prepared.

    Raises:
      ValueError: one line: no file of tensors, JSON beside it that is none, or as
        `open_tensors`.
    """
    file = read(path)
    opened = open_tensors(
        file.tensors,
        format=format,
        branch=branch,
        heads=heads,
        decoder_heads=decoder_heads,
        image=image,
        partial=partial,
        ignore=ignore,
        about=beside(path, CONFIG),
        processor=beside(path, PROCESSOR),
        source=str(path),
    )
    report = opened.report
    report.found.insert(0, f"a {file.kind} file")
    report.dropped.update(
        {name: f"no tensor: {what}" for name, what in file.other.items()}
    )
    return opened
