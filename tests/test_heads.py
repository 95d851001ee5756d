"""BatchNorm as PyTorch keeps it, the MLP heads of MoCo v3, the decoder of SimMIM."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MOCO, TINY, VIEW, tiny, tiny_moco_v3

from clvsmim import tree, vit
from clvsmim.heads import BatchNorm, MLPHead, PixelDecoder
from clvsmim.objectives import moco_v3

KEY = jax.random.key(0)


def batch_norm(x, stats=None, params=None, train=True, **fields):
    """(output, new statistics) of one pass."""
    module = BatchNorm(**fields)
    variables = module.init(KEY, x, True)
    given = {"params": params} if params else {}
    given |= {"stats": stats} if stats else {}
    return module.apply({**variables, **given}, x, train, mutable=["stats"])


def sample(shape=(6, 3), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype("f4") * [1, 2, 3] + [0, -1, 5]


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 3)])
def test_training_normalises_by_the_biased_variance_of_all_but_the_last_axis(shape):
    x = sample(shape)
    rows = x.reshape(-1, 3)
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    out, _ = batch_norm(jnp.asarray(x))
    np.testing.assert_allclose(out, expected.reshape(shape), atol=2e-6)


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 3)])
def test_buffers_move_by_a_tenth_towards_mean_and_unbiased_variance(shape):
    x = sample(shape)
    rows = x.reshape(-1, 3)
    stats = {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([4.0, 5.0, 6.0])}
    _, new = batch_norm(jnp.asarray(x), stats)
    mean = 0.9 * np.array([1, 2, 3]) + 0.1 * rows.mean(0)
    var = 0.9 * np.array([4, 5, 6]) + 0.1 * rows.var(0, ddof=1)
    np.testing.assert_allclose(new["stats"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(new["stats"]["var"], var, rtol=1e-6)


def test_evaluation_uses_the_buffers_and_keeps_them():
    x = jnp.asarray(sample())
    stats = {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([4.0, 5.0, 6.0])}
    out, new = batch_norm(x, stats, train=False)
    expected = (x - np.array([[1, 2, 3]])) / np.sqrt(np.array([[4, 5, 6]]) + 1e-5)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert jax.tree.all(jax.tree.map(np.array_equal, new["stats"], stats))


def test_initialisation_leaves_the_buffers_at_zero_and_one():
    variables = BatchNorm().init(KEY, jnp.asarray(sample()), True)
    np.testing.assert_array_equal(variables["stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["stats"]["var"], np.ones(3))
    np.testing.assert_array_equal(variables["params"]["scale"], np.ones(3))
    np.testing.assert_array_equal(variables["params"]["bias"], np.zeros(3))


def test_affine_is_a_scale_and_a_bias_behind_the_normalisation():
    x = jnp.asarray(sample())
    params = {"scale": jnp.array([2.0, 3.0, 4.0]), "bias": jnp.array([5.0, 6.0, 7.0])}
    plain, _ = batch_norm(x, affine=False)
    out, _ = batch_norm(x, params=params)
    scaled = plain * params["scale"][None] + params["bias"][None]
    np.testing.assert_allclose(out, scaled, rtol=1e-6)
    assert "params" not in BatchNorm(affine=False).init(KEY, x, True)


def test_two_passes_update_the_buffers_twice_in_order():
    a, b = (jnp.asarray(sample(seed=i)) for i in (1, 2))
    _, first = batch_norm(a)
    _, second = batch_norm(b, first["stats"])
    mean = 0.09 * a.mean(0) + 0.1 * b.mean(0)
    var = 0.81 + 0.09 * a.var(0, ddof=1) + 0.1 * b.var(0, ddof=1)
    np.testing.assert_allclose(second["stats"]["mean"], mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(second["stats"]["var"], var, rtol=1e-5)


def test_half_precision_is_normalised_in_float32():
    x = jnp.asarray(sample(), jnp.bfloat16)
    out, new = batch_norm(x)
    exact, _ = batch_norm(x.astype(jnp.float32))
    assert {out.dtype, *(v.dtype for v in new["stats"].values())} == {jnp.dtype("f4")}
    np.testing.assert_array_equal(out, exact)


def test_a_constant_input_is_zero_and_has_finite_gradients():
    x = jnp.full((4, 3), 7.0)
    np.testing.assert_array_equal(batch_norm(x)[0], np.zeros((4, 3)))
    grad = jax.grad(lambda x: batch_norm(x)[0][0, 0])(x)
    assert jnp.isfinite(grad).all()
    out, new = batch_norm(x[:1])  # one row has no unbiased variance
    assert jnp.isfinite(out).all() and jnp.isfinite(new["stats"]["var"]).all()


def test_a_large_mean_does_not_hide_the_variance():
    """E[x^2] - E[x]^2 has no digit left here; two passes keep four."""
    rng = np.random.default_rng(0)
    x = (1e4 + rng.normal(size=(4096, 2))).astype("f4")
    exact = x.astype("f8")
    out, new = batch_norm(jnp.asarray(x))
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(out, expected, atol=2e-3)
    var = 0.9 + 0.1 * exact.var(0, ddof=1)
    np.testing.assert_allclose(new["stats"]["var"], var, rtol=1e-5)


def test_head_is_linear_batch_norm_relu_and_ends_without_affine():
    head = MLPHead((5, 4, 2))
    variables = head.init(KEY, jnp.ones((3, 6)), True)
    assert {k: v.shape for k, v in tree.named(variables["params"]).items()} == {
        "fc_0/kernel": (6, 5),
        "bn_0/scale": (5,),
        "bn_0/bias": (5,),
        "fc_1/kernel": (5, 4),
        "bn_1/scale": (4,),
        "bn_1/bias": (4,),
        "fc_2/kernel": (4, 2),
    }
    assert {k: v.shape for k, v in tree.named(variables["stats"]).items()} == {
        "bn_0/mean": (5,),
        "bn_0/var": (5,),
        "bn_1/mean": (4,),
        "bn_1/var": (4,),
        "bn_2/mean": (2,),
        "bn_2/var": (2,),
    }


def test_head_computes_the_layers_in_order():
    head = MLPHead((5, 2))
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("f4")
    variables = head.init(KEY, x, True)
    leaves = {k: np.asarray(v) for k, v in tree.named(variables["params"]).items()}

    def normal(x):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)

    hidden = np.maximum(normal(x @ leaves["fc_0/kernel"]), 0)
    expected = normal(hidden @ leaves["fc_1/kernel"])
    out, _ = head.apply(variables, x, True, mutable=["stats"])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert out.min() < 0  # no ReLU at the end


def test_bfloat16_heads_keep_float32_parameters_and_output():
    head = MLPHead((5, 2), "bfloat16")
    x = jnp.ones((8, 6), jnp.bfloat16)
    variables = head.init(KEY, x, True)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("f4")}
    assert head.apply(variables, x, True, mutable=["stats"])[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("fan_in", "limit"), [(768, 0.0361), (4096, 0.015625), (256, 0.0625)]
)
def test_head_weights_are_uniform_within_one_over_the_root_of_fan_in(fan_in, limit):
    head = MLPHead((512,))
    params = head.init(KEY, jnp.zeros((2, fan_in)), True)["params"]
    x = np.asarray(params["fc_0"]["kernel"])
    assert 0.999 * limit < np.abs(x).max() <= 1.0001 * limit
    assert abs(x.std() * math.sqrt(3) / limit - 1) < 5 / math.sqrt(x.size) + 1e-3
    assert abs(x.mean()) < 5 * limit / math.sqrt(3 * x.size)


def test_decoder_is_one_linear_map_with_torchs_initial_values():
    decoder = PixelDecoder(48)
    params = decoder.init(KEY, jnp.zeros((1, 1, 768)))["params"]
    shapes = {k: v.shape for k, v in params.items()}
    assert shapes == {"kernel": (768, 48), "bias": (48,)}
    for x in params.values():  # both within 1 / sqrt(768)
        assert 0.9 * 0.0361 < np.abs(x).max() <= 0.0361
        assert abs(x.std() * math.sqrt(3) / 0.0361 - 1) < 5 / math.sqrt(x.size)
    tokens = np.random.default_rng(0).normal(size=(2, 5, 768)).astype("f4")
    out = decoder.apply({"params": params}, tokens)
    expected = tokens @ np.asarray(params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(out, expected, atol=1e-5)
    half = PixelDecoder(48, "bfloat16").apply({"params": params}, tokens)
    assert half.dtype == jnp.float32 and half.shape == (2, 5, 48)


def test_moco_v3_of_vit_b_has_the_published_sizes():
    fields = {"image": (224, 224), "patch": 16, **vit.SIZES["B"]}
    encoder = tiny(TINY, **fields, position="moco_sincos")
    objective = moco_v3.make(
        encoder=encoder,
        crop={"area": (0.08, 1.0), "aspect": (0.75, 1.25), "filter": "bilinear"},
        view_1=VIEW | {"blur_p": 1.0, "solarize_p": 0.0},
        view_2=VIEW | {"blur_p": 0.1, "solarize_p": 0.2},
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        projector=(4096, 4096, 256),
        predictor=(4096, 256),
        tau=0.2,
        momentum=0.99,
    )
    image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    params, extra = jax.eval_shape(objective.init, KEY, (image, image))

    def count(x):
        return sum(leaf.size for leaf in jax.tree.leaves(x))

    heads = params["heads"]
    assert count(params["encoder"]) == 85_798_656
    assert count(heads["projector"]) == 20_987_904
    assert count(heads["predictor"]) == 2_105_344
    assert count(params) + count(extra["heads"]["teacher"]) == 215_678_464


def test_moco_v3_statistics_are_those_of_each_view_in_turn():
    """Two passes a head; one pass over both views at once would give others."""
    objective = tiny_moco_v3(tiny(MOCO, depth=1))
    rng = np.random.default_rng(0)
    inputs = tuple(rng.normal(size=(8, 32, 32, 3)).astype("f4") + i for i in (0, 1))
    params, extra = jax.jit(objective.init)(KEY, inputs)

    @jax.jit
    def run(params, extra):
        _, (new, _) = objective.loss(
            params, extra, inputs, KEY, progress=0.0, train=True
        )
        kernel = params["heads"]["projector"]["fc_0"]["kernel"]
        encode = objective.encoder.apply
        return new, [
            encode({"params": params["encoder"]}, x)[0][:, 0] @ kernel for x in inputs
        ]

    new, (a, b) = run(params, extra)
    for stats in (
        new["heads"]["projector"]["bn_0"],
        new["heads"]["teacher_stats"]["projector"]["bn_0"],
    ):
        np.testing.assert_allclose(
            stats["mean"], 0.09 * a.mean(0) + 0.1 * b.mean(0), atol=1e-6
        )
        var = 0.81 + 0.09 * a.var(0, ddof=1) + 0.1 * b.var(0, ddof=1)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-6)
