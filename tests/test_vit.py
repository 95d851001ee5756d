"""The ViT against the recorded originals and against the published tables."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest
from models import MOCO, SIMMIM, TINY, close, tiny

from clvsmim import inits, layers, tree, vit


@pytest.mark.parametrize(
    ("name", "base"),
    [("analysis_moco_vit", MOCO), ("analysis_simmim_vit", SIMMIM)],
)
def test_taps_equal_the_recorded_analysis_model(golden, name, base):
    record = golden(name)
    params = originals.encoder(record.group("params"), heads=3)
    model = tiny(base)
    images = originals.images(record["image"])
    params = tree.strict(_shapes(model, images), params, "the recording")
    tokens, taps = jax.jit(model.apply)({"params": params}, images)
    for ours, theirs in zip(taps["residual"], record["zs"], strict=True):
        close(ours, theirs, rtol=1e-5)
    for ours, theirs in zip(taps["attention"], record["attns"], strict=True):
        close(ours, theirs, rtol=1e-5)
    for ours, theirs in zip(taps["head_outputs"], record["attn_fts"], strict=True):
        close(ours, theirs, rtol=1e-5)
    head = record.group("params")
    pooled = tokens[:, 0] if name == "analysis_moco_vit" else None
    if pooled is not None:
        logits = pooled @ head["head.weight"].T + head["head.bias"][None]
        close(logits, record["logits"], rtol=1e-5)


def _shapes(model, images):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images))["params"]


def test_sincos_tables_equal_the_recorded_ones(golden):
    record = golden("posembed")
    zero = np.zeros((1, 192))
    moco = np.concatenate([zero, inits.sincos_table((14, 14), 192, rows_first=True)])
    mae = np.concatenate([zero, inits.sincos_table((14, 14), 192, rows_first=False)])
    np.testing.assert_allclose(moco, record["moco_v3_14x14x192"][0], atol=1e-6)
    np.testing.assert_allclose(mae, record["mae_14x14x192"], atol=1e-6)


def test_sincos_check_values():
    moco = inits.sincos_table((14, 14), 768, rows_first=True)
    mae = inits.sincos_table((14, 14), 768, rows_first=False)
    dims = [0, 1, 192, 384, 385, 576]
    expected = [0, 0, 1, 0.841471, 0.815251, 0.540302]
    np.testing.assert_allclose(moco[1, dims], expected, atol=1e-6)
    np.testing.assert_allclose(mae[1, dims], expected[3:] + expected[:3], atol=1e-6)
    weights = np.arange(196)[:, None] * np.arange(768)
    assert np.isclose((moco * weights).sum(), 3_054_011_674.05, rtol=1e-9)
    assert np.isclose((mae * weights).sum(), 2_994_398_578.78, rtol=1e-9)
    assert np.isclose(moco.sum(), 69594.4939, rtol=1e-8)


def test_a_non_square_table_has_its_own_rows_and_columns():
    table = inits.sincos_table((2, 3), 8, rows_first=True).reshape(2, 3, 8)
    np.testing.assert_array_equal(table[:, 0, :4], table[:, 2, :4])  # row half
    np.testing.assert_array_equal(table[0, :, 4:], table[1, :, 4:])  # column half
    assert not np.allclose(table[0, 1], table[0, 2])


def test_relative_index_check_values():
    index = inits.relative_index((14, 14), prefix=1)
    places = [(1, 1), (1, 2), (2, 1), (15, 1), (1, 15), (196, 1), (1, 196)]
    values = [364, 363, 365, 391, 337, 728, 0]
    assert [int(index[p]) for p in places] == values
    assert [int(index[p]) for p in [(0, 1), (1, 0), (0, 0)]] == [729, 730, 731]
    assert int(index.sum()) == 14_270_119
    assert inits.relative_index((2, 2), prefix=1).tolist() == [
        [11, 9, 9, 9, 9],
        [10, 4, 3, 1, 0],
        [10, 5, 4, 2, 1],
        [10, 7, 6, 4, 3],
        [10, 8, 7, 5, 4],
    ]


def test_relative_index_of_a_non_square_grid_is_one_row_per_offset():
    rows, columns = 2, 3
    index = inits.relative_index((rows, columns), prefix=0)
    offsets = {}
    for q in range(6):
        for k in range(6):
            offset = q // columns - k // columns, q % columns - k % columns
            offsets.setdefault(offset, set()).add(int(index[q, k]))
    assert all(len(found) == 1 for found in offsets.values())
    assert len({min(f) for f in offsets.values()}) == (2 * rows - 1) * (2 * columns - 1)


PARAMETERS = {"Ti": 5_524_416, "S": 21_665_664, "B": 85_798_656, "L": 303_301_632}


@pytest.mark.parametrize(("size", "count"), [*PARAMETERS.items(), ("H", 630_764_800)])
def test_parameter_counts(size, count):
    patch = 14 if size == "H" else 16
    shape = {"image": (224, 224), "patch": patch, "position": "moco_sincos"}
    model = tiny(TINY, **vit.SIZES[size], **shape)
    shapes = _shapes(model, jnp.zeros((1, 224, 224, 3)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_canonical_tree_of_b16():
    shape = {"image": (224, 224), "patch": 16, "relative": "per_block"}
    model = tiny(SIMMIM, **vit.SIZES["B"], **shape)
    shapes = _shapes(model, jnp.zeros((1, 224, 224, 3)))
    shapes = {k: v.shape for k, v in tree.named(shapes).items()}
    block = {k[len("block_7/") :]: v for k, v in shapes.items() if "block_7/" in k}
    assert block == {
        "ln1/scale": (768,),
        "ln1/bias": (768,),
        "attn/q/kernel": (768, 12, 64),
        "attn/q/bias": (12, 64),
        "attn/k/kernel": (768, 12, 64),
        "attn/v/kernel": (768, 12, 64),
        "attn/v/bias": (12, 64),
        "attn/out/kernel": (12, 64, 768),
        "attn/out/bias": (768,),
        "attn/rel_table": (732, 12),
        "ln2/scale": (768,),
        "ln2/bias": (768,),
        "mlp/fc1/kernel": (768, 3072),
        "mlp/fc1/bias": (3072,),
        "mlp/fc2/kernel": (3072, 768),
        "mlp/fc2/bias": (768,),
        "gamma_1": (768,),
        "gamma_2": (768,),
    }
    assert {k: v for k, v in shapes.items() if "block_" not in k} == {
        "cls_token": (1, 1, 768),
        "patch_embed/kernel": (16, 16, 3, 768),
        "patch_embed/bias": (768,),
        "ln_final/scale": (768,),
        "ln_final/bias": (768,),
    }


def test_conv_stem_parameter_count_of_moco_v3():
    shape = {"image": (224, 224), "patch": 16, "stem": "conv", "depth": 1}
    model = tiny(TINY, **(vit.SIZES["B"] | shape))
    shapes = _shapes(model, jnp.zeros((1, 224, 224, 3)))["patch_embed"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 4_079_712


UNIFORM, NORMAL, CUT = "uniform", "normal", "cut"
XAVIER_B = (6 / (2 * 768)) ** 0.5
INIT_TABLE = {
    "moco_v3": {
        "patch_embed/kernel": (UNIFORM, 0.0625),
        "patch_embed/bias": (UNIFORM, 0.0),
        "block_1/attn/q/kernel": (UNIFORM, 0.0625),
        "block_1/attn/out/kernel": (UNIFORM, 0.0625),
        "block_1/mlp/fc1/kernel": (UNIFORM, 0.0395),
        "block_1/mlp/fc2/kernel": (UNIFORM, 0.0395),
        "cls_token": (NORMAL, 1e-6),
    },
    "mae": {
        "patch_embed/kernel": (UNIFORM, 0.0625),
        "patch_embed/bias": (UNIFORM, 0.0361),
        "block_1/attn/v/kernel": (UNIFORM, 0.0442),
        "block_1/attn/out/kernel": (UNIFORM, 0.0625),
        "block_1/mlp/fc1/kernel": (UNIFORM, 0.0395),
        "cls_token": (NORMAL, 0.02),
    },
    "simmim": {
        "patch_embed/kernel": (CUT, 0.02),
        "patch_embed/bias": (UNIFORM, 0.0),
        "block_1/attn/k/kernel": (CUT, 0.02),
        "block_1/attn/out/kernel": (CUT, 0.02 / 2),  # sqrt(2 (1 + 1))
        "block_1/mlp/fc1/kernel": (CUT, 0.02),
        "block_1/mlp/fc2/kernel": (CUT, 0.02 / 2),
        "cls_token": (CUT, 0.02),
    },
    "timm": {
        "patch_embed/kernel": (UNIFORM, 0.0361),
        "patch_embed/bias": (UNIFORM, 0.0361),
        "block_1/attn/q/kernel": (NORMAL, 0.02),
        "block_1/mlp/fc2/kernel": (NORMAL, 0.02),
        "cls_token": (NORMAL, 0.02),
    },
}


@pytest.mark.parametrize("family", INIT_TABLE)
def test_initial_values_have_the_published_distribution(family):
    shape = {"image": (16, 16), "patch": 16, "width": 768, "heads": 12, "depth": 2}
    model = tiny(TINY, **(shape | {"init": family, "position": "learned"}))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    leaves = tree.named(params["params"])
    for name, (kind, size) in INIT_TABLE[family].items():
        x = np.asarray(leaves[name]).ravel()
        if size == 0:
            assert not x.any(), name
            continue
        std = size * {UNIFORM: 3**-0.5, NORMAL: 1.0, CUT: 0.53956}[kind]
        few = 5 / np.sqrt(x.size)  # five standard errors of a standard deviation
        assert abs(x.std() / std - 1) < few + 2e-3, name
        edge = np.abs(x).max() / size
        assert edge <= 1.002 if kind != NORMAL else edge > 2.5, name
    for name, x in leaves.items():
        if name.startswith("block") and name.endswith("bias"):
            assert not np.asarray(x).any(), name


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((20_000, 1, 2))
    out = np.asarray(layers.drop_path(x, 0.75, jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert (out[:, 0, 0] == out[:, 0, 1]).all()
    assert abs(out.mean() - 1) < 3 * (0.25 / 0.75 / 20_000) ** 0.5
    assert layers.drop_path(x, 0.75, None) is x


def test_drop_path_grows_linearly_and_never_touches_block_0():
    model = tiny(TINY, drop_path=0.5)
    images = jax.random.normal(jax.random.key(1), (64, 32, 32, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)
    # Block l drops with 0, .25, .5: a dropped branch leaves the stream as it was.
    _, taps = jax.jit(model.apply)(params, images, jax.random.key(2))
    z = taps["residual"]
    same = [bool((a == b).all((1, 2)).any()) for a, b in zip(z, z[1:], strict=False)]
    shares = [
        float((a == b).all((1, 2)).mean()) for a, b in zip(z, z[1:], strict=False)
    ]
    assert same == [False, False, True, True, True, True]
    assert 0.4 < np.mean(shares[4:]) / 1.0 < 0.6 and np.mean(shares[2:4]) < 0.4
    a, b = (jax.jit(model.apply)(params, images)[0] for _ in range(2))
    np.testing.assert_array_equal(a, b)  # without a key nothing is dropped


VARIANTS = {
    "non_square_registers": {
        "image": (16, 32),
        "prefix": 3,
        "position": "learned",
        "relative": "per_block",
    },
    "no_cls": {"prefix": 0, "position": "mae_sincos"},
    "conv_stem": {"stem": "conv", "position": "moco_sincos"},
    "no_final_norm": {"final_norm": False, "relative": "shared", "prefix": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_the_promised_shapes_and_finite_gradients(name):
    model = tiny(TINY, layer_scale=0.1, qkv_bias="qv", **VARIANTS[name])
    spec = model.spec
    images = jax.random.normal(jax.random.key(1), (2, *spec.image, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)

    def loss(params):
        tokens, taps = model.apply({**variables, "params": params}, images)
        return jnp.sum(tokens**2), (tokens, taps)

    grads, (tokens, taps) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    t = spec.prefix + spec.image[0] // 8 * (spec.image[1] // 8)
    assert tokens.shape == (2, t, 48) and spec.tokens == t
    assert [x.shape for x in taps["residual"]] == [(2, t, 48)] * 7
    assert [x.shape for x in taps["attention"]] == [(2, 3, t, t)] * 3
    assert [x.shape for x in taps["head_outputs"]] == [(2, 3, t, 16)] * 3
    for leaf, g in tree.named(grads).items():
        assert jnp.isfinite(g).all() and jnp.any(g != 0), leaf
    if not spec.final_norm:
        np.testing.assert_array_equal(tokens, taps["residual"][-1])


def test_registers_come_after_cls_and_carry_no_position():
    model = tiny(TINY, prefix=3, position="learned")
    images = jnp.zeros((1, 32, 32, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    tokens = model.apply({"params": params}, jnp.zeros((1, 16, 48)), method="place")
    close(tokens[0, 0], params["cls_token"][0, 0] + params["pos_embed"][0, 0])
    close(tokens[0, 1:3], params["registers"][0])
    close(tokens[0, 3:], params["pos_embed"][0, 1:])


def test_bfloat16_keeps_float32_parameters_softmax_and_layer_norm():
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    exact, half = tiny(SIMMIM), tiny(SIMMIM, dtype="bfloat16")
    params = jax.jit(half.init)(jax.random.key(0), images)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    a, _ = jax.jit(exact.apply)(params, images)
    b, taps = jax.jit(half.apply)(params, images)
    assert b.dtype == jnp.bfloat16 and taps["attention"][0].dtype == jnp.float32
    rows = taps["attention"][-1].sum(-1)
    np.testing.assert_allclose(rows, np.ones(rows.shape), atol=1e-6)
    assert 0 < jnp.abs(a - b.astype(jnp.float32)).max() < 0.1
    text = jax.jit(half.apply).lower(params, images).as_text()
    for op in ("stablehlo.rsqrt", "stablehlo.exponential"):
        lines = [line for line in text.splitlines() if op in line]
        assert lines and all("bf16" not in line for line in lines), op


def test_rematerialisation_keeps_block_inputs_only_and_equal_gradients():
    images = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))
    plain, remat = tiny(TINY, drop_path=0.5), tiny(TINY, drop_path=0.5, remat=True)
    params = jax.jit(plain.init)(jax.random.key(0), images)

    def loss(model, params):
        return jnp.sum(model.apply(params, images, jax.random.key(1))[0] ** 2)

    def kept(model):  # bytes that the backward pass reads
        back = jax.eval_shape(lambda p: jax.vjp(partial(loss, model), p)[1], params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(back))

    assert kept(remat) < 0.4 * kept(plain)
    a, b = (jax.jit(jax.grad(partial(loss, m)))(params) for m in (plain, remat))
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        close(x, y, scale)  # a k bias has no gradient but rounding noise


def test_taps_nobody_reads_are_pruned():
    images = jnp.zeros((4, 32, 32, 3))
    model = tiny(TINY)
    params = jax.jit(model.init)(jax.random.key(0), images)
    with_taps = jax.jit(model.apply).lower(params, images).compile()
    without = jax.jit(lambda *a: model.apply(*a)[0]).lower(params, images).compile()
    out = [c.memory_analysis().output_size_in_bytes for c in (with_taps, without)]
    assert out[1] == 4 * 17 * 48 * 4  # the tokens alone
    assert out[0] > 10 * out[1]
    flops = [c.cost_analysis()["flops"] for c in (with_taps, without)]
    assert flops[1] <= flops[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": (30, 32)}, r"\(30, 32\) is not a multiple of patch 8.*\(24, 32\)"),
        ({"heads": 5}, "width 48 does not divide into 5 heads"),
        ({"stem": "cnn"}, "encoder.stem='cnn'; known: patch, conv"),
        ({"width": 50, "heads": 5, "position": "mae_sincos"}, "width % 4"),
        ({"patch": 12, "image": (24, 24), "stem": "conv"}, "conv stem needs patch"),
    ],
)
def test_impossible_encoders_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(TINY, **fields)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="encoder for"):
        tiny().init(jax.random.key(0), jnp.zeros((1, 40, 32, 3)))
