"""What an X-ray costs, in training steps of the same batch.

    python benchmarks/xray.py
    python benchmarks/xray.py --config=configs/photos_simmim.py --images=256

Both are timed in turns on this machine, after compilation, and the median is printed;
so are their operations as the compiler counts them.
"""

import statistics
import sys
import time

import jax
from absl import flags

from clvsmim import build, cli, xray
from clvsmim import mesh as meshes
from clvsmim.data.pipeline import batches


def main(argv):
    values, _ = cli.parse(__doc__, argv, _flags)
    config = cli.config_of(values)
    config.batch = values.images
    program, settings = build.build(config), build.plain(config)
    state, encoder = program.init(), program.objective.encoder
    colour = settings["input"]
    look = xray.measuring(
        encoder, tuple(colour["mean"]), tuple(colour["std"]), program.mesh
    )
    images = xray.probe(program.source, encoder.spec.image, values.images, program.mesh)
    data = batches(program.source, program.objective.views, batch=values.images, seed=0)
    batch = meshes.put(next(data), program.mesh)
    data.close()
    metrics, times = xray.make_metrics(encoder), {"step": [], "X-ray": []}
    for _ in range(values.rounds + 1):  # the first one compiles
        begun = time.perf_counter()
        state, _ = jax.block_until_ready(program.step(state, batch))
        variables = {"params": state.params["encoder"], "stats": state.extra["encoder"]}
        between = time.perf_counter()
        xray.numbers(metrics, jax.device_get(look(variables, images)))
        times["step"].append(between - begun)
        times["X-ray"].append(time.perf_counter() - between)
    step, ray = (statistics.median(x[1:]) for x in times.values())
    lowered = {
        "step": program.step.lower(state, batch),
        "X-ray": look.lower(variables, images),
    }
    work = {name: x.cost_analysis()["flops"] for name, x in lowered.items()}
    device = jax.devices()[0].device_kind
    print(f"{values.images} images on {len(jax.devices())} x {device}")
    print(f"a step {1e3 * step:.1f} ms, an X-ray {1e3 * ray:.1f} ms: {ray / step:.2f}")
    share = work["X-ray"] / work["step"]
    print(f"{work['step']:.3g} and {work['X-ray']:.3g} operations: {share:.2f}")


def _flags(values):
    cli.define_config(values)
    flags.DEFINE_integer("images", 64, "of both", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("rounds", 10, "of both", lower_bound=1, flag_values=values)


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
