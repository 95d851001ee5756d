"""What tensors do not hold goes out in a file beside them, or nothing goes out."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
import torchvision_stub
from test_formats import HEAD, SCALED, core

from clvsmim import convert, foreign, formats, handover, plugin, tree, vit

COLOUR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
# What each says of an encoder beside its tensors.
TOLD = {
    "gelu_tanh": {"hf_beit", "hf_dinov2", "hf_vit", "hf_vitmae", "ours"}
    | {"timm", "deit", "google"},
    "norm_eps": {"hf_beit", "hf_dinov2", "hf_vit", "hf_vitmae", "ours"},
    "swiglu": {"dinov2", "hf_dinov2", "ours", "timm"},
}
CHANGES = {
    "gelu_tanh": {"mlp": "gelu_tanh"},
    "norm_eps": {"norm_eps": 1e-12},
    "swiglu": {"mlp": "swiglu"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_family_cannot_say_is_refused_by_name(change):
    found = formats.open_tensors(core() | HEAD | SCALED, heads=3)
    encoder = found.encoder | CHANGES[change]
    ((field, value),) = CHANGES[change].items()
    for name in plugin.names("formats"):
        usual = {"mlp": "gelu_tanh"} if (name, field) == ("google", "norm_eps") else {}
        try:
            formats.export(found.params, found.extra, encoder | usual, name)
        except ValueError as error:
            refused = f"no place for {field}={value!r}, its code has" in str(error)
            assert not refused or "hf_dinov2, " in str(error).split("have one: ")[1]
            assert "\n" not in str(error)
        else:
            refused = False
        assert refused == (name not in TOLD[change]), name


@pytest.fixture
def source(tmp_path):
    """Writes a small file of timm's names that is none of the usual networks."""
    tensors = core() | HEAD
    for name in ("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"):
        tensors[name] *= 30  # so that the two GELUs differ

    def write(**about):
        folder = tmp_path / "theirs"
        folder.mkdir()
        with (folder / "x.npz").open("wb") as file:
            np.savez(file, **tensors)
        about = {"num_attention_heads": 3, "hidden_act": "gelu_new"} | about
        (folder / "config.json").write_text(json.dumps(about))
        sides = {"size": 32, "image_processor_type": "ViTImageProcessor"}
        processor = json.dumps(COLOUR | sides)
        (folder / "preprocessor_config.json").write_text(processor)
        return str(folder / "x.npz")

    return write


@pytest.mark.parametrize(
    "to, eps", [("hf_vit", 1e-5), ("ours", 1e-5), ("deit", 1e-6), ("timm", 1e-6)]
)
def test_settings_and_colours_come_back(source, tmp_path, to, eps):
    path, dest = source(layer_norm_eps=eps), tmp_path / "out" / "model.safetensors"
    dest.parent.mkdir()
    want = foreign.open_run(path)
    convert.main([path, str(dest), f"--to={to}"])
    got = formats.open_file(str(dest), format=to)
    assert (got.encoder["mlp"], got.encoder["norm_eps"]) == ("gelu_tanh", eps)
    assert got.input == want.input == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert got.encoder | {"init": ""} == want.encoder | {"init": ""}
    assert got.transform._replace(floor=True) == want.transform
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_colours_without_a_place_are_said(source, tmp_path, capsys):
    folder = source(hidden_act="gelu").rpartition("/")[0]
    convert.main([f"{folder}/x.npz", f"{tmp_path}/x.npz", "--to=dino", "--heads=3"])
    out = capsys.readouterr().out
    assert "dino has no place for it: input mean (0.1, 0.2, 0.3), std (0.4" in out
    assert "its code has (0.485, 0.456, 0.406)" in out


@pytest.mark.parametrize("to, eps", [("dino", 1e-6), ("timm", 1e-12)])
def test_a_config_that_its_own_family_does_not_read_tells_nothing(
    source, tmp_path, to, eps
):
    path = source(layer_norm_eps=eps)
    field = "mlp='gelu_tanh'" if to == "dino" else "norm_eps=1e-12"
    with pytest.raises(ValueError, match=f"no place for {field}"):
        formats.export_again(formats.open_file(path, format=to))


def test_a_config_of_hugging_face_comes_back_with_the_heads_that_were_given():
    plain = formats.open_tensors(core() | HEAD, heads=3)
    made = formats.export_again(plain, "hf_vit")
    about = made.config | {"num_attention_heads": 6, "hidden_dropout_prob": 0.5}
    again = formats.open_tensors(made.tensors, heads=3, about=about)
    assert formats.export_again(again).config == about | {"num_attention_heads": 3}
    # What timm or nobody reads is no config of theirs.
    strange = formats.open_tensors(made.tensors, heads=3, about={"image_size": 32})
    assert formats.export_again(strange).config["model_type"] == "vit"


def test_timms_config_comes_back_with_the_colours_that_count(source, tmp_path):
    said = {"input_size": [3, 9, 9], "mean": [0.7] * 3, "std": [0.7] * 3}
    for about in ({"pretrained_cfg": said}, said):
        about |= {"architecture": "vit_tiny", "extra": "x", "layer_norm_eps": 1e-6}
        path = source(**about)
        convert.main([path, f"{tmp_path}/out/x.npz", "--to=timm"])
        got = json.loads((tmp_path / "out" / "config.json").read_text())
        inner = got.get("pretrained_cfg", got)
        assert inner["mean"] == [0.1, 0.2, 0.3] and inner["std"] == [0.4, 0.5, 0.6]
        assert inner["input_size"] == [3, 9, 9] and got["extra"] == "x"
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "theirs")


# Classifiers

FC_NORM = {f"fc_norm.{n}": np.full(48, 2.0, np.float32) for n in ("weight", "bias")}
NO_NORM = {k: x for k, x in core().items() if not k.startswith("norm.")}
# What a classifier of 7 classes reads, and who can read the same.
MOST = {"beit", "deit", "hf_beit", "mae"}
CLASSIFIERS = {
    "cls": (core(), "cls", MOST | {"google", "hf_vit", "moco_v3", "ours", "timm"}),
    "patches": (core(), "patches", {"ours", "timm"}),
    "their norm": (NO_NORM | FC_NORM, "", MOST | {"ours", "timm"}),
    "norm of cls": (NO_NORM | FC_NORM, "cls", {"ours", "timm"}),
    "two norms": (core() | FC_NORM, "", {"ours"}),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_classifier_is_written_where_it_reads_the_same(case):
    tensors, pool, able = CLASSIFIERS[case]
    found = formats.open_tensors(tensors | HEAD, heads=3, format="timm")
    leaves = tree.named(found.params)
    no_keys = {k: x for k, x in leaves.items() if not k.endswith("attn/k/bias")}
    for name in plugin.names("formats"):
        encoder = found.encoder | {"mlp": "gelu_tanh" if name == "google" else "gelu"}
        params = tree.nest(no_keys if "beit" in name else leaves)
        try:
            made = formats.export(params, found.extra, encoder, name, pool=pool)
        except ValueError as error:
            assert " needs encoder/" in str(error) and name not in able, name
            continue
        head = [n for n, x in made.tensors.items() if 7 in x.shape]
        assert bool(head) == (name in able), name
        assert ("heads/last/rate_1/kernel" in made.left) == (name not in able), name
        assert (HF_CLASSIFIER in str(made.config)) == (name in able & HF), name
        beside = handover.beside(made.config, encoder, found.transform, name)
        about = beside.get("config.json")
        again = formats.open_tensors(made.tensors, heads=3, format=name, about=about)
        if name in able:
            assert again.objective["pool"] == (pool or "patches"), name


HF, HF_CLASSIFIER = {"hf_vit", "hf_beit"}, "ForImageClassification"


def test_a_classifier_behind_batch_norm_is_left_out_and_said(tmp_path, capsys):
    """MAE's linear probe: without its statistics it would be another one."""
    found = formats.open_tensors(core() | HEAD, heads=3)
    stats = {"mean": np.ones(48), "var": np.ones(48)}
    extra = {"encoder": {}, "heads": {"last": stats}}
    about = {"encoder": found.encoder, "input": found.input, "file": None}
    network = convert.Network(about, found.params, extra, "cls", 0, "")
    for to in ("hf_vit", "timm", "mae", "ours"):
        path = tmp_path / to / "x.npz"
        path.parent.mkdir()
        lines = "".join(convert.export(network, str(path), to))
        assert "no place for it: heads/last/rate_1, stats/heads/last" in lines
        with np.load(path) as file:
            assert not [n for n in file if 7 in file[n].shape]


def test_timm_pools_as_the_file_did_also_by_way_of_a_run(source, tmp_path):
    path = source(hidden_act="gelu", global_pool="avg")
    convert.main([path, f"{tmp_path}/run"])
    for start in (path, f"{tmp_path}/run"):
        convert.main([start, f"{tmp_path}/out/x.npz", "--to=timm"])
        again = formats.open_file(f"{tmp_path}/out/x.npz")
        assert again.objective["pool"] == "patches"
        about = json.loads((tmp_path / "out" / "config.json").read_text())
        assert about["model_args"]["global_pool"] == "avg"
        assert not {"class", "mlp", "norm_eps"} & set(about)  # nobody reads them
        shutil.rmtree(tmp_path / "out")
        convert.main([start, f"{tmp_path}/out/x.npz", "--to=hf_vit"])
        about = json.loads((tmp_path / "out" / "config.json").read_text())
        assert about["architectures"] == ["ViTModel"]
        shutil.rmtree(tmp_path / "out")


def test_the_share_of_a_crop_gives_its_side_again():
    for side in range(1, 600):
        for crop in range(1, side + 1):
            assert math.floor(crop / handover.share(crop, side)) == side, (crop, side)


def images():
    return np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


def tokens(opened):
    """Of our network."""
    run = jax.jit(vit.make(**opened.encoder).apply)
    return run({"params": opened.params["encoder"]}, images())[0]


@pytest.fixture
def in_timm(tmp_path):
    """Runs what the command writes for timm of a file, by way of a run."""
    torch = pytest.importorskip("torch")
    torchvision_stub.install()
    timm = pytest.importorskip("timm")

    def run(path):
        convert.main([path, f"{tmp_path}/run", "--heads=3"])
        convert.main([f"{tmp_path}/run", f"{tmp_path}/model.safetensors", "--to=timm"])
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        with torch.no_grad():
            x = torch.from_numpy(images().transpose(0, 3, 1, 2).copy())
            return model, model.forward_features(x).numpy()

    return run


def test_timm_computes_the_same_with_gelu_by_tanh(source, in_timm):
    path = source(layer_norm_eps=1e-6)
    model, got = in_timm(path)
    opened = foreign.open_run(path)
    np.testing.assert_allclose(got, tokens(opened), atol=5e-6)
    exact = opened._replace(encoder=opened.encoder | {"mlp": "gelu"})
    assert np.abs(got - tokens(exact)).max() > 3e-5  # so that it would show
    assert model.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert model.pretrained_cfg["crop_mode"] == "squash"


def test_timm_computes_the_same_with_a_swiglu(in_timm, tmp_path):
    tensors = core() | HEAD
    for i in (0, 1):
        fc1, fc2 = (f"blocks.{i}.mlp.fc{n}.weight" for n in (1, 2))
        tensors[fc2] = np.ascontiguousarray(tensors[fc2][:, :96])
        assert tensors[fc1].shape == (2 * 96, 48)
    np.savez(tmp_path / "x.npz", **tensors)
    _, got = in_timm(f"{tmp_path}/x.npz")
    opened = foreign.open_run(f"{tmp_path}/x.npz", heads=3)
    assert opened.encoder["mlp"] == "swiglu"
    np.testing.assert_allclose(got, tokens(opened), atol=1e-5)
