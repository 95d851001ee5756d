"""How the images of a file are prepared: what lies beside it, else what is usual."""

import json

import numpy as np
import pytest
from test_formats import HEAD, core
from test_preprocess import DINOV2

from clvsmim import foreign, formats
from clvsmim.formats import _preprocess

SIDE = {"height": 32, "width": 32}  # what the fixture takes
FITTING = DINOV2 | {"crop_size": SIDE, "size": {"shortest_edge": 40}}
ODD = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
TIMM = {"pretrained_cfg": {"mean": [0.7, 0.8, 0.9], "std": [0.2, 0.3, 0.4]}}


@pytest.fixture
def opened(tmp_path):
    """Opens one small file of timm's names with these JSON files beside it."""

    def run(processor=None, config=None):
        with (tmp_path / "x.npz").open("wb") as file:
            np.savez(file, **(core() | HEAD))
        said = {"preprocessor_config.json": processor, "config.json": config}
        for name, content in said.items():
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (tmp_path / name).write_text(text)
        return formats.open_file(str(tmp_path / "x.npz"), heads=3)

    return run


def lines(opened):
    """(found, assumed) of how images are prepared."""
    report = opened.report
    return [
        [x for x in rows if "mean" in x or "images" in x]
        for rows in (report.found, report.assumed)
    ]


def test_hugging_faces_file_beside_tells_all_of_it(opened):
    found = opened(FITTING | ODD, TIMM)
    assert found.input == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    want = _preprocess.Transform((32, 32), 40, "bilinear", True, **found.input)
    assert found.transform == want
    assert foreign.facts(found.report.source, found)["transform"] == want._asdict()
    line = "input mean (0.1, 0.2, 0.3), std (0.4, 0.5, 0.6), by preprocessor_config"
    (said,), assumed = lines(found)
    assert said.startswith(line) and not assumed


def test_timms_config_tells_where_there_is_none_of_hugging_face(opened):
    found = opened(config=TIMM)
    assert found.input["mean"] == found.transform.mean == (0.7, 0.8, 0.9)
    (said,), _ = lines(found)
    assert said.endswith("by timm's config.json")


def test_without_either_mean_and_std_are_an_assumption(opened):
    found = opened(config={"num_attention_heads": 3})
    assert found.input["mean"] == found.transform.mean == (0.5, 0.5, 0.5)
    said, (assumed,) = lines(found)
    assert not said and "(0.5, 0.5, 0.5), the usual ones; a prepro" in assumed
    half = {k: FITTING[k] for k in ("do_normalize", "image_mean")}  # of no processor
    assert opened(half).input == {"mean": (0.485, 0.456, 0.406), "std": (0.5,) * 3}


def test_sizes_of_another_network_are_not_followed_colours_are(opened):
    found = opened(DINOV2)
    usual = _preprocess.transform("timm", (32, 32))
    assert found.transform == usual._replace(**found.input)
    assert found.input["mean"] == (0.485, 0.456, 0.406)
    _, (assumed,) = lines(found)
    assert "preprocessor_config.json makes them 224 x 224 px" in assumed


STRANGE = (
    {"image_processor_type": "X"},
    {"resample": 1},
    {"resample": [3]},
    {"do_resize": False},
    {"size": "224"},
    {"size": {"shortest_edge": 24}},  # from which no 32 x 32 can be cut
    {"crop_size": [32, 32, 3]},
)


@pytest.mark.parametrize("change", STRANGE)
def test_what_is_not_understood_is_said(opened, change):
    found = opened(FITTING | ODD | change)
    assert found.input["mean"] == (0.1, 0.2, 0.3)
    assert found.transform.filter == "bicubic"
    _, (assumed,) = lines(found)
    assert assumed.startswith("images resized as is usual: ")


@pytest.mark.parametrize("change", ({"do_rescale": False}, {"rescale_factor": 1 / 2}))
def test_mean_and_std_of_other_pixels_are_not_taken(opened, change):
    found = opened(FITTING | ODD | change)
    assert found.input["mean"] == (0.5, 0.5, 0.5)
    _, (resized, colour) = lines(found)
    assert colour.endswith(
        "the usual ones; preprocessor_config.json does not tell them"
    )


def test_pixels_that_are_not_normalised_have_mean_0_and_std_1(opened):
    found = opened(FITTING | ODD | {"do_normalize": False})
    assert found.input == {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    assert found.transform.resize == 40 and not lines(found)[1]


def test_one_number_of_a_grey_network_is_of_all_channels(opened):
    said = {"mean": [0.1307], "std": [0.3081], "input_size": [1, 28, 28]}
    found = opened(config={"pretrained_cfg": said})
    assert found.input == {"mean": (0.1307,) * 3, "std": (0.3081,) * 3}
    found = opened(FITTING | {"image_mean": [0.25], "image_std": 0.5})
    assert found.input == {"mean": (0.25,) * 3, "std": (0.5,) * 3}


BAD = {
    "a word": FITTING | {"image_mean": ["a", "b", "c"]},
    "two numbers": FITTING | {"image_std": [0.5, 0.5]},
    "zero": FITTING | {"image_std": [0, 0, 0]},
    "factor": FITTING | {"rescale_factor": "1/255"},
    "cut off": '{"image_mean": [0.5',
    "a list": "[1]",
    "empty": "",
}


@pytest.mark.parametrize("case", BAD)
def test_a_preprocessor_config_that_cannot_be_is_one_line(opened, case):
    with pytest.raises(ValueError, match="preprocessor_config.json.* remove it") as got:
        opened(BAD[case])
    assert "x.npz" in str(got.value) and "\n" not in str(got.value)
