"""Training steps a second: ours against PyTorch, the same model, batch and dtype.

    pip install torch transformers                     # the peers; without, ours alone
    python benchmarks/train_step.py                    # CPU: ViT-S/16, batch 8, float32
    python benchmarks/train_step.py --device=gpu       # CUDA: ViT-B/16, bfloat16
    python benchmarks/train_step.py --quick            # tiny sizes, to see that it runs

SimMIM against transformers' ViTForMaskedImageModeling, MAE against its
ViTMAEForPreTraining, MoCo v3 against a transcription into plain PyTorch
(`_torch_moco.py`); theirs eager and under torch.compile, both with fused attention. A
step is forward, backward, AdamW and the teacher, on images that are on the device.
Exact (erf) GELU on both sides, which is what transformers calls "gelu".

Ours is the trainer's program, from uint8: it flips, normalises and masks inside the
step, MoCo v3 also jitters and blurs there; theirs gets float32 that is ready. So MoCo
v3 has a row with ready views too, which is the one to compare. Norms of the gradient
are part of our step. SimMIM's encoder is set as transformers has it: learned positions,
no relative bias, no layer scale. No side clips gradients or drops paths.

A method has a process of its own, in which sides take turns; times are medians of the
rounds, and the spread is from the fastest to the slowest. Utilisation counts products
of matrices (`clvsmim/flops.py`) against the device's dense bfloat16 peak. Memory is,
for ours, what the compiled program holds (on a GPU its allocator's peak is printed
too); for PyTorch the allocator's peak, which a CPU does not have. Compiling is never
read from a cache; that of torch.compile includes the first step. What is not installed,
or what this machine does not have, is "not measured".
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from _step_shapes import QUICK, SHAPES, Shape, Side, cores, pictures

ROOT = Path(__file__).resolve().parent.parent  # the package need not be installed
NAMES = {"simmim": "SimMIM", "mae": "MAE", "moco_v3": "MoCo v3"}
OUT_OF_MEMORY = 3  # the exit status of a method that does not fit
MISSING = "not measured"
STEPS = {"cpu": 1, "gpu": 10}  # of a round


def main() -> None:
    args = arguments()
    if args.child:
        raise SystemExit(measure(args))
    found = ("jax", "flax", "optax", "torch", "transformers")
    print(
        f"{processor()}, {cores()} cores, {platform.system()}; "
        f"{', '.join(map(version, found))}",
        flush=True,
    )
    failed = [method for method in args.only if run_fitting(args, method)]
    if failed:
        raise SystemExit(f"failed: {', '.join(NAMES[method] for method in failed)}")


def run_fitting(args: argparse.Namespace, method: str) -> int:
    """Measure a method at the batch asked for, else at the largest half of the default
    that fits; the exit status."""
    batch = args.batch or shape_of(args).batch
    while (status := run_child(args, method, batch)) == OUT_OF_MEMORY:
        print(f"  batch {batch} does not fit in memory", flush=True)
        if args.batch or batch == 1:
            break
        batch //= 2
    return status


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--only", type=methods, default=list(NAMES), help=f"some of {','.join(NAMES)}"
    )
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--steps", type=positive, help="of a round: 1, on a GPU 10")
    parser.add_argument("--batch", type=positive, help="default: 8, on a GPU what fits")
    parser.add_argument(
        "--quick", action="store_true", help="tiny, to see that it runs"
    )
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def methods(text: str) -> list[str]:
    """The flag --only."""
    found = text.split(",")
    if not set(found) <= set(NAMES):
        raise argparse.ArgumentTypeError(f"{text!r}: use some of {','.join(NAMES)}")
    return found


def positive(text: str) -> int:
    """A number of rounds, steps or images."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number >= 1")
    return int(text)


def shape_of(args: argparse.Namespace) -> Shape:
    """What the arguments ask for."""
    shape = SHAPES[args.device]
    shape = dataclasses.replace(shape, **QUICK) if args.quick else shape
    return dataclasses.replace(shape, batch=args.batch) if args.batch else shape


def run_child(args: argparse.Namespace, method: str, batch: int) -> int:
    """Measure a method in a process of its own; its exit status."""
    settings = {
        # Big pages, as `clvsmim train` has, for both sides here.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the GPU is shared with PyTorch
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    if args.device == "cpu":
        settings["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, __file__, *sys.argv[1:]]
    command += [f"--child={method}", f"--batch={batch}"]
    return subprocess.run(command, env=os.environ | settings, check=False).returncode


def measure(args: argparse.Namespace) -> int:
    """Measure a method and print its table; the exit status."""
    try:
        report(args.child, shape_of(args), args)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return OUT_OF_MEMORY
    return 0


def report(method: str, shape: Shape, args: argparse.Namespace) -> None:
    """Both sides of a method, in turns, as a table."""
    import _jax_train

    size = f"{shape.name}, {shape.image} px, batch {shape.batch}, {shape.dtype}"
    print(f"\n{NAMES[method]}, {size}, {args.device}", flush=True)
    images, views, hidden = pictures(shape)
    device, sides = _jax_train.device(args.device), []
    if device:
        sides += _jax_train.sides(method, shape, images, views)
    else:
        print(f"  ours: {MISSING} (JAX has no {args.device} here)")
    sides += peers(method, shape, views, hidden, args)
    if not sides:
        return
    times = interleave(sides, args.rounds, args.steps or STEPS[args.device])
    kind = device.device_kind if device else gpu_of_torch()
    table(sides, times, shape, _jax_train.work(method, shape), kind)
    if device and (stats := device.memory_stats()):
        peak = stats["peak_bytes_in_use"] / 2**30
        print(f"  JAX's allocator held {peak:.2f} GiB at most, while compiling too")


def peers(
    method: str,
    shape: Shape,
    views: np.ndarray,
    hidden: np.ndarray,
    args: argparse.Namespace,
) -> list[Side]:
    """PyTorch's rows; what cannot be had is said."""
    try:
        import _torch_train
    except ImportError as error:
        print(f"  PyTorch: {MISSING} ({error})")
        return []
    if args.device == "gpu" and not _torch_train.gpu():
        print(f"  PyTorch: {MISSING} (it has no CUDA GPU here)")
        return []
    found, device = [], {"cpu": "cpu", "gpu": "cuda"}[args.device]
    for compiled in (False,) if args.no_compile else (False, True):
        given = (method, shape, views, hidden, device)
        try:
            found.append(_torch_train.make(compiled, *given))
        except Exception as error:  # a compiler, or a package, that this machine lacks
            if out_of_memory(error):
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"  {_torch_train.LABELS[compiled]}: {MISSING} ({why})")
    return found


def gpu_of_torch() -> str:
    """The name of the device of a table without our rows."""
    import _torch_train

    return _torch_train.gpu()


def out_of_memory(error: Exception) -> bool:
    """Whether XLA or PyTorch ran out of memory."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def interleave(sides: list[Side], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each side in each round, taken in turns; prints the losses.

    A turn begins with a step that does not count: who gave memory back meanwhile, as
    XLA does on a CPU after every step, gets it again there (on a virtual machine that
    took three seconds for 1.3 GiB). Training takes one step after the other.
    """
    times = {side.label: [] for side in sides}
    for turn in range(rounds):
        for side in sides:
            side.run(1)
            begun = time.perf_counter()
            loss = side.run(steps)
            times[side.label].append((time.perf_counter() - begun) / steps)
            if turn == rounds - 1:
                print(f"  {side.label}: loss {side.first:.4f}, at last {loss:.4f}")
    return times


def table(
    sides: list[Side],
    times: dict[str, list[float]],
    shape: Shape,
    work: float,
    kind: str,
) -> None:
    """Print the rows; `work` is the operations of a step per image."""
    from clvsmim import flops

    counts = sorted({side.trained for side in sides})
    same = "the same in every row" if len(counts) == 1 else "NOT THE SAME MODEL"
    print(f"  trained parameters: {', '.join(f'{n:,}' for n in counts)} ({same})")
    print(f"  {work / 1e9:.3g} GFLOP per image and step; {kind}")
    median = {label: statistics.median(found) for label, found in times.items()}
    theirs = [x for label, x in median.items() if label.startswith("torch")]
    best, peak = min(theirs, default=None), flops.peak(kind)
    heads = ("images/s", "x best torch", "TFLOP/s", "utilisation", "peak memory")
    print(f"  {'':20}{'seconds':>9} {'(spread)':15}", end="")
    print("".join(f"{head:>14}" for head in (*heads, "compile")))
    for side in sides:
        seconds, every = median[side.label], times[side.label]
        speed = work * shape.batch / seconds
        spread = f"({min(every):.3f}-{max(every):.3f})"
        cells = (
            f"{shape.batch / seconds:.2f}",
            f"{best / seconds:.2f}" if best else MISSING,
            f"{speed / 1e12:.3f}",
            f"{100 * speed / peak:.1f}%" if peak else MISSING,
            f"{side.memory / 2**30:.2f} GiB" if side.memory else MISSING,
            f"{side.compile_s:.0f} s" if side.compile_s else "-",
        )
        print(f"  {side.label:20}{seconds:9.3f} {spread:15}", end="")
        print("".join(f"{cell:>14}" for cell in cells))


def version(package: str) -> str:
    """What is installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
