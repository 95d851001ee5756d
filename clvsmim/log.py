"""What a run says while it trains: a JSON line per record, TensorBoard, a progress bar.

Each of the three has `write(record)`, `flush()` and `close()`; a record is a dict with
"step".
"""

import datetime
import gzip
import io
import json
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np
from etils import epath
from tqdm import tqdm

UPLOAD_SECONDS = 60.0  # between two uploads of a log that lies in a bucket
SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# A loss or accuracy of one head among several, "eval/top1/block_3/rate_0.1".
HEAD = re.compile(r"/rate_[^/]+$")

Record = dict[str, Any]


class JsonlLog:
    """One JSON object per line, appended and flushed per record.

    Numbers survive exactly (a float32 is written as the float64 of the same value).
    JSON has no NaN or infinity: they are written as the strings "NaN", "Infinity" and
    "-Infinity", which `read` turns back. A log on gs:// is uploaded whole, at most once
    a minute and on `flush`.
    """

    def __init__(self, path: str):
        self._path = epath.Path(path)
        self._remote = _is_remote(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        if self._remote:
            self._file = io.StringIO(_text(self._path))
            self._file.seek(0, io.SEEK_END)
        else:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._uploaded = time.monotonic()

    def write(self, record: Record) -> None:
        """Append one record; arrays become numbers or lists."""
        self._file.write(json.dumps(_plain(record), allow_nan=False) + "\n")
        if not self._remote or time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make everything written so far visible; call it before a checkpoint."""
        self._file.flush()
        if self._remote:
            self._path.write_text(self._file.getvalue())
            self._uploaded = time.monotonic()

    def rewind(self, step: int) -> None:
        """Forget what came after `step`, where the run is taken up again.

        A last line that a kill cut short goes too. A reader sees the old file or the
        new one, never a part.
        """
        self.close()
        kept = [record for record in read(self._path) if record["step"] <= step]
        lines = [json.dumps(_plain(r), allow_nan=False) + "\n" for r in kept]
        part = self._path.with_name(self._path.name + ".part")
        part.write_text("".join(lines))
        part.replace(self._path)
        self._open()

    def close(self) -> None:
        """Flush and close."""
        if not self._file.closed:
            self.flush()
            self._file.close()


def read(path: str) -> list[Record]:
    """The records of a log; a last line without its end is left out.

    Raises:
      ValueError: another line is not JSON; the message has its number.
    """
    *lines, _ = _text(epath.Path(path)).split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_special(json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); delete that line"
            ) from error
    return records


class TensorBoard:
    """The scalars of every record, for `tensorboard --logdir`.

    Raises:
      ValueError: what it needs is not installed.
    """

    def __init__(self, logdir: str):
        try:
            from clu import metric_writers  # pulls TensorFlow in
        except ImportError as error:
            raise ValueError(
                f"TensorBoard logs need a package that is missing ({error}); "
                "pip install 'clvsmim[tensorboard]', or switch tensorboard off"
            ) from error
        self._writer = metric_writers.SummaryWriter(str(logdir))

    def write(self, record: Record) -> None:
        """Write the numbers of `record`; strings and lists are left out."""
        plain = _plain(record, special=False)
        scalars = {k: v for k, v in plain.items() if _is_number(v) and k != "step"}
        self._writer.write_scalars(int(plain["step"]), scalars)

    def flush(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._writer.close()


class Speed:
    """How fast a run is, from one record to the next; the first has nothing before it.

    Args:
      images: per step.
      flops: of a step per image; None if they are not counted.
      peak: operations per second of all devices together; None if unknown.
    """

    def __init__(self, *, images: int, flops: float | None, peak: float | None):
        self._images = images
        self._share = flops / peak if flops and peak else None
        self._before = None

    def __call__(self, step: int, seconds: float, waited: float) -> Record:
        """What to log at `step`, `seconds` after the start, `waited` of them for data.

        All is wall time, with evaluations, X-rays and checkpoints in it: "images_per_
        second"; "data_wait", the share that the loop stood still for the next batch,
        of which the devices may have been busy for a part: more than it costs;
        and "mfu", model FLOP utilisation, see `flops`, where it can be known.
        """
        before, self._before = self._before, (step, seconds, waited)
        if before is None or seconds <= before[1]:
            return {}
        time = seconds - before[1]
        rate = (step - before[0]) * self._images / time
        found = {
            "images_per_second": round(rate, 3),
            "data_wait": round((waited - before[2]) / time, 5),
        }
        return found | ({"mfu": rate * self._share} if self._share else {})


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere, with speed and losses.

    Args:
      total: steps of the whole run.
      images: images per step, for images/s.
      start: the step the run was taken up at.
      every: seconds between two lines where there is no terminal.
    """

    def __init__(
        self,
        total: int,
        *,
        images: int,
        start: int = 0,
        every: float = 30.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._images, self._every = total, images, every
        self._stream, self._clock = stream or sys.stderr, clock
        self._seen = None  # (step, time) of the record before; none before compilation
        self._found: list[str] = []  # by the last evaluation
        self._printed = -math.inf
        self._bar = self._make_bar(start) if self._stream.isatty() else None

    def _make_bar(self, start: int) -> tqdm:
        layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {desc}"
        return tqdm(
            total=self._total, initial=start, file=self._stream, bar_format=layout
        )

    def write(self, record: Record) -> None:
        """Show a record: the speed since the one before it, its losses, and what the
        last evaluation found; the record of an evaluation at once.

        The time of a record is its "seconds", if it has any: it is written late, and
        two of them may be written at once.
        """
        step, now = int(record["step"]), self._clock()
        at = record.get("seconds", now)
        evaluation = _shown(record, "eval/")
        self._found = evaluation or self._found
        own = [] if evaluation else [*self._speed(step, at), *_shown(record, "loss")]
        text = ", ".join([*own, *self._found])
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif evaluation or step >= self._total or now - self._printed >= self._every:
            self._printed = now
            percent = 100 * step // self._total
            line = f"step {step}/{self._total} ({percent}%)"
            print(", ".join(filter(None, [line, text])), file=self._stream, flush=True)
        if not evaluation:
            self._seen = step, at

    def _speed(self, step: int, now: float) -> list[str]:
        if self._seen is None or now <= self._seen[1] or step <= self._seen[0]:
            return []
        rate = (step - self._seen[0]) / (now - self._seen[1])
        left = datetime.timedelta(seconds=round((self._total - step) / rate))
        return [f"{rate * self._images:.0f} images/s", f"{left} left"]

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Leave the bar as it is and start a new line."""
        if self._bar is not None:
            self._bar.close()


def _shown(record: Record, what: str) -> list[str]:
    """The numbers whose names hold `what`, but for those of single heads of several;
    of these the best top-1, and not how many images an evaluation had."""
    found = {k: float(v) for k, v in record.items() if what in k and k != "eval/images"}
    heads = [v for k, v in found.items() if k.startswith("eval/top1/")]
    if heads:
        found["best eval/top1"] = max(heads)
    return [f"{k} {v:.4g}" for k, v in found.items() if not HEAD.search(k)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_remote(path: str) -> bool:
    return "://" in str(path)


def _text(path: epath.Path) -> str:
    """Of a log, or of the compressed one of a packed run."""
    if path.exists():
        return path.read_text()
    small = path.with_name(f"{path.name}.gz")
    return gzip.decompress(small.read_bytes()).decode() if small.exists() else ""


def _plain(value: Any, special: bool = True) -> Any:
    """Arrays and numpy scalars as Python numbers and lists, NaN and inf as strings."""
    if isinstance(value, dict):
        return {str(k): _plain(v, special) for k, v in value.items()}
    if hasattr(value, "dtype"):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [_plain(v, special) for v in value]
    if special and isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("-" if value < 0 else "") + "Infinity"
    return value


def _special(value: Any) -> Any:
    """The inverse of `_plain` on NaN and inf."""
    if isinstance(value, dict):
        return {k: _special(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_special(v) for v in value]
    return SPECIAL.get(value, value) if isinstance(value, str) else value
