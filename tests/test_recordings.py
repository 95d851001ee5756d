"""Objectives and the step against the recorded originals (tests/golden/README.md)."""

import dataclasses

import jax
import numpy as np
import originals
import pytest
from models import MOCO, SIMMIM, close, tiny, tiny_moco_v3, tiny_simmim

from clvsmim import optim, schedules, tree
from clvsmim.objectives import moco_v3, simmim
from clvsmim.step import Optimizer, State, make_step

KEY = jax.random.key(0)


def largest(group):
    return max(np.abs(x).max() for x in group.values())


def moco_state(record):
    """(params, extra) at the start of the recording."""
    flat = record.group("params")
    student, s_stats = originals.head(flat, "base_encoder.head.")
    teacher, t_stats = originals.head(flat, "momentum_encoder.head.")
    predictor, p_stats = originals.head(flat, "predictor.")
    params = {
        "encoder": originals.encoder(flat, 3, "base_encoder."),
        "heads": {"projector": student, "predictor": predictor},
    }
    momentum = originals.encoder(flat, 3, "momentum_encoder.")
    heads = {
        "projector": s_stats,
        "predictor": p_stats,
        "teacher": {"encoder": momentum, "projector": teacher},
        "teacher_stats": {"encoder": {}, "projector": t_stats},
    }
    return jax.tree.map(np.asarray, (params, {"encoder": {}, "heads": heads}))


def moco_grads(record):
    """The recorded gradients in our tree; the frozen patch projection has none."""
    flat = record.group("grads")
    return {
        "encoder": originals.encoder(flat, 3, "base_encoder."),
        "heads": {
            "projector": originals.head(flat, "base_encoder.head.")[0],
            "predictor": originals.head(flat, "predictor.")[0],
        },
    }


@pytest.fixture(scope="module")
def moco(golden):
    """The recording, our objective, and its (params, extra) before the first loss."""
    record = golden("moco_v3")
    objective = tiny_moco_v3(tiny(MOCO))
    params, extra = moco_state(record)
    inputs = tuple(originals.images(record[x]) for x in ("x1", "x2"))
    shapes = jax.eval_shape(objective.init, KEY, inputs)
    params, extra = (
        tree.strict(a, b, "rec") for a, b in zip(shapes, (params, extra), strict=True)
    )
    # The recording moves the teacher before the first keys, our trainer after a step.
    return record, objective, params, objective.after(params, extra, 0.0), inputs


def test_moco_v3_loss_gradients_teacher_and_buffers(moco):
    record, objective, params, extra, inputs = moco

    @jax.jit
    def run(params):
        def loss(params):
            return objective.loss(params, extra, inputs, KEY, progress=0.0, train=True)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (extra, _)), grads = run(params)
    np.testing.assert_allclose(loss, record["loss"], rtol=5e-6)
    theirs, ours = tree.named(moco_grads(record)), tree.named(grads)
    assert set(ours) - set(theirs) == {
        "encoder/patch_embed/kernel",
        "encoder/patch_embed/bias",
        "encoder/pos_embed",
    }
    scale = largest(record.group("grads"))
    for name, g in theirs.items():
        close(ours[name], g, scale)

    after = record.group("after")
    momentum = originals.encoder(after, 3, "momentum_encoder.")
    projector, t_stats = originals.head(after, "momentum_encoder.head.")
    expected = {
        "teacher": {"encoder": momentum, "projector": projector},
        "teacher_stats": {"projector": t_stats},
    }
    for name, x in tree.named(expected).items():
        close(tree.named(extra["heads"])[name], x, largest(after))
    for head, prefix in (
        ("projector", "base_encoder.head."),
        ("predictor", "predictor."),
    ):
        stats = originals.head(after, prefix)[1]
        for name, x in tree.named(stats).items():
            close(tree.named(extra["heads"][head])[name], x, largest(after))


def test_the_teacher_update_comes_before_the_first_keys(moco, golden):
    """Without it the first loss is 2.0551, not the recorded 2.0479."""
    record, objective, params, _, inputs = moco
    _, extra = moco_state(record)
    loss = jax.jit(
        lambda: objective.loss(params, extra, inputs, KEY, progress=0.0, train=True)[0]
    )()
    assert abs(float(loss) - 2.0551) < 1e-4 < abs(float(loss) - record["loss"])


def test_the_teacher_slows_down_along_a_half_cosine(moco):
    """m is .99, .995 and 1 at the start, the middle and the end of training."""
    _, objective, params, extra, _ = moco
    old = extra["heads"]["teacher"]["projector"]["fc_0"]["kernel"]
    new = params["heads"]["projector"]["fc_0"]["kernel"]
    for progress, rate in ((0.0, 0.01), (0.5, 0.005), (1.0, 0.0)):
        moved = objective.after(params, extra, progress)["heads"]["teacher"]
        kernel = moved["projector"]["fc_0"]["kernel"]
        np.testing.assert_allclose(kernel, old + rate * (new - old), atol=1e-7)


def test_contrastive_loss_alone(moco):
    record = moco[0]
    loss, _ = moco_v3.contrast(record["contrastive_q"], record["contrastive_k"], 0.2)
    np.testing.assert_allclose(loss, record["contrastive_loss"], rtol=5e-6)


def test_contrastive_test_vectors():
    q = np.array([[1, 0], [0, 2], [3, 4]], np.float32)
    k = np.array([[2, 0], [1, 1], [0, 5]], np.float32)
    for tau, expected in ((0.2, 0.43544281), (1.0, 1.93194329)):
        np.testing.assert_allclose(moco_v3.contrast(q, k, tau)[0], expected, rtol=1e-6)
    both = moco_v3.contrast(q, k, 0.2)[0] + moco_v3.contrast(k, q, 0.2)[0]
    np.testing.assert_allclose(both, 0.87030672, rtol=1e-6)
    same = np.ones((1024, 4), np.float32)  # uniform logits: 2 tau ln B a direction
    np.testing.assert_allclose(
        2 * moco_v3.contrast(same, same, 0.2)[0], 5.545, rtol=1e-4
    )


def run_steps(objective, inputs, params, extra, groups, transform, rate, count=4):
    """Losses and final params of `count` steps of the trainer's own step."""
    after = objective.after
    objective = dataclasses.replace(
        objective,
        prepare=lambda key, batch, *, train: inputs,
        after=lambda params, extra, progress: after(params, extra, 0.0),  # m stays
    )
    optimizer = Optimizer(groups, transform, rate)
    step = jax.jit(make_step(objective, optimizer, seed=0, total=1000))
    trainable, _ = tree.partition(params, optim.keep(groups))
    state = State(0, params, extra, transform.init(trainable))
    losses = []
    for _ in range(count):
        state, logs = step(state, None)
        losses.append(float(logs["loss"]))
    return losses, state.params


FROZEN = ("encoder/patch_embed/.*", "encoder/pos_embed")


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_moco_v3_trajectory(moco, name):
    record, objective, params, extra, inputs = moco
    vectors = (optim.VECTORS,) if name == "lars" else ()
    groups = optim.groups(params, no_decay=vectors, no_trust=vectors, frozen=FROZEN)
    if name == "lars":
        rate = schedules.Constant(base=0.3)
        settings = {"momentum": 0.9, "trust_coefficient": 1e-3, "weight_decay": 1e-2}
    else:
        rate = schedules.Constant(base=1e-3)
        settings = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    transform = optim.optimizer(groups, name, schedule=rate, **settings)
    losses, final = run_steps(objective, inputs, params, extra, groups, transform, rate)
    np.testing.assert_allclose(losses, record[f"trajectory/{name}_losses"], rtol=5e-6)
    after = record.group(f"{name}_after4")
    close(final["encoder"]["cls_token"], after["base_encoder.cls_token"])
    kernel = final["heads"]["predictor"]["fc_0"]["kernel"]
    close(kernel, after["predictor.0.weight"].T)
    frozen = final["encoder"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(frozen, params["encoder"]["patch_embed"]["kernel"])


SIMMIM_FORMS = {
    "simmim_shared_rpb": SIMMIM,
    "simmim_per_block_rpb": SIMMIM | {"relative": "per_block", "final_norm": False},
}


@pytest.fixture(scope="module", params=SIMMIM_FORMS)
def mim(request, golden):
    """The recording, our objective, its params and inputs, in both forms."""
    record = golden(request.param)
    objective = tiny_simmim(tiny(SIMMIM_FORMS[request.param]))
    params = simmim_tree(record.group("params"))
    mask = record["mask"].astype(np.float32)
    inputs = {"image": originals.images(record["image"]), "mask": mask}
    shapes, extra = jax.eval_shape(objective.init, KEY, inputs)
    assert extra == {"encoder": {}, "heads": {}}
    return record, objective, tree.strict(shapes, params, "rec"), extra, inputs


def simmim_tree(flat):
    kernel, bias = flat["decoder.0.weight"], flat["decoder.0.bias"]
    return {
        "encoder": originals.encoder(flat, 3, "encoder."),
        "heads": {
            "mask_token": flat["encoder.mask_token"],
            "decoder": {"kernel": kernel[:, :, 0, 0].T, "bias": bias},
        },
    }


def test_simmim_loss_gradients_and_reconstruction(mim):
    record, objective, params, extra, inputs = mim

    @jax.jit
    def run(params):
        def loss(params):
            return objective.loss(params, extra, inputs, KEY, progress=0.0, train=True)[
                0
            ]

        return jax.value_and_grad(loss)(params)

    loss, grads = run(params)
    np.testing.assert_allclose(loss, record["loss"], rtol=5e-6)
    theirs = tree.named(simmim_tree(record.group("grads")))
    assert set(theirs) == set(tree.named(grads))
    for name, g in tree.named(grads).items():
        close(g, theirs[name], largest(record.group("grads")))
    image, hidden, reconstruction = jax.jit(objective.reconstruct)(
        params, extra, inputs
    )
    close(reconstruction, originals.images(record["reconstruction"]))
    pixels = inputs["mask"].repeat(8, 1).repeat(8, 2)[..., None]
    np.testing.assert_array_equal(hidden, pixels)
    np.testing.assert_array_equal(image, inputs["image"])


def test_simmim_trajectory(mim):
    record, objective, params, extra, inputs = mim
    no_decay = (optim.VECTORS, "encoder/cls_token")
    groups = optim.groups(params, no_decay=no_decay)
    rate = schedules.Constant(base=1e-3)
    settings = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.05}
    transform = optim.optimizer(groups, "adamw", schedule=rate, **settings)
    losses, _ = run_steps(objective, inputs, params, extra, groups, transform, rate)
    np.testing.assert_allclose(losses, record["adamw_losses"], rtol=5e-6)


def test_simmim_encoder_output(mim):
    """What the decoder reads: patch tokens after the final norm, if there is one."""
    record, objective, params, extra, inputs = mim
    encoder = objective.encoder
    seen = {}

    class Spy:
        def apply(self, variables, tokens):
            seen["tokens"] = tokens
            return np.zeros((*tokens.shape[:2], 192), np.float32)

    simmim.predict(encoder, Spy(), params, extra, inputs, None, False)
    close(
        np.asarray(seen["tokens"]).reshape(8, 4, 4, 48),
        originals.images(record["encoder_out"]),
    )
