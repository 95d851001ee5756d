"""Several processes as one run: how they start, stop and end together.

On TPU pods, under Slurm and under Open MPI the processes find each other; elsewhere
each is told by --coordinator, --processes and --process. One that fails tells the
others before it ends, so that nobody waits for it.
"""

import atexit
import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from absl import flags
from jax._src import distributed  # its client, which has no public name
from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks

from clvsmim import cli, stopping

CLUSTERS = ("gketpu", "gcetpu", "slurm", "ompi")  # as JAX calls what it detects
FLAGS = ("coordinator", "processes", "process")
CONNECT = 300  # seconds to wait for the others
# A process from which nothing is heard for so long counts as dead. JAX sends the signs
# of life from C++, so that neither a long compilation nor Python can delay them.
HEARTBEAT = 100
POLL, GRACE = 1.0, 5.0  # seconds: between two looks whether one failed; to leave
FAILED = "clvsmim/failed"  # the key under which the first to fail says why
AGAIN = "Start all of them again: a training goes on from its last checkpoint"
# What the libraries say when another process does not answer.
SILENT = re.compile(
    r"gloo|coordination|heartbeat|barrier|unavailable|deadline_exceeded|socket closed|"
    r"connection (closed|reset)",
    re.IGNORECASE,
)


class Place(NamedTuple):
    """Which one of several processes this is, and the HOST:PORT where all meet."""

    coordinator: str
    processes: int
    process: int


def define_flags(values: flags.FlagValues) -> None:
    """--coordinator, --processes, --process and --connect_seconds."""
    own = {"flag_values": values}
    what = "HOST:PORT of process 0, where several processes meet; TPU pods need none "
    what += "of these flags, nor do Slurm and Open MPI 4 with a task for each GPU"
    flags.DEFINE_string("coordinator", None, what, **own)
    flags.DEFINE_integer("processes", None, "how many", lower_bound=1, **own)
    flags.DEFINE_integer("process", None, "which this is, from 0", lower_bound=0, **own)
    what = "how long to wait for the other processes"
    flags.DEFINE_integer("connect_seconds", CONNECT, what, lower_bound=1, **own)


def place(values: flags.FlagValues) -> Place | None:
    """What the flags, or else the cluster, say; None for a process that is alone.

    Raises:
      ValueError: flags that do not go together, or a cluster without a process 0.
    """
    given = {name: getattr(values, name) for name in FLAGS}
    if all(value is None for value in given.values()):
        return _found(values.connect_seconds)
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} missing; several processes need all of "
            "--coordinator=HOST:PORT --processes=N --process=I, one process none"
        )
    here = Place(**given)
    host, _, port = here.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"--coordinator={here.coordinator}: expected HOST:PORT of process 0, for "
            "example 10.0.0.1:8476"
        )
    if here.process >= here.processes:
        raise ValueError(
            f"--process={here.process} of --processes={here.processes}: expected 0 to "
            f"{here.processes - 1}"
        )
    return here if here.processes > 1 else None


def _found(seconds: int) -> Place | None:
    """What a TPU pod, Slurm or Open MPI says; nothing on a laptop or on a single VM.

    Raises:
      ValueError: there are several processes, but nothing says where they meet.
    """
    only_cpu = jax.config.jax_platforms == "cpu"
    for cluster in ClusterEnv._cluster_types:
        if cluster.name not in CLUSTERS or (only_cpu and "tpu" in cluster.name):
            continue
        if cluster.is_env_present():
            if cluster.get_process_count() == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            try:
                coordinator = cluster.get_coordinator_address(seconds, port)
            except RuntimeError as error:
                raise ValueError(
                    f"{cluster.name} names no process 0 ({_first_line(error)}); give "
                    "--coordinator=HOST:PORT --processes=N --process=I"
                ) from error
            return Place(
                coordinator, cluster.get_process_count(), cluster.get_process_id()
            )
    count = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1))
    if count > 1:  # each would train alone, in one workdir
        raise ValueError(
            f"mpirun started {count} processes, but JAX knows the way of Open MPI 4 to "
            "say where they meet, no other; give --coordinator=HOST:PORT --processes=N "
            "--process=I"
        )
    return None


def start(values: flags.FlagValues) -> None:
    """Join the others, if there are any; before anything asks for a device.

    Raises:
      ValueError: flags that do not go together; the port of the coordinator is taken.
    """
    here = place(values)
    if here is None or jax.distributed.is_initialized():
        return
    by_flags = values.coordinator is not None
    join(here, seconds=values.connect_seconds, by_flags=by_flags)


def join(here: Place, *, seconds: int = CONNECT, by_flags: bool = True) -> None:
    """Initialise jax.distributed and stand by the others from now on.

    Where they do not come within `seconds`, this ends the process with a line and
    status 75: JAX would end it too, but with the stack of a C++ program.

    Args:
      by_flags: take all devices of this host, which Slurm and Open MPI share out.

    Raises:
      ValueError: the port is taken, or process 0 refused this one.
    """
    if here.process == 0:
        _check_port(here)
    late = threading.Timer(seconds, _give_up, (here, seconds))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            *here,
            cluster_detection_method="deactivate" if by_flags else None,
            initialization_timeout=seconds + 60,  # ours comes first
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except RuntimeError as error:
        raise ValueError(
            f"process {here.process} of {here.processes} cannot join at "
            f"{here.coordinator} ({_first_line(error)}); does another process have the "
            "same --process?"
        ) from error
    finally:
        late.cancel()
    stopping.take_notifier()
    _guards.append(_last_words(here))
    _watch(here.process)


def _check_port(here: Place) -> None:
    """Raise ValueError if process 0 cannot listen; JAX would crash."""
    port = int(here.coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at {here.coordinator} ({error.strerror}); choose "
            "another port, the same on every host"
        ) from error


def _give_up(here: Place, seconds: int) -> None:
    host, _, port = here.coordinator.rpartition(":")
    why = f"not all {here.processes} processes came within {seconds} s; was the same "
    why += f"command started on every host, with --process=0 to {here.processes - 1}?"
    if here.process:
        try:
            socket.create_connection((host.strip("[]"), int(port)), 5).close()
        except OSError as error:
            why = f"no answer within {seconds} s ({error}); does process 0 run there, "
            why += "and does the firewall let the port through?"
    _end(f"clvsmim: process {here.process} at {here.coordinator}: {why}", cli.TRY_AGAIN)


def several() -> bool:
    """Whether this process is one of several; no device is touched."""
    return jax.distributed.is_initialized()


def gone(error: Exception) -> str:
    """One line for an error that only means that another process is gone, else ""."""
    text = " ".join(str(error).split())
    theirs = isinstance(error, RuntimeError) or re.match(r"[A-Z_]+: ", text)
    text = text[:150]  # a dump of memory names much further on
    if not (several() and theirs and SILENT.search(text)):
        return ""
    return f"another process, or the network, is gone, see above ({text}). {AGAIN}"


def hold() -> None:
    """Wait for the end, if another thread is ending this process and has said why."""
    if _leaving.locked():
        time.sleep(2 * GRACE)


def leave(why: str, status: int) -> None:
    """End this process at once, with the others; returns where there are no others.

    The usual end of a program waits until all have come to it.

    Args:
      why: one line, for the others to say.
    """
    client = distributed.global_state.client
    if client is None:
        return
    if not _leaving.acquire(blocking=False):
        hold()
    process = distributed.global_state.process_id
    with contextlib.suppress(Exception):  # somebody may have been first
        client.key_value_set(FAILED, f"{process} {why}")
    _depart(status)


def _depart(status: int) -> None:
    """Wait until the others know, then end."""
    state = distributed.global_state
    with contextlib.suppress(Exception):  # one that was killed will not come
        state.client.wait_at_barrier(f"{FAILED}/end", int(1000 * GRACE))
    if state.process_id == 0:
        time.sleep(POLL)  # JAX ends whoever loses the connection to process 0
    _end("", status)


def _watch(process: int) -> None:
    """Look, now and then, whether another process has failed, and end this one then."""
    done = threading.Event()

    def look() -> None:
        client = distributed.global_state.client
        while not done.wait(POLL):
            try:
                who, why = client.key_value_try_get(FAILED).split(" ", 1)
            except Exception:  # there is no such key: all is well
                continue
            if int(who) != process and _leaving.acquire(blocking=False):
                line = f"clvsmim: process {process} stops too, for process {who} says:"
                print(line, why, file=sys.stderr, flush=True)
                _depart(1)
            return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    atexit.register(lambda: (done.set(), thread.join()))


def _last_words(here: Place) -> Callable[[], None]:
    """Have a line said if this process is ended without one; returns what calls it off.

    JAX ends a process from C++ when another one is gone, and nothing in Python runs
    after that: a shell waits for the end of its input.
    """
    line = (
        f"clvsmim: process {here.process} of {here.processes} was killed, or another "
    )
    line += f"one is gone (see above, and what the others say). {AGAIN}"
    shell = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _ || echo "$0" >&2', line],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # what is sent to our group is not for it
    )

    def call_off() -> None:
        with contextlib.suppress(OSError, ValueError):
            shell.communicate(b"\n")

    atexit.register(call_off)
    return call_off


_guards: list[Callable[[], None]] = []
_leaving = threading.Lock()


def _end(line: str, status: int) -> None:
    if line:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    for call_off in _guards:
        call_off()
    os._exit(status)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
