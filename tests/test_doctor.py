"""The doctor finds what is planted, names who is missing, and leaves no trace."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from clvsmim import build, doctor, machine, meta, preflight, rehearsal, rollcall
from clvsmim.checkpoint import Checkpoints
from clvsmim.machine import FIX, OK, WARNING

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

QUIET = {"data__workers": 0, "data__threads": 0}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Little is timed, and nobody waits for a slow network."""
    monkeypatch.setattr(preflight, "SECONDS", 0.1)
    monkeypatch.setattr(preflight, "IMAGES", 8)
    monkeypatch.setattr(preflight, "PATIENCE", 0.3)
    sys.modules.pop("config_config", None)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(*functions):
    """What functions in a thread each return or raise."""
    found = [None] * len(functions)

    def run(i):
        try:
            found[i] = functions[i]()
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


@pytest.fixture
def called():
    """`called(numbers, of=N)` -> what each of these processes gets of the roll call."""
    rolls = []

    def call(numbers, *, of, seconds=10.0):
        there = f"127.0.0.1:{free_port()}"
        wait = {"seconds": seconds, "silence": 5.0}
        found = together(
            *(lambda i=i: rollcall.call(there, of, i, **wait) for i in numbers)
        )
        rolls.extend(roll for roll in found if isinstance(roll, rollcall.Roll))
        return found

    yield call
    for roll in rolls:
        roll.close()


# The roll call


def test_all_processes_learn_who_is_there_and_what_each_says(called):
    rolls = called([2, 0, 1], of=3)
    assert [roll.index for roll in rolls] == [2, 0, 1]
    assert all(roll.hosts == (socket.gethostname(),) * 3 for roll in rolls)
    for i in (1, 2):
        said = together(
            *(lambda r=r, i=i: r.gather(f"call {i}", f"{i}, {r.index}") for r in rolls)
        )
        assert said == [[f"{i}, 0", f"{i}, 1", f"{i}, 2"]] * 3


def test_who_is_missing_is_told_to_those_who_came(called):
    errors = called([0, 2], of=4, seconds=0.7)
    name = socket.gethostname()
    for error in errors:
        assert isinstance(error, ValueError)
        assert f"processes 1, 3 of 4 did not come in 0.7 s; came: 0 ({name}), 2 (" in (
            str(error)
        )


def test_a_missing_process_0_is_named_by_its_address(called):
    (error,) = called([1], of=2, seconds=0.4)
    assert re.search(r"process 0 does not answer at 127\.0\.0\.1:\d+ for", str(error))


def test_two_processes_with_one_number_and_other_numbers_of_processes(called):
    errors = called([0, 1, 1], of=3, seconds=5)
    assert all("two processes have the number 1" in str(e) for e in errors)
    there = f"127.0.0.1:{free_port()}"
    errors = together(
        lambda: rollcall.call(there, 2, 0, seconds=5),
        lambda: rollcall.call(there, 3, 1, seconds=5),
    )
    assert all("expects 3 processes, process 0" in str(e) for e in errors)


def test_a_stranger_at_the_port_does_not_count():
    port = free_port()

    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), 5) as link:
                    link.sendall(b"GET / HTTP/1.1\n\n")
                return
            except ConnectionError:
                threading.Event().wait(0.05)

    _, error = together(
        stranger, lambda: rollcall.call(f"127.0.0.1:{port}", 2, 0, seconds=1)
    )
    assert "process 1 of 2 did not come" in str(error)


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at port {port}"):
            rollcall.call(f"127.0.0.1:{port}", 2, 0, seconds=1)


def test_a_process_that_goes_is_named_to_the_others(called):
    first, second, third = called([0, 1, 2], of=3)
    second.close()
    errors = together(
        lambda: first.gather("here", ""), lambda: third.gather("here", "")
    )
    assert all(isinstance(e, rollcall.Lost) for e in errors)
    assert all(
        "process 1 (" in str(e) and "is lost in 'here'" in str(e) for e in errors
    )


def test_processes_at_two_places_are_not_taken_for_one(called):
    first, second = called([0, 1], of=2)
    errors = together(
        lambda: first.gather("here", ""), lambda: second.gather("there", "too large")
    )
    assert all("is at 'there' and process 0 at 'here'" in str(e) for e in errors)
    assert all("too large" in str(e) for e in errors)


# The machine


def test_accelerators_are_known_by_their_device_files_and_the_environment(tmp_path):
    def at(*paths, env=None):
        shutil.rmtree(tmp_path / "root", ignore_errors=True)
        for path, text in paths:
            (tmp_path / "root" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "root" / path).write_text(text)
        return machine.accelerators(tmp_path / "root", env or {})

    vendor = "sys/bus/pci/devices/0/vendor"
    assert at() == {}
    assert at(("dev/nvidia0", ""), ("dev/nvidiactl", "")) == {"cuda": "/dev/nvidia0"}
    assert at(("dev/nvidiactl", "")) == {}
    assert at(("dev/accel1", ""), ("dev/accel0", "")) == {"tpu": "/dev/accel0"}
    assert at(("dev/vfio/0", ""), (vendor, "0x1ae0\n")) == {"tpu": "/dev/vfio/0"}
    assert at(("dev/vfio/0", ""), (vendor, "0x10de\n")) == {}  # a GPU handed on
    assert at(env={"TPU_NAME": "pod", "TPU_WORKER_ID": ""}) == {"tpu": "TPU_NAME"}


def test_what_is_installed_here_fits_together():
    found = machine.check_versions({}, machine.installed())
    assert found.state == OK and f"jaxlib {machine.installed()['jaxlib']}" in found.text


@pytest.mark.parametrize(
    ("expected", "changes", "says"),
    [
        (
            {},
            {"jaxlib": "0.9.9"},
            "jax is 0.10.2 but jaxlib 0.9.9: pip install -U jax==",
        ),
        ({}, {"optax": None}, "optax is missing: pip install ."),
        (
            {"tpu": "/dev/accel0"},
            {},
            "/dev/accel0 says that there is a TPU: pip install",
        ),
        ({"cuda": "/dev/nvidia0"}, {}, "GPU: pip install '.[cuda]', or '.[cuda12]'"),
        (
            {"cuda": "/dev/nvidia0"},
            {"jax-cuda13-plugin": "0.10.1"},
            "jax-cuda13-plugin is 0.10.1 but jaxlib 0.10.2: pip install -U jax-cuda13",
        ),
    ],
)
def test_versions_that_do_not_fit(expected, changes, says):
    fine = dict.fromkeys(machine.PACKAGES, "1.0") | {"jax": "0.10.2"}
    fine["jaxlib"] = "0.10.2"
    assert machine.check_versions({}, fine).state == OK
    fine = {k: v for k, v in (fine | changes).items() if v}
    found = machine.check_versions(expected, fine)
    assert found.state == FIX and says in found.text


def test_who_holds_the_tpu_is_named_by_its_number(tmp_path):
    tpu, lock = {"tpu": "/dev/accel0"}, tmp_path / "lock"
    assert machine.check_lock({}, lock, tmp_path).state == OK
    assert machine.check_lock(tpu, lock, tmp_path).state == OK
    lock.touch()  # left over, in nobody's way
    assert machine.check_lock(tpu, lock, tmp_path).state == OK
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    )
    hold += "; print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, lock], **pipes) as holder:
        holder.stdout.readline()
        found = machine.check_lock(tpu, lock, tmp_path)
        holder.stdin.close()
    assert found.state == FIX and f"process {holder.pid} (" in found.text
    assert f"kill {holder.pid}" in found.text
    assert machine.check_lock(tpu, lock, tmp_path).state == OK


def test_who_has_the_tpu_open_and_a_lock_of_another_user(tmp_path, monkeypatch):
    tpu, lock = {"tpu": "/dev/vfio/1"}, tmp_path / "lock"
    links = tmp_path / "proc" / "123" / "fd"
    links.mkdir(parents=True)
    (links.parent / "cmdline").write_bytes(b"python\0train.py\0")
    os.symlink("/dev/null", links / "0")
    assert machine.check_lock(tpu, lock, tmp_path).state == OK
    os.symlink("/dev/vfio/1", links / "7")
    found = machine.check_lock(tpu, lock, tmp_path)
    assert found.state == FIX and "123 (python train.py) holds the TPU" in found.text
    (links / "7").unlink()
    lock.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = machine.check_lock(tpu, lock, tmp_path)
    assert found.state == FIX and f"sudo rm -f {lock}" in found.text


def test_a_cpu_in_place_of_an_accelerator_is_not_overlooked():
    gpu = {"cuda": "/dev/nvidia0"}
    assert machine.check_devices({}, 1, "cpu") == (OK, "8 x cpu")
    found = machine.check_devices(gpu, 1, None)
    assert found.state == FIX and "fell back to the CPU" in found.text
    assert "/dev/nvidia0" in found.text and "pip install '.[cuda]'" in found.text
    found = machine.check_devices(gpu, 1, "cpu")
    assert found.state == WARNING and "unset it" in found.text
    found = machine.check_devices({}, 4, None)
    assert found.state == FIX and "JAX knows 1 processes, expected 4" in found.text


def test_products_that_are_wrong(monkeypatch):
    found = machine.check_products(None)
    assert found.state == OK and "bfloat16" not in found.text
    matmul = jnp.matmul

    def coarse(a, b, precision):  # as a TPU does unless it is asked for more
        kind = jnp.float32 if precision == "highest" else jnp.bfloat16
        a, b = (x.astype(kind) for x in (a, b))
        return matmul(a, b, precision=precision).astype(jnp.float32)

    monkeypatch.setattr(jnp, "matmul", coarse)
    found = machine.check_products(None)
    assert found.state == OK and "bfloat16" in found.text
    monkeypatch.setattr(jnp, "matmul", lambda *x, precision: coarse(*x, None))
    assert machine.check_products(None).state == FIX


# The run


def config(**changes):
    return runs.config("simmim", **QUIET | changes)


def program(**changes):
    return build.build(config(**changes), jax.devices()[:1])


def settings(**changes):
    return build.plain(config(**changes))


def examined(capsys, workdir, *, rehearse=False, **changes):
    """(names of what is to fix, printed lines by name) of a visit."""
    visit, one = doctor.Visit(), jax.devices()[:1]
    doctor.examine(visit, config(**changes), workdir, rehearse=rehearse, among=one)
    lines = capsys.readouterr().out.splitlines()
    return visit.fixes, {line[9:].split(":")[0]: line for line in lines}


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_will_work_is_rehearsed_and_nothing_stays(capsys, tmp_path, there):
    if there:
        runs.run(tmp_path / "a" / "run", **QUIET)
    before = runs.snapshot(tmp_path)
    workdir = str(tmp_path / "a" / "run")
    fixes, lines = examined(capsys, workdir, rehearse=True)
    assert not fixes, lines
    assert runs.snapshot(tmp_path) == before
    names = ["workdir", "config", "data", "memory", "run", "space", "rehearsal"]
    assert list(lines) == names
    assert all(lines[name].startswith("ok") for name in names[:-1])
    left = 0 if there else 12
    assert f"at step {12 - left}" in lines["run"]
    told = lines["rehearsal"]
    assert "restored in" in told and "bit for bit" in told and "compiled in" in told
    assert f"{left} steps at that speed take" in told and "peak memory" in told


def test_without_a_workdir_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fixes, lines = examined(capsys, None, rehearse=True)
    assert not fixes and list(lines) == ["config", "data", "memory", "rehearsal"]
    assert "not saved, without --workdir" in lines["rehearsal"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_a_config_is_a_line_and_the_rest_waits(capsys, tmp_path):
    fixes, lines = examined(capsys, str(tmp_path), rehearse=True, encoder__heads=5)
    assert fixes == ["config"] and "\n" not in lines["config"]
    assert lines["config"].startswith("fix") and "heads" in lines["config"]
    for name in ("data", "memory", "run", "space", "rehearsal"):
        assert lines[name].startswith("skipped") and "first fix: config" in lines[name]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = preflight.check_workdir(str(tmp_path / "file" / "run"), rollcall.alone())
    assert found.state == FIX and "cannot be written" in found.text


def test_a_folder_that_the_hosts_share_and_one_that_they_do_not(tmp_path, called):
    rolls = called([0, 1], of=2)
    shared = [str(tmp_path / "shared")] * 2
    own = [str(tmp_path / "own" / str(i)) for i in (0, 1)]
    bad = [shared[0], str(tmp_path / "file" / "run")]
    (tmp_path / "file").write_text("")

    def states(folders):
        return together(
            *(
                lambda r=r, f=f: preflight.check_workdir(f, r)
                for r, f in zip(rolls, folders, strict=True)
            )
        )

    assert [f.state for f in states(shared)] == [OK, OK]
    for i, found in enumerate(states(own)):
        assert found.state == FIX and "hosts see different folders" in found.text
        assert f"what process {1 - i} (" in found.text
    assert [f.state for f in states(bad)] == [OK, FIX]
    files = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert files == ["file"]


def test_hosts_that_ask_at_once_do_not_disturb_each_other(tmp_path):
    def ask():
        for _ in range(50):
            meta.check_writable(str(tmp_path / "run"))

    assert together(ask, ask, ask, ask) == [None] * 4
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_of_another_run(capsys, tmp_path):
    runs.run(tmp_path / "run", **QUIET)
    before = runs.snapshot(tmp_path)
    fixes, lines = examined(capsys, str(tmp_path / "run"), seed=7)
    assert fixes == ["run"]
    assert "holds another run: seed is 0 there and 7 here" in lines["run"]
    assert runs.snapshot(tmp_path) == before


def test_an_encoder_to_start_from_that_is_not_there(capsys, tmp_path):
    path = str(tmp_path / "nowhere")
    fixes, lines = examined(capsys, str(tmp_path / "run"), init__path=path)
    assert fixes == ["init"] and f"init.path={path}" in lines["init"]
    assert "first fix: init" in lines["run"]


def test_images_that_cannot_be_read(capsys, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(16):
            (tmp_path / split / "cat" / f"{i}.png").write_bytes(b"no image")
    changed = config(batch=4)
    changed.data.source = {
        "name": "folder",
        "path": str(tmp_path),
        "train": "train",
        "test": "val",
        "lengths": (0, 0),
        "classes": 0,
    }
    made = build.build(changed, jax.devices()[:1])
    with pytest.raises(ValueError, match="none of 8 images of the train split can be"):
        preflight.check_data(made, build.plain(changed), {})


def test_an_input_that_is_too_slow_for_the_step(capsys, tmp_path, monkeypatch):
    slow = {"images_per_second": 1.0, "one_core": 1.0, "cores": 2, "workers": 0}
    monkeypatch.setattr(preflight.inspect_data, "speed", lambda *_: dict(slow))
    fixes, lines = examined(capsys, str(tmp_path), rehearse=True)
    assert not fixes and lines["rehearsal"].startswith("warning")
    assert "the host makes 1 images/s" in lines["rehearsal"]
    hours = 12 * 16 / 3600
    assert (
        f"with the input as it is, the steps take {hours:.3g} hours"
        in (lines["rehearsal"])
    )


def test_memory_and_space_that_do_not_suffice(tmp_path, monkeypatch):
    made, workdir = program(), str(tmp_path / "a" / "b")
    each, here = preflight.bytes_of(made.state)
    assert (
        each
        == here
        == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.state))
    )
    states = []
    for host in (1.9 * here, 3 * here, 5 * here, None):  # needed: the state, a copy
        monkeypatch.setattr(preflight, "available", lambda host=host: host)
        states.append(preflight.check_memory(made).state)
    assert states == [FIX, WARNING, OK, OK]
    monkeypatch.setattr(preflight, "limit", lambda _: each - 1)
    found = preflight.check_memory(made)
    assert found.state == FIX and "--config.mesh.fsdp" in found.text
    for free, state in ((4 * each - 1, FIX), (4 * each, OK)):  # at 5, 10, 12; one more
        usage = shutil._ntuple_diskusage(0, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        found = preflight.check_space(made, settings=settings(), workdir=workdir)
        assert found.state == state, found
    monkeypatch.setattr(preflight, "saved_steps", lambda _: [3])
    remote = preflight.check_space(made, settings=settings(), workdir="gs://a/b")
    assert remote.state == OK and "3 more checkpoints" in remote.text
    assert "not known" in remote.text
    assert not (tmp_path / "a").exists()


def test_the_bytes_of_a_state_that_is_split_over_devices(monkeypatch):
    monkeypatch.setattr(build.meshes, "SMALL", 1024)
    split = build.program(
        devices=jax.devices(), **build.plain(config(mesh__fsdp=8, encoder__width=64))
    )
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(split.state))
    each, here = preflight.bytes_of(split.state)
    assert here == whole and each < whole / 3


def test_what_comes_back_other_than_it_was_saved(capsys, tmp_path, monkeypatch):
    restore = Checkpoints.restore

    def rotten(self, abstract):
        state, step = restore(self, abstract)
        bias = state.params["encoder"]["patch_embed"]["bias"]
        state.params["encoder"]["patch_embed"]["bias"] = bias.at[3].add(1e-7)
        return state, step

    monkeypatch.setattr(Checkpoints, "restore", rotten)
    fixes, lines = examined(capsys, str(tmp_path / "run"), rehearse=True)
    assert fixes == ["rehearsal"] and list(tmp_path.iterdir()) == []
    assert "1 of" in lines["rehearsal"]
    assert "such as params/encoder/patch_embed/bias" in lines["rehearsal"]


class Compiled:
    """A function in place of a jitted one."""

    def __init__(self, function):
        self.function = function

    def lower(self, *_):
        return self

    def compile(self):
        return self.function


def test_a_loss_that_is_not_finite_and_a_device_that_is_too_small(monkeypatch):
    made = program()
    state = made.init()
    nan = state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    spoilt = vars(made) | {"init": Compiled(lambda _: nan)}
    call = {"settings": settings(), "roll": rollcall.alone(), "workdir": None}
    call["speed"] = {"images_per_second": 1e9}
    found = rehearsal.rehearse(build.Program(**spoilt), **call)
    assert found.state == FIX and "loss is nan at step 2" in found.text

    def full(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20 GB of 16 GB\nmore")

    spoilt["init"] = Compiled(full)
    found = rehearsal.rehearse(build.Program(**spoilt), **call)
    assert found.state == FIX and "\n" not in found.text
    assert "20 GB of 16 GB; try --config.encoder.remat=True, a smaller" in found.text


# The command


def test_hosts_that_differ_are_told_apart(capsys):
    fine, bad = machine.Finding(OK, "good"), machine.Finding(FIX, "bad")
    names = ("a", "b", "c")
    assert doctor.told("x", [fine] * 3, names) == ["ok       x:            good"]
    (line,) = doctor.told("x", [fine, bad, bad], names)
    assert line.endswith("process 1 (b), 2 (c): bad") and line.startswith("fix")
    visit = doctor.Visit()
    said = [json.dumps((OK, "jax 1")), json.dumps((OK, "jax 2"))]
    visit.roll = type("Roll", (), {"index": 0, "hosts": ("a", "b")})
    visit.roll.gather = staticmethod(lambda *_: said)
    visit.ask("versions", lambda: machine.Finding(OK, "jax 1"), alike=True)
    out = capsys.readouterr().out
    assert visit.fixes == ["versions"] and "process 1 (b): hosts differ: jax 2" in out
    visit.ask("data", lambda: machine.Finding(OK, "jax 1"))
    assert (
        visit.fixes == ["versions"] and "others are ok too" in capsys.readouterr().out
    )


def test_the_command_looks_at_the_machine_and_ends_with_its_verdict(
    capsys, monkeypatch
):
    doctor.main([])
    lines = capsys.readouterr().out.splitlines()
    names = [re.match(r"(ok|warning) +([^:]+):", line)[2] for line in lines[:-1]]
    assert names == ["hosts", "versions", "libtpu lock", "devices", "precision"]
    assert lines[-1].startswith("all ok")
    monkeypatch.setattr(machine, "check_products", lambda _: 1 / 0)
    with pytest.raises(SystemExit) as status:
        doctor.main([])
    assert status.value.code == 2
    out = capsys.readouterr().out
    assert re.search("fix +precision: +ZeroDivisionError", out)
    assert out.endswith("to fix: precision\n")


def test_a_workdir_without_a_config():
    with pytest.raises(ValueError, match="--workdir needs the --config"):
        doctor.main(["--workdir=runs/x"])


def start(port, process, processes, *flags, cwd=runs.ROOT):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}
    env["XLA_FLAGS"] = runs.flags(devices=2)
    place = [f"--coordinator=127.0.0.1:{port}", f"--process={process}"]
    command = [sys.executable, "-m", "clvsmim.doctor", *place]
    command += [f"--processes={processes}", *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=env, stdout=pipe, stderr=pipe, text=True, cwd=cwd
    )


def test_one_of_three_processes_does_not_come():
    port = free_port()
    two = [start(port, i, 3, "--connect_seconds=10") for i in (0, 2)]
    for process in two:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert "process 1 of 3 did not come in 10 s; came: 0 (" in out
        assert "skipped  devices" in out and out.endswith("to fix: hosts\n")
        assert "Check failure" not in err  # the stack of a C++ program


@pytest.mark.slow
def test_an_encoder_that_one_of_two_hosts_sees(tmp_path):
    """Each in a folder of its own, the encoder in that of the first alone."""
    runs.run(tmp_path / "0" / "encoder", **QUIET)
    (tmp_path / "1").mkdir()
    port, demo = free_port(), f"--config={runs.ROOT}/configs/demo.py:simmim"
    flags = [demo, *runs.overrides(**QUIET, init__path="encoder")]
    two = [start(port, i, 2, *flags, cwd=tmp_path / str(i)) for i in (0, 1)]
    outs = [p.communicate(timeout=300) for p in two]
    assert [p.returncode for p in two] == [2, 2], "\n".join(map("\n".join, outs))
    assert re.search(r"fix +init: .*process 1.*init.path=encoder: no run", outs[0][0])
    assert outs[0][0].endswith("to fix: init\n")


@pytest.mark.slow
def test_two_processes_check_and_rehearse_as_one(tmp_path):
    port = free_port()
    demo = f"--config={runs.ROOT}/configs/demo.py:simmim"
    flags = [demo, f"--workdir={tmp_path}/a/run", *runs.overrides(**QUIET)]
    two = [start(port, i, 2, *flags) for i in (0, 1)]
    outs = [p.communicate(timeout=300) for p in two]
    assert [p.returncode for p in two] == [0, 0], "\n".join(map("\n".join, outs))
    first, second = (out for out, _ in outs)
    assert "2 processes, on" in first and "4 x cpu, 2 on each host" in first
    assert "bit for bit" in first and first.endswith("all ok\n")
    assert "rehearsal" not in second  # one speaks for all
    assert list(tmp_path.iterdir()) == []
