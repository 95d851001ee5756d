"""Training on files: what was killed goes on bit for bit, broken images and all."""

import jax
import numpy as np
import pytest
import runs
import sets
from ml_collections import ConfigDict
from test_train import Stop, stop_in_data

from clvsmim import train

LENGTHS, CLASSES = (32, 4), len(sets.NAMES)


def a_folder(root):
    for i in range(32):
        path = root / "train" / sets.NAMES[i % CLASSES] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = sets.encoded(sets.picture(i))
        path.write_bytes(whole[:300] if i in (5, 9) else whole)
    return {"name": "folder", "path": str(root), "train": "train", "test": "train"}


def a_set(format):
    def make(root):
        splits = {"train": sets.records(32, broken=(5, 9)), "test": sets.records(4)}
        sets.prepare(root, format, splits, shards=3)
        name = {"array_record": "tfds", "tfrecord": "tfrecords"}[format]
        source = {"name": name, "dataset": "tiny_pets", "dir": str(root)}
        return source | {"train": "train", "test": "test"}

    return make


DATA = {
    "folder": a_folder,
    "tfds": a_set("array_record"),
    "tfrecords": a_set("tfrecord"),
}


def config(source, **data):
    """Twelve steps of 16 images: six epochs."""
    found = runs.config("simmim", epochs=6.0)
    with found.unlocked():
        found.data.source = ConfigDict(
            source | {"lengths": LENGTHS, "classes": CLASSES}, convert_dict=False
        )
        found.data.update(data)
    return found


@pytest.mark.parametrize("name", DATA)
def test_a_run_killed_and_resumed_ends_bit_for_bit(name, tmp_path, monkeypatch, capfd):
    source = DATA[name](tmp_path / "data")
    chosen = config(source, repeats=3, unreadable=2)

    def run(workdir):
        train.train(chosen, str(tmp_path / workdir), devices=jax.devices()[:1])

    run("whole")
    assert "another image takes its place" in capfd.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_in_data(patch, 8)
        run("killed")
    run("killed")
    runs.assert_identical(
        runs.state(tmp_path / "killed"), runs.state(tmp_path / "whole")
    )
    assert runs.trace(tmp_path / "killed") == runs.trace(tmp_path / "whole")
    assert np.isfinite([r["loss"] for r in runs.trace(tmp_path / "whole")]).all()


def test_one_broken_image_too_many_ends_the_run(tmp_path):
    chosen = config(a_folder(tmp_path / "data"), unreadable=1)
    with pytest.raises(ValueError, match="2 images of .* data.unreadable allows 1"):
        train.train(chosen, str(tmp_path / "run"), devices=jax.devices()[:1])
