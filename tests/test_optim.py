"""Schedules against their published values, groups by name, optimizers against torch.

The expected numbers were worked out from the formulas in float64, or recorded from the
original code (tests/golden); the optimizers are compared with numpy transcriptions.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clvsmim import optim, tree
from clvsmim.objectives import ema_rate

EPOCH_4096, EPOCH_2048, EPOCH_1024 = 312, 625, 1251


def at(schedule, *steps):
    """The schedule under jit, as float64 for comparison."""
    run = jax.jit(schedule)
    return np.array([run(t) for t in steps], np.float64)


def moco_lr(epochs, base, steps_per_epoch=EPOCH_4096):
    return optim.schedule(
        "cosine",
        base=base,
        minimum=0.0,
        warmup_epochs=40,
        total_steps=epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
    )


def simmim_finetune(lag):
    return optim.schedule(
        "timm_cosine",
        base=5e-3,
        start=1e-6,
        minimum=1e-6,
        warmup_epochs=20,
        lag=lag,
        total_steps=62_500,
        steps_per_epoch=EPOCH_2048,
    )


def mae_finetune():
    return optim.schedule(
        "cosine",
        base=2e-3,
        minimum=1e-6,
        warmup_epochs=5,
        total_steps=100 * EPOCH_1024,
        steps_per_epoch=EPOCH_1024,
    )


def test_moco_v3_learning_rate():
    got = at(moco_lr(300, 2.4e-3), 0, 1, *(e * 312 for e in (20, 40, 105, 170, 235)))
    want = [0, 1.9230769e-7, 1.2e-3, 2.4e-3, 2.0485281e-3, 1.2e-3, 3.5147186e-4]
    np.testing.assert_allclose(got, want, rtol=5e-7)


def test_mae_learning_rate():
    got = at(moco_lr(800, 2.4e-3), *(e * 312 for e in (20, 40, 230, 420, 610)))
    want = [1.2e-3, 2.4e-3, 2.0485281e-3, 1.2e-3, 3.5147186e-4]
    np.testing.assert_allclose(got, want, rtol=5e-7)


def test_mae_finetune_learning_rate_ends_at_the_minimum():
    schedule = mae_finetune()
    got = at(schedule, *(e * EPOCH_1024 for e in (1, 5, 50, 99, 100)))
    want = [4.0e-4, 2e-3, 1.0830381e-3, 1.5464693e-6, 1e-6]
    np.testing.assert_allclose(got, want, rtol=5e-7)


@pytest.mark.parametrize("lag", [0, 1])
def test_simmim_pretrain_learning_rate(lag):
    schedule = optim.schedule(
        "milestones",
        base=4e-4,
        start=2e-6,
        warmup_epochs=10,
        milestones=[700 / 800],
        factor=0.1,
        lag=lag,
        total_steps=800 * EPOCH_2048,
        steps_per_epoch=EPOCH_2048,
    )
    steps = np.array([0, 1, 3125, 6250, 437_499, 437_500]) + lag
    want = [2e-6, 2.06368e-6, 2.01e-4, 4e-4, 4e-4, 4e-5]
    np.testing.assert_allclose(at(schedule, *steps), want, rtol=5e-7)
    if lag:
        assert at(schedule, 0)[0] == at(schedule, 1)[0]


@pytest.mark.parametrize("lag", [0, 1])
def test_simmim_finetune_learning_rate_jumps_after_the_warmup(lag):
    steps = np.array([0, 6250, 12_499, 12_500, 31_250]) + lag
    want = [1e-6, 2.5005e-3, 4.9996001e-3, 4.5226380e-3, 2.5005e-3]
    np.testing.assert_allclose(at(simmim_finetune(lag), *steps), want, rtol=5e-7)


def test_deit_learning_rate_is_one_epoch_late():
    schedule = optim.schedule(
        "timm_cosine",
        base=1e-3,
        start=1e-6,
        minimum=1e-5,
        warmup_epochs=5,
        per="epoch",
        lag=1,
        total_steps=300 * EPOCH_1024,
        steps_per_epoch=EPOCH_1024,
    )
    f = {0: 1e-6, 1: 2.008e-4, 4: 8.002e-4, 5: 9.9932162e-4, 150: 5.05e-4}
    f |= {299: 1.0027141e-5}
    first = [(e + 1) * EPOCH_1024 for e in f]
    last = [(e + 2) * EPOCH_1024 - 1 for e in f]
    np.testing.assert_allclose(at(schedule, *first), list(f.values()), rtol=5e-7)
    np.testing.assert_array_equal(at(schedule, *first), at(schedule, *last))
    np.testing.assert_allclose(at(schedule, 0, EPOCH_1024 - 1), 1e-6, rtol=5e-7)


def test_probe_learning_rate_changes_once_per_epoch():
    schedule = optim.schedule(
        "cosine",
        base=12.0,
        minimum=0.0,
        warmup_epochs=0,
        per="epoch",
        total_steps=900,
        steps_per_epoch=10,
    )
    want = [12.0, 12.0, 6 * (1 + np.cos(np.pi / 90)), 6 * (1 + np.cos(np.pi * 89 / 90))]
    np.testing.assert_allclose(at(schedule, 0, 9, 10, 899), want, rtol=5e-7)


def test_constant_and_zero_warmup():
    flat = optim.schedule("constant", base=0.3, total_steps=9, steps_per_epoch=3)
    np.testing.assert_allclose(at(flat, 0, 8), 0.3, rtol=5e-7)


def test_recorded_moco_v3_schedules(golden):
    recorded = golden("schedules")
    steps = np.round(2 * recorded["epoch"]).astype(int)
    got = jax.jit(jax.vmap(moco_lr(300, 1.0, steps_per_epoch=2)))(steps)
    np.testing.assert_allclose(got, recorded["moco_v3_lr"], rtol=5e-7)


def test_recorded_teacher_momentum(golden):
    recorded = golden("schedules")
    m = 1 - ema_rate(0.99, jnp.asarray(recorded["epoch"] / 300))
    np.testing.assert_allclose(m, recorded["moco_v3_momentum"], atol=6e-8, rtol=0)


def test_the_teacher_moves_until_the_very_end():
    """1 - m keeps its digits where m itself is 1 in float32."""
    steps, total = np.array([1, 5, 20]), 93_600
    got = np.array([ema_rate(0.99, 1 - t / total) for t in steps])
    exact = 0.01 * np.sin(0.5 * np.pi * steps / total) ** 2
    np.testing.assert_allclose(got, exact, rtol=0.15)  # 1 - t/T has one float32 digit
    assert ema_rate(0.99, 1.0) == 0


def test_layer_multiplier_scales_all_of_maes_rate_but_only_simmims_base():
    whole = mae_finetune()
    assert whole(700, 0.5) == 0.5 * whole(700)
    assert whole(100 * EPOCH_1024, 0.5) == np.float32(0.5e-6)
    base = simmim_finetune(lag=0)
    np.testing.assert_allclose(base(0, 0.5), 1e-6, rtol=5e-7)
    np.testing.assert_allclose(base(62_500, 0.5), 1e-6, rtol=5e-7)
    want = 1e-6 + (0.5 * 5e-3 - 1e-6) / 2
    np.testing.assert_allclose(base(31_250, 0.5), want, rtol=5e-7)


def test_schedules_compare_by_value():
    assert moco_lr(300, 1.0) == moco_lr(300, 1.0) != moco_lr(300, 2.0)
    assert hash(moco_lr(300, 1.0)) == hash(moco_lr(300, 1.0))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("constant", {"bas": 1.0}, "did you mean 'base'"),
        ("constant", {}, "needs a value for: base"),
        (
            "cosine",
            {"base": 1.0, "minimum": 0.0, "warmup_epochs": 1, "per": "epochs"},
            "did you mean 'epoch'",
        ),
    ],
)
def test_schedule_mistakes_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        optim.schedule(name, total_steps=10, steps_per_epoch=1, **settings)


# Groups


def abstract(*names):
    """A nested dict with a placeholder shape for every "/"-joined name."""
    root = {}
    for name in names:
        *folders, leaf = name.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jax.ShapeDtypeStruct((), jnp.float32)
    return root


def block(i, layer_scale=False, rel_table=False):
    at = f"encoder/block_{i}"
    names = [f"{at}/{ln}/{x}" for ln in ("ln1", "ln2") for x in ("scale", "bias")]
    layers = ("attn/q", "attn/k", "attn/v", "attn/out", "mlp/fc1", "mlp/fc2")
    names += [f"{at}/{layer}/{x}" for layer in layers for x in ("kernel", "bias")]
    names += [f"{at}/gamma_1", f"{at}/gamma_2"] if layer_scale else []
    return [*names, f"{at}/attn/rel_table"] if rel_table else names


def table(groups, field):
    return {name: getattr(group, field) for name, group in tree.named(groups).items()}


MOCO = [
    "encoder/patch_embed/kernel",
    "encoder/patch_embed/bias",
    "encoder/cls_token",
    "encoder/pos_embed",
    *block(0),
    *block(1),
    "encoder/ln_final/scale",
    "encoder/ln_final/bias",
    "heads/projector/fc_0/kernel",
    "heads/projector/bn_0/scale",
    "heads/projector/bn_0/bias",
    "heads/predictor/fc_0/kernel",
]


def test_moco_v3_decays_everything_it_trains():
    groups = optim.groups(
        abstract(*MOCO), frozen=(r"encoder/patch_embed/.*", "encoder/pos_embed")
    )
    assert set(table(groups, "decay").values()) == {1.0}
    frozen = {name for name, held in table(groups, "frozen").items() if held}
    assert frozen == {
        "encoder/patch_embed/kernel",
        "encoder/patch_embed/bias",
        "encoder/pos_embed",
    }


def test_simmim_decays_mask_token_bias_table_and_decoder():
    names = [
        *("encoder/patch_embed/kernel", "encoder/patch_embed/bias"),
        *("encoder/cls_token", "encoder/rel_table"),
        *block(0, layer_scale=True),
        *("encoder/ln_final/scale", "encoder/ln_final/bias"),
        *("heads/mask_token", "heads/decoder/kernel", "heads/decoder/bias"),
    ]
    groups = optim.groups(
        abstract(*names), no_decay=(optim.VECTORS, "encoder/cls_token")
    )
    decayed = {name for name, decay in table(groups, "decay").items() if decay}
    assert decayed == {
        "encoder/patch_embed/kernel",
        "encoder/rel_table",
        *(f"encoder/block_0/attn/{x}/kernel" for x in ("q", "k", "v", "out")),
        "encoder/block_0/mlp/fc1/kernel",
        "encoder/block_0/mlp/fc2/kernel",
        "heads/mask_token",
        "heads/decoder/kernel",
    }


def test_lars_trusts_matrices_only():
    groups = optim.groups(
        abstract("heads/classifier/kernel", "heads/classifier/bias"),
        no_trust=(optim.VECTORS,),
        no_decay=(optim.VECTORS,),
    )
    want = {"heads/classifier/kernel": True, "heads/classifier/bias": False}
    assert table(groups, "trust") == want
    assert table(groups, "decay") == want


def test_layer_ids():
    want = {
        "encoder/cls_token": 0,
        "encoder/registers": 0,
        "encoder/pos_embed": 0,
        "encoder/patch_embed/conv_3/kernel": 0,
        "heads/mask_token": 0,
        "heads/simmim/mask_token": 0,
        "encoder/block_0/attn/rel_table": 1,
        "encoder/block_5/gamma_1": 6,
        "encoder/block_11/ln1/scale": 12,
        "encoder/rel_table": 13,
        "encoder/ln_final/scale": 13,
        "heads/fc_norm/scale": 13,
        "heads/mae/block_0/ln1/scale": 13,
    }
    assert {name: optim.layer_id(name, 12) for name in want} == want


def test_layer_multipliers():
    names = ["encoder/cls_token", "encoder/ln_final/scale"]
    names += [name for i in range(12) for name in block(i)]
    scale = table(optim.groups(abstract(*names), layer_decay=0.65), "lr_scale")
    got = [scale["encoder/cls_token"]]
    got += [scale[f"encoder/block_{i}/ln1/scale"] for i in (0, 5, 11)]
    want = [0.00369721, 0.00568801, 0.04902228, 0.65]
    np.testing.assert_allclose(got, want, atol=5e-9)
    assert scale["encoder/ln_final/scale"] == 1.0


TORCH_NAMES = {
    "cls_token": ["encoder/cls_token"],
    "pos_embed": ["encoder/pos_embed"],
    "patch_embed.proj": ["encoder/patch_embed"],
    "fc_norm": ["heads/fc_norm"],
    "head": ["heads/classifier"],
    "norm1": ["ln1"],
    "norm2": ["ln2"],
    "attn.qkv": ["attn/q", "attn/k", "attn/v"],
    "attn.proj": ["attn/out"],
    "mlp.fc1": ["mlp/fc1"],
    "mlp.fc2": ["mlp/fc2"],
}


def ours(torch_name):
    """Our names of one parameter of the recorded PyTorch model."""
    if torch_name in ("cls_token", "pos_embed"):
        return TORCH_NAMES[torch_name]
    layer, kind = torch_name.rsplit(".", 1)
    place = ""
    if layer.startswith("blocks."):
        _, i, layer = layer.split(".", 2)
        place = f"encoder/block_{i}/"
    weight = "scale" if "norm" in layer else "kernel"
    leaf = {"weight": weight, "bias": "bias"}[kind]
    return [f"{place}{name}/{leaf}" for name in TORCH_NAMES[layer]]


def test_recorded_mae_layer_decay():
    file = pathlib.Path(__file__).parent / "golden" / "mae_layer_decay_0.75.json"
    recorded = json.loads(file.read_text())
    want = {name: row for torch, row in recorded.items() for name in ours(torch)}
    groups = optim.groups(
        abstract(*want),
        no_decay=(optim.VECTORS, "encoder/(cls_token|pos_embed)"),
        layer_decay=0.75,
    )
    got = {
        name: {"lr_scale": group.lr_scale, "weight_decay": 0.05 * group.decay}
        for name, group in tree.named(groups).items()
    }
    assert got == want


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="frozen rule 'encoder/patch_embd/.*'"):
        optim.groups(abstract(*MOCO), frozen=("encoder/patch_embd/.*",))


# Optimizers


def flat_lr(base):
    return optim.schedule("constant", base=base, total_steps=1, steps_per_epoch=1)


def lr_table(rates):
    """A schedule that reads the rate of each step from a list."""
    return lambda step, scale=1.0: scale * jnp.asarray(rates, jnp.float32)[step]


def steps_of(tx, params, grads):
    """`params` after one update per gradient tree."""

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def torch_adamw(p, grads, rates, *, b1, b2, eps, weight_decay):
    """torch.optim.AdamW in float64."""
    p, m, v = p.astype(np.float64), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        p = p * (1 - lr * weight_decay)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        denominator = np.sqrt(v) / np.sqrt(1 - b2**t) + eps
        p = p - lr / (1 - b1**t) * m / denominator
    return p


def test_adamw_is_torchs_under_a_changing_rate():
    rng = np.random.default_rng(0)
    rates = [0.0, 0.3, 0.1, 0.5, 0.2]
    start = rng.normal(size=(3, 4)).astype(np.float32)
    grads = rng.normal(size=(5, 3, 4)).astype(np.float32) * [[[1, 1e-4, 1e-8, 0]]]
    params = {"w": jnp.asarray(start)}
    tx = optim.optimizer(
        optim.groups(params), "adamw", schedule=lr_table(rates), **ADAM
    )
    got, _ = steps_of(tx, params, [{"w": jnp.float32(g)} for g in grads])
    want = torch_adamw(start, grads, rates, **ADAM)
    np.testing.assert_allclose(got["w"], want, rtol=1e-6, atol=5e-7)


def test_first_adam_step_is_exact_where_optax_is_not():
    params, grad = {"w": jnp.ones(3)}, {"w": jnp.float32([0.1, -2.0, 30.0])}
    tx = optim.optimizer(
        optim.groups(params),
        "adamw",
        schedule=flat_lr(1.0),
        **(ADAM | {"weight_decay": 0.0}),
    )
    update, _ = tx.update(grad, tx.init(params), params)
    np.testing.assert_allclose(update["w"], [-1.0, 1.0, -1.0], rtol=4e-7)


def test_decay_that_ignores_the_peak_rate():
    """big_vision: p -= schedule * (lr * adam + wd * p), with the schedule's peak 1."""
    params, zero = {"w": jnp.full(3, 2.0)}, {"w": jnp.zeros(3)}
    decay = ADAM | {"weight_decay": 1e-2 / 1e-3}
    tx = optim.optimizer(
        optim.groups(params), "adamw", schedule=flat_lr(1e-3 * 0.25), **decay
    )
    update, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(update["w"], -0.25 * 1e-2 * 2.0, rtol=1e-6)


LARS = {"momentum": 0.9, "trust_coefficient": 0.001, "weight_decay": 0.1}
POINT = {"kernel": jnp.float32([[3.0, 4.0]])}
PULL = {"kernel": jnp.float32([[0.6, 0.8]])}


def lars(params, rates, **rules):
    groups = optim.groups(params, **rules)
    return optim.optimizer(groups, "lars", schedule=lr_table(rates), **LARS)


def test_lars_at_a_constant_rate():
    one, state = steps_of(lars(POINT, [6.4]), POINT, [PULL])
    np.testing.assert_allclose(one["kernel"], [[2.9808, 3.9744]], rtol=5e-7)
    momentum = optax.tree.get(state, "trace")["kernel"]
    np.testing.assert_allclose(momentum, [[0.003, 0.004]], rtol=5e-7)
    two, state = steps_of(lars(POINT, [6.4, 6.4]), POINT, [PULL, PULL])
    np.testing.assert_allclose(two["kernel"], [[2.94444288, 3.92592384]], rtol=5e-7)
    momentum = optax.tree.get(state, "trace")["kernel"]
    np.testing.assert_allclose(momentum, [[0.0056808, 0.0075744]], rtol=5e-7)


def test_lars_momentum_does_not_hold_the_rate():
    rates = [6.4, 3.2]
    got, _ = steps_of(lars(POINT, rates), POINT, [PULL, PULL])
    np.testing.assert_allclose(got["kernel"], [[2.96262144, 3.95016192]], rtol=5e-7)
    other = optax.lars(lr_table(rates), weight_decay=0.1, momentum=0.9)
    got, _ = steps_of(other, POINT, [PULL, PULL])
    np.testing.assert_allclose(got["kernel"], [[2.9539814, 3.938642]], rtol=5e-7)


def test_lars_leaves_biases_alone():
    params, grad = {"q": {"bias": jnp.ones((2, 2))}}, {"q": {"bias": jnp.ones((2, 2))}}
    tx = lars(params, [0.5], no_decay=(optim.VECTORS,), no_trust=(optim.VECTORS,))
    got, _ = steps_of(tx, params, [grad])
    np.testing.assert_allclose(got["q"]["bias"], 0.5)


def test_lars_with_a_zero_norm_takes_the_plain_step():
    params = {"a": jnp.zeros((2, 2)), "b": jnp.ones((2, 2))}
    groups = optim.groups(params)
    plain = LARS | {"weight_decay": 0.0}
    tx = optim.optimizer(groups, "lars", schedule=flat_lr(0.5), **plain)
    grads = {"a": jnp.ones((2, 2)), "b": jnp.zeros((2, 2))}
    got, _ = steps_of(tx, params, [grads])
    np.testing.assert_allclose(got["a"], -0.5)
    np.testing.assert_allclose(got["b"], 1.0)


def test_sgd_momentum_is_torchs():
    params, grad = {"w": jnp.float32([1.0, -2.0])}, np.array([0.5, 0.25])
    rates, p, v = [0.1, 0.2, 0.05], np.array([1.0, -2.0]), 0.0
    for lr in rates:
        v = 0.9 * v + grad + 0.05 * p
        p = p - lr * v
    tx = optim.optimizer(
        optim.groups(params),
        "sgd",
        schedule=lr_table(rates),
        momentum=0.9,
        weight_decay=0.05,
    )
    got, _ = steps_of(tx, params, 3 * [{"w": jnp.float32(grad)}])
    np.testing.assert_allclose(got["w"], p, rtol=1e-6)


@pytest.mark.parametrize(
    ("norm", "factor"), [(2e-3, 1e-3 / 2.001e-3), (1e-3, 1e-3 / 1.001e-3), (9e-4, 1.0)]
)
def test_clip_is_torchs(norm, factor):
    """Plain SGD with rate 1 shows the clipped gradient; the norm spans both leaves."""
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    grads = {"a": jnp.float32([0.6, 0.0]) * norm, "b": jnp.float32([0.8]) * norm}
    tx = optim.optimizer(
        optim.groups(params),
        "sgd",
        schedule=flat_lr(1.0),
        clip=1e-3,
        momentum=0.0,
        weight_decay=0.0,
    )
    got, _ = steps_of(tx, params, [grads])
    want = [-0.6 * norm * factor, 0.0]
    np.testing.assert_allclose(got["a"], want, rtol=1e-6)
    np.testing.assert_allclose(got["b"], [-0.8 * norm * factor], rtol=1e-6)


def test_clip_comes_before_the_decay():
    params, grads = {"w": jnp.full(1, 2.0)}, {"w": jnp.full(1, 100.0)}
    tx = optim.optimizer(
        optim.groups(params),
        "sgd",
        schedule=flat_lr(1.0),
        clip=0.5,
        momentum=0.0,
        weight_decay=0.25,
    )
    update, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(update["w"], -(0.5 + 0.25 * 2.0), rtol=1e-6)


MIXED = abstract(
    "encoder/cls_token",
    "encoder/pos_embed",
    "encoder/block_0/attn/q/kernel",
    "encoder/block_0/attn/q/bias",
    "heads/mask_token",
)


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_without_gradient_only_decay_moves_a_parameter(name):
    params = jax.tree.map(lambda s: jnp.full((2, 3), 2.0), MIXED)
    groups = optim.groups(
        params,
        frozen=("encoder/pos_embed",),
        no_decay=(optim.VECTORS, "encoder/cls_token"),
        no_trust=(".*",),
        layer_decay=0.5,
    )
    trainable, _ = tree.partition(params, optim.keep(groups))
    settings = {"adamw": ADAM, "lars": LARS, "sgd": {"momentum": 0.9}}[name]
    settings = settings | {"weight_decay": 0.1}
    tx = optim.optimizer(groups, name, schedule=flat_lr(0.25), **settings)
    zero = jax.tree.map(jnp.zeros_like, trainable)
    updates, state = tx.update(zero, tx.init(trainable), trainable)
    got = {name: float(x[0, 0]) for name, x in tree.named(updates).items()}
    assert got == pytest.approx(
        {
            "encoder/cls_token": 0.0,
            "encoder/block_0/attn/q/kernel": -0.25 * 0.5 * 0.1 * 2.0,
            "encoder/block_0/attn/q/bias": 0.0,
            "heads/mask_token": -0.25 * 0.25 * 0.1 * 2.0,
        },
        abs=0,
        rel=1e-6,
    )
    assert not any("pos_embed" in leaf for leaf in tree.named(state))


def test_layer_multiplier_scales_the_adam_step():
    params = jax.tree.map(lambda s: jnp.zeros((2, 3)), MIXED)
    groups = optim.groups(params, layer_decay=0.5)
    tx = optim.optimizer(groups, "adamw", schedule=flat_lr(1.0), **ADAM)
    got, _ = steps_of(tx, params, [jax.tree.map(jnp.ones_like, params)])
    moved = {name: -float(x[0, 0]) for name, x in tree.named(got).items()}
    want = dict.fromkeys(moved, 0.25) | {
        "encoder/block_0/attn/q/kernel": 0.5,
        "encoder/block_0/attn/q/bias": 0.5,
    }
    assert moved == pytest.approx(want, rel=1e-6)


def test_the_optimizer_refuses_frozen_leaves():
    groups = optim.groups(MIXED, frozen=("encoder/pos_embed",))
    params = jax.tree.map(lambda s: jnp.zeros(2), MIXED)
    tx = optim.optimizer(groups, "adamw", schedule=flat_lr(1.0), **ADAM)
    with pytest.raises(ValueError, match="unexpected: .'encoder/pos_embed'"):
        tx.init(params)


def test_equal_arguments_build_the_identical_transformation():
    def build(base):
        groups = optim.groups(MIXED, frozen=("encoder/pos_embed",))
        return optim.optimizer(groups, "adamw", schedule=flat_lr(base), **ADAM)

    assert build(1.0) is build(1.0)
    assert build(1.0) is not build(2.0)


@pytest.mark.parametrize(("name", "moment"), [("adamw", "mu"), ("sgd", "trace")])
def test_moment_dtype_is_that_of_the_first_moment_in_the_state(name, moment):
    params = {"w": jnp.ones(3)}
    settings = {"adamw": ADAM, "sgd": {"momentum": 0.9, "weight_decay": 0.0}}[name]
    tx = optim.optimizer(
        optim.groups(params),
        name,
        schedule=flat_lr(1.0),
        moment_dtype="bfloat16",
        **settings,
    )
    got, state = steps_of(tx, params, 2 * [{"w": jnp.ones(3)}])
    assert optax.tree.get(state, moment)["w"].dtype == jnp.bfloat16
    assert got["w"].dtype == jnp.float32
    if name == "adamw":
        assert optax.tree.get(state, "nu")["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adam", ADAM, "did you mean 'adamw'"),
        ("adamw", ADAM | {"weight_decy": 0.1}, "did you mean 'weight_decay'"),
        ("sgd", {"momentum": 0.9}, "needs a value for: weight_decay"),
    ],
)
def test_optimizer_mistakes_are_named(name, settings, message):
    groups = optim.groups(MIXED)
    with pytest.raises(ValueError, match=message):
        optim.optimizer(groups, name, schedule=flat_lr(1.0), **settings)
