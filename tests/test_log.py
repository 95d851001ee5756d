"""Logs: exact numbers, valid JSON; a resumed log equals an uninterrupted one."""

import io
import json
import math
import sys
import types

import clu
import jax.numpy as jnp
import numpy as np
import pytest

from clvsmim import log


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "log.jsonl"


def write(path, *steps):
    file = log.JsonlLog(path)
    for step in steps:
        file.write({"step": step, "loss": 1 / step})
    file.close()


def test_numbers_survive_exactly(path):
    file = log.JsonlLog(path)
    file.write(
        {
            "step": jnp.int32(7),
            "loss": np.float32(0.1),
            "rate": jnp.float32(1e-7),
            "half": jnp.bfloat16(0.3),
            "rows": np.float32([[0.1, 2.0]]),
            "note": "text",
            "flag": True,
        }
    )
    (got,) = log.read(path)
    file.close()
    assert got == {
        "step": 7,
        "loss": 0.10000000149011612,
        "rate": float(np.float32(1e-7)),
        "half": float(jnp.bfloat16(0.3)),
        "rows": [[float(np.float32(0.1)), 2.0]],
        "note": "text",
        "flag": True,
    }
    assert isinstance(got["step"], int) and got["flag"] is True


def test_nan_and_infinity_are_valid_json(path):
    file = log.JsonlLog(path)
    file.write({"step": 1, "a": math.nan, "b": jnp.float32("inf"), "c": [-math.inf]})
    file.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (got,) = log.read(path)
    assert math.isnan(got["a"]) and got["b"] == math.inf and got["c"] == [-math.inf]


def test_every_record_is_on_disk_at_once(path):
    file = log.JsonlLog(path)
    for step in (1, 2, 3):
        file.write({"step": step})
        assert [r["step"] for r in log.read(path)] == list(range(1, step + 1))
    file.close()


def test_rewind_makes_the_log_of_an_uninterrupted_run(path):
    write(path, 1, 2, 3, 4, 5, 6)
    whole = path.read_bytes()
    write(path.with_name("b"), 1, 2, 3, 4, 5)
    broken = path.with_name("b")
    broken.write_bytes(broken.read_bytes()[:-7])
    file = log.JsonlLog(broken)
    file.rewind(3)
    assert [r["step"] for r in log.read(broken)] == [1, 2, 3]
    for step in (4, 5, 6):
        file.write({"step": step, "loss": 1 / step})
    file.close()
    assert broken.read_bytes() == whole


def test_rewind_keeps_special_numbers_and_is_atomic(path, monkeypatch):
    file = log.JsonlLog(path)
    file.write({"step": 1, "loss": math.nan})
    file.write({"step": 2, "loss": 1.0})
    before = path.read_bytes()
    file.rewind(1)
    assert math.isnan(log.read(path)[0]["loss"])
    file.write({"step": 2, "loss": 1.0})
    assert path.read_bytes() == before

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(log.epath.Path(path)), "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        file.rewind(0)
    assert path.read_bytes() == before


def test_an_empty_or_missing_log(path):
    file = log.JsonlLog(path)
    file.rewind(0)
    file.close()
    assert log.read(path) == []
    assert log.read(path.with_name("missing")) == []


def test_a_broken_line_inside_is_named(path):
    write(path, 1, 2)
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON.*delete that line"):
        log.read(path)


def test_a_bucket_gets_the_whole_log_once_a_minute_and_on_flush(path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log, "_is_remote", lambda _: True)
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    path.parent.mkdir()
    path.write_text('{"step": 1}\n')
    file = log.JsonlLog(path)

    def steps():
        return [r["step"] for r in log.read(path)]

    file.write({"step": 2})
    assert steps() == [1]
    now[0] = 61.0
    file.write({"step": 3})
    assert steps() == [1, 2, 3]
    file.write({"step": 4})
    file.flush()
    assert steps() == [1, 2, 3, 4]
    file.rewind(2)
    file.write({"step": 3})
    file.close()
    assert steps() == [1, 2, 3]


def test_tensorboard_without_its_packages_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "clu.metric_writers", None)
    with pytest.raises(ValueError, match=r"pip install 'clvsmim\[tensorboard\]'") as e:
        log.TensorBoard(tmp_path)
    assert "\n" not in str(e.value)


def test_tensorboard_gets_the_scalars(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, logdir):
            calls.append(("logdir", logdir))

        def write_scalars(self, step, scalars):
            calls.append((step, scalars))

        def flush(self):
            calls.append("flush")

        close = flush

    fake = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "clu.metric_writers", fake)
    monkeypatch.setattr(clu, "metric_writers", fake, raising=False)
    board = log.TensorBoard(tmp_path)
    board.write({"step": jnp.int32(5), "loss": jnp.float32(0.5), "note": "x", "l": [1]})
    board.close()
    assert calls[:2] == [("logdir", str(tmp_path)), (5, {"loss": 0.5})]
    assert "flush" in calls


def progress(stream, **settings):
    now = [0.0]
    bar = log.Progress(100, images=256, stream=stream, clock=lambda: now[0], **settings)
    return bar, now


def test_progress_is_a_line_every_few_seconds_without_a_terminal():
    stream = io.StringIO()
    bar, now = progress(stream, every=10.0)
    for step in range(1, 101):
        now[0] = 30.0 + 0.5 * step  # compilation, then half a second per step
        bar.write({"step": step, "loss": 2.0 / step, "rate": 1.0, "mim_loss": 3.0})
    bar.close()
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [
        1,
        21,
        41,
        61,
        81,
        100,
    ]
    assert lines[0] == "step 1/100 (1%), loss 2, mim_loss 3"
    want = "step 21/100 (21%), 512 images/s, 0:00:40 left, loss 0.09524, mim_loss 3"
    assert lines[1] == want


def test_progress_is_a_bar_on_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    bar, now = progress(stream, start=40)
    for step in (50, 60):
        now[0] += 5.0
        bar.write({"step": step, "loss": 0.25})
    bar.close()
    shown = stream.getvalue()
    assert "60/100" in shown
    assert "512 images/s, 0:00:20 left, loss 0.25" in shown
    assert "40%" in shown and shown.count("\r") >= 2


def test_progress_speed_starts_at_the_step_it_was_taken_up():
    stream = io.StringIO()
    bar, now = progress(stream, start=90, every=0.0)
    bar.write({"step": 91})
    now[0] = 2.0
    bar.write({"step": 92})
    assert "128 images/s" in stream.getvalue().splitlines()[1]


def test_progress_shows_an_evaluation_at_once_and_until_the_next():
    stream = io.StringIO()
    bar, now = progress(stream, every=10.0)
    bar.write({"step": 10, "loss": 2.0})
    now[0] = 5.0
    bar.write({"step": 20, "loss": 1.0})  # not yet
    now[0] = 6.0
    bar.write({"step": 20, "eval/top1": 0.3125, "eval/loss": 1.5, "eval/images": 512})
    now[0] = 25.0
    bar.write({"step": 30, "loss": 0.5})
    bar.close()
    assert stream.getvalue().splitlines() == [
        "step 10/100 (10%), loss 2",
        "step 20/100 (20%), eval/top1 0.3125, eval/loss 1.5",
        "step 30/100 (30%), 128 images/s, 0:02:20 left, loss 0.5, eval/top1 0.3125, "
        "eval/loss 1.5",
    ]


def test_speed_is_that_between_two_records():
    speed = log.Speed(images=64, flops=2e9, peak=1e12)
    assert speed(10, 30.0, 1.0) == {}  # compilation
    found = speed(20, 32.0, 1.5)
    assert found["images_per_second"] == 320
    assert found["data_wait"] == 0.25
    assert found["mfu"] == pytest.approx(320 * 2e9 / 1e12)
    assert speed(30, 36.0, 1.5)["images_per_second"] == 160


@pytest.mark.parametrize("flops, peak", [(None, 1e12), (2e9, None)])
def test_utilisation_is_left_out_where_it_is_unknown(flops, peak):
    speed = log.Speed(images=64, flops=flops, peak=peak)
    speed(1, 1.0, 0.0)
    assert set(speed(2, 2.0, 0.0)) == {"images_per_second", "data_wait"}


def test_tensorboard_writes_nested_names(tmp_path):
    pytest.importorskip("tensorflow")
    from tensorboard.backend.event_processing import event_accumulator

    board = log.TensorBoard(tmp_path)
    record = {"step": 5, "xray/nmi/block_1": 0.25, "gradient_norm": 2.0}
    board.write(record | {"gradient_norm/patch_embed": 1.0})
    board.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = {*events.Tags()["tensors"]}
    assert {"xray/nmi/block_1", "gradient_norm", "gradient_norm/patch_embed"} <= tags
