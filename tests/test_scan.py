"""Scan over layers: another way to compile the same network."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MAE, SIMMIM, TINY, tiny, tiny_mae

from clvsmim import tree

CASES = {
    "all but remat": {
        "prefix": 3,
        "position": "learned",
        "relative": "per_block",
        "layer_scale": 0.1,
        "drop_path": 0.5,
    },
    "shared bias, remat": {
        "relative": "shared",
        "drop_path": 0.5,
        "remat": True,
        "final_norm": False,
    },
}


def images():
    return jax.random.normal(jax.random.key(1), (8, 32, 32, 3))


@pytest.fixture(scope="module", params=CASES)
def found(request):
    """Per `scan`: (shapes of the parameters, output, gradients) of a case."""
    both = {}
    for scan in (False, True):
        model = tiny(TINY, **CASES[request.param], scan=scan)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images())["params"]

        def loss(params, model=model):
            tokens, taps = model.apply(
                {"params": params}, images(), jax.random.key(3), taps=False
            )
            assert taps == {}
            return jnp.mean(jnp.sin(tokens)), tokens

        params = noise(shapes)
        grad = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params)
        both[scan] = tree.named(shapes), *grad.compile()(params)
    return both


def noise(shapes):
    """Where new biases are 0 and all blocks alike, no mix-up of two would show."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes
    )


def test_scan_keeps_the_unstacked_parameters(found):
    plain, scan = found[False][0], found[True][0]
    assert plain == scan
    assert scan["block_0/mlp/fc1/kernel"].shape == (48, 192)


def test_scan_gives_the_same_tokens_and_draws(found):
    (_, (a, x), _), (_, (b, y), _) = found[False], found[True]
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(x, y, atol=1e-6 * np.abs(x).max())


def test_scan_gives_the_same_gradients(found):
    a, b = (tree.named(found[scan][2]) for scan in (False, True))
    most = max(np.abs(x).max() for x in a.values())
    for name, x in a.items():
        np.testing.assert_allclose(b[name], x, rtol=1e-5, atol=1e-6 * most)
        assert np.abs(x).max() > 0, name


def loops(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("scan[")


def test_taps_come_from_unrolled_blocks():
    plain, model = tiny(SIMMIM), tiny(SIMMIM, scan=True)
    variables = jax.jit(plain.init)(jax.random.key(0), images())
    assert loops(model.apply, variables, images()) == 0
    assert loops(partial(model.apply, taps=False), variables, images()) == 1
    assert loops(partial(plain.apply, taps=False), variables, images()) == 0
    _, taps = jax.eval_shape(model.apply, variables, images())
    assert len(taps["residual"]) == 7


def test_training_scans_the_encoder_and_the_decoder():
    """The forward pass of MAE has two loops; a block is traced once for each."""
    objective = tiny_mae(tiny(MAE, scan=True))
    views = (np.zeros((2, 32, 32, 3), np.uint8),)
    key = jax.random.key(0)
    inputs = objective.prepare(key, {"views": views}, train=True)
    params, extra = jax.eval_shape(objective.init, key, inputs)
    loss = partial(objective.loss, progress=0.0, train=True)
    assert loops(loss, params, extra, inputs, key) == 2


def test_a_loop_keeps_linear_products_or_with_remat_block_inputs():
    """Numbers (beside the parameters) that the backward pass reads."""

    def kept(**fields):
        model = tiny(TINY, **fields)
        params = jax.eval_shape(model.init, jax.random.key(0), images())

        def loss(params):
            return jnp.sum(model.apply(params, images(), taps=False)[0] ** 2)

        back = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
        both = [sum(x.size for x in jax.tree.leaves(t)) for t in (back, params)]
        return both[0] - both[1]

    inputs, products = kept(scan=True, remat=True), kept(scan=True)
    tokens = 8 * 17 * 48
    assert 3 * tokens < inputs < 10 * tokens
    # Of each block q, k, v, the attention's output and fc1, four times as wide.
    assert products - inputs == 3 * (3 + 1 + 4) * tokens
    assert products < 0.4 * kept()


def test_drop_path_rates_differ_by_block():
    """Blocks drop with 0, 1/4, 1/2: the scanned one gets its own of each."""
    model = tiny(TINY, drop_path=0.5, scan=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), images())
    run = partial(model.apply, taps=False)
    made = jax.make_jaxpr(run)(variables, images(), jax.random.key(1))
    kept = [x for x in made.consts if getattr(x, "shape", None) == (3,)]
    np.testing.assert_allclose(kept[0], [1, 0.75, 0.5])
