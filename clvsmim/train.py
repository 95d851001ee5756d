"""Train an encoder.

    clvsmim train --config=configs/demo.py:simmim --workdir=runs/simmim
    clvsmim train --config=... --workdir=... --config.batch=256 --config.seed=1

Started again with the same config and workdir, a run that was stopped goes on where it
was, bit for bit. The workdir holds checkpoints/, log.jsonl and meta.json.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from clvsmim import cli, meta, tree
from clvsmim import mesh as meshes
from clvsmim.build import Program, build, count, plain
from clvsmim.checkpoint import Checkpoints, restore_params, saved_steps
from clvsmim.data.pipeline import batches
from clvsmim.log import JsonlLog, Progress, TensorBoard
from clvsmim.step import State

# Keys that may change between two starts of one run: they do not change its numbers.
FREE = (r"log\..*", r"mesh\..*", r"data\.(workers|threads|prefetch)")


def main(argv: Sequence[str]) -> None:
    values, _ = cli.parse(__doc__, argv, _flags)
    if not values.workdir:
        raise ValueError("--workdir is missing; for example --workdir=runs/first")
    train(cli.config_of(values), values.workdir)


def _flags(values: flags.FlagValues) -> None:
    cli.define_config(values)
    flags.DEFINE_string(
        "workdir", None, "folder of this run, local or gs://", flag_values=values
    )


def train(
    config: ConfigDict,
    workdir: str,
    *,
    devices: Sequence[jax.Device] | None = None,
    name: str = "",
) -> None:
    """Run `config` in `workdir` from where it is to its last step.

    Args:
      devices: to train on, all by default.
      name: what to call the run in the line before the first step.

    Raises:
      ValueError: a config that cannot work, or a workdir that is not this run's.
    """
    program, settings = build(config, devices), plain(config)
    encoder = dataclasses.asdict(program.objective.encoder.spec)
    facts = {"encoder": encoder, "input": settings["input"]}
    facts |= {"parameters": count(program.state.params["encoder"])}
    given = None  # read, and refused, before anything is written
    if not saved_steps(workdir):
        given = given_encoder(program, settings["init"]["path"])
    meta.prepare(workdir, settings, facts, ignore=FREE)
    log = settings["log"]
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=log["keep"]))
        state, start = begin(program, checkpoints, given)
        if jax.process_index() == 0:
            say(program, settings, start, name)
        if start < program.total:
            writers = open_writers(
                workdir, log, program.total, settings["batch"], start
            )
            for writer in writers:
                stack.callback(writer.close)
            loop(program, settings, state, start, checkpoints, writers)


def say(program: Program, settings: dict[str, Any], start: int, name: str) -> None:
    """One line before the first step, which is silent while it compiles."""
    devices = program.mesh.devices.ravel()
    where = f"{devices.size} x {devices[0].device_kind}"
    done = f"{start} of {program.total} steps of {settings['batch']} images"
    left = "compiling the step" if start < program.total else "nothing left to do"
    who = name or settings["objective"]["name"]
    print(f"{who}: {done} on {where}; {left}", file=sys.stderr, flush=True)


def open_writers(
    workdir: str, log: dict[str, Any], total: int, batch: int, start: int
) -> list[Any]:
    """Where records go; one process writes for all."""
    if jax.process_index():
        return []
    records = JsonlLog(f"{workdir}/log.jsonl")
    records.rewind(start)
    board = [TensorBoard(workdir)] if log["tensorboard"] else []
    return [records, *board, Progress(total, images=batch, start=start)]


def begin(program: Program, checkpoints: Checkpoints, given: Any) -> tuple[State, int]:
    """The state of the newest checkpoint, else a new one, and its step."""
    if checkpoints.latest() is not None:
        return checkpoints.restore(program.state)
    return program.init(given), 0


def given_encoder(program: Program, path: str) -> Any:
    """The encoder of the run in `path`, {"params", "stats"}; None without a path.

    Raises:
      ValueError: it is of another architecture, or there is none.
    """
    if not path:
        return None
    saved, _ = restore_params(path, sharding=meshes.replicated(program.mesh))
    mine = {"params": program.state.params, "stats": program.state.extra}
    theirs = {"params": saved["params"], "stats": saved["extra"]}
    return {
        part: tree.strict(
            mine[part]["encoder"], theirs[part].get("encoder", {}), f"init.path={path}"
        )
        for part in mine
    }


def loop(
    program: Program,
    settings: dict[str, Any],
    state: State,
    start: int,
    checkpoints: Checkpoints,
    writers: Sequence[Any],
) -> None:
    """Steps `start` to the last. One iteration, in this order:

    1. take a batch and put it on the devices;
    2. dispatch the step;
    3. every `log.every` steps, write the record before this one (the host never waits
       for the step it has just dispatched) and keep this one;
    4. every `log.save` steps and at the end, write what is kept, then save.

    Raises:
      ValueError: loss or gradient is not finite; the checkpoints are from before.
    """
    every, save = settings["log"]["every"], settings["log"]["save"]
    data = batches(
        program.source,
        program.objective.views,
        batch=settings["batch"],
        seed=settings["seed"],
        start=start,
        process=jax.process_index(),
        processes=jax.process_count(),
        **{k: v for k, v in settings["data"].items() if k != "source"},
    )
    kept: list[tuple[int, float, dict]] = []

    def write() -> None:
        while kept:
            step, seconds, logs = kept.pop()
            logs = {k: float(v) for k, v in jax.device_get(logs).items()}
            for writer in writers:
                writer.write({"step": step, **logs, "seconds": round(seconds, 3)})
            check_finite(step, logs, checkpoints)

    begun = time.monotonic()
    try:
        with jax.transfer_guard("disallow"):
            for step in range(start + 1, program.total + 1):
                state, logs = program.step(state, meshes.put(next(data), program.mesh))
                last = step == program.total
                if step % every == 0 or last:
                    write()
                    kept.append((step, time.monotonic() - begun, logs))
                if step % save == 0 or last:
                    write()
                    for writer in writers:
                        writer.flush()
                    check_finite(step, logs, checkpoints)
                    checkpoints.save(step, state)
    finally:
        data.close()
    checkpoints.wait()


def check_finite(step: int, logs: dict[str, Any], checkpoints: Checkpoints) -> None:
    """Raise ValueError if training is over: NaN or infinity in the loss, or in the
    gradient, which makes the parameters so before the loss shows it."""
    for name in ("loss", "gradient_norm"):
        value = jax.device_get(logs[name])
        if not np.isfinite(value):
            raise ValueError(
                f"{name} is {value} at step {step}; the last checkpoint is of step "
                f"{checkpoints.latest()}. Lower optim.schedule.base or set optim.clip"
            )


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
