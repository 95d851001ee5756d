"""What the optimizer of every recipe with labels does with every leaf, as tables.

A row is (decay, frozen, learning-rate multiplier) and for LARS the trust ratio too;
`{i}` is any block, and a multiplier "block" is decay ** (L - i) of block i, from 0.
"""

import functools

import jax
import numpy as np
import pytest

from clvsmim import build, optim, tree
from clvsmim.configs import deit, finetune, linear_probe

DECAYED, PLAIN = (1.0, False, 1.0), (0.0, False, 1.0)

# DeiT: no decay on vectors, CLS and positions; one learning rate.
DEIT = {
    "encoder/cls_token": PLAIN,
    "encoder/pos_embed": PLAIN,
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
    "heads/last/rate_1/kernel": DECAYED,
    "heads/last/rate_1/bias": PLAIN,
}
# Layer decay: 0 is what feeds block 0, then the blocks, then the rest.
STEM_D, STEM = (1.0, False, "stem"), (0.0, False, "stem")
BLOCK_D, BLOCK = (1.0, False, "block"), (0.0, False, "block")
MAE = {
    "encoder/cls_token": STEM,
    "encoder/pos_embed": STEM,
    "encoder/patch_embed/kernel": STEM_D,
    "encoder/patch_embed/bias": STEM,
    "encoder/block_{i}/ln1/scale": BLOCK,
    "encoder/block_{i}/ln1/bias": BLOCK,
    "encoder/block_{i}/attn/q/kernel": BLOCK_D,
    "encoder/block_{i}/attn/q/bias": BLOCK,
    "encoder/block_{i}/attn/k/kernel": BLOCK_D,
    "encoder/block_{i}/attn/k/bias": BLOCK,
    "encoder/block_{i}/attn/v/kernel": BLOCK_D,
    "encoder/block_{i}/attn/v/bias": BLOCK,
    "encoder/block_{i}/attn/out/kernel": BLOCK_D,
    "encoder/block_{i}/attn/out/bias": BLOCK,
    "encoder/block_{i}/ln2/scale": BLOCK,
    "encoder/block_{i}/ln2/bias": BLOCK,
    "encoder/block_{i}/mlp/fc1/kernel": BLOCK_D,
    "encoder/block_{i}/mlp/fc1/bias": BLOCK,
    "encoder/block_{i}/mlp/fc2/kernel": BLOCK_D,
    "encoder/block_{i}/mlp/fc2/bias": BLOCK,
    "heads/last/rate_1/fc_norm/scale": PLAIN,
    "heads/last/rate_1/fc_norm/bias": PLAIN,
    "heads/last/rate_1/kernel": DECAYED,
    "heads/last/rate_1/bias": PLAIN,
}
# SimMIM: a bias table per block, decayed (2-D); no k bias, layer scale.
SIMMIM = {
    name: row
    for name, row in MAE.items()
    if name not in ("encoder/pos_embed", "encoder/block_{i}/attn/k/bias")
} | {
    "encoder/block_{i}/attn/rel_table": BLOCK_D,
    "encoder/block_{i}/gamma_1": BLOCK,
    "encoder/block_{i}/gamma_2": BLOCK,
}

LAYER_DECAY = {  # the multipliers of an encoder of 12 blocks, stem first
    "simmim": [0.00369721, 0.00568801, 0.00875079, 0.01346275, 0.02071192]
    + [0.03186449, 0.04902228, 0.07541889, 0.11602906, 0.17850625, 0.274625]
    + [0.4225, 0.65],
    None: [1.0] * 13,
}
LAYER_DECAY["mae"] = LAYER_DECAY["simmim"]


def groups(config):
    """The groups by name, of the recipe as it is."""
    config = build.plain(config)
    encoder = build.make_encoder(config["encoder"])
    method = build.make_objective(encoder, config["input"], config["objective"])
    return tree.named(build.make_optimizer(method, config["optim"], 100, 10).groups)


def rows(table, decay):
    found = {}
    for name, (wd, frozen, scale) in table.items():
        for i in range(12 if "{i}" in name else 1):
            value = {"stem": decay[0], "block": decay[i + 1]}.get(scale, scale)
            found[name.format(i=i)] = (wd, frozen, value)
    return found


RECIPES = {
    "deit": (functools.partial(deit.get_config, "S"), DEIT, None),
    "finetune:deit": (functools.partial(finetune.get_config, "deit"), DEIT, None),
    "finetune:mae": (functools.partial(finetune.get_config, "mae"), MAE, "mae"),
    "finetune:simmim": (
        functools.partial(finetune.get_config, "simmim"),
        SIMMIM,
        "simmim",
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_leaf_is_in_the_group_of_its_table(recipe):
    get_config, table, decay = RECIPES[recipe]
    got = groups(get_config())
    want = rows(table, LAYER_DECAY[decay])
    assert set(got) == set(want)
    for name, (wd, frozen, scale) in want.items():
        group = got[name]
        assert (group.decay, group.frozen) == (wd, frozen), name
        np.testing.assert_allclose(group.lr_scale, scale, rtol=2e-6, err_msg=name)


def probe(protocol):
    """(groups of the heads, groups of the encoder) of a linear probe."""
    found = groups(linear_probe.get_config(protocol))
    heads = {n: g for n, g in found.items() if n.startswith("heads/")}
    return heads, [g for n, g in found.items() if n.startswith("encoder/")]


@pytest.mark.parametrize("protocol", linear_probe.VARIANTS)
def test_a_probe_trains_its_heads_alone(protocol):
    heads, encoder = probe(protocol)
    assert len(encoder) > 150 and all(group.frozen for group in encoder)
    blocks = {"paper": range(1, 13), "simmim": [8]}.get(protocol)
    factors = (0.1, 0.3, 1.0, 3.0, 10.0) if blocks else (1.0,)
    places = [f"block_{b}" for b in blocks] if blocks else ["last"]
    # LARS of MAE scales kernels, and leaves the bias its whole learning rate.
    want = {
        f"heads/{place}/rate_{factor:g}/{leaf}": (
            False,
            factor,
            leaf == "kernel" or protocol != "mae",
        )
        for place in places
        for factor in factors
        for leaf in ("kernel", "bias")
    }
    got = {n: (g.frozen, g.lr_scale, g.trust) for n, g in heads.items()}
    assert got == want


# (learning rate at step 0, base at the batch, batch, epochs, last block's drop path)
NUMBERS = {
    "simmim": (1e-6, 5e-3, 2048, 100, 0.1),
    "mae": (0.0, 2e-3, 1024, 100, 0.1),
    "deit": (1e-6, 1e-3, 1024, 150, 0.1),
}


@pytest.mark.parametrize("protocol", NUMBERS)
def test_fine_tuning_has_the_published_numbers(protocol):
    config = finetune.get_config(protocol)
    first, base, batch, epochs, drop = NUMBERS[protocol]
    steps = 1281167 // batch
    schedule = dict(config.optim.schedule)
    rate = optim.schedule(
        schedule.pop("name"),
        total_steps=epochs * steps,
        steps_per_epoch=steps,
        **schedule,
    )
    assert (config.batch, config.epochs) == (batch, epochs)
    assert float(rate(0)) == pytest.approx(first, rel=1e-6)
    assert config.optim.schedule.base == pytest.approx(base, rel=1e-9)
    assert config.encoder.drop_path == drop
    assert config.encoder.final_norm == (protocol == "deit")
    assert config.objective.eval_crop.resize == 256


@pytest.mark.parametrize(
    "width, base, decay, epochs, drop",
    [(768, 2e-3, 0.65, 100, 0.1), (1024, 4e-3, 0.75, 50, 0.2)]
    + [(1280, 4e-3, 0.75, 50, 0.3), (96, 2e-3, 0.65, 100, 0.1)],
)
def test_mae_is_fine_tuned_by_size(monkeypatch, width, base, decay, epochs, drop):
    monkeypatch.setitem(finetune.OF["mae"], "width", width)
    config = finetune.get_config("mae")
    assert config.optim.schedule.base == pytest.approx(base, rel=1e-9)
    assert config.optim.schedule.warmup_epochs == pytest.approx(5)
    assert (config.optim.layer_decay, config.epochs) == (decay, epochs)
    assert config.encoder.drop_path == drop


def test_a_probe_follows_the_batch():
    config = linear_probe.get_config("mae")
    assert config.optim.schedule.base == pytest.approx(6.4)
    assert config.optim.schedule.warmup_epochs == pytest.approx(10)
    config.batch = 256
    assert config.optim.schedule.base == pytest.approx(0.1)
    assert linear_probe.get_config("moco_v3").optim.schedule.base == 12.0
    assert linear_probe.get_config("paper").optim.schedule.base == 2.0


def test_the_recipe_builds_without_the_data():
    made = build.build(shallow(linear_probe.get_config("paper")), jax.devices()[:1])
    assert made.steps_per_epoch == 1251 and made.total == 50 * 1251
    assert len(made.held_out) == 50000


def shallow(config):
    config.encoder.depth = 1
    return config
