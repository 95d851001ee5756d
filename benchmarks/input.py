"""How fast images get to the device: our pipeline against a PyTorch DataLoader.

    python benchmarks/input.py                 # about 5 minutes on two cores
    python benchmarks/input.py --workers=8 --rounds=5

Both decode the same JPEG files, which the script makes of the embedded photographs, cut
the same two boxes per image (MoCo's crops, 0.08 to 1 of the area) and resize them to
224 pixels, in as many worker processes; both deliver batches of uint8. The peer is
plain Pillow, and gets its boxes for nothing. What most scripts do, to deliver
normalised float32, is a row of its own; so are exact and DCT-scaled decoding. One run,
taken in turns, each with a warm-up; rates are medians of the rounds.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import io
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import PIL
from PIL import Image, features

from clvsmim.data import folder, photos
from clvsmim.data.crops import RandomResizedCrop, random_box
from clvsmim.data.pipeline import batches, generator

SIZES = {"500 x 375": (500, 375), "1000 x 750": (1000, 750)}
SEED, BATCH, FILES = 0, 64, 128
CROP = {"area": (0.08, 1.0), "aspect": (3 / 4, 4 / 3)}
VIEWS = tuple(
    RandomResizedCrop(name=f"moco_v3/{i}", size=(224, 224), filter="bilinear", **CROP)
    for i in (1, 2)
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Batch = Sequence[np.ndarray]  # uint8 or float32 (B, 224, 224, 3), two of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    parser.add_argument("--workers", type=int, default=cores or os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=16, help="timed, per round")
    args = parser.parse_args()
    jpeg = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
    print(
        f"{processor()}, {os.cpu_count()} cores, {args.workers} workers; Python "
        f"{platform.python_version()}, Pillow {PIL.__version__} with {jpeg}"
    )
    torch = importlib.util.find_spec("torch") is not None
    if not torch:
        print("PyTorch: not measured (torch is not installed)")
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as where:
            files = make_files(pathlib.Path(where), size)
            compare(name, where, files, args, torch)


def compare(
    name: str,
    where: str,
    files: Sequence[pathlib.Path],
    args: argparse.Namespace,
    torch: bool,
) -> None:
    """Print the table of one size of images."""
    default = inspect.signature(batches).parameters["draft"].default
    runs = {}
    for draft, how in ((False, "exact"), (True, "DCT-scaled")):
        note = " (default)" if draft == default else ""
        label = f"ours, {how} decoding{note}"
        runs[label] = functools.partial(ours, where, args.workers, draft)
    if torch:
        boxes = [draw(files[p % FILES], p) for p in range(FILES)]
        for form in ("uint8", "float32 normalised"):
            label = f"torch DataLoader, {form}"
            runs[label] = functools.partial(theirs, files, boxes, args, form)
    rates, first = interleave(runs, args)
    each = statistics.mean(path.stat().st_size for path in files) / 1000
    print(f"\n{name} pixels, {each:.0f} kB each, two crops at 224; images per second")
    heads = [label for label in runs if label.startswith("torch")]
    print(f"  {'':36}{'images/s':>10}{'per core':>10}", end="")
    print("".join(f"{'x ' + h.split(', ')[1]:>22}" for h in heads) + "   difference")
    for label, rate in rates.items():
        ratios = "".join(f"{rate / rates[h]:22.2f}" for h in heads)
        same = heads and not label.startswith("torch")
        off = difference(first[label], first[heads[0]]) if same else None
        shown = f"{off:10.3f}/255" if same else ""
        print(f"  {label:36}{rate:10.0f}{rate / args.workers:10.0f}{ratios}{shown}")


def make_files(where: pathlib.Path, size: tuple[int, int]) -> list[pathlib.Path]:
    """`FILES` JPEG files of (width, height), each another part of a photograph."""
    rng = np.random.default_rng(0)
    names = [file for files, _ in photos.SCENES.values() for file in files]
    made = []
    for i in range(FILES):
        photo = photos.read_photo(names[i % len(names)])
        shape = (size[0] / size[1],) * 2  # no distortion
        box = random_box(photo.size, (0.4, 0.9), shape, rng)
        out = io.BytesIO()
        resized = photo.resize(size, Image.Resampling.BICUBIC, box=box)
        resized.save(out, "JPEG", quality=95)
        made.append(where / f"{i:04}.jpg")
        made[-1].write_bytes(out.getvalue())
    return made


def ours(where: str, workers: int, draft: bool) -> Iterator[Batch]:
    """Batches of the pipeline that training uses, in the order of the files."""
    source = folder.make(
        split="train", path=where, train="", test="", lengths=(0, 0), classes=0
    )
    stream = batches(
        source,
        VIEWS,
        batch=BATCH,
        seed=SEED,
        workers=workers,
        shuffle=False,
        draft=draft,
    )
    with contextlib.closing(stream):
        for batch in stream:
            yield batch["views"]


class Files:
    """What the DataLoader reads: the files again and again, two crops of each."""

    def __init__(self, files: Sequence, boxes: Sequence, length: int, form: str):
        self.files, self.boxes, self.form = files, boxes, form
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, p: int) -> list:
        with Image.open(self.files[p % FILES]) as file:
            image = file.convert("RGB")
        cut = [image.crop(box) for box in self.boxes[p % FILES]]
        return [self.deliver(x.resize((224, 224), Image.BILINEAR)) for x in cut]

    def deliver(self, image: Image.Image):
        """uint8 (224, 224, 3), or float32 (3, 224, 224) of zero mean, as is usual."""
        import torch

        x = torch.from_numpy(np.array(image))
        if self.form == "uint8":
            return x
        x = x.permute(2, 0, 1).contiguous().float().div(255)
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        return x.sub_(mean).div_(std)


def theirs(
    files: Sequence, boxes: Sequence, args: argparse.Namespace, form: str
) -> Iterator:
    """Batches of a DataLoader with its usual settings, as many as are asked for: one
    that is left in the middle does not end its workers in peace."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Files(files, boxes, BATCH * (warm_up(args) + args.batches), form),
        batch_size=BATCH,
        num_workers=args.workers,
        multiprocessing_context="spawn",  # Grain's threads do not survive a fork
    )
    for batch in loader:
        yield [x.numpy() for x in batch]


def draw(path: pathlib.Path, position: int) -> list[tuple]:
    """The boxes that our views draw for the image at a position."""
    with Image.open(path) as image:
        size = image.size
    return [
        random_box(size, view.area, view.aspect, generator(SEED, position, view.name))
        for view in VIEWS
    ]


def interleave(
    runs: dict[str, Callable], args: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Batch]]:
    """Median images per second of each, taken in turns; and each one's first batch."""
    rates, first = {name: [] for name in runs}, {}
    for _ in range(args.rounds):
        for name, run in runs.items():
            with contextlib.closing(run()) as stream:
                for i in range(warm_up(args)):
                    batch = next(stream)
                    if not i and name not in first:
                        first[name] = [np.array(x) for x in batch]
                start = time.perf_counter()
                for _ in range(args.batches):
                    next(stream)
                seconds = time.perf_counter() - start
                if name.startswith("torch"):
                    assert not list(stream)
            rates[name].append(args.batches * BATCH / seconds)
    return {name: statistics.median(found) for name, found in rates.items()}, first


def warm_up(args: argparse.Namespace) -> int:
    """Batches until those that were made during the start are used up."""
    return 4 * args.workers


def difference(a: Batch, b: Batch) -> float:
    """Mean absolute difference of the crops, in levels of 255."""
    pairs = zip(a, b, strict=True)
    return float(np.mean([np.abs(x.astype(float) - y).mean() for x, y in pairs]))


def processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
