"""A folder of images: what counts, in which order, with which label."""

import pickle

import numpy as np
import pytest
from etils import epath
from sets import encoded, picture, upload

from clvsmim.data import Unreadable, folder, tfds
from clvsmim.data.crops import to_array


def write(root, *names):
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}
        ending = name.rpartition(".")[2].lower()
        path.write_bytes(encoded(picture(seed), kind.get(ending, ending.upper())))


@pytest.fixture
def pets(tmp_path):
    folder.class_folders.cache_clear()
    folder.list_images.cache_clear()
    write(
        tmp_path,
        *("train/dog/b.jpg", "train/dog/deep/er/a.PNG", "train/cat/z.jpeg"),
        *("train/owl/1.webp", "train/owl/2.bmp", "train/owl/3.ppm", "train/owl/4.gif"),
        *("train/owl/5.tif", "train/owl/.hidden.jpg", "train/.git/a.jpg"),
        *("val/owl/a.jpg", "val/dog/a.jpg", "val/dog/.x/a.jpg"),
    )
    (tmp_path / "train/dog/notes.txt").write_text("no image")
    (tmp_path / "train/ant").mkdir()
    return tmp_path


def make(path, split="train", **changes):
    numbers = {"train": "train", "test": "val", "lengths": (0, 0), "classes": 0}
    return folder.make(split=split, path=str(path), **numbers | changes)


def names(source):
    root = len(source.name) + 1
    return [source[i]["image"].filename[root:] for i in range(len(source))]


def test_classes_are_folders_and_images_are_sorted(pets):
    source = make(pets)
    assert source.class_names == ("ant", "cat", "dog", "owl")
    assert source.num_classes == 4 and len(source) == 8
    assert names(source) == [
        *("train/cat/z.jpeg", "train/dog/b.jpg", "train/dog/deep/er/a.PNG"),
        *(f"train/owl/{i}" for i in ("1.webp", "2.bmp", "3.ppm", "4.gif", "5.tif")),
    ]
    items = [source[i] for i in range(len(source))]
    assert [item["label"] for item in items] == [1, 2, 2, 3, 3, 3, 3, 3]
    assert [item["index"] for item in items] == list(range(8))
    np.testing.assert_array_equal(to_array(items[2]["image"]), np.asarray(picture(1)))


def test_the_order_is_not_that_of_the_file_system(pets, monkeypatch):
    expected = names(make(pets))
    forward = folder.walk
    monkeypatch.setattr(folder, "walk", lambda root: list(forward(root))[::-1])
    folder.list_images.cache_clear()
    assert names(make(pets)) == expected


def test_a_bucket_gives_the_same(pets, monkeypatch):
    bucket = upload(pets, "gs://bucket/pets", monkeypatch)
    bucket.makedirs("gs://bucket/pets/train/ant")
    for split in ("train", "test"):
        local, remote = make(pets, split), make("gs://bucket/pets", split)
        assert remote.class_names == local.class_names
        assert names(remote) == names(local) and len(local) >= 2
        for i in range(len(local)):
            a, b = (to_array(s[i]["image"]) for s in (local, remote))
            np.testing.assert_array_equal(a, b)


def test_a_class_without_test_images_shifts_no_label(pets):
    test = make(pets, "test")
    assert test.class_names == make(pets).class_names
    assert [test[i]["label"] for i in range(len(test))] == [2, 3]
    write(pets, "val/emu/a.jpg")
    folder.list_images.cache_clear()
    with pytest.raises(ValueError, match="val/emu/a.jpg is in no class folder"):
        len(make(pets, "test"))


def test_links_are_followed(pets):
    (pets / "half").mkdir()
    (pets / "half/dog").symlink_to(pets / "train/dog")
    assert len(make(pets, train="half")) == 2


def test_the_usual_layout_needs_only_its_path(pets):
    for split in ("train", "test"):
        source = folder.make(split=split, path=str(pets))
        assert names(source) == names(make(pets, split))


def test_labels_are_known_without_an_image(pets):
    for split in ("train", "test"):
        source = make(pets, split)
        want = [source[i]["label"] for i in range(len(source))]
        for name in names(source):
            (pets / name).write_bytes(b"")
        np.testing.assert_array_equal(make(pets, split).labels, want)


def test_a_bucket_without_its_reader_says_what_to_install(monkeypatch):
    def fs(path):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", fs)
    for source in (
        make("gs://nowhere/pets"),
        tfds.make(
            split="train",
            dataset="pets",
            train="train",
            test="test",
            lengths=(1, 1),
            classes=2,
            dir="gs://nowhere",
        ),
    ):
        with pytest.raises(ValueError, match=r"gcsfs .*pip install clvsmim\[tpu\]"):
            source[0]


def test_a_flat_folder_is_one_class(tmp_path):
    write(tmp_path, "b.jpg", "a.png")
    for split in ("train", "test"):
        source = make(tmp_path, split, train="", test="")
        assert source.class_names == ("all",) and len(source) == 2
        assert [source[i]["label"] for i in range(2)] == [0, 0]
    assert names(source) == ["a.png", "b.jpg"]


def test_what_is_given_needs_no_file(tmp_path):
    source = make(tmp_path / "nowhere", lengths=(1281167, 50000), classes=1000)
    assert len(source) == 1281167 and source.num_classes == 1000
    assert len(make(tmp_path / "nowhere", "test", lengths=(5, 7), classes=2)) == 7
    with pytest.raises(ValueError, match="no folder .*nowhere/train; data.source.path"):
        source[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"lengths": (9, 0)},
            "folder train: 8 images found, data.source.lengths says 9",
        ),
        ({"classes": 5}, "4 classes found, data.source.classes says 5"),
        ({"train": "train/ant"}, "0 images found"),
        ({"lengths": (9,)}, "lengths=.9,.: expected the numbers"),
        ({"split": "val"}, "unknown split 'val', expected one of: train, test"),
    ],
)
def test_what_is_given_is_checked(pets, changes, message):
    with pytest.raises(ValueError, match=message):
        make(pets, **changes)[0]


def test_a_worker_that_finds_other_files_says_so(pets):
    source = make(pets)
    assert len(source) == 8
    sent = pickle.dumps(source)
    (pets / "train/cat/z.jpeg").unlink()
    folder.list_images.cache_clear()
    with pytest.raises(ValueError, match="7 images found, data.source.lengths says 8"):
        pickle.loads(sent)[0]
    with pytest.raises(Unreadable, match="cannot read the image .*cat/z.jpeg"):
        source[0]


def test_items_end(pets):
    with pytest.raises(IndexError):
        make(pets)[8]
