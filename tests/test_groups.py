"""What the optimizer of every recipe does with every leaf, as literal tables.

A row is (decay, trust ratio, frozen, learning-rate multiplier); `{i}` is any block.
AdamW reads no trust ratio, so no recipe of it says anything about one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import pictures

from clvsmim import build, mesh, optim, tree
from clvsmim.configs import (
    demo,
    photos_hybrid,
    photos_mae,
    photos_moco_v3,
    photos_simmim,
)

DECAYED = (1.0, True, False, 1.0)
PLAIN = (0.0, True, False, 1.0)
FROZEN = (1.0, True, True, 1.0)

# MoCo v3 decays all it trains, vectors too.
MOCO_ENCODER = {
    "encoder/cls_token": DECAYED,
    "encoder/pos_embed": FROZEN,
    "encoder/patch_embed/kernel": FROZEN,
    "encoder/patch_embed/bias": FROZEN,
    "encoder/block_{i}/ln1/scale": DECAYED,
    "encoder/block_{i}/ln1/bias": DECAYED,
    "encoder/block_{i}/attn/q/kernel": DECAYED,
    "encoder/block_{i}/attn/q/bias": DECAYED,
    "encoder/block_{i}/attn/k/kernel": DECAYED,
    "encoder/block_{i}/attn/k/bias": DECAYED,
    "encoder/block_{i}/attn/v/kernel": DECAYED,
    "encoder/block_{i}/attn/v/bias": DECAYED,
    "encoder/block_{i}/attn/out/kernel": DECAYED,
    "encoder/block_{i}/attn/out/bias": DECAYED,
    "encoder/block_{i}/ln2/scale": DECAYED,
    "encoder/block_{i}/ln2/bias": DECAYED,
    "encoder/block_{i}/mlp/fc1/kernel": DECAYED,
    "encoder/block_{i}/mlp/fc1/bias": DECAYED,
    "encoder/block_{i}/mlp/fc2/kernel": DECAYED,
    "encoder/block_{i}/mlp/fc2/bias": DECAYED,
    "encoder/ln_final/scale": DECAYED,
    "encoder/ln_final/bias": DECAYED,
}
MOCO = MOCO_ENCODER | {
    "heads/projector/fc_0/kernel": DECAYED,
    "heads/projector/bn_0/scale": DECAYED,
    "heads/projector/bn_0/bias": DECAYED,
    "heads/projector/fc_1/kernel": DECAYED,
    "heads/projector/bn_1/scale": DECAYED,
    "heads/projector/bn_1/bias": DECAYED,
    "heads/projector/fc_2/kernel": DECAYED,
    "heads/predictor/fc_0/kernel": DECAYED,
    "heads/predictor/bn_0/scale": DECAYED,
    "heads/predictor/bn_0/bias": DECAYED,
    "heads/predictor/fc_1/kernel": DECAYED,
}

# SimMIM spares vectors and CLS, not the mask token or the bias table.
SIMMIM_ENCODER = {
    "encoder/cls_token": PLAIN,
    "encoder/rel_table": DECAYED,
    "encoder/patch_embed/kernel": DECAYED,
    "encoder/patch_embed/bias": PLAIN,
    "encoder/block_{i}/ln1/scale": PLAIN,
    "encoder/block_{i}/ln1/bias": PLAIN,
    "encoder/block_{i}/attn/q/kernel": DECAYED,
    "encoder/block_{i}/attn/q/bias": PLAIN,
    "encoder/block_{i}/attn/k/kernel": DECAYED,
    "encoder/block_{i}/attn/v/kernel": DECAYED,
    "encoder/block_{i}/attn/v/bias": PLAIN,
    "encoder/block_{i}/attn/out/kernel": DECAYED,
    "encoder/block_{i}/attn/out/bias": PLAIN,
    "encoder/block_{i}/gamma_1": PLAIN,
    "encoder/block_{i}/ln2/scale": PLAIN,
    "encoder/block_{i}/ln2/bias": PLAIN,
    "encoder/block_{i}/mlp/fc1/kernel": DECAYED,
    "encoder/block_{i}/mlp/fc1/bias": PLAIN,
    "encoder/block_{i}/mlp/fc2/kernel": DECAYED,
    "encoder/block_{i}/mlp/fc2/bias": PLAIN,
    "encoder/block_{i}/gamma_2": PLAIN,
    "encoder/ln_final/scale": PLAIN,
    "encoder/ln_final/bias": PLAIN,
}
SIMMIM = SIMMIM_ENCODER | {
    "heads/mask_token": DECAYED,
    "heads/decoder/kernel": DECAYED,
    "heads/decoder/bias": PLAIN,
}

# MoCo v3's heads under SimMIM's optimizer: no decay on BatchNorm.
CONTRASTIVE = SIMMIM_ENCODER | {
    "heads/projector/fc_0/kernel": DECAYED,
    "heads/projector/bn_0/scale": PLAIN,
    "heads/projector/bn_0/bias": PLAIN,
    "heads/projector/fc_1/kernel": DECAYED,
    "heads/projector/bn_1/scale": PLAIN,
    "heads/projector/bn_1/bias": PLAIN,
    "heads/projector/fc_2/kernel": DECAYED,
    "heads/predictor/fc_0/kernel": DECAYED,
    "heads/predictor/bn_0/scale": PLAIN,
    "heads/predictor/bn_0/bias": PLAIN,
    "heads/predictor/fc_1/kernel": DECAYED,
}
HYBRID = SIMMIM_ENCODER | {
    "heads/simmim/mask_token": DECAYED,
    "heads/simmim/decoder/kernel": DECAYED,
    "heads/simmim/decoder/bias": PLAIN,
    "heads/moco_v3/projector/fc_0/kernel": DECAYED,
    "heads/moco_v3/projector/bn_0/scale": PLAIN,
    "heads/moco_v3/projector/bn_0/bias": PLAIN,
    "heads/moco_v3/projector/fc_1/kernel": DECAYED,
    "heads/moco_v3/projector/bn_1/scale": PLAIN,
    "heads/moco_v3/projector/bn_1/bias": PLAIN,
    "heads/moco_v3/projector/fc_2/kernel": DECAYED,
    "heads/moco_v3/predictor/fc_0/kernel": DECAYED,
    "heads/moco_v3/predictor/bn_0/scale": PLAIN,
    "heads/moco_v3/predictor/bn_0/bias": PLAIN,
    "heads/moco_v3/predictor/fc_1/kernel": DECAYED,
}

# MAE spares vectors alone: CLS and mask token are decayed.
MAE_ENCODER = {
    "encoder/cls_token": DECAYED,
    "encoder/pos_embed": FROZEN,
    "encoder/patch_embed/kernel": DECAYED,
    "encoder/patch_embed/bias": PLAIN,
    "encoder/block_{i}/ln1/scale": PLAIN,
    "encoder/block_{i}/ln1/bias": PLAIN,
    "encoder/block_{i}/attn/q/kernel": DECAYED,
    "encoder/block_{i}/attn/q/bias": PLAIN,
    "encoder/block_{i}/attn/k/kernel": DECAYED,
    "encoder/block_{i}/attn/k/bias": PLAIN,
    "encoder/block_{i}/attn/v/kernel": DECAYED,
    "encoder/block_{i}/attn/v/bias": PLAIN,
    "encoder/block_{i}/attn/out/kernel": DECAYED,
    "encoder/block_{i}/attn/out/bias": PLAIN,
    "encoder/block_{i}/ln2/scale": PLAIN,
    "encoder/block_{i}/ln2/bias": PLAIN,
    "encoder/block_{i}/mlp/fc1/kernel": DECAYED,
    "encoder/block_{i}/mlp/fc1/bias": PLAIN,
    "encoder/block_{i}/mlp/fc2/kernel": DECAYED,
    "encoder/block_{i}/mlp/fc2/bias": PLAIN,
    "encoder/ln_final/scale": PLAIN,
    "encoder/ln_final/bias": PLAIN,
}
# Blocks {j} of its decoder, four in every recipe; its positions are constants.
MAE_HEADS = {
    "heads/mask_token": DECAYED,
    "heads/decoder/proj/kernel": DECAYED,
    "heads/decoder/proj/bias": PLAIN,
    **{
        name.replace("encoder/", "heads/decoder/").replace("{i}", "{j}"): row
        for name, row in MAE_ENCODER.items()
        if "block" in name or "ln_final" in name
    },
    "heads/decoder/pixels/kernel": DECAYED,
    "heads/decoder/pixels/bias": PLAIN,
}
MAE = MAE_ENCODER | MAE_HEADS
# The demo's encoder and optimizer are SimMIM's, but for the positions.
DEMO_MAE = {k: v for k, v in SIMMIM_ENCODER.items() if "rel_table" not in k}
DEMO_MAE |= {"encoder/pos_embed": FROZEN} | MAE_HEADS

# LARS of MoCo v3: what torch stores with one dimension is neither decayed nor scaled.
SCALED = (1.0, True, False, 1.0)
VECTOR = (0.0, False, False, 1.0)
LARS = {
    "encoder/cls_token": SCALED,  # (1, 1, D)
    "encoder/pos_embed": FROZEN,
    "encoder/patch_embed/kernel": FROZEN,
    "encoder/patch_embed/bias": (0.0, False, True, 1.0),
    "encoder/block_{i}/ln1/scale": VECTOR,
    "encoder/block_{i}/ln1/bias": VECTOR,
    "encoder/block_{i}/attn/q/kernel": SCALED,
    "encoder/block_{i}/attn/q/bias": VECTOR,  # here (H, d), in torch (3D,)
    "encoder/block_{i}/attn/k/kernel": SCALED,
    "encoder/block_{i}/attn/k/bias": VECTOR,
    "encoder/block_{i}/attn/v/kernel": SCALED,
    "encoder/block_{i}/attn/v/bias": VECTOR,
    "encoder/block_{i}/attn/out/kernel": SCALED,
    "encoder/block_{i}/attn/out/bias": VECTOR,
    "encoder/block_{i}/ln2/scale": VECTOR,
    "encoder/block_{i}/ln2/bias": VECTOR,
    "encoder/block_{i}/mlp/fc1/kernel": SCALED,
    "encoder/block_{i}/mlp/fc1/bias": VECTOR,
    "encoder/block_{i}/mlp/fc2/kernel": SCALED,
    "encoder/block_{i}/mlp/fc2/bias": VECTOR,
    "encoder/ln_final/scale": VECTOR,
    "encoder/ln_final/bias": VECTOR,
    "heads/projector/fc_0/kernel": SCALED,
    "heads/projector/bn_0/scale": VECTOR,
    "heads/projector/bn_0/bias": VECTOR,
    "heads/projector/fc_1/kernel": SCALED,
    "heads/projector/bn_1/scale": VECTOR,
    "heads/projector/bn_1/bias": VECTOR,
    "heads/projector/fc_2/kernel": SCALED,
    "heads/predictor/fc_0/kernel": SCALED,
    "heads/predictor/bn_0/scale": VECTOR,
    "heads/predictor/bn_0/bias": VECTOR,
    "heads/predictor/fc_1/kernel": SCALED,
}


def moco_v3_with_lars():
    """photos_moco_v3 with the LARS of MoCo v3."""
    config = photos_moco_v3.get_config()
    config.optim = {
        "name": "lars",
        "momentum": 0.9,
        "trust_coefficient": 1e-3,
        "weight_decay": 1e-6,
        "no_decay": (optim.VECTORS,),
        "no_trust": (optim.VECTORS,),
        "frozen": config.optim.frozen,
        "schedule": config.optim.schedule.to_dict(),
    }
    return config


RECIPES = {
    "photos_moco_v3": (photos_moco_v3.get_config, MOCO, 0.1),
    "photos_simmim": (photos_simmim.get_config, SIMMIM, 0.05),
    "photos_mae": (photos_mae.get_config, MAE, 0.05),
    "photos_hybrid": (photos_hybrid.get_config, HYBRID, 0.05),
    "demo:moco_v3": (functools.partial(demo.get_config, "moco_v3"), CONTRASTIVE, 0.05),
    "demo:simmim": (functools.partial(demo.get_config, "simmim"), SIMMIM, 0.05),
    "demo:mae": (functools.partial(demo.get_config, "mae"), DEMO_MAE, 0.05),
    "demo:hybrid": (functools.partial(demo.get_config, "hybrid"), HYBRID, 0.05),
    "moco_v3 with LARS": (moco_v3_with_lars, LARS, 1e-6),
}


def parts(config):
    """(parameter shapes, optimizer) as `build` makes them, of a run of 100 steps."""
    config = build.plain(config)
    encoder = build.make_encoder(config["encoder"])
    method = build.make_objective(encoder, config["input"], config["objective"])
    optimizer = build.make_optimizer(method, config["optim"], 100, 10)
    return build.abstract_params(method)[0], optimizer


def expanded(table, depth, inner=4):
    """One row per leaf, of `depth` blocks {i} and `inner` ones {j} of a decoder."""
    return {
        name.format(i=i, j=i): row
        for name, row in table.items()
        for i in range(depth if "{i}" in name else inner if "{j}" in name else 1)
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_leaf_of_a_recipe_is_in_the_group_of_its_table(recipe):
    get_config, table, _ = RECIPES[recipe]
    config = get_config()
    params, optimizer = parts(config)
    got = {
        name: (group.decay, group.trust, group.frozen, group.lr_scale)
        for name, group in tree.named(optimizer.groups).items()
    }
    assert set(got) == set(tree.named(params))
    assert got == expanded(table, config.encoder.depth)


def shrunk(config):
    """The recipe with two narrow blocks and narrow heads."""
    config.encoder.update(width=12, depth=2, heads=3)
    method = config.objective.get("cl", config.objective)
    if method.name == "moco_v3":
        method.update(projector=(8, 8, 4), predictor=(8, 4))
    return config


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_gradient_a_group_moves_by_its_decay_or_not_at_all(recipe):
    get_config, table, weight_decay = RECIPES[recipe]
    shapes, (groups, transform, rate) = parts(shrunk(get_config()))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(1, 0.1, x.shape).astype("f4"), shapes)
    trainable, frozen = tree.partition(params, optim.keep(groups))
    middle = 50  # of the run, where the learning rate is not 0
    state = jax.tree.map(
        lambda x: jnp.full_like(x, middle) if x.dtype == jnp.int32 else x,
        transform.init(trainable),
    )
    zeros = jax.tree.map(np.zeros_like, trainable)
    updates = tree.named(jax.jit(transform.update)(zeros, state, trainable)[0])
    held = tree.named(frozen)
    lr = float(rate(middle))
    assert lr > 0
    # LARS scales what is left of the gradient, wd * p, to 0.001 of |p|.
    factor = 1e-3 if table is LARS else weight_decay
    for name, (decay, _, is_frozen, _) in expanded(table, 2).items():
        assert (name in held, name in updates) == (is_frozen, not is_frozen)
        if not is_frozen:
            p = tree.named(trainable)[name]
            expected = -lr * factor * p if decay else np.zeros_like(p)
            np.testing.assert_allclose(updates[name], expected, rtol=5e-7, atol=0)
    kept = {name: x for name, x in tree.named(state).items() if x.ndim}
    assert len(kept) == len(updates) * (1 if table is LARS else 2)
    assert not [n for n in kept if any(n.endswith(f"/{frozen}") for frozen in held)]


@pytest.fixture(scope="module")
def two_steps():
    """(before, after): two steps of photos_moco_v3, small, at a constant rate."""
    config = shrunk(photos_moco_v3.get_config())
    config.encoder.update(image=(16, 16), dtype="float32")
    config.data.source.update(length=16, side=24)
    config.batch = 8
    config.optim.schedule = {"name": "constant", "base": 1e-2}
    program = build.build(config, jax.devices()[:1])
    state = program.init()
    before = jax.device_get(state)
    for i in range(2):
        state, _ = program.step(
            state, mesh.put(pictures(program.batch, i), program.mesh)
        )
    return before, jax.device_get(state)


HELD = {"encoder/patch_embed/kernel", "encoder/patch_embed/bias", "encoder/pos_embed"}


def moved(before, after):
    """The names of the leaves that are not bit for bit what they were."""
    a, b = tree.named(before), tree.named(after)
    assert set(a) == set(b)
    return {name for name in a if not np.array_equal(a[name], b[name])}


def test_training_moves_every_leaf_but_the_frozen_ones(two_steps):
    before, after = (state.params for state in two_steps)
    assert moved(before, after) == set(tree.named(before)) - HELD


def test_the_teacher_keeps_the_frozen_leaves_too(two_steps):
    before, after = (state.extra["heads"]["teacher"] for state in two_steps)
    assert moved(before, after) == set(tree.named(before)) - HELD
    student = tree.named(two_steps[1].params)
    for name in HELD:
        np.testing.assert_array_equal(tree.named(after)[name], student[name])


def test_frozen_leaves_have_no_optimizer_state(two_steps):
    leaves = tree.named(two_steps[1].opt)
    assert any(name.endswith("/encoder/cls_token") for name in leaves)
    assert not [n for n in leaves if any(n.endswith(f"/{held}") for held in HELD)]
