"""Files of other libraries through the commands: in, out, measured, trained on."""

import hashlib
import pathlib
import re
import sys
import tracemalloc
import warnings

import jax
import numpy as np
import originals
import pytest
import runs
import torchvision_stub
from PIL import Image

from clvsmim import (
    analysis,
    analyze,
    build,
    checkpoint,
    convert,
    foreign,
    log,
    meta,
    packed,
    plugin,
    train,
    transfer,
    tree,
    zoo,
)
from clvsmim.configs import finetune, linear_probe
from clvsmim.formats import _fit
from clvsmim.measure import Settings

try:
    import torch
except ImportError:
    torch = None
FEW = Settings(images=8, train_images=12, batch=8, group=4, metrics=("nmi", "fourier"))
ROOT = pathlib.Path(__file__).parents[1]
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def save(path, key, tensors, **more):
    """As the originals save them; where there is no PyTorch, as .npz by their names."""
    tensors = {k: np.array(x) for k, x in tensors.items()}
    if torch is None:
        with path.open("wb") as file:
            np.savez(file, **tensors)
    else:
        torch.save(
            {key: {k: torch.from_numpy(x) for k, x in tensors.items()}} | more, path
        )


@pytest.fixture(scope="module")
def files(golden, tmp_path_factory):
    """A folder of files by other libraries' writers."""
    root = tmp_path_factory.mktemp("files")
    moco, mae, simmim = (
        golden(name).group("params")
        for name in ("moco_v3", "mae_pixel", "simmim_shared_rpb")
    )
    moco = {f"module.{k}": x for k, x in moco.items()}
    save(root / "moco.pth.tar", "state_dict", moco, epoch=3, arch="vit_base")
    save(root / "mae_full.pth", "model", mae)
    save(root / "simmim.pth", "model", simmim)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images with and without classes and splits."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for place in ("set/train/a", "set/train/b", "set/val/a", "set/val/b", "flat"):
        (root / place).mkdir(parents=True)
        for i in range(8):
            colour, shape = draw.uniform(0, 200, 3), (40, 48, 3)
            pixels = (colour + draw.uniform(0, 55, shape)).astype(np.uint8)
            Image.fromarray(pixels).save(root / place / f"{i}.png")
    return root


FLAGS = {
    "moco.pth.tar": ["--heads=3"],
    "mae_full.pth": ["--heads=3", "--decoder_heads=4"],
    "simmim.pth": [],
}


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory):
    """{name: folder} of each file as a run."""
    root = tmp_path_factory.mktemp("runs")
    for name, flags in FLAGS.items():
        convert.main([str(files / name), str(root / name), *flags])
    return {name.split(".")[0].split("_")[0]: str(root / name) for name in FLAGS}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A run of ours."""
    workdir = tmp_path_factory.mktemp("ours") / "run"
    runs.run(workdir, "simmim")
    return workdir


def numpy(found):
    return {name: np.asarray(x) for name, x in tree.named(found).items()}


def assert_same(got, want):
    assert sorted(got) == sorted(want)
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape, name
        np.testing.assert_array_equal(got[name], x)


PREFIXES = {"moco": "base_encoder.", "mae": "", "simmim": "encoder."}
RECORDINGS = {"moco": "moco_v3", "mae": "mae_pixel", "simmim": "simmim_shared_rpb"}


@pytest.mark.parametrize("name", PREFIXES)
def test_a_converted_file_is_a_run_of_the_same_numbers(golden, converted, name):
    flat = golden(RECORDINGS[name]).group("params")
    if name == "mae":
        flat = {k: x for k, x in flat.items() if not k.startswith("decoder_")}
    prefix = PREFIXES[name]
    flat = {k: x for k, x in flat.items() if k.startswith(prefix)}
    want = originals.encoder(flat, 3, prefix)
    run = analyze.load(converted[name])
    assert_same(numpy(run.params["encoder"]), numpy(want))
    assert run.file["sha256"] and run.step == 0
    names = {"moco": "encoder", "mae": "mae", "simmim": "simmim"}
    assert run.config["objective"]["name"] == names[name]


def test_a_run_keeps_heads_that_nothing_here_reads(converted):
    found, _ = packed.read(converted["moco"])
    assert {"projector", "predictor"} == set(found["params"]["heads"])
    assert analyze.load(converted["moco"]).params["heads"] == {}


def test_where_a_run_is_from_is_written_down(files, converted):
    about = meta.read_meta(converted["mae"])["file"]
    assert about["path"] == str(files / "mae_full.pth") and about["family"] == "mae"
    assert about["sha256"] == packed.sha256(files / "mae_full.pth")
    assert "3 heads, as you said" in about["report"]


def test_a_sum_is_taken_by_and_by(tmp_path):
    content = bytes(range(256)) * 2**15  # 8 MiB
    (tmp_path / "x").write_bytes(content)
    tracemalloc.start()
    got = packed.sha256(str(tmp_path / "x"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert got == hashlib.sha256(content).hexdigest() and peak < 4 * 2**20


def test_the_report_is_printed(files, tmp_path, capsys):
    convert.main([str(files / "simmim.pth"), str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "SimMIM checkpoint" in out and "54 tensors matched" in out
    assert out.rstrip().endswith("says whence")


# Out


@pytest.mark.parametrize(
    "name, to", [("simmim.pth", "simmim"), ("mae_full.pth", "mae")]
)
def test_a_file_goes_out_as_it_came_in(files, golden, tmp_path, name, to):
    library = pytest.importorskip("safetensors.numpy")
    dest = str(tmp_path / "out.safetensors")
    convert.main([str(files / name), dest, f"--to={to}", *FLAGS[name]])
    want = golden(RECORDINGS[to]).group("params")
    found = library.load_file(dest)
    assert_same({k.removeprefix("model/"): x for k, x in found.items()}, want)


def test_a_converted_run_goes_out_with_its_heads(golden, converted, tmp_path):
    dest = str(tmp_path / "out.npz")
    convert.main([converted["moco"], dest, "--to=moco_v3"])
    with np.load(dest) as file:
        found = {k: file[k] for k in file.files}
    want = golden("moco_v3").group("params")
    base = {k for k in want if not k.startswith("momentum_encoder.")}
    assert base == set(found)
    for name in base - {n for n in base if "num_batches" in n}:
        np.testing.assert_array_equal(found[name], want[name])


def test_timm_builds_it_from_the_folder(converted, tmp_path):
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchvision_stub.install()
        timm = pytest.importorskip("timm")
        run = analyze.load(converted["mae"])
        dest = tmp_path / "model.safetensors"
        convert.main([converted["mae"], str(dest), "--to=timm"])
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        want = model.forward_features(torch.from_numpy(image.transpose(0, 3, 1, 2)))
    got, _ = run.objective.encoder.apply(run.variables, image)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
    assert model.pretrained_cfg["crop_pct"] == pytest.approx(32 / 36)
    again = foreign.open_run(str(dest))  # heads and colour by the file beside it
    assert again.encoder["heads"] == 3 and again.input["mean"][0] == 0.485


def test_transformers_loads_it_strictly_with_its_decoder(converted, tmp_path):
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        dest = tmp_path / "model.safetensors"
        convert.main([converted["mae"], str(dest), "--to=hf_vitmae"])
        model, about = transformers.ViTMAEForPreTraining.from_pretrained(
            str(tmp_path), output_loading_info=True
        )
    assert not about["missing_keys"] and not about["unexpected_keys"]
    assert not about["mismatched_keys"]
    assert model.config.decoder_num_attention_heads == 4
    # And the folder, as `save_pretrained` would leave it, opens again.
    again = tmp_path / "again"
    convert.main([str(tmp_path), str(again)])
    assert_same(
        numpy(analyze.load(str(again)).params),
        numpy(analyze.load(converted["mae"]).params),
    )


def test_a_run_of_ours_goes_out_and_comes_back(ours, tmp_path):
    want = analyze.load(str(ours))
    convert.main([str(ours), str(tmp_path / "packed")])
    got = analyze.load(str(tmp_path / "packed"))
    assert_same(numpy(got.params), numpy(want.params))
    assert log.read(f"{tmp_path}/packed/log.jsonl") == log.read(f"{ours}/log.jsonl")
    convert.main([str(tmp_path / "packed"), f"{tmp_path}/x.npz", "--to=ours"])
    back = foreign.open_run(f"{tmp_path}/x.npz")
    assert_same(numpy(back.params["encoder"]), numpy(want.params["encoder"]))


def test_how_images_are_prepared_goes_out_and_comes_back(converted, tmp_path):
    convert.main([converted["mae"], f"{tmp_path}/model.safetensors", "--to=hf_vitmae"])
    got, want = (
        foreign.transform_of(analyze.load(run).file)
        for run in (str(tmp_path), converted["mae"])
    )
    assert got == want._replace(floor=True)  # whose margins are rounded otherwise
    assert transfer.settings_of(str(tmp_path))["input"]["std"] == want.std


def test_a_converted_run_is_a_member_of_the_zoo(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "ZOO", tmp_path)
    zoo.pack(converted["mae"], "theirs")
    assert re.search(r"theirs +mae +0 +0 +0 +0 .*intact", zoo.listing())
    assert analyze.load("zoo:theirs").file["family"] == "mae"


def test_the_page_names_every_family_and_what_it_was_checked_against():
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    for name in plugin.names("formats"):
        (row,) = (r for r in text.splitlines() if re.match(rf"\|.*`{name}`.* \|", r))
        checked = plugin.find("formats", name)().checked
        assert ("names from documentation only" in row) == (not checked), name
    for flag in ("--format", "--branch", "--heads", "--partial", "--ignore", "--to"):
        assert flag in text


# Refused


MISTAKES = {
    "two": (["{simmim}"], "expected SOURCE and DEST, got 1"),
    "no family": (["{simmim}", "{new}/x.npz"], "is a file for another library: give"),
    "no file": (["{simmim}", "{new}", "--to=timm"], "end .* in .safetensors or .npz"),
    "wrong family": (["{simmim}", "{new}.npz", "--to=tim"], "did you mean 'timm'"),
    "there": (["{simmim}", "{photos}/set"], "set is there already"),
    "a file is there": (["{simmim}", "{simmim}.npz", "--to=ours"], "is there already"),
    "heads": (["{mae}", "{new}"], "shapes do not tell the heads"),
    "a place": (
        ["{moco}", "{new}.npz", "--to=timm", "--format=simmim"],
        "no SimMIM checkpoint has",
    ),
    "no source": (["{new}/nothing/at/all", "{new}"], "is no file, no workdir"),
    "flags of a run": (
        ["{run}", "{new}", "--heads=3"],
        "is a run, which needs no --heads",
    ),
    "another network": (["{run}", "{new}.npz", "--to=mae"], "has no place for|needs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    files, photos, converted, tmp_path, mistake
):
    argv, reason = MISTAKES[mistake]
    (tmp_path / "simmim.pth").write_bytes((files / "simmim.pth").read_bytes())
    (tmp_path / "simmim.pth.npz").write_bytes(b"x")
    places = {"simmim": tmp_path / "simmim.pth", "mae": files / "mae_full.pth"}
    places |= {"moco": files / "moco.pth.tar", "run": converted["simmim"]}
    places |= {"new": tmp_path / "new", "photos": photos}
    before = runs.snapshot(tmp_path)
    with pytest.raises(ValueError, match=reason) as error:
        convert.main([arg.format(**places) for arg in argv])
    assert "\n" not in str(error.value) and runs.snapshot(tmp_path) == before


FLAGGED = {
    "heads": (["{mae}"], "say --heads="),
    "branch": (["{moco}", "--branch=teacher"], r" --branch='teacher'; this file"),
    "format": (["{mae}", "--format=timm"], "another --format=, or .* with --ignore="),
    "partial": (["{mae}", "--partial=("], r" --partial='\(' is no regular"),
    "both": (["{simmim}", "--heads=5"], "--heads=5, and the file has tables of 3"),
}


@pytest.mark.parametrize("case", FLAGGED)
def test_errors_name_flags_as_they_are_typed(files, tmp_path, case):
    argv, reason = FLAGGED[case]
    places = {"mae": "mae_full.pth", "moco": "moco.pth.tar", "simmim": "simmim.pth"}
    places = {name: files / file for name, file in places.items()}
    with pytest.raises(ValueError, match=reason):
        convert.main([*(arg.format(**places) for arg in argv), f"{tmp_path}/run"])


def test_reports_name_flags_as_they_are_typed(converted):
    report = meta.read_meta(converted["moco"])["file"]["report"]
    assert "there too: momentum (--branch=momentum)" in report
    for text in ("encoder.heads= /a/heads=3.pth", "runs,heads=6.pth", "'heads=6'"):
        assert foreign.as_flags(text) == text


def test_a_conversion_that_fails_late_leaves_nothing(
    files, converted, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(packed.meta, "write_meta", full)
    with pytest.raises(OSError, match="No space"):
        convert.main([str(files / "simmim.pth"), str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())
    write = convert.write_whole

    def weights_do_not_fit(path, data):
        write(path, data[: 2 * len(data) // 3] if len(data) > 9999 else data)
        if len(data) > 9999:
            raise OSError("No space left on device")

    monkeypatch.setattr(convert, "write_whole", weights_do_not_fit)
    with pytest.raises(OSError, match="No space"):
        convert.main([converted["mae"], f"{tmp_path}/x.safetensors", "--to=timm"])
    assert not list(tmp_path.iterdir())


def test_a_repository_needs_the_client_and_a_network(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r"no file or workdir here; .*clvsmim\[convert"
    ):
        convert.main(["owner/name", str(tmp_path / "run")])
    monkeypatch.undo()
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="client cannot fetch it"):
        convert.main(["owner/name", str(tmp_path / "run")])


# Trained on


def wanted(opened, **changes):
    """(spec, {"params", "stats"} as shapes) of a file's encoder, changed."""
    vit = build.make_encoder({**opened, **changes})
    images = jax.ShapeDtypeStruct((1, *vit.spec.image, 3), np.float32)
    found = jax.eval_shape(vit.init, jax.random.key(0), images)
    return vit.spec, {"params": found["params"], "stats": {}}


def test_another_grid_is_fitted_and_said(files, converted, capsys):
    settings = transfer.settings_of(converted["mae"])
    colour = settings["input"]
    spec, shapes = wanted(settings["encoder"], image=(48, 64), final_norm=False)
    given = transfer.read(converted["mae"], spec, colour, shapes, DEVICE)
    table = analyze.load(converted["mae"]).params["encoder"]["pos_embed"]
    want = _fit.position_table(table, (6, 8), prefix=1, how="bicubic")
    np.testing.assert_array_equal(given["params"]["pos_embed"], want)
    line = capsys.readouterr().err
    assert "resized: pos_embed: 4x4 -> 6x8 patches, bicubic" in line
    file = str(files / "simmim.pth")
    settings = transfer.settings_of(file)
    spec, shapes = wanted(settings["encoder"], patch=4, relative="per_block")
    given = transfer.read(file, spec, settings["input"], shapes, DEVICE)
    assert given["params"]["block_2"]["attn"]["rel_table"].shape == (15 * 15 + 3, 3)
    said = capsys.readouterr().err
    assert said.count("SimMIM checkpoint") == 1 and "patch 8 -> 4" in said


def test_what_cannot_be_fitted_is_refused(files, converted):
    file = str(files / "simmim.pth")
    settings = transfer.settings_of(file)
    spec, shapes = wanted(settings["encoder"], depth=2)
    with pytest.raises(ValueError, match="unexpected .block_2"):
        transfer.read(file, spec, settings["input"], shapes, DEVICE)
    spec, shapes = wanted(settings["encoder"], heads=6)
    with pytest.raises(ValueError, match="heads=6, and the file has tables of 3"):
        transfer.read(file, spec, settings["input"], shapes, DEVICE)
    with pytest.raises(ValueError, match="convert FILE FOLDER` takes these flags"):
        transfer.settings_of(str(files / "mae_full.pth"))
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    spec, shapes = wanted(settings["encoder"])
    with pytest.raises(ValueError, match=r"trained with input.mean=\(0.485"):
        transfer.read(file, spec, half, shapes, DEVICE)


def test_a_head_count_that_no_shape_tells_is_that_of_the_run(files):
    file = str(files / "mae_full.pth")
    encoder = foreign.formats.open_file(file, heads=3).encoder
    spec, shapes = wanted(encoder)
    colour = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    given = transfer.read(file, spec, colour, shapes, DEVICE)
    assert given["params"]["block_0"]["attn"]["q"]["kernel"].shape == (48, 3, 16)


QUICK = {"batch": 8, "epochs": 1.0, "log.every": 1, "log.save": 9, "xray.share": 0.0}


def test_one_command_probes_a_file_on_a_folder(files, photos, tmp_path):
    run = str(files / "simmim.pth")
    config = linear_probe.get_config(f"paper,{run},{photos}/set")
    config.update_from_flattened_dict(QUICK | {"data.workers": 0})
    assert config.objective.classes == 2 and tuple(config.encoder.image) == (32, 32)
    train.train(config, str(tmp_path / "probe"), devices=jax.devices()[:1])
    state, _ = checkpoint.restore_params(str(tmp_path / "probe"))
    want = analyze.load(run).params["encoder"]
    assert_same(numpy(state["params"]["encoder"]), numpy(want))
    records = log.read(f"{tmp_path}/probe/log.jsonl")
    assert records[-1]["eval/images"] == 16


def test_recipes_take_the_colour_of_a_file_and_ask_for_splits(files, photos):
    file = str(files / "simmim.pth")
    config = finetune.get_config(f"simmim,{file},{photos}/set")
    assert tuple(config.input.mean) == (0.485, 0.456, 0.406)
    assert config.encoder.relative == "per_block" and not config.encoder.final_norm
    assert config.data.source.path == f"{photos}/set"
    imagenet = linear_probe.get_config(f"simmim,{file}")
    assert imagenet.data.source.dataset == "imagenet2012"
    with pytest.raises(ValueError, match="flat has no folders train and val"):
        finetune.get_config(f"simmim,{file},{photos}/flat")


def test_an_encoder_from_a_file_is_not_trained_as_it_is(converted):
    run = analyze.load(converted["moco"])
    with pytest.raises(ValueError, match="which has no loss; train it by another"):
        run.objective.loss({}, {}, {}, None, progress=0.0, train=True)


# Measured


@pytest.fixture(scope="module")
def page(files, converted, photos, tmp_path_factory):
    """Two networks side by side, from a file and from a converted one."""
    out = tmp_path_factory.mktemp("page")
    flags = ["--images=8", "--batch=8", "--group=4", "--metrics=nmi,fourier,grams"]
    argv = [str(files / "simmim.pth"), converted["mae"], f"--data={photos}/flat"]
    analyze.main([*argv, f"--out={out}", *flags, "--paper"])
    return out


def test_files_are_measured_side_by_side(page):
    text = (page / "report.html").read_text()
    assert "2 models side by side" in text and "SimMIM checkpoint" in text
    rows = (page / "data" / "normalized-mutual-information.csv").read_text()
    names = {line.split(",")[0] for line in rows.splitlines()[1:]}
    assert names == {"simmim", "mae_full", "MoCo v3 in the paper"}
    assert {p.name for p in page.iterdir()} >= {"simmim", "mae_full"}
    assert list((page / "data").glob("cka-between-*.json"))


def test_each_is_measured_as_its_family_prepares_images(page):
    stamps = [
        analysis.read_series(f"{page}/{n}")["stamp"] for n in ("simmim", "mae_full")
    ]
    assert [s["data"] for s in stamps[:1]] == [s["data"] for s in stamps[1:]]
    assert all("shorter side to 36" in s["transform"] for s in stamps)
    with np.load(f"{page}/mae_full/pictures.npz") as found:
        assert found["reconstruction"].shape == (4, 32, 32, 3)


def test_learning_metrics_need_classes_and_a_split(files, photos, tmp_path, capsys):
    names = ("nmi", "knn")
    file = str(files / "simmim.pth")
    settings = FEW._replace(metrics=names)
    with pytest.raises(ValueError, match="not measured: knn, for .* has no train/"):
        analyze.analyze(file, str(tmp_path / "a"), settings, f"{photos}/flat")
    found = analyze.analyze(file, str(tmp_path / "b"), settings, f"{photos}/set")
    assert "k-NN accuracy" in {s.name for s in found}
    facts = {"grid": (4, 4), "patch": 8, "prefix": 1, "depth": 3, "group": 4}
    metrics = analysis.make_metrics(analysis.METRICS, facts | {"classes": 1})
    where = {"path": "x", "train": "", "test": ""}
    left = analyze.without_learning(metrics, where, 1)
    assert set(metrics) - set(left) == {"probe", "knn"}
    assert "probe, knn, for x has no train/" in capsys.readouterr().err


def test_where_images_and_results_are_is_asked_for(files, tmp_path):
    file = str(files / "simmim.pth")
    with pytest.raises(ValueError, match="simmim.pth is no workdir: give --out"):
        analyze.main([file])
    with pytest.raises(ValueError, match="name a folder of images: --data=DIR"):
        analyze.main([file, f"--out={tmp_path}/x"])
    with pytest.raises(ValueError, match="several are compared: give --out"):
        analyze.main([file, file, "--data=x"])
    with pytest.raises(ValueError, match="there is no folder .*nothing"):
        analyze.main([file, f"--out={tmp_path}/x", f"--data={tmp_path}/nothing"])


def test_folders_of_results_have_different_names():
    names = [
        "a/x.pth",
        "b/x.pth",
        "zoo:mini",
        "runs/mae",
        "owner/name/model.safetensors",
    ]
    assert analyze.short_names(names) == ["x", "x-2", "mini", "mae", "name"]


def test_a_run_of_ours_is_measured_on_other_images(ours, photos, tmp_path):
    out = str(tmp_path / "out")
    analyze.analyze(str(ours), out, FEW, f"{photos}/set")
    found = analysis.read_series(out)
    assert found["stamp"]["data"]["path"] == f"{photos}/set"
    assert "transform" not in found["stamp"] and "file" not in found
