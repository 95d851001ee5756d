"""Several processes: how they find each other, stop together and end together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
import runs

from clvsmim import checkpoint, cli, hosts, log, stopping, train

# What a command does, with a sum over all processes in place of a step.
TOY = """
import sys, time, types
import jax
import numpy as np
from clvsmim import cli, hosts, mesh, stopping

def main(argv):
    values, (hook,) = cli.parse("", argv, hosts.define_flags, "HOOK")
    hosts.start(values)
    grid, sums = mesh.make(), jax.jit(lambda x: x.sum())
    with stopping.sigterm() as stop:
        for step in range(1, 3000):
            float(sums(mesh.put(np.ones(1, np.float32), grid)))
            print(step, flush=True)
            if jax.process_index() == 1 and step == 5:
                if hook == "unreadable":
                    raise ValueError("photo.jpg cannot be read")
                if hook == "bug":
                    raise TypeError("a bug")
            if hook == "nan" and step == 5:
                raise ValueError("loss is nan at step 5")
            if stop():
                raise SystemExit(143)
            time.sleep(0.02)

cli.run(types.SimpleNamespace(__spec__=None, __name__="toy", main=main), sys.argv[1:])
"""
# The command itself, slowed down so that a signal can hit it.
TRAIN = """
import sys, time
from clvsmim import cli, train
put = train.meshes.put

def slow(*args):
    time.sleep(0.05)
    return put(*args)

train.meshes.put = slow
cli.run(train, sys.argv[1:])
"""


started = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    for each in started:
        if each.poll() is None:
            each.kill()
            each.communicate()
    started.clear()


def parsed(*argv):
    values, _ = cli.parse("", argv, hosts.define_flags)
    return values


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def toys(hook="", program=TOY):
    """Two processes that add numbers for a minute."""
    at = port()
    return [process(program, i, at, hook) for i in (0, 1)]


def trainings(workdir, name="simmim", **changes):
    """Two processes that train in `workdir`/run."""
    given = {"epochs": 1000.0, "log__save": 10, "log__keep": 2} | changes
    config = workdir / "config.py"
    config.write_text("from runs import config as get_config\n")
    argv = [f"--config={config}:{name}", f"--workdir={workdir}/run"]
    argv += runs.overrides(**given)
    at = port()
    return [process(TRAIN, i, at, *argv) for i in (0, 1)]


def process(program, number, at, *argv):
    """Process `number` of two, on one device."""
    env = os.environ | {"XLA_FLAGS": runs.flags(devices=1)}
    env["PYTHONPATH"] = f"{runs.ROOT}:{runs.ROOT / 'tests'}"
    place = [f"--coordinator=127.0.0.1:{at}", "--processes=2", f"--process={number}"]
    started.append(
        subprocess.Popen(
            [sys.executable, "-c", program, *place, *argv],
            env=env,
            cwd=runs.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a group of its own, for signals to all of it
        )
    )
    return started[-1]


def said(processes, timeout=100):
    """What they said, by lines, and their status."""
    found = [p.communicate(timeout=timeout)[1].splitlines() for p in processes]
    return found, [p.returncode for p in processes]


def steps(workdir):
    path = workdir / "run/log.jsonl"
    return [r["step"] for r in log.read(path)] if path.exists() else []


def until(processes, ready, seconds=200):
    """Wait until `ready()`; fail if a process ends before."""
    end = time.monotonic() + seconds
    while not ready():
        ended = [p for p in processes if p.poll() is not None]
        assert not ended, ended[0].stderr.read()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.02)


def ours(lines):
    return [line for line in lines if line.startswith("clvsmim")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--processes=2"], "--coordinator, --process missing; several processes need"),
        (["--coordinator=a:1", "--process=0"], "--processes missing"),
        (["--coordinator=a", "--processes=2", "--process=0"], "expected HOST:PORT"),
        (["--coordinator=a:x", "--processes=2", "--process=0"], "expected HOST:PORT"),
        (["--coordinator=a:70000", "--processes=2", "--process=0"], "HOST:PORT"),
        (["--coordinator=a:1", "--processes=2", "--process=2"], "expected 0 to 1"),
        (["--coordinator=a:1", "--processes=0", "--process=0"], "--processes"),
        (["--coordinator=a:1", "--processes=2", "--process=-1"], "--process"),
    ],
)
def test_flags_that_do_not_go_together_are_an_error(argv, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hosts.place(parsed(*argv))


def test_flags_say_where_the_others_are():
    argv = ["--coordinator=[::1]:80", "--processes=3", "--process=1"]
    assert hosts.place(parsed(*argv)) == ("[::1]:80", 3, 1)
    alone = ["--coordinator=a:1", "--processes=1", "--process=0"]
    assert hosts.place(parsed(*alone)) is None


def test_a_process_is_alone_by_default():
    assert hosts.place(parsed()) is None
    hosts.start(parsed())
    assert not hosts.several() and hosts.gone(RuntimeError("Gloo")) == ""
    hosts.leave("nothing happens", 7)


SLURM = {"JOB_ID": 5000, "STEP_NODELIST": "node[3-6]", "NTASKS": 4, "PROCID": 2}


def test_under_slurm_the_processes_find_each_other(monkeypatch):
    for name, value in (SLURM | {"LOCALID": 0}).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    at = 65535 - 2**12 + 1 + 5000 % 2**12
    assert hosts.place(parsed()) == (f"node3:{at}", 4, 2)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "99")
    assert hosts.place(parsed()) == ("node3:99", 4, 2)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert hosts.place(parsed()) is None


def test_processes_of_an_mpi_that_says_nothing_do_not_train_alone(monkeypatch):
    """Open MPI 5 no longer sets what JAX looks for; all would take one workdir."""
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri", raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="mpirun started 4 processes.*--coordinator"):
        hosts.place(parsed())
    by_hand = ["--coordinator=a:1", "--processes=4", "--process=2"]
    assert hosts.place(parsed(*by_hand)) == ("a:1", 4, 2)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert hosts.place(parsed()) is None


def test_in_a_kubernetes_pod_nobody_else_is_looked_for(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert hosts.place(parsed()) is None


def test_on_a_tpu_pod_the_processes_find_each_other(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,other")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    for name in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID"):
        monkeypatch.setenv(f"MEGASCALE_{name}", "")
    assert hosts.place(parsed()) is None  # JAX_PLATFORMS=cpu
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        assert hosts.place(parsed()) == ("localhost:8482", 2, 1)
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        monkeypatch.setenv("TPU_WORKER_ID", "0")
        assert hosts.place(parsed()) is None  # a single VM
    finally:
        jax.config.update("jax_platforms", before)


def test_without_other_processes_sigterm_is_kept_until_asked_for():
    before = signal.getsignal(signal.SIGTERM)
    with stopping.sigterm() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop.here == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def batches_of(calls, end):
    """`load` for a Reader: numbers up to `end`; workers are lost before the third."""

    def load(first, changes):
        calls.append((first, changes))
        for number in range(first, end):
            if number == 2 and changes.get("workers") != 0:
                raise train.WorkerLost("killed")
            yield number

    return load


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("signalled", [True, False])
def test_after_sigterm_a_process_that_others_wait_for_reads_by_itself(
    monkeypatch, several, signalled
):
    monkeypatch.setattr(hosts, "several", lambda: several)
    calls, stop = [], stopping.Stop()
    reader = train.Reader(batches_of(calls, 4))
    assert [reader.read(stop), reader.read(stop)] == [0, 1]
    stop.here += [signal.SIGTERM] * signalled
    if several and signalled:
        assert [reader.read(stop) for _ in range(3)] == [2, 3, None]
        assert calls == [(0, {}), (2, {"workers": 0})]
    else:
        with pytest.raises(train.WorkerLost):
            reader.read(stop)
    reader.close()


def test_saving_asks_jax_for_no_signal_by_the_number_of_the_step(tmp_path, monkeypatch):
    """The numbers of `Stop` count evaluations too, and may never go back."""
    asked = []
    ask = stopping.multihost_utils.reached_preemption_sync_point
    monkeypatch.setattr(
        stopping.multihost_utils, "reached_preemption_sync_point", asked.append
    )
    with checkpoint.Checkpoints(str(tmp_path), keep=1) as found:
        found.save(3, {"a": jax.numpy.ones(2)})
        found.wait()
    assert not asked and found.latest() == 3 and not ask(1)


def test_who_does_not_come_is_not_waited_for():
    alone = [process(TOY, i, port(), "", "--connect_seconds=3") for i in (0, 1)]
    (first, second), status = said(alone)
    assert status == [75, 75]  # it may go better the next time
    assert [re.sub(r":\d+", "", line)[:60] for line in first + second] == [
        "clvsmim: process 0 at 127.0.0.1: not all 2 processes came wi",
        "clvsmim: process 1 at 127.0.0.1: no answer within 3 s ([Errn",
    ]


def test_a_taken_port_is_an_error():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        (lines,), (status,) = said([process(TOY, 0, taken.getsockname()[1], "")])
    assert status == 2 and "cannot listen at 127.0.0.1" in ours(lines)[-1]


def running(two, count):
    """Wait for so many steps."""
    for each in two:
        while (line := each.stdout.readline()) != f"{count}\n":
            assert line, each.stderr.read()[-2000:]


@pytest.mark.parametrize("who", [(1,), (0, 1)])
def test_sigterm_to_one_stops_all_at_one_step(who):
    two = toys()
    running(two, 10)
    for number in who:
        two[number].terminate()
    last = [each.communicate(timeout=60)[0].split()[-1] for each in two]
    assert [each.returncode for each in two] == [143, 143]
    assert last[0] == last[1]


@pytest.mark.parametrize(
    ("hook", "message", "status"),
    [("unreadable", "photo.jpg cannot be read", 2), ("bug", "TypeError('a bug')", 1)],
)
def test_who_fails_takes_the_other_along(hook, message, status):
    two = toys(hook)
    lines, found = said(two)
    assert found == [1, status], lines
    assert ours(lines[0]) == [
        f"clvsmim: process 0 stops too, for process 1 says: {message}"
    ]
    assert any("cannot be read" in x or "a bug" in x for x in lines[1])
    assert not any("Check failure" in x for x in lines[0] + lines[1])


def test_what_fails_everywhere_ends_everywhere():
    lines, status = said(toys("nan"))
    assert 2 in status and set(status) <= {1, 2}
    assert all("loss is nan at step 5" in x for some in lines for x in ours(some))


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_stops_and_says_why(victim):
    two = toys()
    running(two, 10)
    two[victim].kill()
    lines, status = said(two)
    assert status[victim] == -signal.SIGKILL and status[1 - victim] in (75, -6)
    assert re.search(
        "another (process, or the network, is|one is) gone", ours(lines[1 - victim])[-1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_hangs_is_not_waited_for(victim):
    """As one whose machine is gone: nothing closes its connections."""
    two = toys(program="from clvsmim import hosts; hosts.HEARTBEAT = 10" + TOY)
    running(two, 10)
    os.kill(two[victim].pid, signal.SIGSTOP)
    (lines,), (status,) = said([two[1 - victim]])
    two[victim].kill()
    said([two[victim]])
    assert status == -signal.SIGABRT and "another one is gone" in ours(lines)[-1]


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_one_step_of_both(tmp_path):
    two = trainings(tmp_path, log__save=100000)
    until(two, lambda: len(steps(tmp_path)) > 3)
    two[1].terminate()
    lines, status = said(two)
    assert status == [143, 143]
    (step,) = checkpoint.saved_steps(tmp_path / "run")
    assert steps(tmp_path) == list(range(1, step + 1))
    note = f"clvsmim train: SIGTERM: step {step} is saved; start it again to go on"
    assert ours(lines[0]) == [note] and not ours(lines[1])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_restart_resumes(tmp_path, victim):
    two = trainings(tmp_path)
    until(two, lambda: checkpoint.saved_steps(tmp_path / "run"))
    two[victim].kill()
    said(two)
    saved = checkpoint.saved_steps(tmp_path / "run")[-1]
    two = trainings(tmp_path)
    until(two, lambda: steps(tmp_path) and steps(tmp_path)[-1] > saved + 3)
    two[0].terminate()
    lines, status = said(two)
    assert status == [143, 143] and f"simmim: {saved} of" in " ".join(lines[0])


@pytest.mark.slow
def test_sigterm_to_a_group_whose_workers_end_with_it(tmp_path):
    more = {"data__workers": 1, "data__prefetch": 1}  # it soon has none left
    two = trainings(tmp_path, log__save=100000, **more)
    until(two, lambda: len(steps(tmp_path)) > 3)
    os.killpg(two[1].pid, signal.SIGTERM)
    lines, status = said(two)
    assert status == [143, 143], lines
    (step,) = checkpoint.saved_steps(tmp_path / "run")
    assert steps(tmp_path) == list(range(1, step + 1))


@pytest.mark.slow
def test_sigterm_during_an_evaluation_stops_both(tmp_path):
    """Nearly all the time goes into evaluations; both leave one at the same batch."""
    more = {"eval__epochs": 1 / 32, "batch": 2, "log__save": 100000}
    two = trainings(tmp_path, "classify", **more)
    until(two, lambda: len(steps(tmp_path)) > 2)
    two[1].terminate()
    lines, status = said(two)
    assert status == [143, 143], lines
    assert f"step {checkpoint.saved_steps(tmp_path / 'run')[-1]} is saved" in str(lines)
