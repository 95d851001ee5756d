"""Train an encoder.

    clvsmim train --config=configs/demo.py:simmim --workdir=runs/simmim
    clvsmim train --config=... --workdir=... --config.batch=256 --config.seed=1

Started again with the same config and workdir, a run that was stopped goes on where it
was, bit for bit. SIGTERM, which is how a cloud takes a machine back, saves first and
ends with status 143. The workdir holds checkpoints/, log.jsonl, xray.jsonl (what every
block does, at intervals, and alarms) and meta.json.
"""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from clvsmim import cli, flops, meta, transfer
from clvsmim import mesh as meshes
from clvsmim.build import Program, build, count, loader_section, log_section, plain
from clvsmim.checkpoint import Checkpoints, saved_steps
from clvsmim.data.pipeline import batches, eval_batches
from clvsmim.log import JsonlLog, Progress, Speed, TensorBoard
from clvsmim.step import State
from clvsmim.xray import XRay

# Keys that may change between two starts of one run: they do not change its numbers.
FREE = (
    r"(log|eval|xray|mesh)\..*",
    r"data\.(workers|threads|prefetch|unreadable|source\.(dir|path))",
)
STOPPED = 128 + signal.SIGTERM  # the exit status of a program that SIGTERM ends


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
        checkpoints = stack.enter_context(Checkpoints(workdir, **log_section(**log)))
        state, start = begin(program, checkpoints, given)
        if jax.process_index() == 0:
            say(program, settings, start, name)
        if start < program.total:
            writers = open_writers(
                workdir, log, program.total, settings["batch"], start
            )
            xray = None
            if settings["xray"]["share"]:
                boards = [w for w in writers if isinstance(w, TensorBoard)]
                xray = XRay(program, settings, workdir, start, boards)
            for writer in [*writers, *filter(None, [xray])]:
                stack.callback(writer.close)
            loop(program, settings, state, start, checkpoints, writers, xray)


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
    mine = {"params": program.state.params, "stats": program.state.extra}
    return transfer.read(
        path,
        program.objective.encoder.spec,
        {part: fields["encoder"] for part, fields in mine.items()},
        meshes.replicated(program.mesh),
    )


def loop(
    program: Program,
    settings: dict[str, Any],
    state: State,
    start: int,
    checkpoints: Checkpoints,
    writers: Sequence[Any],
    xray: XRay | None,
) -> None:
    """Steps `start` to the last. One iteration, in this order:

    1. take a batch and put it on the devices;
    2. dispatch the step;
    3. every `log.every` steps, write the record before this one (the host never waits
       for the step it has just dispatched) and keep this one;
    4. where one is due, dispatch an X-ray, which is written after the next record;
    5. every `eval.epochs` epochs and at the end, evaluate and write that;
    6. every `log.save` steps, at the end and after a SIGTERM, write what is kept, then
       save.

    Raises:
      ValueError: loss or gradient is not finite; the checkpoints are from before.
      SystemExit: SIGTERM came; everything up to this step is saved.
    """
    every, save = settings["log"]["every"], settings["log"]["save"]
    between = round(settings["eval"]["epochs"] * program.steps_per_epoch)
    data = batches(
        program.source,
        program.objective.views,
        batch=settings["batch"],
        seed=settings["seed"],
        start=start,
        process=jax.process_index(),
        processes=jax.process_count(),
        **loader_section(**settings["data"]),
    )
    kept: list[tuple[int, float, float, dict]] = []
    speed = speedometer(program, settings["batch"])

    def write() -> None:
        while kept:
            step, seconds, waited, logs = kept.pop()
            logs = {k: float(v) for k, v in jax.device_get(logs).items()}
            record = {"step": step, **logs, **speed(step, seconds, waited)}
            for writer in writers:
                writer.write(record | {"seconds": round(seconds, 3)})
            if xray:
                xray.see(record)
            check_finite(step, logs, checkpoints)
        if xray:
            xray.write()

    begun, waited = time.monotonic(), 0.0
    try:
        with jax.transfer_guard("disallow"), sigterm() as came:
            if xray and not start:
                xray.take(0, state.params, state.extra)
            for step in range(start + 1, program.total + 1):
                asked = time.monotonic()
                batch = next(data)
                waited += time.monotonic() - asked
                state, logs = program.step(state, meshes.put(batch, program.mesh))
                last = step == program.total
                if step % every == 0 or last:
                    write()
                    kept.append((step, time.monotonic() - begun, waited, logs))
                if xray and xray.due(step):
                    xray.take(step, state.params, state.extra)
                if program.evaluate and (last or between and step % between == 0):
                    write()
                    found = evaluate(program, settings, state)
                    for writer in writers:
                        writer.write({"step": step, **found})
                if step % save == 0 or last or came:
                    write()
                    for writer in [*writers, *filter(None, [xray])]:
                        writer.flush()
                    check_finite(step, logs, checkpoints)
                    checkpoints.save(step, state)
                if came and not last:
                    checkpoints.wait()
                    note = f"SIGTERM: step {step} is saved; start it again to go on"
                    print(f"clvsmim train: {note}", file=sys.stderr, flush=True)
                    raise SystemExit(STOPPED)
    finally:
        data.close()
    checkpoints.wait()


def speedometer(program: Program, batch: int) -> Speed:
    """What turns the times of records into speeds; see `flops` for what counts."""
    devices = program.mesh.devices.ravel()
    peak, work = flops.peak(devices[0].device_kind), program.objective.flops
    return Speed(
        images=batch,
        flops=work.step if work else None,
        peak=peak * devices.size if peak else None,
    )


@contextlib.contextmanager
def sigterm() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM comes, which then no longer ends the program.

    Only the main thread may ask for signals; another one gets a list that stays empty.
    """
    came: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    except ValueError:  # not the main thread
        yield came
        return
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def evaluate(
    program: Program, settings: dict[str, Any], state: State
) -> dict[str, float]:
    """{"eval/...": mean over the held-out images}, and how many these were."""
    loader = loader_section(**settings["data"])
    batches = eval_batches(
        program.held_out,
        program.objective.view,
        batch=settings["batch"],
        limit=settings["eval"]["images"] or None,
        process=jax.process_index(),
        processes=jax.process_count(),
        **{k: loader[k] for k in ("workers", "threads", "prefetch", "unreadable")},
    )
    try:
        sums = [program.evaluate(state, meshes.put(b, program.mesh)) for b in batches]
    finally:
        batches.close()
    total = {k: sum(float(x[k]) for x in jax.device_get(sums)) for k in sums[0]}
    images = total.pop("images")
    return {f"eval/{k}": v / images for k, v in total.items()} | {
        "eval/images": int(images)
    }


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
