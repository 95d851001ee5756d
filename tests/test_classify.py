"""Classification: what is read, what is trained, what is scored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import COLOUR, LABELS, TINY, pictures, tiny

from clvsmim import build, tree
from clvsmim.data.randaugment import RandAugmentCrop
from clvsmim.objectives import classify
from clvsmim.step import make_init, make_step

SMALL = {"image": (16, 16), "width": 16, "depth": 2, "heads": 2}
PLAIN = LABELS | {
    "classes": 7,
    "eval_crop": {"resize": 18, "filter": "bicubic"},
    "rand_augment": None,
    "erasing": None,
    "mix": None,
    "average": 0.0,
}
PROBE = PLAIN | {"tune": "head", "smoothing": 0.0}


def make(encoder=None, base=PROBE, **changes):
    settings = {k: v for k, v in (base | COLOUR | changes).items() if k != "name"}
    return classify.make(encoder=encoder or tiny(TINY, **SMALL), **settings)


BATCH = 16
LABEL = np.arange(BATCH, dtype=np.int32) % 7


def batch_of(objective, seed=0):
    return pictures(build.batch_spec(objective, BATCH), seed) | {"label": LABEL}


@functools.cache
def encoder_of(encoder):
    """Its parameters and batch statistics, drawn and compiled once."""
    images = jnp.zeros((1, *encoder.spec.image, 3))
    init = jax.jit(functools.partial(encoder.init, train=True))
    return {"stats": {}} | init(jax.random.key(0), images)


def begun(objective):
    """(params, extra, inputs)."""
    key, batch = jax.random.key(0), batch_of(objective)
    inputs = objective.prepare(key, batch, train=False)
    return (*objective.init(key, inputs, encoder_of(objective.encoder)), inputs)


@functools.cache
def encoded(encoder, seed=0):
    """(tokens, taps) of the pictures, in float64."""
    inputs = begun(make(encoder))[2]
    apply = jax.jit(lambda params, x: encoder.apply({"params": params}, x))
    found = apply(encoder_of(encoder)["params"], inputs["image"])
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)


def scores(objective, params, extra, images, train=False):
    """(logits by head, extra) as the objective's loss has them."""
    encoder, heads, *_ = objective.loss.args
    read = functools.partial(classify.logits, train_encoder=False, train=train)
    read = jax.jit(functools.partial(read, encoder, heads))
    found, extra = read(params, extra, images, None)
    return {k: np.asarray(x) for k, x in found.items()}, extra


@pytest.mark.parametrize("pool", ["cls", "patches"])
def test_a_block_is_read_before_the_final_norm_and_the_last_after_it(pool):
    encoder = tiny(TINY, **SMALL)
    objective = make(encoder, blocks="all", pool=pool, norm="none")
    params, extra, inputs = begun(objective)
    tokens, taps = encoded(encoder)
    got, _ = scores(objective, params, extra, inputs["image"])
    assert list(got) == ["block_1/rate_1", "block_2/rate_1"]

    def want(x, block):
        x = x[:, 0] if pool == "cls" else x[:, 1:].mean(1)
        head = jax.tree.map(np.asarray, params["heads"][block]["rate_1"])
        return x @ head["kernel"] + head["bias"]

    for block in (1, 2):
        x = want(taps["residual"][2 * block], f"block_{block}")
        np.testing.assert_allclose(got[f"block_{block}/rate_1"], x, atol=1e-6)
    last = make(encoder, blocks="last", pool=pool, norm="none")
    params = params | {"heads": {"last": params["heads"]["block_2"]}}
    got, _ = scores(last, params, extra, inputs["image"])
    np.testing.assert_allclose(got["last/rate_1"], want(tokens, "last"), atol=1e-6)


def test_layer_norm_is_new_and_batch_norm_has_no_parameters():
    layer = make(norm="layer", blocks="last", rates=(1.0, 3.0))
    params, extra, inputs = begun(layer)
    assert set(tree.named(params["heads"])) == {
        f"last/{rate}/{leaf}"
        for rate in ("rate_1", "rate_3")
        for leaf in ("kernel", "bias", "fc_norm/scale", "fc_norm/bias")
    }
    tokens, _ = encoded(layer.encoder)
    x = tokens[:, 1:].mean(1)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    got, _ = scores(layer, params, extra, inputs["image"])
    want = x @ np.asarray(params["heads"]["last"]["rate_3"]["kernel"], np.float64)
    np.testing.assert_allclose(got["last/rate_3"], want, atol=1e-5)

    batch = make(norm="batch", blocks="last", rates=(1.0, 3.0))
    params, extra, inputs = begun(batch)
    assert set(tree.named(params["heads"])) == {
        f"last/{rate}/{leaf}"
        for rate in ("rate_1", "rate_3")
        for leaf in ("kernel", "bias")
    }
    assert set(tree.named(extra["heads"])) == {"last/mean", "last/var"}
    x = tokens[:, 1:].mean(1)
    got, new = scores(batch, params, extra, inputs["image"], train=True)
    kernel = np.asarray(params["heads"]["last"]["rate_1"]["kernel"], np.float64)
    want = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6) @ kernel
    np.testing.assert_allclose(got["last/rate_1"], want, atol=1e-4)
    running = jax.tree.map(np.asarray, new["heads"]["last"])
    np.testing.assert_allclose(running["mean"], 0.1 * x.mean(0), rtol=1e-4, atol=1e-6)
    want = 0.9 + 0.1 * x.var(0, ddof=1)
    np.testing.assert_allclose(running["var"], want, rtol=1e-5)
    # Evaluation, at variances near the epsilon, which is 1e-6 and not PyTorch's 1e-5.
    running["var"] = 1e-6 * running["var"]
    small = new | {"heads": {"last": running}}
    got, same = scores(batch, params, small, inputs["image"])
    want = (x - running["mean"]) / np.sqrt(running["var"] + 1e-6) @ kernel
    np.testing.assert_allclose(got["last/rate_1"], want, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(same["heads"]["last"]["mean"], running["mean"])


def test_heads_begin_small_equal_over_rates_and_different_over_blocks():
    objective = make(rates=(0.1, 1.0), head_std=0.01, classes=1000)
    heads = begun(objective)[0]["heads"]
    kernel = heads["block_1"]["rate_0.1"]["kernel"]
    assert kernel.std() == pytest.approx(0.01, rel=0.05)
    np.testing.assert_array_equal(kernel, heads["block_1"]["rate_1"]["kernel"])
    assert (kernel != heads["block_2"]["rate_1"]["kernel"]).any()
    assert not heads["block_1"]["rate_1"]["bias"].any()


RULES = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.1},
    "lars": {
        "momentum": 0.9,
        "trust_coefficient": 1e-3,
        "weight_decay": 0.1,
        "no_trust": (r".*/bias",),
    },
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
}


def optimizer_of(objective, rule, base):
    schedule = {"name": "constant", "base": base}
    section = {"name": rule, "schedule": schedule, **RULES[rule]}
    return build.make_optimizer(objective, section, 10, 10)


@functools.cache
def gradients(blocks, rates):
    """(objective, heads to begin with, gradient of these by the number of a step)."""
    objective = make(tiny(TINY, **SMALL), blocks=blocks, rates=rates)
    params, extra, _ = begun(objective)
    key = jax.random.key(0)
    inputs = [
        objective.prepare(key, batch_of(objective, seed), train=False)
        for seed in range(3)
    ]

    @jax.jit
    def gradient(heads, inputs):
        def loss(heads):
            every = {"encoder": params["encoder"], "heads": heads}
            return objective.loss(every, extra, inputs, key, progress=0, train=True)[0]

        return jax.grad(loss)(heads)

    return objective, params["heads"], lambda heads, i: gradient(heads, inputs[i])


def trained(rule, base, blocks, rates):
    """The heads after three steps at a constant rate."""
    objective, heads, gradient = gradients(blocks, rates)
    optimizer = optimizer_of(objective, rule, base)
    none = jax.tree.map(lambda _: None, encoder_of(objective.encoder)["params"])
    state = optimizer.transform.init({"encoder": none, "heads": heads})
    for i in range(3):
        grads = {"encoder": none, "heads": gradient(heads, i)}
        now = {"encoder": none, "heads": heads}
        updates, state = optimizer.transform.update(grads, state, now)
        heads = jax.tree.map(lambda p, u: p + u, heads, updates["heads"])
    return {name: np.asarray(x) for name, x in tree.named(heads["block_2"]).items()}


@pytest.mark.parametrize("rule", RULES)
def test_each_rate_of_a_sweep_trains_as_if_it_were_alone(rule):
    together = trained(rule, 0.1, "all", (0.3, 3.0))
    start = np.asarray(gradients(2, (1.0,))[1]["block_2"]["rate_1"]["kernel"])
    for factor in (0.3, 3.0):
        alone = trained(rule, 0.1 * factor, 2, (1.0,))
        moved = np.abs(alone["rate_1/kernel"] - start).max()
        for leaf in ("kernel", "bias"):
            got = together[f"rate_{factor:g}/{leaf}"]
            np.testing.assert_allclose(got, alone[f"rate_1/{leaf}"], atol=1e-3 * moved)
    apart = np.abs(together["rate_3/kernel"] - together["rate_0.3/kernel"]).max()
    assert apart > 0.5 * moved


@pytest.fixture(scope="module")
def swept():
    """(state before, state after, logs): three steps of two blocks and two rates."""
    encoder = tiny(TINY | {"stem": "conv"}, **SMALL, drop_path=0.5)
    objective = make(encoder, rates=(0.3, 3.0))
    optimizer = optimizer_of(objective, "adamw", 0.1)
    batch = batch_of(objective)
    init = make_init(objective, optimizer, batch, seed=0)
    step = jax.jit(make_step(objective, optimizer, seed=0, total=10))
    first = state = jax.jit(init).lower().compile()()
    step = step.lower(state, batch).compile()
    for i in range(3):
        state, logs = step(state, batch_of(objective, i))
    return jax.device_get((first, state, logs))


def test_a_probe_changes_heads_alone_and_has_no_state_for_the_encoder(swept):
    before, after, _ = swept
    for part in ("params", "extra"):
        a, b = (tree.named(getattr(x, part)["encoder"]) for x in (before, after))
        assert a  # the convolutional stem has batch statistics
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    heads = tree.named(after.params["heads"])
    kept = {n: x for n, x in tree.named(after.opt).items() if x.ndim}
    assert len(kept) == 2 * len(heads) == 16
    assert sum(x.size for x in kept.values()) == 2 * sum(x.size for x in heads.values())
    assert all("/heads/" in name for name in kept)
    start = tree.named(before.params["heads"])
    assert all((start[name] != heads[name]).any() for name in heads)


def test_fine_tuning_freezes_nothing():
    assert make().frozen == ("encoder/.*",) and make(tune="all").frozen == ()


def test_the_loss_is_the_sum_and_each_head_is_logged(swept):
    logs = swept[2]
    each = {k: v for k, v in logs.items() if k.startswith("loss/")}
    assert set(each) == {
        f"loss/block_{b}/rate_{r}" for b in (1, 2) for r in ("0.3", "3")
    }
    assert logs["loss"] == pytest.approx(sum(each.values()), rel=1e-6)
    assert logs["mean_loss"] == pytest.approx(logs["loss"] / 4, rel=1e-6)
    assert "gradient_norm/patch_embed" not in logs


def test_drop_path_is_for_training_the_encoder_only():
    encoder = tiny(TINY, **SMALL, drop_path=0.9)

    def losses(tune):
        objective = make(encoder, tune=tune, norm="none", blocks="last")
        params, extra, inputs = begun(objective)

        @jax.jit
        def loss(key):
            return objective.loss(params, extra, inputs, key, progress=0.0, train=True)[
                0
            ]

        return [float(loss(jax.random.key(i))) for i in range(2)]

    assert len(set(losses("head"))) == 1 and len(set(losses("all"))) == 2


def counted(function, *args):
    """Operations, as the compiler counts them."""
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@pytest.mark.parametrize("rates", [(1.0,), (0.1, 0.3, 1.0, 3.0, 10.0)])
def test_a_probe_step_costs_a_forward_pass(rates):
    """At most 1.1 times, by the compiler's count; training all costs three."""
    encoder = tiny(TINY, image=(64, 64), width=96, depth=4)
    objective = make(
        encoder,
        blocks="all" if len(rates) > 1 else "last",
        rates=rates,
        classes=10,
        eval_crop={"resize": 72, "filter": "bicubic"},
    )
    section = {"schedule": {"name": "constant", "base": 0.1}, "name": "sgd"}
    optimizer = build.make_optimizer(objective, section | RULES["sgd"], 10, 10)
    batch = build.batch_spec(objective, 8)
    state = jax.eval_shape(make_init(objective, optimizer, batch, seed=0))
    step = make_step(objective, optimizer, seed=0, total=10)
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
    forward = counted(
        lambda params, x: encoder.apply({"params": params}, x)[0],
        state.params["encoder"],
        images,
    )
    assert counted(step, state, batch) <= 1.1 * forward
    # What the log counts by hand, without norms and the like, is near it.
    assert objective.flops.step * 8 == pytest.approx(forward, rel=0.1)


def test_evaluation_is_per_image_and_without_randomness():
    objective = make(
        blocks="last", base=PLAIN, rand_augment=None, mix=LABELS["mix"], flip_p=1.0
    )
    params, extra, inputs = begun(objective)
    again = objective.prepare(jax.random.key(9), batch_of(objective), train=False)
    np.testing.assert_array_equal(again["image"], inputs["image"])
    colour = batch_of(objective)["views"][0] / 255
    want = (colour - COLOUR["mean"]) / COLOUR["std"]
    np.testing.assert_allclose(again["image"], want, atol=1e-5)
    np.testing.assert_array_equal(again["target"], np.eye(7)[LABEL])
    found = objective.evaluate(params, extra, inputs)
    assert set(found) == {"loss", "top1", "top5"}
    assert all(x.shape == (BATCH,) and x.dtype == jnp.float32 for x in found.values())
    x = scores(objective, params, extra, inputs["image"])[0]["last/rate_1"]
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    np.testing.assert_allclose(
        found["loss"], -log_p[np.arange(BATCH), LABEL], atol=1e-5
    )
    np.testing.assert_array_equal(found["top1"], x.argmax(1) == LABEL)
    five = np.argsort(-x, 1)[:, :5]
    np.testing.assert_array_equal(found["top5"], (five == LABEL[:, None]).any(1))


def test_of_several_heads_each_is_scored_and_of_five_classes_no_top5():
    objective = make(rates=(0.1, 1.0), blocks=(2,), classes=5)
    params, extra, inputs = begun(objective)
    inputs = inputs | {"label": inputs["label"] % 5}
    found = jax.eval_shape(objective.evaluate, params, extra, inputs)
    assert set(found) == {
        f"{kind}/block_2/rate_{rate}" for kind in ("loss", "top1") for rate in (0.1, 1)
    }


def test_ties_and_nan_are_no_hits():
    rows = [[1, 2, 0, 0, 0, 0, 0], [2, 2, 0, 0, 0, 0, 0], [np.nan] * 7, [0.0] * 7]
    label = jnp.array([1, 1, 1, 1])
    inputs = {"label": label, "target": jax.nn.one_hot(label, 7)}
    found = classify.scored(jnp.array(rows), inputs)
    assert found["top1"].tolist() == [1, 0, 0, 0]
    assert found["top5"].tolist() == [1, 1, 0, 0]


def test_the_average_follows_the_parameters_and_is_scored_beside_them():
    objective = make(base=PLAIN, blocks="last", average=0.75)
    params, extra, inputs = begun(objective)
    average = extra["heads"]["average"]
    for a, b in zip(*map(jax.tree.leaves, (average, params)), strict=True):
        np.testing.assert_array_equal(a, b)
    moved = jax.tree.map(lambda x: x + 1, params)
    new = objective.after(moved, extra, 0.5)
    assert {k: v for k, v in new["heads"].items() if k != "average"} == {
        k: v for k, v in extra["heads"].items() if k != "average"
    }
    for a, b in zip(
        *map(jax.tree.leaves, (new["heads"]["average"], params)), strict=True
    ):
        np.testing.assert_allclose(a, b + 0.25, rtol=1e-6)
    extra["heads"]["average"] = params
    found = objective.evaluate(moved, extra, inputs)
    plain = make(base=PLAIN, blocks="last").evaluate(params, extra, inputs)
    assert set(found) == {
        f"{a}{k}" for a in ("", "average/") for k in ("loss", "top1", "top5")
    }
    np.testing.assert_allclose(found["average/loss"], plain["loss"], rtol=1e-6)
    assert np.abs(found["loss"] - plain["loss"]).max() > 1e-3
    assert make().after(params, extra, 0.5) is extra


def test_training_images_are_erased_before_they_are_mixed(monkeypatch):
    """Each holds its own noise and its partner's: unmixed, one rectangle per image."""
    lam = 0.7
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b: jnp.float32(lam))
    erasing = {"p": 1.0, "area": (0.2, 0.3), "aspect": (0.5, 2.0)}
    mix = {"mixup": 0.8, "cutmix": 0.0, "switch_p": 0.5}
    objective = make(base=PLAIN, erasing=erasing, mix=mix)
    batch = batch_of(objective)
    batch["views"] = (np.zeros_like(batch["views"][0]),)  # black
    prepare = jax.jit(functools.partial(objective.prepare, train=True))
    inputs = prepare(jax.random.key(1), batch)
    soft = 0.9 * np.eye(7)[LABEL] + 0.1 / 7  # smoothed
    want = lam * soft + (1 - lam) * soft[::-1]
    np.testing.assert_allclose(inputs["target"], want, atol=1e-6)
    image = np.asarray(inputs["image"], np.float64)
    unmixed = (lam * image - (1 - lam) * image[::-1]) / (2 * lam - 1)
    black = -np.array(COLOUR["mean"]) / COLOUR["std"]
    noise = (np.abs(unmixed - black) > 1e-4).any(-1)
    heights, widths = noise.any(2).sum(1), noise.any(1).sum(1)
    np.testing.assert_array_equal(noise.sum((1, 2)), heights * widths)  # full boxes
    assert (noise.mean((1, 2)) > 0.15).all() and (noise != noise[::-1]).any()
    assert unmixed[noise].std() == pytest.approx(1, abs=0.05)


def test_rand_augment_mirrors_on_the_host_and_fills_with_the_mean():
    objective = make(base=PLAIN, rand_augment=LABELS["rand_augment"], flip_p=1.0)
    (view,) = objective.views
    assert isinstance(view, RandAugmentCrop)
    assert view.fill == (124, 116, 104) and view.flip_p == 1.0
    assert objective.prepare.args[0].keywords["flip_p"] == 0.0
    plain = make(base=PLAIN, flip_p=1.0)
    assert plain.prepare.args[0].keywords["flip_p"] == 1.0
    assert objective.view.size == (16, 16) and objective.view.resize == 18


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tune": "heads"}, "unknown objective.tune 'heads': did you mean 'head'"),
        ({"pool": "mean"}, "unknown objective.pool"),
        ({"norm": "batchnorm"}, "did you mean 'batch'"),
        (
            {"blocks": "lasts"},
            "blocks='lasts': use 'last', 'all', a number from 1 to 2",
        ),
        ({"blocks": (0, 1)}, "a number from 1 to 2"),
        ({"blocks": 3}, "blocks=3"),
        ({"blocks": ()}, "blocks="),
        ({"blocks": (1, 1)}, "several different ones"),
        ({"rates": ()}, "use different factors above 0"),
        ({"rates": (1.0, 1.0)}, "use different factors above 0"),
        ({"rates": (0.0,)}, "use different factors above 0"),
        ({"classes": 1}, "classes=1"),
        ({"smoothing": 1.0}, "smoothing=1.0"),
        ({"average": 0.5}, "tune='all'"),
        ({"mix": {"mixup": 0.8}}, "mix needs a value for: cutmix, switch_p"),
        ({"erasing": {"q": 1}}, "unknown key in erasing 'q'"),
        ({"rand_augment": {"m": 1}}, "unknown key in rand_augment 'm'"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make(**change)
    if change == {"pool": "mean"}:
        with pytest.raises(ValueError, match="set encoder.prefix >= 1"):
            make(tiny(TINY, **SMALL, prefix=0), pool="cls")
