"""What tensors do not hold goes out in a file beside them, or nothing goes out."""

import json

import jax
import numpy as np
import pytest
import torchvision_stub
from test_formats import HEAD, SCALED, core

from clvsmim import convert, foreign, formats, plugin, vit

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
    if to == "timm":  # which would give back the file with what was beside it
        convert.main([path, f"{tmp_path}/run"])
        path = f"{tmp_path}/run"
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
