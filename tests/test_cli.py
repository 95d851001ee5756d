"""Every mistake ends in one line that says what to do, and nothing is lost."""

import contextlib
import dataclasses
import os
import platform
import shutil
import subprocess
import sys

import pytest
import runs
from PIL import Image

from clvsmim import cli, plugin
from clvsmim.data import crops, photos
from clvsmim.data.pipeline import batches

# ml_collections 1.1 loads a config file with what Python 3.12 deprecated for good.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

DEMO = f"--config={runs.ROOT}/configs/demo.py"
FLAGS = {
    "convert": (
        *("SOURCE", "DEST", "--to", "--format", "--branch", "--heads", "--image"),
        *("--decoder_heads", "--partial", "--ignore"),
    ),
    "convert-data": ("SRC", "DST", "gs://"),
    "inspect-data": ("--config", "--out", "--images", "--images_per_second", "--rows"),
    "doctor": ("--config", "--workdir", "--[no]rehearsal", "--coordinator"),
    "train": ("--config", "--workdir"),
    "analyze": (
        *("--out", "--split", "--images", "--skip", "--train_images", "--batch"),
        *("--group", "--every", "--metrics", "WORKDIR"),
        *("--data", "--[no]paper", "FILE"),
    ),
    "compare": ("--out", "runs/moco_v3 runs/simmim"),
    "merge": ("--out", "a b"),
    "sweep": ("--config", "--out", "--lambdas", "--probe_set", "--finetune"),
    "zoo": ("--pack", "--name", "--[no]untrained", "zoo:"),
    "aot": (
        *("--config", "--topology", "--slices", "--json", "--[no]markdown"),
        *("--[no]analysis", "--[no]remedies"),
    ),
    "demo": ("--out",),
}


@pytest.fixture(autouse=True)
def forget_the_config_file():
    """In one process ml_collections loads every file into the same module."""
    sys.modules.pop("config_config", None)


@pytest.fixture
def clvsmim(monkeypatch, capsys):
    """`clvsmim(*argv)` -> (exit status, stdout, stderr) of the entry point."""
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or it would start this process again
    monkeypatch.delenv("CLVSMIM_DEBUG", raising=False)

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["clvsmim", *map(str, argv)])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def refused(clvsmim):
    """`refused(*argv)` -> the one line of a command that refuses, without its name."""

    def call(*argv):
        status, out, err = clvsmim(*argv)
        return the_line(argv[0], status, out, err)

    return call


def the_line(verb, status, out, err):
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.endswith("\n"), err
    start = f"clvsmim {verb}: "
    assert err.startswith(start)
    return err.removeprefix(start).strip()


@pytest.fixture
def refused_config(refused, tmp_path):
    """The line for a config that is not even given a folder."""

    def call(*argv, config=f"{DEMO}:simmim"):
        line = refused("train", config, f"--workdir={tmp_path}/new/run", *argv)
        assert list(tmp_path.iterdir()) == []
        return line

    return call


def process(*argv, **env):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "clvsmim.cli", *map(str, argv)]
    env = os.environ | env
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run."""
    workdir = tmp_path_factory.mktemp("cli") / "run"
    runs.run(workdir)
    return workdir


def test_every_verb_is_in_the_table_of_this_file():
    assert set(FLAGS) == set(cli.VERBS)


@pytest.mark.parametrize("verb", FLAGS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_the_flags(clvsmim, verb, flag):
    status, out, err = clvsmim(verb, flag)
    assert (status, err) == (0, "")
    assert f"clvsmim {verb}" in out
    for name in FLAGS[verb]:
        assert name in out


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_verb_the_verbs_are_listed(clvsmim, argv):
    status, out, err = clvsmim(*argv)
    assert status == (0 if argv else 2)
    for verb in cli.VERBS:
        assert verb in (out if argv else err)
    assert not (err if argv else out)


def test_an_unknown_verb_gets_the_closest_one(clvsmim):
    status, out, err = clvsmim("trian", "--workdir=x")
    assert (status, out) == (2, "")
    assert err.startswith("clvsmim: unknown verb 'trian': did you mean 'train'?")
    assert err.count("\n") == 1


def test_the_module_of_a_verb_is_the_verb_and_the_process_ends_with_status_2(tmp_path):
    for command in (["-m", "clvsmim.cli", "train"], ["-m", "clvsmim.train"]):
        done = subprocess.run(
            [sys.executable, *command, f"{DEMO}:simmim", "--config.encoder.heds=3"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        line = the_line("train", done.returncode, done.stdout, done.stderr)
        assert "'heds'" in line and '"heads"' in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["train", "analyze"])
def test_the_huge_pages_restart_keeps_the_arguments(monkeypatch, verb):
    calls = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "argv", ["clvsmim", verb, "--workdir=a b"])
    monkeypatch.setattr(os, "execv", lambda *args: calls.append(args))
    cli.tune_process()
    assert os.environ == cli.tuned(verb)
    ((program, argv),) = calls
    assert program == sys.executable
    assert argv[0] == program
    assert argv[-4:] == ["-m", "clvsmim.cli", verb, "--workdir=a b"]
    cli.tune_process()
    assert len(calls) == 1


@pytest.mark.skipif(
    cli.tuned("analyze")["GLIBC_TUNABLES"] == cli.PAGES,
    reason="an old glibc or accelerator",
)
def test_freed_memory_is_kept_for_the_next_step():
    code = """
import resource, threading
import numpy as np
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
found = []
def work():
    for _ in range(3):
        before = faults()
        np.ones(2**26, np.uint8)  # 64 MiB, freed at once
        found.append(faults() - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*found)
"""
    env = os.environ | cli.tuned("analyze") | {"LD_PRELOAD": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    first, _, last = map(int, done.stdout.split())
    assert last <= 4 < 16 < first  # of 32 pages of 2 MiB, or 16,384 of 4 KiB


def test_malloc_keeps_its_arenas_where_one_does_not_help(monkeypatch, tmp_path):
    def malloc(verb):
        return cli.tuned(verb)["GLIBC_TUNABLES"]

    monkeypatch.setattr(cli, "ACCELERATORS", (f"{tmp_path}/accel*",))
    for libc in (("glibc", "2.35"), ("", ""), ("glibc", "2.9")):
        monkeypatch.setattr(platform, "libc_ver", lambda libc=libc: libc)
        assert malloc("analyze") == cli.PAGES == "glibc.malloc.hugetlb=1"
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert "arena_max=1" in malloc("analyze")
    assert malloc("train") == malloc("demo") == cli.PAGES
    (tmp_path / "accel0").touch()
    assert malloc("analyze") == cli.PAGES


MISTAKES = {
    "key": (["--config.encoder.heds=3"], ["unknown config key 'heds'", '"heads"']),
    "section": (["--config.encodr.heads=3"], ["'encodr'", '"encoder"']),
    "type": (["--config.batch=many"], ["--config.batch=many", "int"]),
    "no override": (["--config.batch"], ["batch"]),
    "flag": (["--bar=1"], ["Unknown command line flag 'bar'"]),
    "argument": (["runs/x"], ["unexpected argument 'runs/x'"]),
    "image": (
        ["--config.encoder.image=(30,32)"],
        ["image size (30, 32) is not a multiple of patch 4", "(28, 32)"],
    ),
    "heads": (["--config.encoder.heads=5"], ["width 96 does not divide into 5 heads"]),
    "mask": (["--config.objective.mask_unit=6"], ["mask_unit=6", "patch 4"]),
    "devices": (["--config.batch=12"], ["batch 12", "8 devices", "use 8 or 16"]),
    "data": (
        ["--config.data.source.length=64"],
        ["batch 128 is larger than the 64 images"],
    ),
    "fsdp": (["--config.mesh.fsdp=3"], ["mesh.fsdp=3", "8 devices", "[1, 2, 4, 8]"]),
    "epochs": (["--config.epochs=0"], ["epochs=0", "no step"]),
    "objective": (
        ["--config.objective.name=sinmim"],
        ["unknown objectives name 'sinmim'", "did you mean 'simmim'?"],
    ),
    "source": (
        ["--config.data.source.name=photo"],
        ["unknown data name 'photo'", "did you mean 'photos'?"],
    ),
    "optimizer": (["--config.optim.name=adam"], ["did you mean 'adamw'?"]),
    "schedule": (["--config.optim.schedule.name=cosin"], ["did you mean 'cosine'?"]),
    "rule": (
        ["--config.optim.no_decay=('heads/bais',)"],
        ["'heads/bais'", "matches no"],
    ),
    "epochs for ever": (["--config.epochs=inf"], ["epochs=inf", "0.0312 (one)"]),
    "no logs": (["--config.log.every=0"], ["log.every=0", ">= 1"]),
    "seed": (["--config.seed=-1"], ["seed=-1", ">= 0"]),
    "workers": (["--config.data.workers=-1"], ["data.workers=-1", ">= 0"]),
    "patch": (["--config.encoder.patch=0"], ["encoder.patch=0", ">= 1"]),
    "one side": (["--config.encoder.image=(32,)"], ["(rows, columns)"]),
    "mask unit": (["--config.objective.mask_unit=0"], ["mask_unit=0"]),
    "no rule": (["--config.optim.no_decay=('(',)"], ["'('", "no regular expression"]),
    "crop": (["--config.objective.crop.filter=bilnear"], ["'bilnear'", "bilinear"]),
    "no run": (["--config.init.path=/nowhere"], ["no checkpoint in /nowhere"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_config_is_one_line_and_leaves_no_folder(
    refused_config, mistake
):
    argv, parts = MISTAKES[mistake]
    line = refused_config(*argv)
    for part in parts:
        assert part in line


def test_heads_that_cannot_be_compared(refused_config):
    line = refused_config(
        "--config.objective.predictor=(256,32)", config=f"{DEMO}:moco_v3"
    )
    assert "projector" in line and "predictor" in line


@pytest.mark.parametrize("lam", [-0.1, 1.5, "nan"])
def test_lambda_lies_in_0_to_1(refused_config, lam):
    line = refused_config(f"--config.objective.lam={lam}", config=f"{DEMO}:hybrid")
    assert f"objective.lam={lam}" in line and "[0, 1]" in line


CONFIG_FILES = {
    "missing": (None, "there-is-none.py"),
    "raises": ("def get_config(): raise RuntimeError('no luck')", "no luck"),
    "raises at once": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "misses a key": (
        "from clvsmim.configs import demo\ndef get_config(): demo.get_config().sed",
        "cannot load --config: AttributeError",
    ),
    "syntax": ("def get_config(:", "SyntaxError"),
    "empty": ("", "get_config"),
    "import": ("import there_is_none", "there_is_none"),
    "none": ("def get_config(): return None", "--config"),
    "number": ("def get_config(): return 3", "--config"),
}


@pytest.mark.parametrize("kind", CONFIG_FILES)
def test_a_config_file_that_cannot_be_used(refused, tmp_path, kind):
    text, part = CONFIG_FILES[kind]
    path = tmp_path / "there-is-none.py"
    if text is not None:
        path.write_text(text)
    line = refused("train", f"--config={path}", f"--workdir={tmp_path}/run")
    assert part in line
    assert not (tmp_path / "run").exists()


def test_a_config_without_a_section_or_with_one_too_many(refused, tmp_path):
    for change, part in (("del c.optim", "optim"), ("c.optm = {}", "did you mean")):
        path = tmp_path / "config.py"
        path.write_text(
            "from clvsmim.configs import demo\n"
            f"def get_config():\n  c = demo.get_config('simmim')\n  {change}\n"
            "  return c\n"
        )
        line = refused("train", f"--config={path}", f"--workdir={tmp_path}/run")
        assert part in line
    assert not (tmp_path / "run").exists()


def test_recipes_are_found_where_there_is_no_clone(refused_config, monkeypatch):
    monkeypatch.chdir("/")
    recipe = "--config=configs/demo.py:simmim"
    assert "batch 12" in refused_config("--config.batch=12", config=recipe)
    assert "demos.py" in refused_config(config="--config=configs/demos.py")


def test_an_unknown_variant_names_the_known_ones(refused_config):
    line = refused_config(config=f"{DEMO}:simmin")
    assert "demo.py:simmin" in line
    assert all(name in line for name in ("moco_v3", "simmim", "hybrid", "mae"))


def test_what_must_be_given_is_named(refused, tmp_path):
    assert "--config is missing" in refused("train", f"--workdir={tmp_path}/x")
    assert "--workdir is missing" in refused("train", f"{DEMO}:simmim")
    assert "--config is missing" in refused("inspect-data")
    assert "expected SRC and DST, got 1" in refused("convert-data", "a")
    assert "expected a WORKDIR of a training, or" in refused("analyze")
    assert "several are compared: give --out" in refused("analyze", "a", "b")
    assert "no run in a;" in refused("analyze", "a", "b", "--out=x")
    assert "expected SOURCE and DEST, got 0" in refused("convert")
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_of_another_architecture(refused, trained, tmp_path):
    before = runs.snapshot(trained)
    argv = [
        f"{DEMO}:simmim",
        f"--workdir={tmp_path}/run",
        f"--config.init.path={trained}",
        *runs.overrides(encoder__depth=3, encoder__layer_scale=0.0),
    ]
    line = refused("train", *argv)
    assert f"init.path={trained} is of another architecture" in line
    assert "missing (block_2/" in line and "unexpected (block_0/gamma_1" in line
    assert not (tmp_path / "run").exists()
    assert runs.snapshot(trained) == before


def test_a_folder_that_holds_another_run_is_left_as_it_is(refused, trained):
    before = runs.snapshot(trained)
    argv = [f"--workdir={trained}", *runs.overrides(seed=5)]
    line = refused("train", f"{DEMO}:simmim", *argv)
    assert "seed is 0 there and 5 here" in line
    line = refused("train", f"{DEMO}:hybrid", *argv)
    assert 'objective.name is "simmim" there and "hybrid" here' in line
    assert runs.snapshot(trained) == before


@pytest.mark.parametrize("where", ["file", "below a file", "nowhere to write"])
def test_a_folder_that_cannot_be_written(refused, tmp_path, where):
    file = tmp_path / "file"
    file.write_text("mine")
    workdir = {
        "file": file,
        "below a file": file / "run",
        "nowhere to write": "/proc/clvsmim/run",
    }[where]
    argv = [f"--workdir={workdir}", *runs.overrides()]
    line = refused("train", f"{DEMO}:simmim", *argv)
    assert f"workdir {workdir} cannot be written" in line
    assert runs.snapshot(tmp_path) == {file: b"mine"}


def test_a_folder_with_an_unreadable_meta_file(refused, tmp_path):
    (tmp_path / "meta.json").write_text('{"config": {')
    before = runs.snapshot(tmp_path)
    argv = [f"--workdir={tmp_path}", *runs.overrides()]
    assert str(tmp_path / "meta.json") in refused("train", f"{DEMO}:simmim", *argv)
    assert str(tmp_path / "meta.json") in refused("analyze", tmp_path)
    assert runs.snapshot(tmp_path) == before


@pytest.fixture
def corrupt(tmp_path, monkeypatch):
    """A truncated file in the place of every photograph; returns its path."""
    path = tmp_path / "photographs" / "coffee.png"
    path.parent.mkdir()
    photos.read_photo("skimage/data/coffee.png").save(path)
    path.write_bytes(path.read_bytes()[:20_000])
    monkeypatch.setattr(photos, "read_photo", lambda file: crops.read_image(path))
    return path


@pytest.mark.parametrize("threads", [0, 2])
def test_a_corrupt_image_is_named_when_training_meets_it(
    clvsmim, corrupt, tmp_path, threads
):
    workdir, few = tmp_path / "run", {"data__unreadable": 0}
    argv = [f"--workdir={workdir}", *runs.overrides(**few, data__threads=threads)]
    status, out, err = clvsmim("train", f"{DEMO}:simmim", *argv)
    assert (status, out) == (2, "")
    *_, line = err.splitlines()  # after the one that says what is being trained
    assert line.startswith("clvsmim train: 1 images of 'photos' cannot be read, and ")
    assert f"; the last: cannot read the image {corrupt}: " in line
    assert "replace or remove the file" in line
    assert "Traceback" not in err and len(err.splitlines()) == 2


@dataclasses.dataclass(frozen=True)
class Corrupt:
    """A source whose every image is the same damaged file."""

    path: str
    name: str = "corrupt"

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"image": crops.read_image(self.path), "label": 0, "index": index}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_across_threads_and_processes(
    corrupt, capsys, workers
):
    view = {"size": (8, 8), "area": (0.2, 1.0), "aspect": (0.7, 1.4)}
    views = (crops.RandomResizedCrop(name="a", filter="bilinear", **view),)
    module = type(sys)("clvsmim.train")

    def main(argv):
        source = Corrupt(str(corrupt))
        settings = {"batch": 4, "seed": 0, "threads": 2, "workers": workers}
        settings["unreadable"] = 0
        with contextlib.closing(batches(source, views, **settings)) as data:
            next(data)

    module.main = main
    with pytest.raises(SystemExit) as error:
        cli.run(module, [])
    line = the_line("train", error.value.code, *capsys.readouterr())
    assert f"cannot read the image {corrupt}: " in line


def test_a_corrupt_image_is_named_when_an_analysis_meets_it(clvsmim, corrupt, trained):
    before = runs.snapshot(trained)
    few = ("--images=16", "--batch=8", "--group=4")
    status, out, err = clvsmim("analyze", trained, *few)
    line = the_line("analyze", status, out, err)
    assert f"cannot read the image {corrupt}: " in line
    assert runs.snapshot(trained) == before | {trained / "analysis": None}


ANALYSES = {
    "metric": (["--metrics=distnace"], ["'distnace'", "did you mean 'distance'?"]),
    "no metric": (["--metrics=,"], ["metric", "distance"]),
    "split": (["--split=tets"], ["unknown split 'tets'", "train, test"]),
    "no images": (["--images=0"], ["images", "positive"]),
    "no batch": (["--batch=0"], ["batch", "positive"]),
    "mini-batch": (["--group=3"], ["group", "4"]),
    "too few": (["--images=9"], ["9 images", "mini-batch of CKA, 64", "--group"]),
    "learning": (["--split=train"], ["probe, knn", "another split"]),
    "number": (["--images=few"], ["images", "few"]),
    "flag": (["--image=3"], ["Unknown command line flag 'image'", "images"]),
}


@pytest.mark.parametrize("mistake", ANALYSES)
def test_a_mistake_in_an_analysis_is_one_line_and_changes_nothing(
    refused, trained, mistake
):
    argv, parts = ANALYSES[mistake]
    before = runs.snapshot(trained)
    line = refused("analyze", trained, *argv)
    for part in parts:
        assert part in line
    assert runs.snapshot(trained) == before


def test_an_analysis_of_what_is_no_run(refused, trained, tmp_path):
    assert f"no run in {tmp_path}/typo" in refused("analyze", f"{tmp_path}/typo")
    assert f"no run in {tmp_path};" in refused("analyze", tmp_path)
    shutil.copy(trained / "meta.json", tmp_path)
    before = runs.snapshot(tmp_path)
    assert f"no checkpoint in {tmp_path};" in refused("analyze", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "no readable checkpoint" in refused("analyze", tmp_path)
    (tmp_path / "checkpoints").rmdir()
    assert runs.snapshot(tmp_path) == before


def test_an_analysis_that_cannot_be_written(refused, trained, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    line = refused("analyze", trained, f"--out={file}/below", "--images=8", "--group=4")
    assert f"out {file}/below cannot be written" in line
    assert "choose another --out" in line
    assert file.read_text() == "mine"


def test_a_demo_that_cannot_be_written(refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert str(file) in refused("demo", f"--out={file}")


def test_debug_shows_the_traceback(clvsmim, monkeypatch):
    monkeypatch.setenv("CLVSMIM_DEBUG", "1")
    with pytest.raises(ValueError, match="--config is missing"):
        clvsmim("train", "--workdir=x")
    status, out, err = process("train", "--workdir=x", CLVSMIM_DEBUG="1")
    assert status == 1 and "Traceback" in err and "--config is missing" in err


def test_other_errors_are_ours_and_keep_their_traceback(monkeypatch):
    broken = type(sys)("clvsmim.broken")
    broken.main = lambda argv: {}[3]
    with pytest.raises(KeyError):
        cli.run(broken, [])


def test_an_interrupt_says_how_to_go_on(capsys):
    module = type(sys)("clvsmim.train")

    def main(argv):
        raise KeyboardInterrupt

    module.main = main
    with pytest.raises(SystemExit) as error:
        cli.run(module, [])
    assert error.value.code == 130
    assert capsys.readouterr().err.strip().endswith("start it again to go on")


def test_images_of_every_kind_of_damage_are_value_errors(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(path)
    whole = path.read_bytes()
    for damage in (b"", b"text", whole[:40], whole[: len(whole) // 2]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"cannot read the image {path}"):
            crops.read_image(path)


def test_the_closest_name_is_offered_only_if_there_is_one():
    assert "did you mean" not in plugin.unknown("verb", "xyz", ["train"])
