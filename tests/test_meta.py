"""meta.json: a workdir belongs to one run, and every refusal says what to do."""

import json

import pytest

from clvsmim import meta

CONFIG = {
    "optimizer": {"b1": 0.9, "b2": 0.999},
    "image": (224, 224),
    "log_every": 50,
}


def test_meta_round_trip(tmp_path):
    assert meta.read_meta(tmp_path) is None
    meta.prepare(tmp_path / "new" / "run", CONFIG, {"encoder": {"heads": 12}})
    found = meta.read_meta(tmp_path / "new" / "run")
    assert found["encoder"] == {"heads": 12}
    assert found["config"] == json.loads(json.dumps(CONFIG))
    assert found["versions"]["jax"].count(".") >= 1
    assert [p.name for p in (tmp_path / "new" / "run").iterdir()] == ["meta.json"]


def test_the_same_run_may_start_again(tmp_path):
    meta.prepare(tmp_path, CONFIG, {})
    meta.prepare(tmp_path, CONFIG | {"image": [224, 224]}, {})
    changed = CONFIG | {"log_every": 10}
    with pytest.raises(ValueError, match="log_every is 50 there and 10 here"):
        meta.prepare(tmp_path, changed, {})
    meta.prepare(tmp_path, changed, {}, ignore=("log_.*",))


def test_another_run_is_named_by_what_differs(tmp_path):
    meta.prepare(tmp_path, CONFIG, {})
    other = {"optimizer": {"b1": 0.9, "b2": 0.95, "clip": 5.0}, "log_every": 50}
    with pytest.raises(ValueError) as error:
        meta.prepare(tmp_path, other, {})
    text = str(error.value)
    assert "optimizer.b2 is 0.999 there and 0.95 here" in text
    assert "optimizer.clip is absent there and 5.0 here" in text
    assert "image is [224, 224] there and absent here" in text
    assert "b1" not in text and "log_every" not in text
    assert "Use another --workdir, or delete this one" in text
    assert meta.read_meta(tmp_path)["config"]["optimizer"]["b2"] == 0.999


def test_many_differences_are_cut_short(tmp_path):
    with pytest.raises(ValueError, match="k7 is .*; and 2 more. Use"):
        meta.check_same(tmp_path, {f"k{i}": 0 for i in range(10)}, {})


def test_a_workdir_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for workdir in (file, file / "below", "/proc/clvsmim/run"):
        with pytest.raises(ValueError, match=f"workdir {workdir} cannot be written"):
            meta.prepare(workdir, CONFIG, {})


def test_a_crash_while_writing_keeps_the_old_meta(tmp_path, monkeypatch):
    meta.prepare(tmp_path, CONFIG, {})

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(meta.epath.Path(tmp_path)), "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        meta.write_meta(tmp_path, {})
    assert meta.read_meta(tmp_path)["config"]["log_every"] == 50
