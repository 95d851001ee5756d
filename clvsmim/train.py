"""Train an encoder.

    clvsmim train --config=configs/demo.py:simmim --workdir=runs/simmim
    clvsmim train --config=... --workdir=... --config.batch=256 --config.seed=1

Started again with the same config and workdir, a run that was stopped goes on where it
was, bit for bit. SIGTERM, which is how a cloud takes a machine back, saves first and
ends with status 143; where several processes train, one that gets it stops all of them
at one step. The workdir holds checkpoints/, log.jsonl, xray.jsonl (what every
block does, at intervals, and alarms) and meta.json.

On several hosts start it on each: TPU pods, Slurm and Open MPI need nothing more, other
machines --coordinator=HOST:PORT --processes=N --process=I.
"""

import contextlib
import dataclasses
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from clvsmim import cli, flops, hosts, meta, stopping, transfer
from clvsmim import mesh as meshes
from clvsmim.build import (
    Program,
    build,
    count,
    init_section,
    loader_section,
    log_section,
    plain,
)
from clvsmim.checkpoint import Checkpoints, saved_steps
from clvsmim.data import WorkerLost
from clvsmim.data.pipeline import batches, eval_batches
from clvsmim.log import JsonlLog, Progress, Speed, TensorBoard, read
from clvsmim.step import State
from clvsmim.xray import XRay

# Keys that may change between two starts of one run: they do not change its numbers.
FREE = (
    r"(log|eval|xray|mesh)\..*",
    r"encoder\.(remat|scan)",
    r"data\.(workers|threads|prefetch|unreadable|source\.(dir|path))",
)
STOPPED = 128 + signal.SIGTERM  # the exit status of a program that SIGTERM ends


def main(argv: Sequence[str]) -> None:
    values, _ = cli.parse(__doc__, argv, _flags)
    if not values.workdir:
        raise ValueError("--workdir is missing; for example --workdir=runs/first")
    hosts.start(values)
    train(cli.config_of(values), values.workdir)


def _flags(values: flags.FlagValues) -> None:
    cli.define_config(values)
    hosts.define_flags(values)
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
    facts |= {"steps": program.total}
    given = None  # read, and refused, before anything is written
    if not saved_steps(workdir):
        given = given_encoder(
            program, init_section(**settings["init"]), settings["input"]
        )
    facts |= {"images": images(program)}
    meta.prepare(workdir, settings, facts, ignore=FREE, same=("images",))
    log = settings["log"]
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir, **log_section(**log)))
        state, start = begin(program, checkpoints, given)
        if jax.process_index() == 0:
            say(program, settings, start, name)
        again = evaluation_due(program, settings, start) and not evaluated(
            workdir, start
        )
        if start < program.total or again:
            writers = open_writers(
                workdir, log, program.total, settings["batch"], start
            )
            xray = None
            if settings["xray"]["share"]:
                boards = [w for w in writers if isinstance(w, TensorBoard)]
                xray = XRay(program, settings, workdir, start, boards)
            for writer in [*writers, *filter(None, [xray])]:
                stack.callback(writer.close)
            loop(program, settings, state, start, checkpoints, writers, xray, again)


def images(program: Program) -> dict[str, Any]:
    """What the data sets hold: other images would make it another run."""
    names = "\n".join(program.source.class_names)
    found = {"train": len(program.source), "classes": zlib.crc32(names.encode())}
    return found | ({"test": len(program.held_out)} if program.evaluate else {})


def evaluation_due(program: Program, settings: dict[str, Any], step: int) -> bool:
    """Whether an evaluation follows this step."""
    between = round(settings["eval"]["epochs"] * program.steps_per_epoch)
    last = step == program.total
    return bool(program.evaluate and step and (last or between and step % between == 0))


def evaluated(workdir: str, step: int) -> bool:
    """Whether the log has the evaluation of this step, which SIGTERM may cut short."""
    path = epath.Path(f"{workdir}/log.jsonl")
    records = read(path) if path.exists() else []
    return any(r["step"] == step and "eval/images" in r for r in records)


def say(program: Program, settings: dict[str, Any], start: int, name: str) -> None:
    """One line before the first step, which is silent while it compiles."""
    devices = program.mesh.devices.ravel()
    where = f"{devices.size} x {devices[0].device_kind}"
    done = f"{start} of {program.total} steps of {settings['batch']} images"
    left = "compiling the step" if start < program.total else "nothing left to do"
    who = name or settings["objective"]["name"]
    path = init_section(**settings["init"])
    if path or "encoder/.*" in program.objective.frozen:
        who += (
            f" from {path}"
            if path
            else " of an untrained encoder (init.path or init.zoo would name one)"
        )
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


def given_encoder(program: Program, path: str, colour: dict[str, Any]) -> Any:
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
        colour,
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
    again: bool,
) -> None:
    """Steps `start` to the last; first the evaluation of `start`, if `again`. One
    iteration, in this order:

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
    data = Reader(lambda first, more: load(program, settings, start + first, **more))
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

    def assess(step: int) -> None:
        write()
        found = evaluate(program, settings, state, stop)
        for writer in writers if found else ():
            writer.write({"step": step, **found})

    def keep(step: int) -> None:
        write()
        for writer in [*writers, *filter(None, [xray])]:
            writer.flush()
        check_finite(step, logs, checkpoints)
        checkpoints.save(step, state)

    def end(step: int) -> None:
        checkpoints.wait()
        if jax.process_index() == 0:
            note = f"SIGTERM: step {step} is saved; start it again to go on"
            print(f"clvsmim train: {note}", file=sys.stderr, flush=True)
        raise SystemExit(STOPPED)

    begun, waited = time.monotonic(), 0.0
    try:
        with jax.transfer_guard("disallow"), stopping.sigterm() as stop:
            if xray and not start:
                xray.take(0, state.params, state.extra)
            if again:
                assess(start)
                if stop():
                    end(start)
            for step in range(start + 1, program.total + 1):
                asked = time.monotonic()
                try:
                    batch = meshes.put(data.read(stop), program.mesh)
                except WorkerLost:  # a signal to the group ends the workers first
                    if not stop.here:
                        raise
                    if step - 1 > start and (step - 1) % save:  # else it is saved
                        keep(step - 1)
                    end(step - 1)
                waited += time.monotonic() - asked
                state, logs = program.step(state, batch)
                last = step == program.total
                if step % every == 0 or last:
                    write()
                    kept.append((step, time.monotonic() - begun, waited, logs))
                if xray and xray.due(step):
                    xray.take(step, state.params, state.extra)
                if evaluation_due(program, settings, step):
                    assess(step)
                ends = stop()  # once: it may come at any moment
                if step % save == 0 or last or ends:
                    keep(step)
                if ends:
                    end(step)
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


def load(
    program: Program, settings: dict[str, Any], start: int, **changes: int
) -> Iterator[dict[str, Any]]:
    """This process's rows of the batches of training, from step `start` on."""
    return batches(
        program.source,
        program.objective.views,
        batch=settings["batch"],
        seed=settings["seed"],
        start=start,
        process=jax.process_index(),
        processes=jax.process_count(),
        **loader_section(**settings["data"]) | changes,
    )


def load_held_out(
    program: Program, settings: dict[str, Any], start: int, **changes: int
) -> Iterator[dict[str, Any]]:
    """This process's rows of the batches of an evaluation, from number `start` on."""
    loader = loader_section(**settings["data"]) | changes
    return eval_batches(
        program.held_out,
        program.objective.view,
        batch=settings["batch"],
        limit=settings["eval"]["images"] or None,
        process=jax.process_index(),
        processes=jax.process_count(),
        start=start,
        **{k: loader[k] for k in ("workers", "threads", "prefetch", "unreadable")},
    )


class Reader:
    """Batches one by one, also after a SIGTERM has ended the workers that read them.

    A signal to a group of processes ends its workers too. The other hosts may have to
    train for another step or two until all stop at the same one, and cannot do that
    without our rows: this process then reads them itself.

    Args:
      load: `(number of the first batch, changed settings) -> iterator of batches`.
    """

    def __init__(self, load: Callable[[int, dict[str, int]], Iterator]) -> None:
        self._load, self._count = load, 0
        self._data = load(0, {})

    def read(self, stop: stopping.Stop) -> dict[str, Any] | None:
        """The next batch; None after the last one.

        Raises:
          WorkerLost: no other host waits for the batch, or no SIGTERM was the reason.
        """
        try:
            batch = next(self._data, None)
        except WorkerLost:
            if not (stop.here and hosts.several()):
                raise
            self.close()
            self._data = self._load(self._count, {"workers": 0})
            batch = next(self._data, None)
        self._count += 1
        return batch

    def close(self) -> None:
        """Stop the workers."""
        self._data.close()


def evaluate(
    program: Program,
    settings: dict[str, Any],
    state: State,
    stop: stopping.Stop | None = None,
) -> dict[str, float]:
    """{"eval/...": mean over the held-out images}, and how many these were; {} where
    a SIGTERM came meanwhile and `stop` says so.

    Raises:
      ValueError: none of the held-out images can be read.
    """
    stop, sums = stop or stopping.Stop(), []
    data = Reader(lambda first, more: load_held_out(program, settings, first, **more))
    try:
        while (batch := data.read(stop)) is not None:
            if stop():
                return {}
            sums.append(program.evaluate(state, meshes.put(batch, program.mesh)))
    except WorkerLost:
        if stop.here:
            return {}
        raise
    finally:
        data.close()
    total = {k: sum(float(x[k]) for x in jax.device_get(sums)) for k in sums[0]}
    images = total.pop("images")
    if not images:
        raise ValueError(
            f"none of the held-out images of {program.held_out.name!r} can be read"
        )
    means = {f"eval/{k}": v / images for k, v in total.items()}
    return means | {"eval/images": int(images)}


def check_finite(step: int, logs: dict[str, Any], checkpoints: Checkpoints) -> None:
    """Raise ValueError if training is over: NaN or infinity in the loss, or in the
    gradient, which makes the parameters so before the loss shows it."""
    for name in ("loss", "gradient_norm"):
        value = jax.device_get(logs[name])
        if not np.isfinite(value):
            last = checkpoints.latest()
            saved = f"the last checkpoint is of step {last}" if last else "none saved"
            raise ValueError(
                f"{name} is {value} at step {step}; {saved}. "
                "Lower optim.schedule.base or set optim.clip"
            )


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
