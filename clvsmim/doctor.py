"""Check machine, hosts, folder, data and a rehearsal before a long run.

    clvsmim doctor
    clvsmim doctor --config=configs/demo.py:simmim --workdir=runs/simmim
    clvsmim doctor --config=... --workdir=gs://... --norehearsal

Prints a line per check, as soon as it is known: ok, a warning, or what to fix. Ends
with status 0, or with 2 if there is something to fix. Without --config it looks at the
machine alone. With it, a sample of the data is read and two steps of the run itself are
timed; with --workdir, every host writes and reads there, and the rehearsal is saved and
restored. All of it is deleted again.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from clvsmim import build, cli, hosts, machine, preflight, rehearsal, rollcall
from clvsmim.machine import FIX, OK, WARNING, Finding
from clvsmim.rollcall import Roll


def main(argv: Sequence[str]) -> None:
    values, _ = cli.parse(__doc__, argv, _flags)
    config = cli.config_of(values) if values.config is not None else None
    if values.workdir and config is None:
        raise ValueError("--workdir needs the --config of the run that goes there")
    with contextlib.closing(Visit()) as visit:
        assemble(visit, values)
        look(visit)
        if visit.ready("devices", ("hosts", "libtpu lock")):
            hosts.start(values)
            compute(visit)
        if config is not None:
            examine(visit, config, values.workdir, rehearse=values.rehearsal)
        visit.end()


def _flags(values: flags.FlagValues) -> None:
    own = {"flag_values": values}
    cli.define_config(values)
    hosts.define_flags(values)
    flags.DEFINE_string(
        "workdir", None, "where the run is to go, local or gs://", **own
    )
    flags.DEFINE_boolean("rehearsal", True, "time, save and restore two steps", **own)


class Visit:
    """What has been asked so far, and of whom; process 0 prints for all.

    Attributes:
      roll: the processes; this one alone until they have been called.
      fixes: names of the checks that found something to fix, the same everywhere.
      warnings: how many checks found something to know.
    """

    def __init__(self, roll: Roll | None = None):
        self.roll = roll or rollcall.alone()
        self.fixes: list[str] = []
        self.warnings = 0

    def ask(
        self, name: str, check: Callable[[], Finding], *, alike: bool = False
    ) -> Finding:
        """Run `check` on every process; print what they found, which is returned.

        A check that raises is something to fix, in the words of the exception.

        Args:
          alike: whether the processes must find the same, word for word.

        Raises:
          Lost: a process is.
        """
        try:
            mine = check()
        except rollcall.Lost:
            raise
        except Exception as error:  # of any library: that is what is looked for here
            mine = Finding(FIX, _line(error))
        texts = self.roll.gather(name, json.dumps(mine))
        found = [Finding(*json.loads(text)) for text in texts]
        if alike and len(set(found)) > 1 and all(f.state == OK for f in found):
            found = [Finding(FIX, f"hosts differ: {f.text}") for f in found]
        if any(f.state == FIX for f in found):
            self.fixes.append(name)
        self.warnings += any(f.state == WARNING for f in found)
        if self.roll.index == 0:
            for line in told(name, found, self.roll.hosts):
                print(line, flush=True)
        return mine

    def ready(self, name: str, needed: Sequence[str]) -> bool:
        """Whether the checks `needed` before another one left nothing to fix; says so
        if they did."""
        first = [other for other in needed if other in self.fixes]
        if first and self.roll.index == 0:
            print(_row("skipped", name, f"first fix: {', '.join(first)}"), flush=True)
        return not first

    def end(self) -> None:
        """Print the verdict.

        Raises:
          SystemExit: with 2, there is something to fix.
        """
        fixes = f"to fix: {', '.join(self.fixes)}" if self.fixes else "all ok"
        warnings = f", {self.warnings} with a warning" if self.warnings else ""
        if self.roll.index == 0:
            print(fixes + warnings, flush=True)
        if self.fixes:
            raise SystemExit(2)

    def close(self) -> None:
        self.roll.close()


def told(name: str, found: Sequence[Finding], names: Sequence[str]) -> list[str]:
    """The findings of all processes in lines: what is not ok by process, else one."""
    if len(found) == 1:
        return [_row(found[0].state, name, found[0].text)]
    lines = []
    for it in dict.fromkeys(f for f in found if f.state != OK):
        who = [f"{i} ({names[i]})" for i, f in enumerate(found) if f == it]
        some = (
            "all processes" if len(who) == len(found) else "process " + ", ".join(who)
        )
        lines.append(_row(it.state, name, f"{some}: {it.text}"))
    if not lines:
        others = "" if len(set(found)) == 1 else " (process 0; the others are ok too)"
        lines.append(_row(OK, name, found[0].text + others))
    return lines


def _row(state: str, name: str, text: str) -> str:
    return f"{state:8} {name + ':':13} {text}"


def _line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines() or [""]
    known = isinstance(error, ValueError)
    text = " ".join(lines) if known else f"{type(error).__name__}: {lines[0]}"
    return text[:500]


# The machine


def assemble(visit: Visit, values: flags.FlagValues) -> None:
    """Call the roll; afterwards the visit is of all processes, or of this one alone."""

    def check() -> Finding:
        place = hosts.place(values)
        if place is None:
            return Finding(OK, f"one process, on {visit.roll.hosts[0]}")
        note = f"waiting for {place.processes} processes at {place.coordinator}"
        print(f"clvsmim doctor: {note}", file=sys.stderr, flush=True)
        visit.roll = rollcall.call(*place, seconds=values.connect_seconds)
        names = ", ".join(dict.fromkeys(visit.roll.hosts))
        return Finding(OK, f"{place.processes} processes, on {names}")

    visit.ask("hosts", check)


def look(visit: Visit) -> None:
    """What the machine says before any device is touched."""
    expected, found = machine.accelerators(), machine.installed()
    if jax.config.jax_platforms == "cpu":
        expected = {}  # no accelerator is wanted
    visit.ask("versions", lambda: machine.check_versions(expected, found), alike=True)
    visit.ask("libtpu lock", lambda: machine.check_lock(expected))


def compute(visit: Visit) -> None:
    """What JAX makes of the machine."""
    expected, count = machine.accelerators(), len(visit.roll.hosts)
    chosen = jax.config.jax_platforms
    visit.ask("devices", lambda: machine.check_devices(expected, count, chosen))
    if "devices" not in visit.fixes:
        precision = jax.config.jax_default_matmul_precision
        visit.ask("precision", lambda: machine.check_products(precision))


# The run


def examine(
    visit: Visit,
    config: ConfigDict,
    workdir: str | None,
    *,
    rehearse: bool = True,
    among: Sequence[jax.Device] | None = None,
) -> None:
    """What the run of `config` in `workdir` will meet.

    Args:
      workdir: None leaves out what needs one.
      rehearse: also time two steps.
      among: the devices to train on, all by default.
    """
    settings, speed = build.plain(config), {}

    def program() -> build.Program:
        return build.build(config, among)  # remembered from the second time on

    with preflight.as_it_was(workdir):
        needed = ["hosts", "libtpu lock", "devices"]
        if workdir and visit.ready("workdir", needed):
            visit.ask("workdir", lambda: preflight.check_workdir(workdir, visit.roll))
        if not visit.ready("config", needed):
            return
        check = functools.partial(preflight.check_config, program, settings)
        visit.ask("config", check, alike=True)
        needed += ["config"]
        if visit.ready("data", needed):
            visit.ask("data", lambda: preflight.check_data(program(), settings, speed))
        if visit.ready("memory", needed):
            visit.ask("memory", lambda: preflight.check_memory(program()))
        needed += ["workdir"]
        if any(settings["init"].values()) and visit.ready("init", needed):
            check = functools.partial(preflight.check_init, settings, workdir)
            visit.ask("init", check)
        needed += ["init"]
        if workdir and visit.ready("run", needed):
            visit.ask("run", lambda: preflight.check_run(program(), settings, workdir))
        if workdir and visit.ready("space", needed):
            check = functools.partial(preflight.check_space, settings=settings)
            visit.ask("space", lambda: check(program(), workdir=workdir))
        needed += ["precision", "data", "memory", "run", "space"]
        if rehearse and visit.ready("rehearsal", needed):
            check = functools.partial(rehearsal.rehearse, workdir=workdir, speed=speed)
            visit.ask("rehearsal", lambda: check(program(), settings, visit.roll))


if __name__ == "__main__":
    cli.run(sys.modules["__main__"])
