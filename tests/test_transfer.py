"""A trained encoder in another run: what is fitted, what is refused, end to end."""

import json

import jax
import numpy as np
import pytest
import runs

from clvsmim import build, checkpoint, log, train, transfer, tree
from clvsmim.configs import finetune, linear_probe
from clvsmim.formats import _fit


@pytest.fixture(scope="module")
def simmim(tmp_path_factory):
    """A pre-trained run: SimMIM, twelve steps."""
    workdir = tmp_path_factory.mktemp("transfer") / "simmim"
    runs.run(workdir, "simmim")
    return workdir


def shapes(encoder):
    """(spec, {"params", "stats"} as shapes) of the demo's encoder, changed."""
    config = runs.config("simmim")
    config.encoder.update(encoder)
    vit = build.make_encoder(build.plain(config)["encoder"])
    images = jax.ShapeDtypeStruct((1, *vit.spec.image, 3), np.float32)
    found = jax.eval_shape(vit.init, jax.random.key(0), images)
    return vit.spec, {"params": found["params"], "stats": {}}


def read(workdir, **encoder):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec, wanted = shapes(encoder)
    colour = build.plain(runs.config("simmim").input)
    found = transfer.read(str(workdir), spec, colour, wanted, device)
    return {name: np.asarray(x) for name, x in tree.named(found["params"]).items()}


def saved(workdir):
    start = "params/encoder/"
    return {
        name.removeprefix(start): x
        for name, x in runs.state(workdir).items()
        if name.startswith(start)
    }


def test_the_same_encoder_is_read_bit_for_bit(simmim):
    want = saved(simmim)
    runs.assert_identical(read(simmim), want)
    other = {"dtype": "bfloat16", "remat": True, "drop_path": 0.3}
    runs.assert_identical(read(simmim, **other), want)


def test_the_shared_table_is_copied_to_every_block_and_the_norm_is_dropped(simmim):
    want = saved(simmim)
    table = want.pop("rel_table")
    assert table.any()  # it was trained
    found = read(simmim, relative="per_block", final_norm=False)
    for block in (0, 1):
        np.testing.assert_array_equal(found.pop(f"block_{block}/attn/rel_table"), table)
    assert want.pop("ln_final/scale").shape == want.pop("ln_final/bias").shape
    runs.assert_identical(found, want)


@pytest.mark.parametrize(
    "encoder, message",
    [
        ({"depth": 3}, r"missing \(block_2/attn"),
        ({"depth": 1}, r"unexpected \(block_1/attn"),
        (
            {"heads": 4},
            r"block_0/attn/k/kernel: \(16, 2, 8\) in the file, \(16, 4, 4\)",
        ),
        ({"relative": "none"}, r"1 unexpected \(rel_table"),
        ({"qkv_bias": "qkv"}, r"2 missing \(block_0/attn/k/bias"),
        ({"layer_scale": 0.0}, r"unexpected \(block_0/gamma_1"),
        ({"prefix": 0}, r"unexpected \(cls_token"),
    ],
)
def test_any_other_encoder_is_refused(simmim, encoder, message):
    with pytest.raises(ValueError, match=message):
        read(simmim, **encoder)


@pytest.mark.parametrize("change", [{"image": (24, 24)}, {"patch": 2}])
def test_another_grid_is_fitted_and_said(simmim, change, capsys):
    """The table is that of the module that does it; nothing else is touched."""
    want, found = saved(simmim), read(simmim, **change)
    side = (24 if "image" in change else 16) // change.get("patch", 4)
    table = _fit.relative_table(want.pop("rel_table"), (4, 4), (side, side))
    np.testing.assert_array_equal(found.pop("rel_table"), table)
    said = capsys.readouterr().err
    assert f"resized: rel_table (1): 4x4 -> {side}x{side} patches, geometric" in said
    if "patch" in change:
        kernel = _fit.patch_kernel(want.pop("patch_embed/kernel"), 2)
        np.testing.assert_array_equal(found.pop("patch_embed/kernel"), kernel)
        assert "patch_embed/kernel: patch 4 -> 2, pseudo-inverse" in said
    runs.assert_identical(found, want)


def test_what_has_no_positions_fits_any_grid():
    saved = {"cls_token": np.zeros(2), "block_0": {"mlp": np.ones(3)}}
    assert transfer.fit(saved, saved) == saved


def test_another_activation_or_epsilon_is_said(simmim, capsys):
    read(simmim)
    assert capsys.readouterr().err == ""
    read(simmim, mlp="gelu_tanh")
    assert "trained with mlp=gelu, this run has gelu_tanh" in capsys.readouterr().err


def test_a_refused_transfer_writes_nothing(simmim, tmp_path):
    before = runs.snapshot(simmim)
    with pytest.raises(ValueError, match="missing .block_2"):
        runs.run(tmp_path / "new", init__path=str(simmim), encoder__depth=3)
    assert not (tmp_path / "new").exists() and runs.snapshot(simmim) == before


def test_no_run_no_settings(tmp_path):
    with pytest.raises(ValueError, match="no meta.json in .*nothing.*`clvsmim train`"):
        linear_probe.get_config(f"paper,{tmp_path}/nothing")
    with pytest.raises(ValueError, match="probe.py:papers does not exist; known"):
        linear_probe.get_config("papers")
    with pytest.raises(ValueError, match="finetune.py:maes does not exist; known"):
        finetune.get_config("maes,runs/x")


CHANGES = {"batch": 16, "epochs": 3.0, "log.every": 1, "log.save": 5, "xray.share": 0.0}


def config(module, what, **changes):
    found = module.get_config(what)
    found.update_from_flattened_dict(CHANGES | changes)
    return found


def go(config, workdir):
    train.train(config, str(workdir), devices=jax.devices()[:1])


class Stop(Exception):
    """Where a test ends a run."""


def stopped_after(config, workdir, step):
    """The run, killed between the save of a step and the end."""
    real = checkpoint.Checkpoints.save

    def save(self, number, state):
        real(self, number, state)
        if number == step:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train.Checkpoints, "save", save)
        go(config, workdir)


COMMANDS = {
    "linear_probe": (linear_probe, "paper"),
    "finetune": (finetune, "simmim"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_command_from_the_run_it_evaluates_and_resumes(simmim, tmp_path, name):
    module, protocol = COMMANDS[name]
    made = config(module, f"{protocol},{simmim}", **{"eval.epochs": 2.0})
    assert made.data.source.length == 64 and made.objective.classes == 16
    assert tuple(made.encoder.image) == (16, 16) and made.init.path == str(simmim)
    assert made.objective.eval_crop.resize == 18
    whole, again = tmp_path / "whole", tmp_path / "again"
    go(made, whole)
    stopped_after(made, again, 5)
    go(made, again)
    assert runs.trace(again) == runs.trace(whole)
    runs.assert_identical(runs.state(again, runs.TOTAL), runs.state(whole, runs.TOTAL))
    records = log.read(f"{whole}/log.jsonl")
    scored = [r for r in records if "eval/images" in r]
    assert [r["step"] for r in scored] == [8, 12]
    heads = [""]
    if name == "linear_probe":
        rates = ("0.1", "0.3", "1", "3", "10")
        heads = [f"/block_{b}/rate_{r}" for b in (1, 2) for r in rates]
    kinds = ("loss", "top1", "top5")
    assert set(scored[0]) == {
        "step",
        "eval/images",
        *(f"eval/{kind}{head}" for kind in kinds for head in heads),
    }
    assert all(r["eval/images"] == 64 for r in scored)
    top = [v for k, v in scored[-1].items() if k.startswith("eval/top1")]
    assert all(0 <= x <= 1 and (x * 64).is_integer() for x in top)
    after, before = saved(whole), saved(simmim)
    if name == "linear_probe":
        runs.assert_identical(after, before)
    else:
        assert "ln_final/scale" not in after and "block_1/attn/rel_table" in after
        same = [n for n, x in after.items() if np.array_equal(x, before.get(n))]
        assert not same  # all of it learns
    assert json.loads((whole / "meta.json").read_text())["config"]["init"] == {
        "path": str(simmim),
        "zoo": "",
    }


def test_another_normalisation_is_refused(simmim):
    spec, wanted = shapes({})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    colour = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    with pytest.raises(ValueError, match=r"trained with input.mean=\(0.485, .*0.5\)"):
        transfer.read(str(simmim), spec, colour, wanted, device)
