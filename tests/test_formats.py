"""Families of checkpoints: recordings load by their own format; traps are named.

Fixtures are recordings of the originals, or lists of names and shapes written out here;
what live libraries write is in test_live_parity.py.
"""

import itertools
import re

import jax
import numpy as np
import originals
import pytest
from models import MAE, MOCO, SIMMIM, close, tiny, tiny_mae, tiny_simmim

from clvsmim import formats, inits, masks, plugin, tree, vit
from clvsmim.formats import _check, _positions, _spec
from clvsmim.formats._report import Report
from clvsmim.objectives import mae, simmim

KEY = jax.random.key(0)
RECORDINGS = {
    "moco_v3": ("moco_v3", MOCO, "base_encoder."),
    "simmim_shared_rpb": ("simmim", SIMMIM, "encoder."),
    "simmim_per_block_rpb": (
        "simmim",
        SIMMIM | {"relative": "per_block", "final_norm": False},
        "encoder.",
    ),
    "mae_normpix": ("mae", MAE, ""),
    "mae_pixel": ("mae", MAE, ""),
    "analysis_moco_vit": ("moco_v3", MOCO, ""),
    "analysis_simmim_vit": ("simmim", SIMMIM, ""),
}
FREE = ("drop_path", "mlp_ratio", "scan")


def opened(record, **options):
    """The weights of a recording, of 3 heads and a decoder of 4."""
    given = {"heads": 3, "decoder_heads": 4} | options
    return formats.open_tensors(record.group("params"), **given)


def encoder_of(record):
    """Without MAE's decoder, whose names have no prefix."""
    flat = record.group("params")
    return {k: x for k, x in flat.items() if not k.startswith("decoder_")}


def core(width=48, heads=3, depth=2, side=4, patch=8, table=None):
    """The names of timm's ViT, random numbers."""
    rng = np.random.default_rng(0)
    d, hidden = width, 4 * width
    shapes = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, side * side + 1, d),
        "patch_embed.proj.weight": (d, 3, patch, patch),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (d,),
            f"blocks.{i}.norm1.bias": (d,),
            f"blocks.{i}.attn.qkv.weight": (3 * d, d),
            f"blocks.{i}.attn.qkv.bias": (3 * d,),
            f"blocks.{i}.attn.proj.weight": (d, d),
            f"blocks.{i}.attn.proj.bias": (d,),
            f"blocks.{i}.norm2.weight": (d,),
            f"blocks.{i}.norm2.bias": (d,),
            f"blocks.{i}.mlp.fc1.weight": (hidden, d),
            f"blocks.{i}.mlp.fc1.bias": (hidden,),
            f"blocks.{i}.mlp.fc2.weight": (d, hidden),
            f"blocks.{i}.mlp.fc2.bias": (d,),
        }
    made = {
        name: rng.normal(0, 0.1, s).astype(np.float32) for name, s in shapes.items()
    }
    if table is not None:
        rows = inits.sincos_table((side, side), d, table == "moco_sincos")
        made["pos_embed"] = np.pad(rows, ((1, 0), (0, 0)))[None].astype(np.float32)
    return made


def under(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


HEAD = {
    "head.weight": np.ones((7, 48), np.float32),
    "head.bias": np.ones(7, np.float32),
}


# Recordings


@pytest.mark.parametrize("name", RECORDINGS)
def test_recorded_weights_open_by_their_own_format(golden, name):
    family, fields, prefix = RECORDINGS[name]
    # The analysis ViT of SimMIM has the names of fine-tuned BEiT, too.
    format = family if name == "analysis_simmim_vit" else ""
    found = opened(golden(name), format=format)
    assert found.family == family
    want = originals.encoder(encoder_of(golden(name)), 3, prefix)
    got = tree.named(found.params["encoder"])
    assert set(got) == set(tree.named(want))
    for leaf, x in tree.named(want).items():
        np.testing.assert_array_equal(got[leaf], x, leaf)
    for field in set(fields) - set(FREE):
        assert found.encoder[field] == fields[field], field
    assert found.report.parameters == sum(x.size for x in got.values())


@pytest.mark.parametrize("name", RECORDINGS)
def test_writing_what_was_read_gives_the_same_file(golden, name):
    family = RECORDINGS[name][0]
    record = golden(name).group("params")
    found = opened(golden(name), format=family)
    back = formats.export_again(found).tensors
    assert set(back) == set(record)
    for key, x in record.items():
        assert (back[key].dtype, back[key].tobytes()) == (x.dtype, x.tobytes()), key


@pytest.mark.parametrize("name", ("simmim_shared_rpb", "mae_normpix", "moco_v3"))
def test_writing_without_the_file_leaves_nothing_out(golden, name):
    """Tables, indices and counters are computed; what was read is not at hand."""
    record = golden(name).group("params")
    found = opened(golden(name))
    made = formats.export(
        found.params, found.extra, found.encoder, found.family, decoder_heads=4
    )
    first = {k: x for k, x in record.items() if not k.startswith("momentum")}
    assert made.left == [] and set(made.tensors) == set(first)
    for key, x in first.items():
        if "num_batches" not in key:
            np.testing.assert_allclose(made.tensors[key], x, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "name, family",
    (("analysis_moco_vit", "moco_v3"), ("analysis_simmim_vit", "simmim")),
)
def test_recorded_taps_and_logits(golden, name, family):
    record = golden(name)
    found = opened(record, format=family)
    encoder = vit.make(**found.encoder)
    x = originals.images(record["image"])
    tokens, taps = jax.jit(encoder.apply)({"params": found.params["encoder"]}, x)
    for tap, want in zip(taps["residual"], record["zs"], strict=True):
        close(tap, want)
    for tap, want in zip(taps["attention"], record["attns"], strict=True):
        close(tap, want)
    assert (found.objective["name"], found.objective["pool"]) == ("classify", "cls")
    head = found.params["heads"]["last"]["rate_1"]
    close(tokens[:, 0] @ head["kernel"] + head["bias"][None], record["logits"])


def evaluated(objective, params, inputs):
    """The loss."""

    @jax.jit
    def run(params, inputs):
        extra = {"encoder": {}, "heads": {}}
        more = {"progress": 0.0, "train": False}
        return objective.loss(params, extra, inputs, KEY, **more)[0]

    return run(params, inputs)


@pytest.mark.parametrize("name", ("mae_normpix", "mae_pixel"))
def test_recorded_loss_of_mae_with_its_decoder(golden, name):
    record = golden(name)
    found = opened(record)
    assert found.objective["decoder"] == {"width": 32, "depth": 2, "heads": 4}
    objective = tiny_mae(tiny(MAE), norm_pix=name == "mae_normpix")
    keep, restore, mask = jax.vmap(lambda n: masks.mask_from_noise(n, 4))(
        record["noise"]
    )
    inputs = {"image": originals.images(record["image"]), "keep": keep}
    inputs |= {"restore": restore, "mask": mask}
    value = evaluated(objective, found.params, inputs)
    np.testing.assert_allclose(value, record["loss"], rtol=5e-6)
    shapes, _ = jax.eval_shape(objective.init, KEY, inputs)
    tree.strict(shapes, found.params, "the file")


def test_recorded_loss_of_simmim_with_its_decoder(golden):
    """Its channels stay in the order (c, dy, dx)."""
    record = golden("simmim_shared_rpb")
    found = opened(record)
    objective = tiny_simmim(tiny(SIMMIM))
    inputs = {"image": originals.images(record["image"]), "mask": record["mask"]}
    params = tree.strict(
        jax.eval_shape(objective.init, KEY, inputs)[0], found.params, "the file"
    )
    value = evaluated(objective, params, inputs)
    np.testing.assert_allclose(value, record["loss"], rtol=5e-6)
    image, _, _ = simmim.predict(
        tiny(SIMMIM), objective.loss.args[1], params, found.extra, inputs, None, False
    )
    close(image, originals.images(record["reconstruction"]))


def test_heads_and_statistics_of_moco_v3(golden):
    record = golden("moco_v3")
    flat = record.group("params")
    for branch in ("base", "momentum"):
        found = opened(record, branch=branch)
        params, stats = originals.head(flat, f"{branch}_encoder.head.")
        jax.tree.map(
            np.testing.assert_array_equal, found.params["heads"]["projector"], params
        )
        jax.tree.map(
            np.testing.assert_array_equal, found.extra["heads"]["projector"], stats
        )
        want = originals.encoder(flat, 3, f"{branch}_encoder.")
        jax.tree.map(np.testing.assert_array_equal, found.params["encoder"], want)
    objective = opened(record).objective
    assert objective == {
        "name": "moco_v3",
        "projector": (64, 64, 32),
        "predictor": (64, 32),
    }


def test_the_base_encoder_is_used_unless_the_momentum_one_is_asked_for(golden):
    report = opened(golden("moco_v3")).report
    assert "the base encoder; there too: momentum (branch=momentum)" in str(report)
    assert any("momentum" in why for why in report.dropped.values())
    with pytest.raises(ValueError, match="branch='teacher'; this file has base, mom"):
        opened(golden("moco_v3"), branch="teacher")


# Which family


def relative(tensors, heads=3, side=4):
    """SimMIM's and BEiT's names of the same network."""
    out = {k: x for k, x in tensors.items() if "qkv.bias" not in k and k != "pos_embed"}
    width = tensors["cls_token"].shape[-1]
    for i in range(2):
        for name in ("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2"):
            out[f"blocks.{i}.{name}"] = np.full(width, 0.1, np.float32)
    table = np.zeros(((2 * side - 1) ** 2 + 3, heads), np.float32)
    return out | {"rel_pos_bias.relative_position_bias_table": table}


LM = {"lm_head.weight": np.ones((9, 48), np.float32)}
SCALED = {
    f"blocks.{i}.ls{j}.gamma": np.ones(48, np.float32) for i in (0, 1) for j in (1, 2)
}
TOKEN = np.ones((1, 48), np.float32)
FILES = {
    "MoCo v3, released": (
        "moco_v3",
        lambda: under("state_dict/module.base_encoder.", core(table="moco_sincos")),
    ),
    "MoCo v3, linear probe": (
        "moco_v3",
        lambda: under("state_dict/module.", core(table="moco_sincos") | HEAD),
    ),
    "MAE, encoder": ("mae", lambda: under("model/", core(table="mae_sincos"))),
    "DINO": ("dino", core),
    "DINO, full": (
        "dino",
        lambda: (
            under("student/module.backbone.", core())
            | under("teacher/backbone.", core())
            | {"dino_loss/center": np.ones((1, 8), np.float32)}
        ),
    ),
    "iBOT": ("ibot", lambda: under("state_dict/", core())),
    "iBOT, token": ("ibot", lambda: core() | {"masked_embed": TOKEN}),
    "iBOT, full": (
        "ibot",
        lambda: (
            under("student/module.backbone.", core() | {"masked_embed": TOKEN})
            | under("teacher/backbone.", core() | {"masked_embed": TOKEN})
            | {"ibot_loss/center": TOKEN, "ibot_loss/center2": TOKEN[None]}
        ),
    ),
    "DINOv2": ("dinov2", lambda: core() | SCALED | {"mask_token": TOKEN}),
    "DeiT": ("deit", lambda: under("model/", core() | HEAD)),
    "timm": ("timm", lambda: core() | HEAD),
    "SimMIM": ("simmim", lambda: under("model/encoder.", relative(core()))),
    "BEiT": ("beit", lambda: under("model/", relative(core()) | LM)),
}


@pytest.mark.parametrize("case", FILES)
def test_the_family_is_recognised(case):
    family, make = FILES[case]
    tensors = make()
    found = formats.open_tensors(tensors, heads=3)
    assert found.family == family
    assert found.report.evidence and found.report.title in str(found.report)
    back = formats.export_again(found).tensors
    assert set(back) == set(tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(back[name], x, name)


def test_families_without_another_writer_say_so():
    line = "names from documentation only"
    for name in plugin.names("formats"):
        family = plugin.find("formats", name)()
        assert bool(family.checked) == (name not in ("dino", "ibot")), name
    assert line in str(formats.open_tensors(core(), heads=3).report)


def test_fine_tuned_simmim_and_beit_cannot_be_told_apart():
    """They want other colours."""
    tensors = under("model/", relative(core()) | HEAD)
    with pytest.raises(ValueError, match="several families.*beit.*simmim.*format="):
        formats.open_tensors(tensors)
    colours = {
        name: formats.open_tensors(tensors, format=name).input["mean"]
        for name in ("beit", "simmim")
    }
    assert colours == {"beit": (0.5, 0.5, 0.5), "simmim": (0.485, 0.456, 0.406)}


def test_an_unknown_file_lists_what_was_looked_for():
    with pytest.raises(ValueError) as caught:
        formats.open_tensors(
            {"layer1.0.conv1.weight": np.ones((2, 2))}, source="r50.pth"
        )
    text = str(caught.value)
    assert text.startswith("r50.pth: no known family; looked for beit:")
    assert "moco_v3: base_encoder.*" in text and "layer1.*.conv1" in text
    assert "\n" not in text
    tensors = {k.replace("mlp.fc", "ffn.w"): x for k, x in core().items()}
    tensors |= {"norm_pre.weight": np.ones(48)}
    with pytest.raises(ValueError, match=r"tensors that no DINO.*blocks\.\*\.ffn\.w"):
        formats.open_tensors(tensors)
    with pytest.raises(ValueError, match="unknown formats name 'simim'.*'simmim'"):
        formats.open_tensors(core(), format="simim")


# Traps


S_HEADS = (("moco_sincos", "moco_v3", 12, 6), ("mae_sincos", "mae", 6, 12))


@pytest.mark.parametrize("table, family, heads, other", S_HEADS)
def test_the_heads_of_a_vit_s_are_named(table, family, heads, other):
    found = formats.open_tensors(core(width=384, table=table))
    assert (found.family, found.encoder["heads"]) == (family, heads)
    (line,) = [x for x in found.report.assumed if "heads" in x]
    assert f": heads={other}" in line and "MoCo v3's" in line
    found = formats.open_tensors(core(width=384, table=table), heads=other)
    assert found.encoder["heads"] == other
    assert not [x for x in found.report.assumed if "heads" in x]
    shape = found.params["encoder"]["block_0"]["attn"]["q"]["kernel"].shape
    assert shape == (384, other, 384 // other)


def test_heads_are_asked_for_where_nothing_tells():
    with pytest.raises(ValueError, match="48 wide; say heads="):
        formats.open_tensors(core())
    with pytest.raises(ValueError, match="width 48 does not divide into 5 heads"):
        formats.open_tensors(core(), heads=5)
    with pytest.raises(ValueError, match="heads=4, and the file has tables of 3"):
        formats.open_tensors(under("encoder.", relative(core())), heads=4)
    found = formats.open_tensors(core(), about={"num_attention_heads": 3})
    assert "3 heads, by config.json" in str(found.report)


def test_a_file_with_biases_of_q_and_v_has_none_of_k(golden):
    found = opened(golden("simmim_shared_rpb"))
    assert found.encoder["qkv_bias"] == "qv"
    assert "bias" not in found.params["encoder"]["block_0"]["attn"]["k"]
    # Where a library has one, it is zero.
    encoder = found.encoder | {"relative": "none", "layer_scale": 0.0}
    leaves = tree.named(found.params["encoder"])
    plain = {
        k: x for k, x in leaves.items() if "rel_table" not in k and "gamma" not in k
    } | {"pos_embed": np.zeros((1, 17, 48))}
    made = formats.export({"encoder": tree.nest(plain)}, {}, encoder, "timm").tensors
    q, k, v = np.split(made["blocks.0.attn.qkv.bias"], 3)
    assert not k.any() and q.any() and v.any()


def test_the_stored_index_of_relative_positions_is_compared(golden):
    record = golden("simmim_shared_rpb").group("params")
    name = "encoder.rel_pos_bias.relative_position_index"
    assert name in formats.open_tensors(record).report.dropped
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*not the expected table"):
        formats.open_tensors(record | {name: record[name].T})
    with pytest.raises(ValueError, match="not the expected table"):
        formats.open_tensors(record | {name: record[name][1:]})


def test_the_stored_positions_of_the_decoder_are_compared(golden):
    record = golden("mae_normpix").group("params")
    moved = record["decoder_pos_embed"][:, ::-1]
    with pytest.raises(ValueError, match="decoder_pos_embed.*not the expected table"):
        formats.open_tensors(record | {"decoder_pos_embed": moved}, heads=3)
    cut = {k: x for k, x in record.items() if k != "decoder_embed.weight"}
    with pytest.raises(ValueError, match="no heads/decoder/proj/kernel"):
        formats.open_tensors(cut, heads=3, format="mae")


def test_a_file_of_mae_says_what_its_names_do_not_tell(golden):
    text = str(opened(golden("mae_pixel")).report)
    assert "*_visualize files were trained without" in text
    found = formats.open_tensors(under("model/", core(table="mae_sincos")), heads=3)
    assert found.objective is None
    assert "the encoder-only file: to see reconstructions" in str(found.report)


def test_a_linear_probe_file_is_named():
    tensors = under("state_dict/module.", core(table="moco_sincos") | HEAD)
    found = formats.open_tensors(tensors, heads=3)
    assert found.objective["classes"] == 7
    assert "linear-probe file, not one of pre-training" in str(found.report)


def test_sincos_tables_are_compared():
    kinds = {"moco_v3": "moco_sincos", "mae": "mae_sincos"}
    for family, kind in kinds.items():
        found = formats.open_tensors(core(table=kind), heads=3)
        assert (found.family, found.encoder["position"]) == (family, kind)
    tensors = core(table="moco_sincos")
    tensors["pos_embed"][0, 3, 5] += 0.01
    found = formats.open_tensors(tensors, format="moco_v3", heads=3)
    assert found.encoder["position"] == "learned"
    (line,) = found.report.warnings
    assert "not MoCo v3's sin-cos table (difference 0.01)" in line


def test_a_table_in_half_precision_is_still_the_table():
    tensors = {k: x.astype(np.float16) for k, x in core(table="mae_sincos").items()}
    found = formats.open_tensors(tensors, heads=3)
    assert found.encoder["position"] == "mae_sincos"
    assert f"{len(tensors)} tensors in float16, float32 here" in str(found.report)
    back = formats.export_again(found).tensors
    assert {x.dtype for x in back.values()} == {np.dtype(np.float16)}


def test_values_that_are_not_finite_are_counted():
    tensors = core()
    tensors["norm.bias"][:3] = np.nan
    tensors["blocks.1.mlp.fc1.weight"][0, 0] = np.inf
    lines = formats.open_tensors(tensors, heads=3).report.warnings
    assert "3 values of encoder/ln_final/bias are NaN or infinite" in lines
    assert "1 values of encoder/block_1/mlp/fc1/kernel are NaN or infinite" in lines


def test_weights_that_are_stored_twice():
    tensors = under("model/", core() | HEAD)
    tensors |= {f"model_ema/{k}": 2 * x for k, x in (core() | HEAD).items()}
    found = formats.open_tensors(tensors, heads=3)
    assert "model_ema (branch=)" in str(found.report)
    other = formats.open_tensors(tensors, heads=3, branch="model_ema")
    for a, b in zip(*map(jax.tree.leaves, (found.params, other.params)), strict=True):
        np.testing.assert_array_equal(2 * a, b)


def test_the_teacher_is_the_encoder_of_dino():
    teacher = under("teacher/backbone.", core())
    student = {f"student/module.backbone.{k}": 2 * x for k, x in core().items()}
    found = formats.open_tensors(student | teacher, heads=3)
    token = found.params["encoder"]["cls_token"]
    np.testing.assert_array_equal(token, core()["cls_token"])
    found = formats.open_tensors(student | teacher, heads=3, branch="student")
    np.testing.assert_array_equal(2 * token, found.params["encoder"]["cls_token"])


def test_training_state_is_no_weight():
    tensors = under("state_dict/module.base_encoder.", core(table="moco_sincos"))
    tensors |= {"optimizer/state/0/exp_avg": np.ones(3), "scaler/scale": np.ones(())}
    dropped = formats.open_tensors(tensors, heads=3).report.dropped
    assert dropped == dict.fromkeys(
        ("optimizer/state/0/exp_avg", "scaler/scale"), "training state, not weights"
    )


# Whole or not at all


def test_a_tensor_without_a_place_is_refused():
    tensors = core() | HEAD | {"blocks.1.attn.q_norm.weight": np.ones(16, np.float32)}
    with pytest.raises(ValueError, match=r"1 tensors that no .*blocks\.\*\.attn\.q_n"):
        formats.open_tensors(tensors, heads=3)
    found = formats.open_tensors(tensors, heads=3, ignore=(r".*q_norm.*",))
    assert found.report.dropped == {
        "blocks.1.attn.q_norm.weight": "ignored, as you said"
    }


def test_a_missing_tensor_is_refused_unless_it_is_named():
    tensors = core() | HEAD
    del tensors["blocks.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match="missing.*encoder/block_1/mlp/fc1/bias"):
        formats.open_tensors(tensors, heads=3)
    found = formats.open_tensors(tensors, heads=3, partial=(".*block_1/mlp/fc1/bias",))
    assert found.report.missing == ["encoder/block_1/mlp/fc1/bias"]
    assert not found.params["encoder"]["block_1"]["mlp"]["fc1"]["bias"].any()
    assert "missing, left as initialised" in str(found.report)
    cut = {k: x for k, x in core(depth=3).items() if not k.startswith("blocks.1.")}
    with pytest.raises(ValueError, match="block 1 of 3 is not there"):
        formats.open_tensors(cut | HEAD, heads=3)
    for name in ("cls_token", "pos_embed", "norm.weight", "patch_embed.proj.weight"):
        cut = {k: x for k, x in core().items() if k != name}
        with pytest.raises(ValueError, match=r"missing|no known family"):
            formats.open_tensors(cut, heads=3)


def test_a_tensor_of_another_shape_is_refused():
    shapes = {
        "blocks.0.attn.qkv.weight": (143, 48),
        "blocks.0.attn.proj.weight": (48, 47),
        "blocks.1.mlp.fc2.weight": (48, 190),
        "patch_embed.proj.weight": (48, 3, 8),
        "norm.weight": (47,),
        "cls_token": (1, 2, 48),
        "pos_embed": (1, 12, 48),
    }
    for name, shape in shapes.items():
        with pytest.raises(ValueError) as caught:
            formats.open_tensors(
                core() | HEAD | {name: np.ones(shape, np.float32)}, heads=3
            )
        assert "\n" not in str(caught.value), name
    with pytest.raises(ValueError, match="holds int64 numbers"):
        formats.open_tensors(core() | {"norm.bias": np.arange(48)}, heads=3)


def mutated(rng, tensors):
    """Something renamed, lost, exchanged, or of another shape or dtype."""
    out = dict(tensors)
    for _ in range(rng.integers(1, 4)):
        name, other = rng.choice(list(out), 2)
        x = out.pop(name)
        sides = rng.choice([0, 1, 2, 3, 48], rng.integers(5))
        new = (
            {},
            {f"{name}x": x},
            {name: np.zeros((), np.float32)},
            {name: np.zeros(sides, np.float32)},
            {name: x.T},
            {name: x.astype(rng.choice([np.int64, np.complex64]))},
            {name: out.get(other, x), other: x},
        )
        out |= new[rng.integers(len(new))]
    return out


def test_a_mutated_file_is_one_line_or_the_same_network(golden):
    bases = [core() | HEAD, core() | SCALED | {"mask_token": TOKEN}]
    bases += [golden(name).group("params") for name in list(RECORDINGS)[:4]]
    rng = np.random.default_rng(0)
    for _ in range(40):
        tensors = mutated(rng, bases[rng.integers(len(bases))])
        try:
            found = formats.open_tensors(tensors, heads=3, decoder_heads=4)
        except ValueError as error:
            assert "\n" not in str(error)
        else:  # what differs, then, is no part of it
            unused = set(found.report.dropped)
            assert len(found.report.matched) + len(unused) == len(tensors)


ABOUT = (
    {"num_attention_heads": "3"},
    {"num_attention_heads": 0},
    {"layer_norm_eps": "1e-6"},
    {"image_size": [32]},
    {"pretrained_cfg": {"mean": [0.5, 0.5]}},
    {"pretrained_cfg": "vit"},
    {"model_args": []},
    {"hidden_act": "relu"},
)


@pytest.mark.parametrize("about", ABOUT)
def test_a_config_that_cannot_be_is_refused(about):
    with pytest.raises(ValueError, match="config.json"):
        formats.open_tensors(core() | HEAD, heads=3, about=about)


def test_null_says_nothing_in_a_config():
    keys = ("layer_norm_eps", "image_size", "model_args", "pretrained_cfg")
    keys += ("num_attention_heads", "hidden_act", "global_pool")
    about = dict.fromkeys(keys) | {"input_size": None}
    plain = formats.open_tensors(core() | HEAD, heads=3)
    for more in ({}, {"pretrained_cfg": {"mean": None, "std": None}}):
        found = formats.open_tensors(core() | HEAD, heads=3, about=about | more)
        assert (found.encoder, found.input) == (plain.encoder, plain.input)
        assert found.origin.about == about | more  # as it was, to be given back


def test_what_config_json_tells_is_said():
    about = {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new"}
    found = formats.open_tensors(core() | HEAD, heads=3, about=about).report.found
    assert "LayerNorm epsilon 1e-05, by config.json" in found
    assert "GELU by tanh, by config.json" in found
    about = {"model_args": {"act_layer": "gelu"}}
    found = formats.open_tensors(core() | HEAD, heads=3, about=about).report.found
    assert "GELU the exact one, by config.json" in found


def test_the_decoder_is_checked_too(golden):
    record = golden("mae_normpix").group("params")
    name = "decoder_blocks.1.mlp.fc1.weight"
    with pytest.raises(
        ValueError, match=r"decoder_blocks\.1\.mlp\.fc1.*block_1/mlp/fc1"
    ):
        formats.open_tensors(record | {name: record[name][:, :31]}, heads=3)
    cut = {k: x for k, x in record.items() if k != name}
    with pytest.raises(
        ValueError, match="heads/decoder/block_1/mlp/fc1/kernel .*is missing"
    ):
        formats.open_tensors(cut, heads=3)


def test_an_encoder_is_never_written_in_part(golden):
    found = opened(golden("simmim_shared_rpb"))
    for family in ("timm", "mae", "hf_vit"):
        with pytest.raises(ValueError, match="needs|no place for"):
            formats.export_again(found, family)
    scaled = formats.open_tensors(core() | HEAD | SCALED, heads=3)
    with pytest.raises(ValueError, match=r"no place for encoder/block_\*/gamma_1"):
        formats.export_again(scaled, "moco_v3")
    found = opened(golden("moco_v3"))
    made = formats.export_again(found, "timm")
    assert {name.split("/")[1] for name in made.left if name.startswith("heads")} == {
        "projector",
        "predictor",
    }


# Sizes


def test_sizes_come_from_the_tables():
    for side, patch in ((4, 8), (3, 16), (5, 4)):
        found = formats.open_tensors(core(side=side, patch=patch) | HEAD, heads=3)
        assert found.encoder["image"] == (side * patch, side * patch)
        assert found.encoder["patch"] == patch
    oblong = core() | HEAD
    oblong["pos_embed"] = np.ones((1, 1 + 2 * 4, 48), np.float32)
    with pytest.raises(ValueError, match="image="):
        formats.open_tensors(oblong | {"pos_embed": np.ones((1, 7, 48))}, heads=3)
    found = formats.open_tensors(oblong, heads=3, image=(16, 32))
    assert found.encoder["image"] == (16, 32)
    with pytest.raises(
        ValueError, match="position table of 9 rows|not the file's table"
    ):
        formats.open_tensors(oblong, heads=3, image=(32, 32))


def test_rows_of_a_position_table():
    assert _positions.split_rows(197, 1, 0) == 1
    assert _positions.split_rows(196, 1, 0) == 0
    assert _positions.split_rows(196 + 5, 5, 0) == 5
    assert _positions.split_rows(9, 1, 8) == 1
    with pytest.raises(ValueError, match="fits no square grid"):
        _positions.split_rows(199, 1, 0)


@pytest.mark.parametrize("width, heads", ((192, 3), (768, 12), (1024, 16), (1152, 16)))
def test_usual_heads(width, heads):
    report = Report()
    family = plugin.find("formats", "timm")()
    assert _spec.guess_heads(width, family, report) == heads
    assert report.assumed


def test_timms_config_tells_colour_and_pooling():
    about = {
        "global_pool": "avg",
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    found = formats.open_tensors(core() | HEAD, heads=3, about=about)
    assert found.input == {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert found.objective["pool"] == "patches"
    found = formats.open_tensors(core() | HEAD, heads=3)
    assert found.objective["pool"] == "cls"
    assert found.input["mean"] == (0.5,) * 3  # AugReg's; others of timm differ


def test_our_own_names_open_again(golden):
    found = opened(golden("mae_normpix"))
    made = formats.export_again(found, "ours").tensors
    again = formats.open_tensors(made)  # kernels tell the heads
    assert again.family == "ours" and again.encoder["position"] == "mae_sincos"
    jax.tree.map(np.testing.assert_array_equal, found.params, again.params)
    assert again.objective == found.objective


@pytest.mark.parametrize(
    "fields",
    [
        MAE,
        SIMMIM | {"relative": "per_block"},
        MOCO | {"stem": "conv", "patch": 16},
    ],
    ids=["mae", "simmim", "conv"],
)
def test_the_shapes_of_all_blocks_follow_from_one(fields):
    full = jax.eval_shape(lambda: _check.init(fields))
    assert _check.expected(fields) == full


# MoCo v3's stem of 16-pixel patches, as the keys of `nn.Sequential` in its code: four
# times convolution, BatchNorm, ReLU, then a 1x1 convolution. Of an encoder 48 wide.
CONV_STEM = {
    "0.weight": (6, 3, 3, 3),
    "1.weight": (6,),
    "1.bias": (6,),
    "1.running_mean": (6,),
    "1.running_var": (6,),
    "1.num_batches_tracked": (),
    "3.weight": (12, 6, 3, 3),
    "4.weight": (12,),
    "4.bias": (12,),
    "4.running_mean": (12,),
    "4.running_var": (12,),
    "4.num_batches_tracked": (),
    "6.weight": (24, 12, 3, 3),
    "7.weight": (24,),
    "7.bias": (24,),
    "7.running_mean": (24,),
    "7.running_var": (24,),
    "7.num_batches_tracked": (),
    "9.weight": (48, 24, 3, 3),
    "10.weight": (48,),
    "10.bias": (48,),
    "10.running_mean": (48,),
    "10.running_var": (48,),
    "10.num_batches_tracked": (),
    "12.weight": (48, 48, 1, 1),
    "12.bias": (48,),
}


def conv_stem():
    """Random numbers under these names; variances are positive."""
    rng = np.random.default_rng(1)
    made = {k: rng.uniform(0.1, 0.9, s).astype("f4") for k, s in CONV_STEM.items()}
    counts = {k: np.int64(7) for k in CONV_STEM if k.endswith("tracked")}
    return made | counts


def with_conv_stem():
    plain = core(side=2, table="moco_sincos")
    plain = {k: x for k, x in plain.items() if not k.startswith("patch_embed.")}
    return plain | under("patch_embed.proj.", conv_stem())


def test_a_conv_stem():
    tensors = under("state_dict/module.base_encoder.", with_conv_stem())
    found = formats.open_tensors(tensors, heads=3)
    assert (found.family, found.encoder["stem"]) == ("moco_v3", "conv")
    assert (found.encoder["patch"], found.encoder["image"]) == (16, (32, 32))
    assert "conv stem are from documentation" in str(found.report)
    back = formats.export_again(found).tensors
    assert set(back) == set(tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(back[name], x, name)


def test_a_conv_stem_computes_what_its_code_does():
    torch = pytest.importorskip("torch")
    nn, sides = torch.nn, (3, 6, 12, 24, 48)
    layers = []
    for a, b in itertools.pairwise(sides):
        layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    stem = nn.Sequential(*layers, nn.Conv2d(48, 48, 1)).eval()
    theirs = {k: torch.tensor(x) for k, x in conv_stem().items()}
    stem.load_state_dict(theirs, strict=True)
    found = formats.open_tensors(with_conv_stem(), heads=3)
    variables = {"params": found.params["encoder"], "stats": found.extra["encoder"]}
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    encoder = vit.make(**found.encoder)
    got = jax.jit(lambda v, x: encoder.apply(v, x, method="embed"))(variables, x)
    with torch.no_grad():
        want = stem(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    close(got, want.flatten(2).transpose(1, 2))


def test_mae_order_of_pixels_is_ours():
    assert mae.ORDER == "dyxc"  # decoder_pred is then the same linear map
