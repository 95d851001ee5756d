"""`clvsmim sweep`: λ from one end to the other, and what labels say of each."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import runs

from clvsmim import claims, cli, labelled, meta, present, sweep
from clvsmim.measure import Settings

LAMS = [0.4]  # each costs three compilations
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
LABELS = "configs/demo_labels.py"
SMALL = ["epochs=1", "batch=16", "eval.epochs=0", "data.source.length=32"]
SMALL += ["data.source.test_length=32"]
SETTINGS = Settings(
    images=16, train_images=32, batch=16, group=8, metrics=("nmi", "fourier", "probe")
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    recipes = {
        "probe": sweep.recipe(f"{LABELS}:probe", SMALL),
        "finetune": sweep.recipe(f"{LABELS}:finetune", SMALL),
    }
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: one)
        patch.chdir(runs.ROOT)
        page = sweep.sweep(
            runs.config("hybrid", epochs=0.5), str(out), LAMS, recipes, SETTINGS
        )
    return out, page


def test_every_lambda_is_trained_probed_tuned_and_measured(swept):
    out, _ = swept
    for lam in LAMS:
        workdir = out / f"lambda_{lam:g}"
        config = json.loads((workdir / "meta.json").read_text())["config"]
        assert config["objective"]["lam"] == lam
        found = {s.name: s for s in labelled.series(str(workdir))}
        assert set(found) == {"linear probe accuracy", "fine-tuning accuracy"}
        for series in found.values():
            assert 0 <= float(np.ravel(series.values)[-1]) <= 100
            assert series.count == 32


def test_the_report_has_the_table_the_plane_and_every_run(swept):
    _, page = swept
    text = page.read_text()
    for words in ("What the mixture is worth", "λ = 0.4", "62.3, 81.95", "Fig. 12a"):
        assert words in text
    assert "normalized mutual information" in text.lower()


def test_claim_21_is_judged_on_the_ends_and_the_best_between(swept):
    """The ends of a sweep are hybrids of λ = 0 and 1, which are the methods."""
    out, _ = swept
    real = present.measured(str(out / "lambda_0.4" / "analysis"))
    objective = sweep.with_lam(runs.config("hybrid"), 0.4).objective.to_dict()
    names = [present.method(objective | {"lam": lam}) for lam in (0, 0.4, 1)]
    assert names == ["simmim", "hybrid", "moco_v3"]
    (tuned,) = (s for s in real.series if s.name == "fine-tuning accuracy")
    value = float(tuned.values)

    def other(gain, method="hybrid", lam=None):
        series = dataclasses.replace(tuned, values=tuned.values + gain)
        return dataclasses.replace(real, method=method, lam=lam, series=[series])

    ends = [other(-1, "simmim"), other(3, "moco_v3")]
    claim = claims.assess(21, [*ends, real, other(-2, lam=0.6)])
    assert claim.values["hybrid (λ = 0.4)"] == [value]
    assert claim.margins == pytest.approx([-3])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--lambdas=0,2"], "--lambdas=0,2: expected different numbers from 0 to 1"),
        (["--lambdas=a"], "--lambdas=a: expected numbers, by commas"),
        (["--probe=nothing.py"], "there is no recipe nothing.py"),
        (["--probe_set=epoch=3"], "did you mean"),
        (["--probe_set=epochs"], "expected key=value, for example epochs=10"),
        (["--probe=configs/linear_probe.py:x"], "linear_probe.py:x does not exist"),
        (None, "has no lam; a sweep over lambda"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(runs.ROOT)
    name = "hybrid" if arguments else "simmim"
    config = [f"--config=configs/demo.py:{name}", *runs.overrides()]
    with pytest.raises(SystemExit) as error:
        cli.run(sweep, [*config, f"--out={tmp_path}/out", *(arguments or [])])
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_of_several_rates_the_best_at_each_block_counts(tmp_path):
    record = {"step": 3, "eval/images": 100}
    record |= {"eval/top1/block_1/rate_0.1": 0.5, "eval/top1/block_1/rate_1": 0.25}
    record |= {"eval/top1/block_2/rate_0.1": 0.125, "eval/top1/block_2/rate_1": 0.75}
    (tmp_path / "log.jsonl").write_text(json.dumps(record) + "\n")
    meta.write_meta(str(tmp_path), {"steps": 4})
    assert not labelled.read(str(tmp_path), "probe"), "it has not ended"
    meta.write_meta(str(tmp_path), {"steps": 3})
    (series,) = labelled.read(str(tmp_path), "probe")
    assert series.axes[0].values == ((1, "mlp"), (2, "mlp"))
    np.testing.assert_allclose(series.values, [50, 75])
    np.testing.assert_allclose(
        series.stderr, [100 * 0.5 / 99**0.5, 100 * (0.1875 / 99) ** 0.5]
    )
    assert "best of 2 learning rates" in series.notes[0]
