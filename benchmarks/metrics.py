"""What measuring costs: against the plain forward, against PyTorch, and on a TPU.

    python benchmarks/metrics.py            # all parts, about 15 minutes on two cores
    python benchmarks/metrics.py --only=kernels,tpu

One run prints, for a ViT-B/16 at 224 pixels with random weights:
  pass     (a) a pass over images with every one-pass metric against the plain forward,
           (d) and its time against the number of images
  kernels  (b) public kernels against PyTorch on the same arrays, both on all cores
  memory   (c) temporary memory of the analysis step at 6 and 12 blocks
  tpu      the analysis step, compiled for v5e:2x4 by the TPU compiler
A device or library that is missing is printed as "not measured". Times are medians of
interleaved rounds.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from clvsmim import cli  # isort: skip

if "GLIBC_TUNABLES" not in os.environ:  # as the command does; read at start only
    os.environ |= cli.tuned("analyze") | os.environ
    os.execv(sys.executable, [sys.executable, *sys.argv])

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim import analysis, mesh, metrics, vit

BASE = vit.SIZES["B"] | {
    "patch": 16,
    "image": (224, 224),
    "stem": "patch",
    "position": "moco_sincos",
    "relative": "none",
    "layer_scale": 0.0,
    "qkv_bias": "qkv",
    "drop_path": 0.0,
    "final_norm": True,
    "prefix": 1,
    "init": "moco_v3",
    "dtype": "float32",
    "remat": False,
}
COLOUR = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
ONE_PASS = tuple(n for n in analysis.METRICS if n not in ("probe", "knn"))
GRID, PATCH = (14, 14), 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="kernels,memory,pass,tpu")
    parser.add_argument("--images", type=int, default=512, help="of the pass")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile-for-tpu", action="store_true", help="used inside")
    args = parser.parse_args()
    if args.compile_for_tpu:
        return print(json.dumps(compile_for_tpu()))
    print(f"jax {jax.__version__}, {os.cpu_count()} cores; devices: {jax.devices()}")
    for part in args.only.split(","):
        PARTS[part](args)


# (a) and (d): a whole pass


def make(depth: int = 12) -> tuple[vit.ViT, dict, dict]:
    """(encoder, variables, metrics) of a ViT-B of so many blocks."""
    encoder = vit.make(**BASE | {"depth": depth})
    facts = analysis.facts_of(encoder, group=64, classes=1000)
    shape = jnp.zeros((1, 224, 224, 3))
    variables = {"stats": {}} | jax.jit(encoder.init)(jax.random.key(0), shape)
    return encoder, variables, analysis.make_metrics(ONE_PASS, facts)


def pictures(images: int, batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of noise, made before they are timed."""
    rng = np.random.default_rng(0)
    view = rng.integers(0, 256, (batch, 224, 224, 3), np.uint8)
    for first in range(0, images, batch):
        index = np.arange(first, first + batch, dtype=np.int32)
        weight = (index < images).astype(np.float32)
        yield {
            "views": (view,),
            "weight": weight,
            "label": index % 1000,
            "index": index,
        }


def forward(encoder: vit.ViT, variables: dict) -> Callable:
    """The same pass without metrics: mean tokens of the last block, to the host."""
    nothing = metrics.Metric(
        needs=("output",),
        update=lambda f, w: {"weight": w, "values": {"x": f["output"].mean(axis=1)}},
        compute=lambda state: [],
    )
    return measuring(encoder, variables, {"nothing": nothing})


def measuring(encoder: vit.ViT, variables: dict, chosen: dict) -> Callable:
    """`run(images, batch)`, a pass; a step is compiled at its first use only."""

    def run(images: int, batch: int) -> None:
        *_, so_far = analysis.run(
            encoder,
            variables,
            pictures(images, batch),
            chosen,
            mesh=mesh.make(),
            **COLOUR,
        )
        so_far()

    return run


def whole_pass(args: argparse.Namespace) -> None:
    """Print (a) and (d)."""
    encoder, variables, chosen = make()
    everywhere = analysis.make_metrics(
        ("spectrum",),
        analysis.facts_of(encoder, group=64, classes=1000) | {"limit": None},
    )
    runs = {
        "plain forward": forward(encoder, variables),
        "all one-pass metrics": measuring(encoder, variables, chosen),
        "token spectra of every image": measuring(encoder, variables, everywhere),
    }
    for run in runs.values():  # compile, with and without token spectra
        run(min(2 * args.batch, args.images), args.batch)
    images = args.images
    found = interleave(
        {n: lambda r=r: r(images, args.batch) for n, r in runs.items()},
        args.rounds,
        begin={n: lambda r=r: r(args.batch, args.batch) for n, r in runs.items()},
    )
    device = jax.devices()[0]
    for other in ("cpu", "gpu", "tpu"):
        if other != device.platform:
            print(f"pass on {other}: not measured (no such device here)")
    plain = found["plain forward"]
    print(
        f"\n(a) one pass over {images} images, batch {args.batch}, {device.device_kind}"
    )
    for name, seconds in found.items():
        each = 1000 * seconds / images
        print(f"  {name:32}{each:8.1f} ms per image {seconds / plain:6.2f} x plain")
    print("\n(d) seconds against images (all one-pass metrics, beyond token spectra)")
    run = runs["all one-pass metrics"]
    for count in (images // 4, images // 2, images):
        start = time.perf_counter()
        run(count, args.batch)
        seconds = time.perf_counter() - start
        print(
            f"  {count:6} images {seconds:8.1f} s {1000 * seconds / count:8.1f} ms each"
        )


def interleave(
    runs: dict[str, Callable], rounds: int, begin: dict[str, Callable] | None = None
) -> dict[str, float]:
    """The median seconds of each, taken in turns.

    A turn begins with a call that does not count, or with `begin`: a virtual machine
    may take seconds to give back the memory that the turn before has freed.
    """
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            (begin or runs)[name]()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


# (b): kernels


def kernels(args: argparse.Namespace) -> None:
    """Print (b)."""
    try:
        import torch
    except ImportError:
        print("\n(b) kernels against PyTorch: not measured (torch is not installed)")
        return
    torch.set_num_threads(os.cpu_count())
    rng = np.random.default_rng(0)
    attention = rng.standard_normal((8, 12, 197, 197), np.float32)
    attention = np.exp(2 * attention)
    attention /= attention.sum(-1, keepdims=True)
    tokens = rng.standard_normal((16, 197, 768), np.float32)
    layers = rng.standard_normal((12, 64, 196 * 64), np.float32)
    blocks = rng.standard_normal((2, 197, 768), np.float32)
    pairs = {
        "attention distance": (attention, ours_distance, torch_distance, 2),
        "NMI": (attention, ours_nmi, torch_nmi, 2),
        "NMI + distance, in the pass": (attention, ours_both, torch_both, 5),
        "aligned attention": (attention, ours_aligned, torch_aligned, 2),
        "deviation over queries": (attention, ours_deviation, torch_deviation, 2),
        "token cosine": (tokens, ours_cosine, torch_cosine, 2),
        "Δ log amplitude": (tokens, ours_fourier, torch_fourier, 5),
        "unbiased CKA of 12 layers": (layers, ours_cka, torch_cka, 2),
        "token spectrum": (blocks, ours_spectrum, torch_spectrum, 20),
    }
    print(
        "\n(b) public kernels against PyTorch (eager, vectorised), float32, all cores"
    )
    print(f"  {'':28}{'ours':>10}{'torch':>10}{'ratio':>8}{'target':>8}   difference")
    for name, (x, ours, theirs, target) in pairs.items():
        fast, given = (ours if ours in HOST else jax.jit(ours)), torch.from_numpy(x)
        on_device = x if ours in HOST else jnp.asarray(x)
        got, want = np.asarray(fast(on_device)), np.asarray(theirs(given))
        worst = np.abs(got - want).max() / np.abs(want).max()
        found = interleave(
            {
                "ours": five(lambda f=fast, a=on_device: jax.block_until_ready(f(a))),
                "torch": five(lambda f=theirs, a=given: f(a)),
            },
            3 * args.rounds,
        )
        a, b = (1000 * found[k] / 5 for k in ("ours", "torch"))
        print(f"  {name:28}{a:7.1f} ms{b:7.1f} ms{b / a:8.1f}{target:8}   {worst:.0e}")


def five(call: Callable) -> Callable:
    """So many calls one after the other; the first finds cold memory."""
    return lambda: [call() for _ in range(5)]


def twice(kernel: Callable) -> Callable:
    """Over images and heads."""
    return jax.vmap(jax.vmap(kernel))


def ours_distance(x):
    one = lambda a: metrics.attention_distance(a, grid=GRID, patch=PATCH, prefix=1)  # noqa: E731
    return twice(one)(x)


def ours_nmi(x):
    return twice(lambda a: metrics.attention_nmi(a, prefix=1))(x)


def ours_both(x):
    """As the pass computes them, in one reading."""
    facts = {"grid": GRID, "patch": PATCH, "prefix": 1}
    chosen = analysis.make_metrics(("distance", "nmi"), facts)
    kernels = {name: metric.each for name, metric in chosen.items()}
    found = metrics.over_each("attention", kernels, {"attention": (x,)})
    return jnp.stack([found["distance"][0]["distance"], found["nmi"][0]["nmi"]])


def ours_aligned(x):
    return twice(lambda a: metrics.aligned_attention(a, grid=GRID, prefix=1))(x)


def ours_deviation(x):
    return twice(lambda a: metrics.row_deviation(a, prefix=1))(x)


def ours_cosine(x):
    return jax.vmap(lambda t: metrics.token_cosine(t, prefix=1))(x)


def ours_fourier(x):
    return jax.vmap(lambda t: metrics.delta_log_amplitude(t, grid=GRID, prefix=1))(x)


def ours_cka(x):
    # One after the other: all at once, the centred features would not fit a cache.
    grams = jax.lax.map(metrics.centred_gram, x)  # (12, 64, 64)
    flat = grams.reshape(len(x), -1)
    hsic = jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
    scale = jnp.sqrt(jnp.diag(hsic))
    return hsic / (scale[:, None] * scale[None])


def ours_spectrum(x):
    return np.log(metrics.token_spectrum(x, prefix=1))


HOST = {ours_spectrum}


def torch_patches(x):
    inner = x[..., 1:, 1:]
    return inner / inner.sum(-1, keepdim=True)


@functools.cache
def torch_far():
    """Distances between patches: a constant of ours too, so not timed."""
    import torch

    return torch.from_numpy(metrics.grid_distances(GRID, PATCH))


def torch_distance(x):
    return (torch_patches(x) * torch_far()).sum(-1).mean(-1)


def torch_nmi(x):
    import torch

    inner = torch_patches(x)
    joint = inner / inner.shape[-1]
    keys = joint.sum(-2, keepdim=True)
    information = (joint * torch.log(inner / keys)).sum((-1, -2))
    entropy = -(keys * torch.log(keys)).sum((-1, -2))
    return information / torch.sqrt(entropy * np.log(196))


def torch_both(x):
    import torch

    return torch.stack([torch_distance(x), torch_nmi(x)])


@functools.cache
def torch_offsets():
    import torch

    row, column = np.indices(GRID).reshape(2, -1)
    down, across = (c[None] - c[:, None] + 13 for c in (row, column))
    return torch.from_numpy((down * 27 + across).reshape(-1))


def torch_aligned(x):
    import torch

    flat = torch_patches(x).flatten(-2)
    canvas = torch.zeros(*flat.shape[:-1], 27 * 27)
    canvas.index_add_(-1, torch_offsets(), flat)
    return canvas.unflatten(-1, (27, 27))


def torch_deviation(x):
    return torch_patches(x).std(-2, unbiased=False).mean(-1)


def torch_cosine(x):
    import torch

    unit = torch.nn.functional.normalize(x[:, 1:], dim=-1)
    gram = unit @ unit.transpose(-1, -2)
    n = gram.shape[-1]
    return (gram.sum((-1, -2)) - n) / (n * (n - 1))


def torch_fourier(x):
    import torch

    maps = x[:, 1:].transpose(-1, -2).unflatten(-1, GRID)
    log = torch.log(torch.fft.fft2(maps).abs() + 1e-6).mean(1)  # (B, 14, 14)
    diagonal = log.diagonal(dim1=-2, dim2=-1)[..., :7]
    return diagonal - diagonal[..., :1]


def torch_cka(x):
    import torch

    n = x.shape[1]
    x = x - x.mean(1, keepdim=True)
    gram = x @ x.transpose(-1, -2)
    gram = gram * (1 - torch.eye(n))
    pairs = torch.einsum("lij,mij->lm", gram, gram)
    rows = gram.sum(-1)
    total = rows.sum(-1)
    hsic = pairs + total[:, None] * total[None] / ((n - 1) * (n - 2))
    hsic = hsic - 2 / (n - 2) * rows @ rows.T
    scale = hsic.diagonal().sqrt()
    return hsic / (scale[:, None] * scale[None])


def torch_spectrum(x):
    import torch

    x = x[:, 1:] - x[:, 1:].mean(1, keepdim=True)
    covariance = x.transpose(-1, -2) @ x / (x.shape[1] - 1)
    _, values, _ = torch.linalg.svd(covariance)
    return torch.log(values[:, :195])


# (c) memory, and the TPU


def step_of(depth: int, batch: int, sharding=None) -> jax.stages.Lowered:
    """The analysis step of a ViT-B of so many blocks, lowered without any array."""
    encoder = vit.make(**BASE | {"depth": depth})
    facts = analysis.facts_of(encoder, group=64, classes=1000)
    chosen = analysis.make_metrics(ONE_PASS, facts)
    measure = analysis.make_measure(encoder, chosen, **COLOUR)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    variables = {"stats": {}} | jax.eval_shape(encoder.init, jax.random.key(0), images)
    split, whole = sharding or (None, None)

    def leaf(dtype, *shape):
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=split)

    variables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), variables
    )
    arrays = {k: leaf(np.int32) for k in ("label", "index", "position")}
    arrays |= {"images": leaf(np.uint8, 224, 224, 3), "weight": leaf(np.float32)}
    return jax.jit(measure, out_shardings=split).lower(variables, arrays)


def memory(args: argparse.Namespace) -> None:
    """Print (c)."""
    print(f"\n(c) temporary memory of the analysis step, batch {args.batch}")
    found = {}
    for depth in (6, 12):
        stats = step_of(depth, args.batch).compile().memory_analysis()
        found[depth] = stats.temp_size_in_bytes
        rows = stats.output_size_in_bytes / 2**20
        print(
            f"  {depth:2} blocks: {found[depth] / 2**20:8.0f} MiB, rows {rows:6.0f} MiB"
        )
    print(f"  growth: {100 * (found[12] / found[6] - 1):.1f}% (target: under 5%)")


def compile_for_tpu() -> dict[str, float]:
    """What the TPU compiler says; run in a process of its own."""
    from jax.experimental import topologies

    where = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    grid = mesh.make(where.devices)
    sharding = mesh.batch_sharding(grid), mesh.replicated(grid)
    start = time.perf_counter()
    compiled = step_of(12, 64 * grid.size, sharding).compile()
    seconds = time.perf_counter() - start
    stats, cost = compiled.memory_analysis(), compiled.cost_analysis()
    text = compiled.as_text()
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    return {
        "seconds to compile": round(seconds),
        "peak GiB": round(stats.peak_memory_in_bytes / 2**30, 2),
        "arguments GiB": round(stats.argument_size_in_bytes / 2**30, 2),
        "rows GiB": round(stats.output_size_in_bytes / 2**30, 2),
        "temporary GiB": round(stats.temp_size_in_bytes / 2**30, 2),
        "TFLOP": round(cost["flops"] / 1e12, 2),
        "GB moved": round(cost["bytes accessed"] / 1e9, 1),
        **{kind: text.count(f" {kind}(") for kind in kinds},
    }


def tpu(args: argparse.Namespace) -> None:
    """Print what the TPU compiler says of the analysis step."""
    del args
    print("\nthe analysis step on TPU v5e:2x4, 64 images per chip (of 15.75 GiB)")
    command = [sys.executable, __file__, "--compile-for-tpu"]
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    quiet |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        command, env=os.environ | quiet, capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"  not measured: {why}")
        return
    for key, value in json.loads(done.stdout.strip().splitlines()[-1]).items():
        print(f"  {key:20}{value}")


PARTS = {"pass": whole_pass, "kernels": kernels, "memory": memory, "tpu": tpu}

if __name__ == "__main__":
    main()
