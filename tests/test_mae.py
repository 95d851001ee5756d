"""MAE: against its recordings, and what masks, targets and loss must be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import originals
import pytest
from models import (
    COLOUR,
    CROP,
    MAE,
    SIMMIM,
    close,
    pictures,
    tiny,
    tiny_mae,
    tiny_moco_v3,
)

from clvsmim import build, inits, masks, optim, schedules, tree
from clvsmim import pictures as galleries
from clvsmim.objectives import hybrid, mae
from clvsmim.step import Optimizer, State, make_step

KEY = jax.random.key(0)


# Against the recorded original (tests/golden/README.md)


def recorded(flat):
    """PyTorch names and layouts -> our tree."""
    own = {k: v for k, v in flat.items() if not k.startswith("decoder_")}
    rest = {k[8:]: v for k, v in flat.items() if k.startswith("decoder_")}
    ends = {
        ours: {"kernel": rest[f"{theirs}.weight"].T, "bias": rest[f"{theirs}.bias"]}
        for ours, theirs in (("proj", "embed"), ("pixels", "pred"))
    }
    inner = {k: v for k, v in rest.items() if k.startswith(("blocks", "norm"))}
    decoder = originals.encoder(inner, 4) | ends
    heads = {"mask_token": flat["mask_token"], "decoder": decoder}
    return {"encoder": originals.encoder(own, 3), "heads": heads}


@pytest.fixture(scope="module", params=[True, False], ids=["normpix", "pixel"])
def replay(request, golden):
    """(recording, objective, params, extra, inputs, all that one loss gives)."""
    record = golden("mae_normpix" if request.param else "mae_pixel")
    objective = tiny_mae(tiny(MAE), norm_pix=request.param)
    keep, restore, mask = masks.mask_from_noise(record["noise"], 4)
    image = originals.images(record["image"])
    inputs = {"image": image, "keep": keep, "restore": restore, "mask": mask}
    shapes, extra = jax.eval_shape(objective.init, KEY, inputs)
    params = tree.strict(shapes, recorded(record.group("params")), "rec")
    decoder = objective.loss.args[1]

    @jax.jit
    def run(params):
        def loss(params):
            return objective.loss(params, extra, inputs, KEY, progress=0.0, train=True)

        latent, _ = mae.encode(objective.encoder, params, extra, inputs, None, False)
        pred = mae.decode(decoder, params["heads"], latent, inputs["restore"])
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params)
        shown = objective.reconstruct(params, extra, inputs)
        return {
            "loss": value,
            "latent": latent,
            "pred": pred,
            "grads": grads,
            "shown": shown,
        }

    return record, objective, params, extra, inputs, run(params)


def test_loss_prediction_mask_and_latent_of_the_recording(replay):
    record, _, _, _, inputs, found = replay
    np.testing.assert_allclose(found["loss"], record["loss"], rtol=5e-6)
    np.testing.assert_array_equal(inputs["mask"], record["mask"])
    close(found["latent"], record["latent"])
    close(found["pred"], record["pred"])


def test_gradients_of_the_recording(replay):
    record, _, _, _, _, found = replay
    flat = record.group("grads")
    theirs, ours = tree.named(recorded(flat)), tree.named(found["grads"])
    assert set(ours) - set(theirs) == {"encoder/pos_embed"}  # frozen: none recorded
    assert set(theirs) <= set(ours)
    scale = max(np.abs(x).max() for x in flat.values())
    for name, g in theirs.items():
        close(ours[name], g, scale)


def test_trajectory_of_the_recording(replay):
    record, objective, params, extra, inputs, _ = replay
    groups = optim.groups(
        params, no_decay=(optim.VECTORS,), frozen=("encoder/pos_embed",)
    )
    rate = schedules.Constant(base=1e-3)
    settings = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.05}
    transform = optim.optimizer(groups, "adamw", schedule=rate, **settings)
    objective = dataclasses.replace(
        objective, prepare=lambda key, batch, *, train: inputs
    )
    optimizer = Optimizer(groups, transform, rate)
    step = jax.jit(make_step(objective, optimizer, seed=0, total=1000))
    trainable, _ = tree.partition(params, optim.keep(groups))
    state, losses = State(0, params, extra, transform.init(trainable)), []
    for _ in range(4):
        state, logs = step(state, None)
        losses.append(float(logs["loss"]))
    np.testing.assert_allclose(losses, record["adamw_losses"], rtol=5e-6)


def test_the_recorded_positions_are_ours(replay):
    record, objective, params, _, _, _ = replay
    table = record["params/decoder_pos_embed"]
    ours = inits.sincos_table((4, 4), 32, rows_first=False)
    np.testing.assert_allclose(table[0, 1:], ours, atol=1e-6)
    assert not table[0, 0].any()
    fresh = objective.encoder.init(KEY, np.zeros((1, 32, 32, 3)))["params"]
    np.testing.assert_allclose(fresh["pos_embed"], params["encoder"]["pos_embed"])


def test_a_picture_shows_predicted_pixels_in_the_colours_of_the_image(replay):
    """What a norm_pix model predicts is un-normalised with each patch's own moments."""
    record, objective, _, _, inputs, found = replay
    image, mask, pixels = found["shown"]
    np.testing.assert_array_equal(image, inputs["image"])
    hidden = record["mask"].reshape(8, 4, 4).repeat(8, 1).repeat(8, 2)
    np.testing.assert_array_equal(mask[..., 0], hidden)
    patches = inputs["image"].reshape(8, 4, 8, 4, 8, 3).swapaxes(2, 3)
    patches = patches.reshape(8, 16, 192)
    expected = record["pred"]
    if objective.loss.args[2]:
        deviation = np.sqrt(patches.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
        expected = expected * deviation + patches.mean(axis=-1, keepdims=True)
    expected = expected.reshape(8, 4, 4, 8, 8, 3).swapaxes(2, 3).reshape(8, 32, 32, 3)
    close(pixels, expected)


# Masks, targets, loss


def test_mask_and_target_vectors():
    """Worked out by hand from the formulas."""
    keep, restore, mask = masks.mask_from_noise(np.array([0.5, 0.1, 0.9, 0.3]), 2)
    assert (keep.tolist(), restore.tolist()) == ([1, 3], [2, 0, 3, 1])
    assert mask.tolist() == [1, 0, 1, 0]
    patch = jnp.arange(768.0).reshape(1, 1, 768)
    mean, deviation = mae.scale(patch, True)
    np.testing.assert_allclose(deviation**2, 49216, rtol=1e-6)
    target = ((patch - mean) / deviation).ravel()
    ends = (-1.72867046, 1.72867046)
    np.testing.assert_allclose(target[np.array([0, -1])], ends, rtol=2e-7)


@pytest.mark.parametrize(
    ("image", "ratio", "seen"),
    [
        ((224, 224), 0.75, 49),  # 14 x 14 patches of 16, as published
        ((16, 160), 0.9, 1),  # in float64, 10 * (1 - 0.9) is less than 1
        ((48, 80), 0.5, 7),  # 15 patches: what stays is rounded down
    ],
)
def test_every_image_shows_as_many_patches(image, ratio, seen):
    objective = tiny_mae(tiny(MAE, image=image, patch=16), mask_ratio=ratio)
    shape = (4, *image, 3)
    batch = {"views": (jax.ShapeDtypeStruct(shape, jnp.uint8),)}
    inputs = jax.eval_shape(
        functools.partial(objective.prepare, train=True), KEY, batch
    )
    n = image[0] * image[1] // 256
    assert inputs["keep"].shape == (4, seen)
    assert inputs["mask"].shape == inputs["restore"].shape == (4, n)
    assert inputs["image"].shape == shape


def test_masks_are_uniform_and_differ_by_image_step_and_training():
    objective = tiny_mae(tiny(MAE))
    batch = {"views": (np.zeros((4096, 32, 32, 3), np.uint8),)}
    prepare = jax.jit(lambda key: objective.prepare(key, batch, train=True))
    inputs, again = prepare(KEY), prepare(jax.random.key(1))
    mask = np.asarray(inputs["mask"])
    assert set(np.unique(mask)) == {0, 1}
    assert (mask.sum(1) == 12).all()  # of 16
    # A patch is hidden with probability 3/4: 5 deviations of a mean of 4096 draws.
    assert np.abs(mask.mean(0) - 0.75).max() < 5 * np.sqrt(0.75 * 0.25 / 4096)
    both = (mask[:, 0] * mask[:, 1]).mean()  # without replacement: 12/16 x 11/15
    assert abs(both - 0.55) < 5 * np.sqrt(0.55 * 0.45 / 4096)
    assert len({row.tobytes() for row in mask}) > 1000  # of 1820 that there are
    assert (np.asarray(again["mask"]) != mask).any()
    for name in ("keep", "restore"):
        assert inputs[name].dtype == jnp.int32
    seen = np.take_along_axis(mask, np.asarray(inputs["keep"]), axis=1)
    assert not seen.any()


@pytest.fixture(scope="module")
def born():
    """A fresh model with registers on a grid that is not square: its parts."""
    objective = tiny_mae(tiny(MAE, image=(16, 32), prefix=3, depth=1))
    batch = pictures(build.batch_spec(objective, 4))

    @jax.jit
    def make():
        inputs = objective.prepare(KEY, batch, train=True)
        return inputs, *objective.init(KEY, inputs)

    return objective, *make()


def test_the_encoder_sees_the_kept_patches_alone(born):
    """Other pixels in hidden patches: the same latent, bit for bit."""
    objective, inputs, params, extra = born
    assert inputs["keep"].shape == (4, 2)
    hidden = np.asarray(inputs["mask"]).reshape(4, 2, 4, 1)
    hidden = hidden.repeat(8, 1).repeat(8, 2)
    noise = np.random.default_rng(0).normal(size=inputs["image"].shape)

    @jax.jit
    def latent(image):
        own = inputs | {"image": image}
        return mae.encode(objective.encoder, params, extra, own, None, False)[0]

    first = latent(inputs["image"])
    assert first.shape == (4, 3 + 2, 48)
    other = latent(jnp.where(hidden, noise, inputs["image"]).astype(jnp.float32))
    np.testing.assert_array_equal(first, other)
    seen = latent(jnp.where(hidden, inputs["image"], noise).astype(jnp.float32))
    assert np.abs(np.asarray(first - seen)).max() > 0.1


def test_only_predictions_of_removed_patches_count(born, monkeypatch):
    objective, inputs, params, extra = born
    rng = np.random.default_rng(0)
    found = jnp.asarray(rng.normal(size=(4, 8, 192)), jnp.float32)

    def loss(found):
        with monkeypatch.context() as patch:
            patch.setattr(mae, "decode", lambda *args: found)
            return objective.loss(
                params, extra, inputs, KEY, progress=0.0, train=False
            )[0]

    value, grad = jax.value_and_grad(loss)(found)
    mask = np.asarray(inputs["mask"])
    assert not np.asarray(grad)[mask == 0].any()
    assert np.asarray(grad)[mask == 1].all(axis=-1).all()
    patches = np.asarray(mae.patchify(inputs["image"], 8), np.float64)
    mean = patches.mean(-1, keepdims=True)
    target = (patches - mean) / np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
    expected = np.square(found - target)[mask == 1].mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_every_token_finds_its_place_again(born):
    """Decoding all patches, shuffled or not, is the same."""
    objective, inputs, params, _ = born
    decoder, heads = objective.loss.args[1], params["heads"]
    tokens = jax.random.normal(KEY, (4, 3 + 8, 48))
    order = np.stack([np.random.default_rng(i).permutation(8) for i in range(4)])
    prefix, patches = tokens[:, :3], tokens[:, 3:]
    shuffled = jnp.concatenate([prefix, mae.gather(patches, order)], axis=1)
    raster = np.broadcast_to(np.arange(8), (4, 8))
    decode = jax.jit(functools.partial(mae.decode, decoder, heads))
    whole = decode(tokens, raster)
    close(decode(shuffled, np.argsort(order, axis=1)), whole, rtol=1e-5)
    assert decode(tokens[:, :5], np.asarray(inputs["restore"])).shape == (4, 8, 192)


def test_initial_values(born):
    _, _, params, extra = born
    heads = tree.named(params["heads"])
    assert extra == {"encoder": {}, "heads": {}}
    assert heads["mask_token"].shape == (1, 1, 32)
    assert 0.01 < np.std(heads["mask_token"]) < 0.03
    limits = {
        "decoder/proj/kernel": (6 / (48 + 32)) ** 0.5,
        "decoder/pixels/kernel": (6 / (32 + 192)) ** 0.5,
        "decoder/block_1/attn/q/kernel": (6 / (4 * 32)) ** 0.5,  # fused in the original
        "decoder/block_1/attn/out/kernel": (6 / (2 * 32)) ** 0.5,
        "decoder/block_1/mlp/fc1/kernel": (6 / (5 * 32)) ** 0.5,
    }
    for name, limit in limits.items():
        assert 0.97 * limit < np.abs(heads[name]).max() <= limit, name
    assert not any(x.any() for name, x in heads.items() if name.endswith("bias"))


def test_the_decoder_has_the_published_size():
    """Width 512, 8 blocks, 16 heads on ViT-B, as published, counted from its shapes."""
    encoder = tiny(MAE, image=(224, 224), patch=16, width=768, depth=12, heads=12)
    decoder = {"width": 512, "depth": 8, "heads": 16}
    params, _ = build.abstract_params(tiny_mae(encoder, decoder=decoder))
    block = 4 * 512 * 512 + 4 * 512 + 8 * 512 * 512 + 5 * 512 + 4 * 512
    ends = 768 * 512 + 512 + 2 * 512 + 512 * 768 + 768
    assert build.count(params["heads"]) == 8 * block + ends + 512
    assert params["heads"]["decoder"]["block_7"]["attn"]["q"]["kernel"].shape == (
        512,
        16,
        32,
    )


def test_the_work_is_that_of_what_is_seen_and_of_every_patch_decoded():
    """Counted on the tiny model: 4 of 16 patches seen, CLS in both halves."""
    block = 2 * (4 * 48 * 48 + 8 * 48 * 48) * 5 + 4 * 5 * 5 * 48
    inner = 2 * (4 * 32 * 32 + 8 * 32 * 32) * 17 + 4 * 17 * 17 * 32
    ends = 2 * (16 * 192 * 48 + 5 * 48 * 32 + 16 * 32 * 192)
    work = tiny_mae(tiny(MAE)).flops
    assert work == (3 * block + 2 * inner + ends, 0)


@pytest.mark.parametrize(
    ("encoder", "changes", "message"),
    [
        (SIMMIM, {}, "relative='shared'.*position=mae_sincos"),
        (MAE, {"mask_ratio": 0.99}, "mask_ratio=0.99 keeps 0 of 16 patches"),
        (MAE, {"mask_ratio": 0.0}, "mask_ratio=0.0 keeps 16 of 16 patches"),
        (MAE, {"mask_ratio": 1.5}, "mask_ratio=1.5 keeps -8 of 16 patches"),
        (
            MAE,
            {"decoder": {"width": 36, "depth": 2, "heads": 5}},
            "decoder.width=36.*divides by the heads",
        ),
        (MAE, {"decoder": {"width": 30, "depth": 2, "heads": 5}}, "by 4"),
        (MAE, {"decoder": {"width": 32, "depth": 0, "heads": 4}}, "decoder.depth=0"),
        (
            MAE,
            {"decoder": {"width": 32, "detph": 2, "heads": 4}},
            "unknown key in objective.decoder 'detph': did you mean 'depth'",
        ),
    ],
)
def test_what_cannot_work_is_refused(encoder, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_mae(tiny(encoder), **changes)


# As a part of a mixture


@pytest.fixture(scope="module")
def mixtures():
    """{λ, or the name of a branch alone: (params, extra, loss, logs, gradients)}."""
    encoder = tiny(MAE, image=(16, 16), depth=1)
    mim, cl = tiny_mae(encoder), tiny_moco_v3(encoder)
    methods = {"mae": mim, "moco_v3": cl}
    for lam in (0.0, 0.5, 1.0):
        methods[lam] = hybrid.make(encoder=encoder, lam=lam, mim=mim, cl=cl)
    views = pictures(build.batch_spec(methods[0.5], 8))["views"]
    own = {"mae": views[:1], 0.0: views[:1], "moco_v3": views[1:], 1.0: views[1:]}

    @jax.jit
    def run():
        found = {}
        for name, method in methods.items():
            batch = {"views": own.get(name, views)}
            inputs = method.prepare(KEY, batch, train=True)
            params, extra = method.init(KEY, inputs)

            def loss(params, method=method, extra=extra, inputs=inputs):
                return method.loss(params, extra, inputs, KEY, progress=0.0, train=True)

            (value, (new, logs)), grads = jax.value_and_grad(loss, has_aux=True)(params)
            found[str(name)] = params, new, value, logs, grads
        return found

    return jax.device_get(run())


@pytest.mark.parametrize(("lam", "name"), [("0.0", "mae"), ("1.0", "moco_v3")])
def test_an_end_of_the_mixture_is_that_method_bit_for_bit(mixtures, lam, name):
    for i, (a, b) in enumerate(zip(mixtures[lam], mixtures[name], strict=True)):
        if i == 3:  # the mixture logs the loss too
            b = b | {"loss": mixtures[name][2]}
            b = {f"{name}/{key}": x for key, x in b.items()}
        if i == 2:
            a, b = {"": a}, {"": b}
        a = {k.replace(f"heads/{name}/", "heads/"): v for k, v in tree.named(a).items()}
        b = tree.named(b)
        assert set(a) == set(b)
        for leaf in b:
            np.testing.assert_array_equal(a[leaf], b[leaf], err_msg=leaf)


def test_in_the_middle_loss_and_gradients_are_the_mean_of_both(mixtures):
    _, _, value, logs, grads = mixtures["0.5"]
    parts = {name: mixtures[name] for name in ("mae", "moco_v3")}
    mean = sum(0.5 * part[2] for part in parts.values())
    np.testing.assert_allclose(value, mean, rtol=3e-7)
    for name, part in parts.items():
        np.testing.assert_allclose(logs[f"{name}/loss"], part[2], rtol=3e-7)
        for leaf, g in tree.named(part[4]["heads"]).items():
            close(2 * tree.named(grads["heads"][name])[leaf], g, scale=1.0)
    for leaf, g in tree.named(grads["encoder"]).items():
        both = sum(0.5 * tree.named(x[4]["encoder"])[leaf] for x in parts.values())
        close(g, both, scale=1.0)


def test_a_mixture_shows_and_measures_its_masked_branch(born):
    encoder = tiny(MAE, image=(16, 32), prefix=3, depth=1)
    mim, cl = tiny_mae(encoder), tiny_moco_v3(encoder)
    objective = hybrid.make(encoder=encoder, lam=0.2, mim=mim, cl=cl)
    params, extra = build.abstract_params(objective)
    own = {"encoder": params["encoder"], "heads": params["heads"]["mae"]}
    model, variables = objective.decoder(params, extra)
    assert (model, variables) == mim.decoder(own, extra)
    assert objective.reconstruct is not None
    only = hybrid.make(encoder=encoder, lam=1.0, mim=mim, cl=cl)
    assert only.decoder is only.reconstruct is None
    assert cl.decoder is None


@pytest.mark.parametrize(
    "form",
    [
        {"prefix": 0},
        {"prefix": 3, "image": (16, 48)},
        {"stem": "conv", "drop_path": 0.5},
        {"position": "learned", "layer_scale": 0.1, "qkv_bias": "qv"},
    ],
    ids=["no CLS", "registers, not square", "conv stem", "another variant"],
)
def test_forms_of_the_encoder_that_it_takes(form):
    objective = tiny_mae(tiny(MAE, depth=1, **form))
    batch = pictures(build.batch_spec(objective, 2))

    @jax.jit
    def run():
        inputs = objective.prepare(KEY, batch, train=True)
        params, extra = objective.init(KEY, inputs)
        value, (new, _) = objective.loss(
            params, extra, inputs, KEY, progress=0.0, train=True
        )
        model, variables = objective.decoder(params, extra)
        return value, objective.reconstruct(params, extra, inputs), new, extra

    value, shown, new, extra = run()
    assert np.isfinite(value)
    height, width = objective.encoder.spec.image
    assert [x.shape for x in shown] == [(2, height, width, n) for n in (3, 1, 3)]
    if "stem" in form:  # its statistics saw the images, all patches of them
        moved = tree.named(new["encoder"])
        assert all(
            (x != moved[k]).any() for k, x in tree.named(extra["encoder"]).items()
        )


# The decoder as something to measure


def test_the_whole_decoder_sees_every_patch_in_raster_order(born):
    """Its taps are those of a loss without a mask; the encoder's are its own."""
    objective, inputs, params, extra = born
    model, variables = objective.decoder(params, extra)
    assert (model.spec.depth, model.spec.width, model.spec.prefix) == (2, 32, 3)
    assert model.spec.grid == (2, 4)
    images = inputs["image"]
    raster = jnp.broadcast_to(jnp.arange(8), (4, 8))
    seen = {"image": images, "keep": raster}

    @jax.jit
    def run():
        output, taps = model.apply(variables, images)
        latent, _ = mae.encode(objective.encoder, params, extra, seen, None, False)
        tokens, _ = objective.encoder.apply(variables["encoder"], images)
        decoder = objective.loss.args[1]
        decoded = mae.decode(decoder, params["heads"], latent, raster)
        pixels = decoder.apply(variables["decoder"], output, method="predict")
        return output, taps, latent, tokens, decoded, pixels

    output, taps, latent, tokens, decoded, pixels = run()
    close(latent, tokens, rtol=1e-5)
    close(pixels, decoded, rtol=1e-5)
    assert output.shape == (4, 11, 32)
    assert [x.shape for x in taps["residual"]] == 5 * [(4, 11, 32)]
    assert [x.shape for x in taps["attention"]] == 2 * [(4, 4, 11, 11)]
    assert [x.shape for x in taps["head_outputs"]] == 2 * [(4, 4, 11, 8)]
    kernel, bias = (
        variables["decoder"]["params"]["proj"][k] for k in ("kernel", "bias")
    )
    first = np.asarray(tokens) @ np.asarray(kernel) + np.asarray(bias)
    first[:, 3:] += inits.sincos_table((2, 4), 32, rows_first=False)
    close(taps["residual"][0], first, rtol=1e-5)


def test_equal_decoders_are_one_to_a_cache(born):
    objective, _, params, extra = born
    again = tiny_mae(tiny(MAE, image=(16, 32), prefix=3, depth=1))
    models = {obj.decoder(params, extra)[0] for obj in (objective, again)}
    assert len(models) == 1


def test_a_gallery_leaves_visible_pixels_alone(born):
    objective, _, params, extra = born
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 3), np.uint8)
    image, mask, shown = galleries.reconstructions(
        objective, params, extra, images, seed=0, **COLOUR
    )
    assert mask.mean() == 0.75
    np.testing.assert_allclose(image[mask == 0], shown[mask == 0], atol=3e-7)
    assert np.abs(image - shown)[mask == 1].mean() > 0.01


def test_the_recipe_is_the_published_one():
    """Methods 4.5, scaled: what is not the size of model, data or run."""
    from clvsmim.configs import photos_mae

    config = photos_mae.get_config()
    assert config.objective.crop.to_dict() == {
        **CROP,
        "area": (0.2, 1.0),
        "filter": "bicubic",
    }
    assert (config.objective.mask_ratio, config.objective.norm_pix) == (0.75, True)
    optimizer = config.optim
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.95, 0.05)
    assert optimizer.schedule.base == 1.5e-4  # batch 256
    assert optimizer.schedule.warmup_epochs / config.epochs == 40 / 800
    config.batch = 4096
    assert optimizer.schedule.base == pytest.approx(2.4e-3)
