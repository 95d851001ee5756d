"""Compile a config for TPUs that are not here: does it fit, how fast can it be?

    clvsmim aot --config=configs/simmim.py:B --topology=v5e:16x16
    clvsmim aot --config=configs/mae.py:L --topology=v5e:16x16 --topology=v4:4x4x8 \\
        --json=mae.json
    clvsmim aot --config=configs/mae.py:H --topology=v5e:4x4 --slices=2 --noanalysis

The TPU compiler (`pip install "clvsmim[aot]"`) needs no TPU, and no data set is read.
What is compiled is the step that `clvsmim train` runs, and the one of `clvsmim
analyze`, for all devices of the topology. Memory, operations, bytes and collectives are
the compiler's. The roofline is what a perfect program would take by the data sheets of
the chips: a real step takes longer. Where the step does not fit, ways to make it fit
are compiled too. A step of a ViT-B takes minutes to compile.
"""

import contextlib
import copy
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import topologies
from ml_collections import ConfigDict

from clvsmim import analysis, aot_text, build, cli, flops
from clvsmim import mesh as meshes
from clvsmim.aot_report import Place, Report, nbytes, report
from clvsmim.measure import Settings

# Read when libtpu is loaded: do not ask a cloud which machine this is, do not mind
# another process that compiles, say nothing of either.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# Names that work (libtpu 0.0.52); it knows more, such as other sizes.
TOPOLOGIES = (
    *("v4:2x2x1", "v4:2x2x4", "v4:4x4x4", "v4:4x4x8"),
    *("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4", "v5p:4x4x8"),
    *("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:16x16", "tpu7x:2x2x1", "tpu7x:4x4x4"),
)
FULL = 6  # products of bfloat16 that make one of float32 at full precision


def main(argv: Sequence[str]) -> None:
    values, _ = cli.parse(__doc__, argv, _flags)
    config = cli.config_of(values)
    if not values.topology:
        raise ValueError("--topology is missing; for example --topology=v5e:16x16")
    prepare()
    places = [topology(name, values.slices) for name in values.topology]
    recipe = re.search(r"--?config[= ](\S+)", " ".join(argv))[1]
    changes = (a for a in argv if a.startswith("--config."))
    title = " ".join([recipe.rsplit("/", 1)[-1], *changes])
    for place in places:  # mistakes come out now, not after the first compilation
        build.build(config, devices=place.devices)
    found = []
    if values.json:
        file = epath.Path(values.json)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("[]")
    if values.markdown:
        print(aot_text.HEAD)
    for place in places:
        for one in reports(
            config, place, analyze=values.analysis, remedy=values.remedies
        ):
            found.append({"recipe": title, **one})
            line = aot_text.row if values.markdown else aot_text.block
            print(line(found[-1]), flush=True)
            if values.json:  # now: the next one takes minutes
                epath.Path(values.json).write_text(json.dumps(found, indent=1))


def _flags(values: flags.FlagValues) -> None:
    own = {"flag_values": values}
    cli.define_config(values)
    what = f"kind:shape of a slice, as often as needed: {', '.join(TOPOLOGIES)}"
    flags.DEFINE_multi_string("topology", [], what, **own)
    what = "slices, connected by the network of the data centre"
    flags.DEFINE_integer("slices", 1, what, lower_bound=1, **own)
    flags.DEFINE_bool("analysis", True, "the step of clvsmim analyze, too", **own)
    what = "compile ways to make it fit, where it does not"
    flags.DEFINE_bool("remedies", True, what, **own)
    flags.DEFINE_string("json", "", "write every number to this file", **own)
    flags.DEFINE_bool("markdown", False, "print rows of a Markdown table", **own)


def prepare() -> None:
    """Set what JAX and libtpu read when they start.

    Raises:
      ValueError: there is no libtpu.
    """
    if not (importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")):
        raise ValueError(
            "the TPU compiler is not installed; get it with `pip install libtpu` (or "
            "clvsmim[aot]), no TPU is needed"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # arrays of this process, if any
    # What is compiled for absent devices can be written to it, not be read back.
    jax.config.update("jax_enable_compilation_cache", False)


def topology(name: str, slices: int = 1) -> Place:
    """The devices of a topology, without any TPU.

    Raises:
      ValueError: the TPU compiler does not know it.
    """
    options = {"num_slices": slices} if slices > 1 else {}
    if name.lower().startswith("v4:"):  # both cores as one device, as JAX has it there
        options["chip_config_name"] = "megacore"
    try:
        with silent():
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=name, **options
            )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        why = str(error).strip().split("\n")[0]
        raise ValueError(
            f"--topology={name}: {why}; these work: {', '.join(TOPOLOGIES)}"
        ) from error
    grid = np.array([d.coords for d in found.devices])
    shape = tuple(int(n) for n in grid.max(0) + 1)
    if found.devices[0].device_kind in ("TPU v5 lite", "TPU v6 lite"):
        shape = shape[:2]
    return Place(name, slices, tuple(found.devices), shape)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what native code writes to stderr: libtpu warns that it is on no TPU."""
    sys.stderr.flush()
    before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)


def reports(
    config: ConfigDict, place: Place, *, analyze: bool = True, remedy: bool = True
) -> Iterator[Report]:
    """One report per program that is compiled; see `report` for what is in it.

    Raises:
      ValueError: the config is wrong, or the compiler refuses for another reason than
        memory.
    """
    first = training(config, place, "")
    yield first
    if not first["fits"] and remedy:
        for change, other in remedies(config, place):
            try:
                yield training(other, place, change)
            except ValueError as error:  # the others may still help
                print(f"no remedy, {change}: {error}", file=sys.stderr, flush=True)
    if analyze:
        yield analysing(config, place)


def remedies(config: ConfigDict, place: Place) -> list[tuple[str, ConfigDict]]:
    """Changes of a config that need less memory: (flags, config).

    Recomputing blocks, splitting the state over 8 devices of a slice, both, half of
    the batch; those that the config does not have already.
    """
    devices = len(place.devices)
    each = devices // place.slices
    ways = 8 if each % 8 == 0 else each
    remat = {} if config.encoder.remat else {"encoder.remat": True}
    fsdp = {} if config.mesh.fsdp >= ways else {"mesh.fsdp": ways}
    half = {} if config.batch % (2 * devices) else {"batch": config.batch // 2}
    tried = [remat, fsdp, remat | fsdp if remat and fsdp else {}, half]
    found = []
    for changes in filter(None, tried):
        other = copy.deepcopy(config)
        other.update_from_flattened_dict(changes)
        named = (f"--config.{key}={value}" for key, value in changes.items())
        found.append((" ".join(named), other))
    return found


def training(config: ConfigDict, place: Place, change: str) -> Report:
    """The report of the step that `clvsmim train` runs."""
    program = build.build(config, devices=place.devices)
    work, state = program.objective.flops, program.state
    held = {
        "parameters": nbytes(state.params),
        "moments": nbytes(state.opt),
        "teacher and statistics": nbytes(state.extra),
        "images": nbytes(program.batch),
    }
    return report(
        lambda: program.step.lower(state, program.batch),
        place,
        what="training step",
        change=change,
        mesh=program.mesh,
        batch=config.batch,
        parameters=(build.count(state.params["encoder"]), build.count(state.params)),
        held=held,
        work=work.step if work else None,
        steps=program.total,
    )


def analysing(config: ConfigDict, place: Place) -> Report:
    """The report of the step that `clvsmim analyze` runs with its usual settings."""
    program, usual = build.build(config, devices=place.devices), Settings()
    section = build.plain(config.encoder) | {"dtype": "float32", "remat": False}
    encoder = build.make_encoder(section)
    facts = analysis.facts_of(
        encoder, group=usual.group, classes=program.source.num_classes
    )
    metrics = analysis.make_metrics(usual.metrics, facts)
    metrics = analysis.reading(metrics, "test")
    unit = program.mesh.size * analysis.unit(metrics)
    batch = -(-usual.batch // unit) * unit
    split = meshes.batch_sharding(program.mesh)
    whole = meshes.replicated(program.mesh)

    def leaf(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=split)

    images = {k: leaf(np.int32) for k in ("label", "index", "position")}
    images |= {"images": leaf(np.uint8, *encoder.spec.image, 3)}
    images |= {"weight": leaf(np.float32)}
    state = {"params": program.state.params, "stats": program.state.extra}
    variables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        {k: fields["encoder"] for k, fields in state.items()},
    )
    colour = build.plain(config.input)
    step = analysis.compiled_step(
        encoder, tuple(metrics.items()), colour["mean"], colour["std"], program.mesh
    )
    count = build.count(variables["params"])
    return report(
        lambda: step.lower(variables, images),
        place,
        what="analysis step",
        change="",
        mesh=program.mesh,
        batch=batch,
        parameters=(count, count),
        held={"parameters": nbytes(variables), "images": nbytes(images)},
        work=flops.embed(encoder.spec) + flops.encode(encoder.spec),
        passes=FULL,
    )


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
