"""Operations counted by hand are those that the compiler counts."""

import dataclasses

import jax
import pytest
import runs

from clvsmim import build, flops, train
from clvsmim.objectives import hybrid

# Wide enough that products of matrices are what a step consists of.
WIDE = {
    "encoder__image": (32, 32),
    "encoder__width": 256,
    "encoder__heads": 4,
    "batch": 8,
}
STEPS = {
    "moco_v3": {},
    "simmim": {},
    "hybrid": {},
    "mae": {},
    "classify": {},
    "conv stem": {"encoder__stem": "conv", "encoder__image": (64, 64)},
    "remat": {"encoder__remat": True},
}


@pytest.fixture(scope="module")
def program():
    """`program(name)` -> a program of STEPS, built but not compiled."""

    def get(name):
        recipe = name if name in runs.OBJECTIVES else "simmim"
        config = runs.config(recipe, **WIDE | STEPS[name])
        return build.build(config, jax.devices()[:1])

    return get


@pytest.mark.parametrize("name", [n for n in STEPS if n != "remat"])
def test_a_step_has_the_operations_that_the_compiler_counts(program, name):
    made = program(name)
    lowered = made.step.lower(made.state, made.batch)
    counted = 8 * made.objective.flops.step
    assert counted == pytest.approx(lowered.cost_analysis()["flops"], rel=0.1)


def test_what_is_computed_twice_counts_once(program):
    made = {name: program(name).objective.flops for name in ("simmim", "remat")}
    assert made["remat"] == made["simmim"]


def test_the_published_size_of_an_encoder():
    """17.6 GMAC for the forward pass of a ViT-B/16 at 224 pixels."""
    spec = build.make_encoder(
        runs.config().encoder.to_dict()
        | {"image": (224, 224), "patch": 16, "width": 768, "depth": 12, "heads": 12}
    ).spec
    whole = flops.embed(spec) + flops.encode(spec)
    assert whole == pytest.approx(2 * 17.58e9, rel=2e-3)
    some = flops.encode(spec, tokens=50)  # an MAE encoder with CLS
    assert some / flops.encode(spec) == pytest.approx(0.247, rel=2e-2)


def test_a_gated_mlp_has_three_products(program):
    plain = program("simmim").objective.encoder.spec
    gated = dataclasses.replace(plain, mlp="swiglu")
    more = flops.encode(gated) - flops.encode(plain)
    hidden = round(plain.mlp_ratio * plain.width)
    assert more == plain.depth * flops.linear(plain.tokens, plain.width, hidden)


def test_frozen_parts_have_a_forward_pass_alone():
    assert flops.Forward(trained=2.0, frozen=5.0).step == 11.0
    assert flops.mlp(4, (3, 2)) == 2 * (12 + 6)


def test_a_mixture_with_what_nobody_counted_is_not_counted(program):
    made = program("simmim").objective
    counted = flops.Forward(1.0, 2.0)
    parts = [(0.5, with_(made, counted)), (0.5, with_(made, counted))]
    assert hybrid.work(parts) == flops.Forward(2.0, 4.0)
    assert hybrid.work([*parts, (0.5, with_(made, None))]) is None


def with_(objective, counted):
    return dataclasses.replace(objective, flops=counted)


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA L4", 121),
    ],
)
def test_the_peak_of_a_device(kind, tera):
    assert flops.peak(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40S", "NVIDIA A10G", ""])
def test_an_unknown_device_has_no_utilisation(kind):
    assert flops.peak(kind) is None


def test_utilisation_is_a_share_of_all_devices(program, monkeypatch):
    made = build.build(runs.config("simmim"), jax.devices()[:2])
    assert "mfu" not in records(made)
    monkeypatch.setattr(flops, "peak", lambda kind: 1e12)
    share = 100 / 5 * made.objective.flops.step / 2e12
    assert records(made)["mfu"] == pytest.approx(share)


def records(made):
    """What is logged of 100 images in 5 seconds."""
    speed = train.speedometer(made, 10)
    assert speed(3, 1.0, 0.0) == {}  # compilation
    return speed(13, 6.0, 1.0)
