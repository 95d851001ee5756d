"""Checkpoints of timm and transformers, live: random weights in, the same numbers out.

Every fixture is written by the other library (its `state_dict` or `save_pretrained`),
and what we export is loaded by it strictly.
"""

import functools
import importlib
import json
import warnings

import jax
import numpy as np
import pytest
import torchvision_stub

from clvsmim import formats, masks, vit
from clvsmim.heads import PixelDecoder
from clvsmim.objectives import mae, simmim

torch = pytest.importorskip("torch")

GRID, PATCH, WIDTH = 4, 8, 48
SIZES = {"img_size": 32, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2}
TIMM = SIZES | {"num_heads": 3, "num_classes": 5}
HF = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": PATCH,
}
WIDE = {"intermediate_size": 4 * WIDTH}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 128,
}


@pytest.fixture(scope="module")
def timm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's imports
        torchvision_stub.install()
        found = pytest.importorskip("timm")
        for name in ("beit", "deit", "vision_transformer"):
            importlib.import_module(f"timm.models.{name}")
    return found


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("transformers")
        found.logging.set_verbosity_error()
        found.logging.disable_progress_bar()
        found.ViTMAEForPreTraining, found.Dinov2Model  # noqa: B018 (imported lazily)
    return found


def images(seed=0):
    """(B, 3, rows, columns)."""
    return np.random.default_rng(seed).normal(size=(3, 3, 32, 32)).astype(np.float32)


def randomised(model):
    """No weight keeps a value that hides a mistake: zeros, ones, 1e-5."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise)
    return model.eval()


def state(model):
    return {name: x.numpy() for name, x in model.state_dict().items()}


def tapped(blocks, first, second, out):
    """Our taps "residual", in order, and "head_outputs", the heads side by side.

    They are what enters each norm, leaves the last block, and enters the linear maps
    after attention.
    """
    found, heads = [], []

    def keep(module, inputs):
        found.append(inputs[0].detach().numpy())

    def keep_heads(module, inputs):
        heads.append(inputs[0].detach().numpy())

    for block in blocks:
        getattr(block, first).register_forward_pre_hook(keep)
        getattr(block, second).register_forward_pre_hook(keep)
        block.get_submodule(out).register_forward_pre_hook(keep_heads)

    def last(module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        found.append(output.detach().numpy())

    blocks[-1].register_forward_hook(last)
    return found, heads


def evaluated(loss, params, inputs):
    """The loss of an objective, of which encoder and heads are bound."""

    @jax.jit
    def run(params, inputs):
        extra = {"encoder": {}, "heads": {}}
        key = jax.random.key(0)
        return loss(params, extra, inputs, key, progress=0.0, train=False)[0]

    return run(params, inputs)


@functools.partial(jax.jit, static_argnums=0)
def run(encoder, params, x):
    return encoder.apply({"params": params}, x)


def ours(opened, x):
    """(tokens, taps) of NCHW images."""
    encoder = vit.make(**opened.encoder)
    tokens, taps = run(encoder, opened.params["encoder"], np.moveaxis(x, 1, 3))
    return np.asarray(tokens), {k: list(map(np.asarray, v)) for k, v in taps.items()}


def assert_taps(taps, want):
    residual, heads = want
    assert_close(taps["residual"], residual)
    side_by_side = [
        x.swapaxes(1, 2).reshape(*heads[0].shape) for x in taps["head_outputs"]
    ]
    assert_close(side_by_side, heads)


def logits(opened, tokens):
    """Of the classifier that came along."""
    head, prefix = opened.params["heads"]["last"]["rate_1"], opened.encoder["prefix"]
    x = tokens[:, 0]
    if opened.objective["pool"] == "patches":
        x = tokens[:, prefix:].mean(axis=1)
    assert ("fc_norm" in head) == (opened.objective["norm"] == "layer")
    if "fc_norm" in head:
        norm = vit.layer_norm(epsilon=opened.encoder["norm_eps"])
        x = norm.apply({"params": head["fc_norm"]}, x)
    return x @ head["kernel"] + head["bias"][None]


def assert_close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def assert_same(got, want, but=()):
    """Bit for bit, dtype too; but of some names the shape alone."""
    assert set(got) == set(want)
    for name, x in want.items():
        assert got[name].shape == x.shape, name
        if not any(name.endswith(end) for end in but):
            assert got[name].dtype == x.dtype, name
            assert got[name].tobytes() == x.tobytes(), name


# timm


def built(timm, config):
    """What `Exported.config` describes, made by timm."""
    folder, _, kind = config["class"].rpartition(".")
    arguments = dict(config["arguments"])
    layers = timm.layers
    if config["mlp"] == "swiglu":
        arguments |= {"mlp_layer": layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    elif config["mlp"] == "gelu_tanh":
        arguments |= {"act_layer": "gelu_tanh"}
    norm = functools.partial(layers.LayerNorm, eps=config["norm_eps"])
    make = getattr(importlib.import_module(folder), kind)
    return make(norm_layer=norm, **arguments)


VIT = "vision_transformer.VisionTransformer"
SWIGLU = {"mlp_ratio": 5.5, "init_values": 1.0}
RELATIVE = {"use_abs_pos_emb": False, "init_values": 0.1}
TIMM_CASES = {
    "classifier": (VIT, {}, "timm"),
    "mean of patches": (VIT, {"global_pool": "avg"}, "timm"),
    "mean, last norm": (VIT, {"global_pool": "avg", "fc_norm": False}, "timm"),
    "CLS, norm": (VIT, {"global_pool": "token", "fc_norm": True}, "timm"),
    "no CLS": (VIT, {"class_token": False, "global_pool": "avg"}, "timm"),
    "no bias of q, k, v": (VIT, {"qkv_bias": False}, "timm"),
    "no position of CLS": (VIT, {"no_embed_class": True}, "timm"),
    "registers": (
        VIT,
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
        "timm",
    ),
    "SwiGLU": (VIT, SWIGLU | {"reg_tokens": 2, "no_embed_class": True}, "timm"),
    "headless": (VIT, {"num_classes": 0}, "dino"),
    "shared relative": (
        "beit.Beit",
        RELATIVE | {"use_shared_rel_pos_bias": True},
        "beit",
    ),
    "relative": ("beit.Beit", RELATIVE | {"use_rel_pos_bias": True}, "beit"),
}


def timm_model(timm, kind, arguments):
    folder, _, name = kind.rpartition(".")
    make = getattr(importlib.import_module(f"timm.models.{folder}"), name)
    arguments = TIMM | arguments
    if "mlp_ratio" in arguments:
        layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
        arguments = arguments | layers
    return randomised(make(**arguments))


@pytest.mark.parametrize("case", TIMM_CASES)
def test_timm(timm, case):
    kind, arguments, family = TIMM_CASES[case]
    model, x = timm_model(timm, kind, arguments), images()
    want = tapped(list(model.blocks), "norm1", "norm2", "attn.proj")
    with torch.no_grad():
        out = model(torch.from_numpy(x)).numpy()
    # SimMIM's fine-tuned files have BEiT's names.
    format = "beit" if family == "beit" else ""
    about = {"global_pool": model.global_pool}  # as in timm's config.json
    opened = formats.open_tensors(state(model), heads=3, format=format, about=about)
    assert opened.family == family
    tokens, taps = ours(opened, x)
    assert_taps(taps, want)
    got = tokens[:, 0] if opened.objective is None else logits(opened, tokens)
    assert_close([got], [out])
    assert_same(formats.export_again(opened).tensors, state(model))

    exported = formats.export_again(opened, "beit" if family == "beit" else "timm")
    again = built(timm, exported.config).eval()
    tensors = {k: torch.from_numpy(v.copy()) for k, v in exported.tensors.items()}
    again.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        assert_close([again(torch.from_numpy(x)).numpy()], [out])


FOLDED = {
    "distilled DeiT": ("deit.VisionTransformerDistilled", {}, "deit"),
    "registers with positions": (VIT, {"reg_tokens": 4}, "timm"),
}


@pytest.mark.parametrize("case", FOLDED)
def test_positions_of_tokens_that_have_none_here_go_into_the_tokens(timm, case):
    kind, arguments, family = FOLDED[case]
    model, x = timm_model(timm, kind, arguments), images()
    want = tapped(list(model.blocks), "norm1", "norm2", "attn.proj")
    with torch.no_grad():
        out = model(torch.from_numpy(x)).numpy()
    opened = formats.open_tensors(state(model), heads=3)
    assert opened.family == family
    _, taps = ours(opened, x)
    assert_taps(taps, want)
    exported = formats.export_again(opened)
    again = built(timm, exported.config).eval()
    tensors = {k: torch.from_numpy(v.copy()) for k, v in exported.tensors.items()}
    again.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        assert_close([again(torch.from_numpy(x)).numpy()], [out])


def test_a_distilled_deit_is_said_to_have_two_classifiers(timm):
    model = timm_model(timm, "deit.VisionTransformerDistilled", {})
    report = formats.open_tensors(state(model), heads=3).report
    assert any("distillation token" in line for line in report.warnings)


def test_dinov2_as_timm_converts_it(timm):
    """Our writing of DINOv2's own names, read by timm's converter of them."""
    model = timm_model(timm, VIT, TIMM_CASES["registers"][1] | {"num_classes": 0})
    x = images()
    opened = formats.open_tensors(state(model), heads=3)
    theirs = formats.export_again(opened, "dinov2").tensors
    assert {"register_tokens", "mask_token"} <= set(theirs)
    table = theirs["pos_embed"]
    assert table.shape == (1, 17, WIDTH)  # with a row for CLS
    theirs["pos_embed"] = table + 0.1 * images()[0, 0, :1, :1]  # which is not zero
    tensors = {k: torch.from_numpy(v.copy()) for k, v in theirs.items()}
    convert = timm.models.vision_transformer.checkpoint_filter_fn
    model.load_state_dict(convert(tensors, model), strict=True)
    with torch.no_grad():
        want = model(torch.from_numpy(x)).numpy()
    opened = formats.open_tensors(theirs, heads=3)
    assert opened.family == "dinov2"
    tokens, _ = ours(opened, x)
    assert_close([tokens[:, 0]], [want])


def google(rng, stacked):
    """Arrays by the names of Google's vision_transformer, or stacked, of big_vision."""
    d, h = WIDTH, 3
    block = {
        "LayerNorm_0/scale": (d,),
        "LayerNorm_0/bias": (d,),
        "MultiHeadDotProductAttention_1/query/kernel": (d, h, d // h),
        "MultiHeadDotProductAttention_1/query/bias": (h, d // h),
        "MultiHeadDotProductAttention_1/key/kernel": (d, h, d // h),
        "MultiHeadDotProductAttention_1/key/bias": (h, d // h),
        "MultiHeadDotProductAttention_1/value/kernel": (d, h, d // h),
        "MultiHeadDotProductAttention_1/value/bias": (h, d // h),
        "MultiHeadDotProductAttention_1/out/kernel": (h, d // h, d),
        "MultiHeadDotProductAttention_1/out/bias": (d,),
        "LayerNorm_2/scale": (d,),
        "LayerNorm_2/bias": (d,),
        "MlpBlock_3/Dense_0/kernel": (d, 4 * d),
        "MlpBlock_3/Dense_0/bias": (4 * d,),
        "MlpBlock_3/Dense_1/kernel": (4 * d, d),
        "MlpBlock_3/Dense_1/bias": (d,),
    }
    rest = {
        "embedding/kernel": (PATCH, PATCH, 3, d),
        "embedding/bias": (d,),
        "cls": (1, 1, d),
        "Transformer/posembed_input/pos_embedding": (1, GRID**2 + 1, d),
        "Transformer/encoder_norm/scale": (d,),
        "Transformer/encoder_norm/bias": (d,),
        "head/kernel": (d, 5),
        "head/bias": (5,),
    }
    names = (
        ("tion_1/", "tion_0/"),
        ("LayerNorm_2", "LayerNorm_1"),
        ("Block_3", "Block_0"),
    )
    if stacked:
        for old, new in names:
            block = {k.replace(old, new): v for k, v in block.items()}
        stack = {f"Transformer/encoderblock/{k}": (2, *v) for k, v in block.items()}
        rest["pos_embedding"] = rest.pop("Transformer/posembed_input/pos_embedding")
        shapes = {f"params/{k}": v for k, v in (rest | stack).items()}
    else:
        blocks = {
            f"Transformer/encoderblock_{i}/{k}": v
            for i in range(2)
            for k, v in block.items()
        }
        shapes = rest | blocks
    return {k: rng.normal(0, 0.2, v).astype(np.float32) for k, v in shapes.items()}


@pytest.mark.parametrize("stacked", (False, True))
def test_google_npz_as_timm_reads_it(timm, tmp_path, stacked):
    arrays, path = google(np.random.default_rng(0), stacked), tmp_path / "ti.npz"
    np.savez(path, **arrays)
    make = timm.models.vision_transformer.VisionTransformer
    model, x = make(**TIMM, act_layer="gelu_tanh").eval(), images()
    model.load_pretrained(str(path))
    want = tapped(list(model.blocks), "norm1", "norm2", "attn.proj")
    with torch.no_grad():
        out = model(torch.from_numpy(x)).numpy()
    opened = formats.open_file(str(path))
    assert opened.family == "google" and opened.encoder["mlp"] == "gelu_tanh"
    assert opened.input["mean"] == (0.5, 0.5, 0.5)
    tokens, taps = ours(opened, x)
    assert_taps(taps, want)
    assert_close([logits(opened, tokens)], [out])
    if not stacked:
        assert_same(formats.export_again(opened).tensors, arrays)


# transformers


def saved(model, folder):
    """(tensors, config.json) as `save_pretrained` writes them."""
    numpy = pytest.importorskip("safetensors.numpy")
    model.save_pretrained(folder)
    tensors = numpy.load_file(folder / "model.safetensors")
    return tensors, json.loads((folder / "config.json").read_text())


def loaded(model, exported, folder):
    """What the library makes of an export; nothing missing, nothing left over."""
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {k: np.ascontiguousarray(v) for k, v in exported.tensors.items()}
    folder.mkdir()
    numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(exported.config))
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return again.eval()


def fill_tables(model):
    """ViTMAE's sin-cos tables by its own function: version 5.23 leaves zeros there."""
    module = importlib.import_module("transformers.models.vit_mae.modeling_vit_mae")
    make = module.build_2d_sinusoidal_position_embedding
    for name, table in model.named_parameters():
        if name.endswith(("position_embeddings", "decoder_pos_embed")):
            rows = make(GRID, GRID, table.shape[-1], cls_token=True)
            table.data = torch.cat(rows.chunk(2, dim=1)[::-1], dim=1)[None]


SHARED = {"use_shared_relative_position_bias": True, "use_mask_token": True}
OWN = {"use_relative_position_bias": True}
OUTER = {"use_mean_pooling": False, "use_absolute_position_embeddings": True}
HF_CASES = {
    "ViT": ("ViTModel", "ViTConfig", WIDE | {"layer_norm_eps": 0.1}, "hf_vit"),
    "ViT, classifier": (
        "ViTForImageClassification",
        "ViTConfig",
        WIDE | {"hidden_act": "gelu_pytorch_tanh"},
        "hf_vit",
    ),
    "ViTMAE": ("ViTMAEModel", "ViTMAEConfig", WIDE | {"mask_ratio": 0.0}, "hf_vitmae"),
    "Dinov2": ("Dinov2Model", "Dinov2Config", {}, "hf_dinov2"),
    "Dinov2, classifier": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {},
        "hf_dinov2",
    ),
    "Dinov2, SwiGLU": (
        "Dinov2Model",
        "Dinov2Config",
        {"use_swiglu_ffn": True},
        "hf_dinov2",
    ),
    "Dinov2, registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {},
        "hf_dinov2",
    ),
    "BEiT": ("BeitModel", "BeitConfig", WIDE | SHARED, "hf_beit"),
    "BEiT, norm": ("BeitModel", "BeitConfig", WIDE | OWN | OUTER, "hf_beit"),
    "BEiT, pre-training": (
        "BeitForMaskedImageModeling",
        "BeitConfig",
        WIDE | SHARED | {"vocab_size": 20},
        "hf_beit",
    ),
    "BEiT, classifier": (
        "BeitForImageClassification",
        "BeitConfig",
        WIDE | OWN,
        "hf_beit",
    ),
    "DeiT": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", WIDE, "hf_vit"),
}


def hf_model(transformers, kind, config, arguments):
    config = getattr(transformers, config)(**HF | arguments)
    model = getattr(transformers, kind)(config)
    if "MAE" in kind:
        fill_tables(model)
    return randomised(model)


def hf_blocks(model):
    found = [
        module
        for name, module in model.named_modules()
        if hasattr(module, "attention") and hasattr(module, "mlp")
        if "decoder" not in name
    ]
    first = "norm1" if hasattr(found[0], "norm1") else "layernorm_before"
    second = "norm2" if hasattr(found[0], "norm2") else "layernorm_after"
    return found, first, second, "attention.o_proj"


@pytest.mark.parametrize("case", HF_CASES)
def test_transformers(transformers, tmp_path, case):
    kind, config, arguments, family = HF_CASES[case]
    model, x = hf_model(transformers, kind, config, arguments), images()
    tensors, about = saved(model, tmp_path / "theirs")
    want = tapped(*hf_blocks(model))
    order = {"noise": torch.arange(16.0).repeat(3, 1)} if "MAE" in case else {}
    model.set_attn_implementation("eager")  # which returns its probabilities
    with torch.no_grad():
        out = model(torch.from_numpy(x), output_attentions=True, **order)

    opened = formats.open_file(str(tmp_path / "theirs" / "model.safetensors"))
    assert opened.family == family and opened.encoder["heads"] == 3
    assert opened.encoder["norm_eps"] == about["layer_norm_eps"]
    tokens, taps = ours(opened, x)
    assert_taps(taps, want)
    assert_close(taps["attention"], [a.numpy() for a in out.attentions])
    if hasattr(out, "last_hidden_state"):
        assert_close([tokens], [out.last_hidden_state.numpy()])
    if opened.objective:
        assert_close([logits(opened, tokens)], [out.logits.numpy()])
    # DeiT's second token has a position of its own there; see the test of timm's.
    but = ("distillation_token", "position_embeddings") if case == "DeiT" else ()
    exported = formats.export_again(opened)
    assert_same(exported.tensors, tensors, but)
    assert exported.config == about

    again = loaded(model, exported, tmp_path / "ours")
    with torch.no_grad():
        same = again(torch.from_numpy(x), **order)
    key = "logits" if hasattr(out, "logits") else "last_hidden_state"
    assert_close([same[key].numpy()], [out[key].numpy()])


@pytest.mark.parametrize("case", ("ViT", "Dinov2, registers", "BEiT"))
def test_names_that_transformers_5_has_in_memory(transformers, tmp_path, case):
    kind, config, arguments, family = HF_CASES[case]
    model = hf_model(transformers, kind, config, arguments)
    tensors, about = saved(model, tmp_path / "theirs")
    memory = formats.open_tensors(state(model), about=about)
    assert memory.family == family
    theirs = formats.open_tensors(tensors, about=about)
    jax.tree.map(np.testing.assert_array_equal, memory.params, theirs.params)
    assert_same(formats.export_again(memory).tensors, state(model))


def test_the_index_that_transformers_4_stored_is_compared(
    transformers, tmp_path, golden
):
    """The recording's is of the same 4 x 4 grid."""
    kind, config, arguments, _ = HF_CASES["BEiT"]
    model = hf_model(transformers, kind, config, arguments)
    tensors, about = saved(model, tmp_path / "theirs")
    name = "relative_position_bias.relative_position_index"
    index = golden("simmim_shared_rpb")[f"params/encoder.rel_pos_bias.{name[23:]}"]
    stored = tensors | {f"encoder.{name}": index}
    opened = formats.open_tensors(stored, about=about)
    assert f"encoder.{name}" in opened.report.dropped
    assert_same(formats.export_again(opened).tensors, stored)
    with pytest.raises(ValueError, match="not the expected table"):
        formats.open_tensors(stored | {f"encoder.{name}": index.T}, about=about)


def test_loss_of_vitmae_with_the_same_noise(transformers, tmp_path):
    arguments = WIDE | DECODER | {"norm_pix_loss": True, "mask_ratio": 0.75}
    kind = ("ViTMAEForPreTraining", "ViTMAEConfig")
    model, x = hf_model(transformers, *kind, arguments), images()
    tensors, about = saved(model, tmp_path / "theirs")
    noise = np.random.default_rng(1).random((3, 16), np.float32)
    with torch.no_grad():
        out = model(torch.from_numpy(x), noise=torch.from_numpy(noise))

    opened = formats.open_tensors(tensors, about=about)
    assert opened.objective["decoder"] == {"width": 32, "depth": 2, "heads": 4}
    encoder = vit.make(**opened.encoder)
    decoder = mae.make_decoder(encoder=encoder, **opened.objective["decoder"])
    keep, restore, mask = jax.vmap(lambda n: masks.mask_from_noise(n, 4))(noise)
    inputs = {"image": np.moveaxis(x, 1, 3), "keep": keep, "restore": restore}
    loss = functools.partial(mae.loss, encoder, decoder, True)
    found = evaluated(loss, opened.params, inputs | {"mask": mask})
    np.testing.assert_allclose(found, out.loss, rtol=1e-5)
    exported = formats.export_again(opened)
    assert_same(exported.tensors, tensors)
    # As if it came from our own training: our names for the decoder, our config.
    plain = formats.export(
        opened.params, opened.extra, opened.encoder, "hf_vitmae", decoder_heads=4
    )
    again = loaded(model, plain, tmp_path / "ours")
    with torch.no_grad():
        same = again(torch.from_numpy(x), noise=torch.from_numpy(noise))
    assert_close([same.logits.numpy()], [out.logits.numpy()])


def test_loss_of_masked_image_modelling_with_the_same_mask(transformers, tmp_path):
    arguments = WIDE | {"encoder_stride": PATCH}
    kind = ("ViTForMaskedImageModeling", "ViTConfig")
    model, x = hf_model(transformers, *kind, arguments), images()
    tensors, about = saved(model, tmp_path / "theirs")
    mask = np.random.default_rng(1).random((3, 16)) < 0.5
    with torch.no_grad():
        out = model(torch.from_numpy(x), bool_masked_pos=torch.from_numpy(mask))

    opened = formats.open_tensors(tensors, about=about)
    assert opened.objective == {"name": "simmim"}
    loss = functools.partial(
        simmim.loss, vit.make(**opened.encoder), PixelDecoder(3 * PATCH**2)
    )
    inputs = {"image": np.moveaxis(x, 1, 3), "mask": mask.reshape(3, GRID, GRID)}
    found = evaluated(loss, opened.params, inputs)
    np.testing.assert_allclose(found, out.loss, rtol=1e-5)
    plain = formats.export(opened.params, opened.extra, opened.encoder, "hf_vit")
    assert_same(formats.export_again(opened).tensors, tensors)
    loaded(model, plain, tmp_path / "ours")


def test_recorded_simmim_runs_in_timms_beit(timm, golden):
    record = golden("simmim_shared_rpb")
    opened = formats.open_tensors(record.group("params"))
    exported = formats.export_again(opened, "beit")
    assert set(exported.left) == {
        "heads/mask_token",
        "heads/decoder/kernel",
        "heads/decoder/bias",
    }
    model = built(timm, exported.config).eval()
    tensors = {k: torch.from_numpy(v.copy()) for k, v in exported.tensors.items()}
    model.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        out = model.forward_features(torch.from_numpy(record["image"])).numpy()
    tokens, _ = ours(opened, record["image"])
    assert_close([tokens], [out])


def test_recorded_moco_v3_gives_its_logits_in_timm(timm, golden):
    record = golden("analysis_moco_vit")
    opened = formats.open_tensors(record.group("params"), heads=3)
    exported = formats.export_again(opened, "timm")
    model = built(timm, exported.config).eval()
    tensors = {k: torch.from_numpy(v.copy()) for k, v in exported.tensors.items()}
    model.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        out = model(torch.from_numpy(record["image"])).numpy()
    np.testing.assert_allclose(out, record["logits"], rtol=1e-5, atol=1e-5)


def test_recorded_mae_gives_its_loss_in_transformers(transformers, golden, tmp_path):
    record = golden("mae_normpix")
    params = record.group("params")
    opened = formats.open_tensors(params, heads=3, decoder_heads=4)
    exported = formats.export_again(opened, "hf_vitmae")
    model = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**exported.config)
    )
    model = loaded(model, exported, tmp_path / "ours")
    image, noise = (torch.from_numpy(record[name]) for name in ("image", "noise"))
    with torch.no_grad():
        loss = model(image, noise=noise).loss
    np.testing.assert_allclose(loss, record["loss"], rtol=1e-5)


def test_an_onnx_export_opens_by_the_names_it_had(timm, tmp_path):
    """The weights of linear layers are transposed constants of MatMul nodes there."""
    pytest.importorskip("onnx")
    path = str(tmp_path / "vit.onnx")
    model, x = timm_model(timm, VIT, {}), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, torch.from_numpy(x), path, dynamo=False)
    opened = formats.open_file(path, heads=3)
    assert opened.family == "timm"
    want = formats.open_tensors(state(model), heads=3)
    jax.tree.map(np.testing.assert_array_equal, opened.params, want.params)


def test_what_timm_has_goes_to_transformers_and_back(timm, transformers, tmp_path):
    model = timm_model(timm, VIT, {})
    opened = formats.open_tensors(state(model), heads=3)
    exported = formats.export_again(opened, "hf_vit")
    assert exported.config["layer_norm_eps"] == 1e-6  # not transformers' own default
    kind = getattr(transformers, exported.config["architectures"][0])
    config = transformers.ViTConfig(**exported.config)
    again = loaded(kind(config), exported, tmp_path / "ours")
    x = torch.from_numpy(images())
    with torch.no_grad():
        assert_close([again(x).logits.numpy()], [model(x).numpy()])
    back = formats.open_tensors(exported.tensors, about=exported.config)
    assert_same(formats.export_again(back, "timm").tensors, state(model))
