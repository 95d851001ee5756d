"""Checkpoints that are not whole, or odd: what is refused, allowed, or said."""

import struct
import time

import jax
import numpy as np
import pytest
from models import MAE, tiny
from test_formats import HEAD, SCALED, TOKEN, core, under

from clvsmim import formats, plugin, vit
from clvsmim.formats import _about, _choose, _preprocess, _read
from clvsmim.formats._family import Look

# Heads


def without(tensors, *names):
    return {k: x for k, x in tensors.items() if k not in names}


def zeros(*shape):
    return np.zeros(shape, np.float32)


CHANGED = {
    "classifier, bias": (None, {"head.bias": zeros(9)}, r"head\.bias .*\(9,\), exp"),
    "classifier, width": (None, {"head.weight": zeros(7, 33)}, r"head\.weight .*33"),
    "fc_norm": (None, {"fc_norm.weight": zeros(48)}, "fc_norm/bias .*is missing"),
    "simmim": ("simmim_shared_rpb", {"decoder.0.weight": zeros(7, 11, 1, 1)}, "11, 7"),
    "simmim, 3x3": (
        "simmim_shared_rpb",
        {"decoder.0.weight": zeros(192, 48, 3, 3)},
        r"decoder\.0\.weight .*is no 1x1 convolution",
    ),
    "simmim, token": (
        "simmim_shared_rpb",
        {"encoder.mask_token": zeros(1, 1, 5)},
        r"encoder\.mask_token .*expected \(1, 1, 48\)",
    ),
    "mae, token": ("mae_normpix", {"mask_token": zeros(1, 1, 5)}, "mask_token .*32"),
    "moco": (
        "moco_v3",
        {"base_encoder.head.0.weight": zeros(7, 3)},
        r"fc_0.*expected \(48, 7\)",
    ),
    "moco, statistics": (
        "moco_v3",
        {"predictor.1.running_var": zeros(3)},
        r"predictor\.1\.running_var .*\(3,\), expected \(64,\)",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_heads_of_another_shape_are_refused(golden, case):
    name, change, message = CHANGED[case]
    tensors = golden(name).group("params") if name else core() | HEAD
    with pytest.raises(ValueError, match=message) as caught:
        formats.open_tensors(tensors | change, heads=3, decoder_heads=4)
    assert "\n" not in str(caught.value)


ABSENT = {
    "head.bias": (None, "heads/last/rate_1/bias"),
    "decoder.0.bias": ("simmim_shared_rpb", "heads/decoder/bias"),
    "encoder.mask_token": ("simmim_shared_rpb", "heads/mask_token"),
    "mask_token": ("mae_normpix", "heads/mask_token"),
    "predictor.0.weight": ("moco_v3", "heads/predictor/fc_0/kernel"),
    "base_encoder.head.1.running_var": ("moco_v3", "stats/heads/projector/bn_0/var"),
}


@pytest.mark.parametrize("theirs", ABSENT)
def test_heads_in_part_are_refused_unless_they_are_named(golden, theirs):
    name, ours = ABSENT[theirs]
    tensors = golden(name).group("params") if name else core() | HEAD
    tensors, given = without(tensors, theirs), {"heads": 3, "decoder_heads": 4}
    with pytest.raises(ValueError, match=f"{ours} .*is missing.*partial="):
        formats.open_tensors(tensors, **given)
    found = formats.open_tensors(tensors, partial=(ours,), **given)
    assert found.report.missing == [ours]
    assert found.objective is not None


def test_what_a_file_lacks_as_a_whole_is_not_asked_for(golden):
    flat = golden("moco_v3").group("params")
    plain = {k: x for k, x in flat.items() if not k.startswith("predictor.")}
    found = formats.open_tensors(plain, heads=3)
    assert set(found.params["heads"]) == {"projector"} and found.objective is None
    backwards = dict(reversed(flat.items()))
    objective = formats.open_tensors(backwards, heads=3).objective
    assert objective["projector"] == (64, 64, 32)
    del flat["base_encoder.head.0.weight"]
    only = {k: x for k, x in flat.items() if ".head." not in k}
    with pytest.raises(ValueError, match="predictor without the projector"):
        formats.open_tensors(only, heads=3)


# Parts of the encoder


def test_a_network_built_without_a_part_says_so():
    for name, ours in (
        ("norm", "encoder/ln_final"),
        ("pos_embed", "encoder/pos_embed"),
    ):
        cut = {k: x for k, x in core().items() if not k.startswith(name)}
        found = formats.open_tensors(
            cut, format="dino", heads=3, partial=(f"{ours}.*",)
        )
        report = found.report
        (line,) = [x for x in report.warnings if x.startswith(f"built without {ours}")]
        assert line in str(report) and report.missing[0].startswith(ours)


def test_alternatives_of_a_message_can_be_given_to_partial():
    cut = {k: x for k, x in (core() | HEAD).items() if not k.startswith("norm.")}
    names = "encoder/ln_final/scale|heads/last/rate_1/fc_norm/scale"
    with pytest.raises(ValueError) as caught:
        formats.open_tensors(cut, format="timm", heads=3)
    assert names in str(caught.value)
    for partial in (names, *names.split("|")):
        found = formats.open_tensors(cut, format="timm", heads=3, partial=(partial,))
        assert "built without" in str(found.report)


@pytest.mark.parametrize("option", ("partial", "ignore"))
def test_an_expression_that_is_none(option):
    with pytest.raises(ValueError, match=rf"{option}='\*' is no regular expression"):
        formats.open_tensors(core(), heads=3, **{option: ("*",)})


def test_heads_are_not_guessed_from_a_width_that_nobody_has():
    tensors = core(width=64, heads=1)
    with pytest.raises(ValueError, match="64 wide; say heads="):
        formats.open_tensors(tensors)
    assert formats.open_tensors(tensors, heads=2).encoder["heads"] == 2


def test_one_channel_becomes_three():
    tensors = core() | HEAD
    grey = tensors["patch_embed.proj.weight"][:, :1]
    found = formats.open_tensors(tensors | {"patch_embed.proj.weight": grey}, heads=3)
    kernel = found.params["encoder"]["patch_embed"]["kernel"]
    assert kernel.shape == (8, 8, 3, 48)
    want = grey[:, 0].transpose(1, 2, 0)
    np.testing.assert_allclose(kernel.sum(axis=2), want, atol=1e-6)
    assert "of one channel (grey)" in str(found.report)
    two = {"patch_embed.proj.weight": tensors["patch_embed.proj.weight"][:, :2]}
    with pytest.raises(ValueError, match="of 2 channels"):
        formats.open_tensors(tensors | two, heads=3)


# Which file, and what else is in it


def test_state_of_training_is_dropped():
    teacher = under("teacher/backbone.", core()) | under("student/backbone.", core())
    state = ("dino_loss/center", "ibot_loss/center2", "koleo_loss.x", "opt/0/mu/cls")
    found = formats.open_tensors(teacher | dict.fromkeys(state, zeros(1, 8)), heads=3)
    why = {found.report.dropped[name] for name in state}
    assert why == {"training state, not weights"}
    look = Look({"opt/target/cls": zeros(1, 1, 8)})
    google = plugin.find("formats", "google")()
    names, _ = _choose.select(look.tensors, google, "", formats.Report())
    assert names == {"cls": "opt/target/cls"}  # the weights of vision_transformer


def test_blocks_in_chunks_are_recognised():
    flat = core() | SCALED | {"mask_token": TOKEN}
    chunked = {k.replace("blocks.", "blocks.0."): x for k, x in flat.items()}
    found = formats.open_tensors(under("teacher/backbone.", chunked), heads=3)
    want = formats.open_tensors(flat, heads=3)
    assert found.family == "dinov2"
    jax.tree.map(np.testing.assert_array_equal, found.params, want.params)


def halves(x, kind):
    if kind == "float16":
        return x.astype(np.float16)
    return np.asarray(jax.numpy.asarray(x, "bfloat16")).view("V2")


@pytest.mark.parametrize("kind", ("float16", "bfloat16"))
def test_a_table_that_follows_is_compared_at_the_precision_of_the_file(golden, kind):
    record = golden("mae_normpix").group("params")
    half = {k: halves(x, kind) for k, x in record.items()}
    given = {"heads": 3, "decoder_heads": 4}
    found = formats.open_tensors(half, **given)
    assert "decoder_pos_embed" in found.report.dropped
    moved = halves(record["decoder_pos_embed"] + 0.01, kind)
    with pytest.raises(ValueError, match="not the expected table"):
        formats.open_tensors(half | {"decoder_pos_embed": moved}, **given)


def test_odd_names_take_no_time(monkeypatch):
    start = time.process_time()
    odd = {"blocks.30000000.norm1.weight": zeros(48)}
    with pytest.raises(ValueError, match="block 2 of 30000001 is not there"):
        formats.open_tensors(core() | HEAD | odd, heads=3)
    assert time.process_time() - start < 2
    calls = []
    monkeypatch.setattr(_choose, "known", lambda name, family: calls.append(name))
    with pytest.raises(ValueError, match="no known family"):
        formats.open_tensors({f"layer.{i}.foo": zeros(1) for i in range(1500)})
    assert len(set(calls)) == _choose.MOST == 1000


def test_damage_is_one_line_wherever_it_is_seen(monkeypatch, tmp_path):
    def damaged(path):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(_read, "_parsed", damaged)
    with pytest.raises(ValueError, match="cannot read x.pth: it is damaged"):
        _read.read("x.pth")


def test_a_json_file_beside_is_an_object_or_refused(tmp_path):
    weights, place = str(tmp_path / "x.pth"), tmp_path / "config.json"
    assert _about.beside(weights, "config.json") == {}
    for text in (b"[" * 200_000, b"\xff\xfe{}\x80", b"[1]", b""):
        place.write_bytes(text)
        with pytest.raises(ValueError, match="config.json is no JSON object"):
            _about.beside(weights, "config.json")
    place.write_bytes('{"é": 1}'.encode())
    assert _about.beside(weights, "config.json") == {"é": 1}
    place.unlink()
    place.mkdir()
    with pytest.raises(ValueError, match="config.json is no JSON object"):
        _about.beside(weights, "config.json")


HF = {"image_processor_type": "BitImageProcessor"}
BAD = (
    ("timm", {"input_size": 3}),
    ("timm", {"input_size": [3, "224", 224]}),
    ("timm", {"input_size": [3, 224, 224], "crop_pct": "0.9"}),
    ("timm", {"input_size": [3, 224, 224], "crop_pct": -1}),
    ("timm", {"input_size": [3, 224, 224], "mean": [0.5, 0.5]}),
    ("timm", {"input_size": [3, 224, 224], "mean": "0.5"}),
    ("timm", {"input_size": [3, 224, 224], "std": [0, 0, 0]}),
    ("timm", {"input_size": [3, 224, 224], "interpolation": ["bicubic"]}),
    ("timm", ["input_size"]),
    ("hf", HF | {"size": "224"}),
    ("hf", HF | {"size": {"shortest_edge": 1e9}}),
    ("hf", HF | {"image_mean": ["a", "b", "c"]}),
    ("hf", HF | {"image_std": [0.5, 0.5]}),
    ("hf", HF | {"rescale_factor": "1/255"}),
    ("hf", HF | {"resample": [3]}),
    ("hf", None),
)


@pytest.mark.parametrize("read, said", BAD)
def test_settings_of_images_of_another_kind(read, said):
    with pytest.raises(ValueError, match="preprocess(ing |or_)config") as caught:
        getattr(_preprocess, f"from_{read}")(_preprocess.checked(said))
    assert "\n" not in str(caught.value)


# Out again


def test_hugging_faces_dinov2_always_has_layer_scale():
    plain = formats.open_tensors(core(), heads=3)
    made = formats.export_again(plain, "hf_dinov2")
    for i in (0, 1):
        for j in (1, 2):
            name = f"dinov2.encoder.layer.{i}.layer_scale{j}.lambda1"
            np.testing.assert_array_equal(made.tensors[name], np.ones(48, np.float32))
    assert made.config["layerscale_value"] == 1.0
    scaled = {k: 0.5 * x for k, x in SCALED.items()}
    tensors = core() | scaled | {"mask_token": TOKEN}
    made = formats.export_again(formats.open_tensors(tensors, heads=3), "hf_dinov2")
    name = "dinov2.encoder.layer.0.layer_scale1.lambda1"
    np.testing.assert_array_equal(made.tensors[name], scaled["blocks.0.ls1.gamma"])


def test_a_decoder_has_no_relative_positions():
    fields = MAE | {"position": "none", "relative": "per_block"}
    wide = {"width": 32, "depth": 1, "heads": 2}
    assert vit.decoder_spec(tiny(fields).spec, **wide).relative == "none"
    for mlp, want in (("gelu_tanh", "gelu_tanh"), ("swiglu", "gelu")):
        spec = tiny(MAE | {"mlp": mlp}).spec
        assert vit.decoder_spec(spec, **wide).mlp == want
