"""Evaluation transforms: what the families' own code does, written out in Pillow."""

import pathlib
import pickle

import numpy as np
import pytest
import torchvision_stub
from PIL import Image

from clvsmim import formats, views
from clvsmim.data.crops import CenterCrop
from clvsmim.formats import _preprocess as preprocess

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def picture(width, height):
    """A smooth colour gradient under noise, so that every filter and offset shows."""
    rng = np.random.default_rng(width)
    ramp = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 90, width))
    noise = rng.integers(0, 45, (height, width, 3))
    return Image.fromarray((ramp[..., None] + noise).astype(np.uint8))


# Landscape, portrait, square, smaller than the crop, as large; margins even and odd.
SIZES = [(333, 250), (250, 333), (300, 300), (101, 77), (456, 224), (259, 227)]
PICTURES = [picture(*size) for size in SIZES]


def torchvision_resize(image, short, filter):
    """Resize(short): the longer side is cut to an integer."""
    width, height = image.size
    if width <= height:
        size = short, int(short * height / width)
    else:
        size = int(short * width / height), short
    return image if size == image.size else image.resize(size, filter)


def torchvision_crop(image, side):
    """CenterCrop(side): Python's round, which takes halves to the even side."""
    left = int(round((image.width - side) / 2.0))
    top = int(round((image.height - side) / 2.0))
    return image.crop((left, top, left + side, top + side))


def torchvision(short, filter, side):
    return lambda image: torchvision_crop(
        torchvision_resize(image, short, filter), side
    )


def hugging_face(short, filter, side):
    """BitImageProcessor: whole pixels, downwards."""

    def run(image):
        image = torchvision_resize(image, short, filter)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    return run


def squeeze(side, filter):
    return lambda image: image.resize((side, side), filter)


# family, input: its transform, mean and std as its evaluation script spells them.
REFERENCE = {
    ("moco_v3", 224): (torchvision(256, BILINEAR, 224), IMAGENET),  # main_lincls.py
    ("simmim", 224): (torchvision(256, BICUBIC, 224), IMAGENET),  # data_finetune.py
    ("simmim", 192): (torchvision(219, BICUBIC, 192), IMAGENET),
    ("mae", 224): (torchvision(256, BICUBIC, 224), IMAGENET),  # util/datasets.py
    ("mae", 448): (torchvision(448, BICUBIC, 448), IMAGENET),
    ("dino", 224): (torchvision(256, BICUBIC, 224), IMAGENET),  # eval_linear.py
    ("ibot", 224): (torchvision(256, BICUBIC, 224), IMAGENET),
    ("dinov2", 224): (torchvision(256, BICUBIC, 224), IMAGENET),  # data/transforms.py
    ("deit", 224): (torchvision(256, BICUBIC, 224), IMAGENET),  # datasets.py
    ("deit", 384): (torchvision(438, BICUBIC, 384), IMAGENET),
    ("beit", 224): (torchvision(256, BICUBIC, 224), HALF),  # beit/datasets.py
    ("beit", 384): (torchvision(384, BICUBIC, 384), HALF),
    ("timm", 224): (torchvision(248, BICUBIC, 224), HALF),  # crop_pct 0.9
    ("google", 384): (torchvision(384, BICUBIC, 384), HALF),  # crop_pct 1.0
    ("hf_vit", 224): (squeeze(224, BILINEAR), HALF),  # ViTImageProcessor
    ("hf_vitmae", 224): (squeeze(224, BILINEAR), IMAGENET),
    ("hf_beit", 224): (squeeze(224, BICUBIC), HALF),
    ("hf_deit", 224): (
        lambda image: torchvision_crop(squeeze(256, BICUBIC)(image), 224),
        HALF,
    ),
    ("hf_dinov2", 224): (hugging_face(256, BICUBIC, 224), IMAGENET),
}


def transform(family, side):
    if family == "hf_deit":  # files of `hf_vit`, with a processor of their own
        return preprocess.from_hf({"image_processor_type": "DeiTImageProcessor"})
    return preprocess.transform(family, (side, side))


@pytest.mark.parametrize("family, side", REFERENCE)
def test_pixels_are_those_of_the_family(family, side):
    expected, (mean, std) = REFERENCE[family, side]
    given = transform(family, side)
    assert (given.mean, given.std) == (mean, std)
    for image in PICTURES:
        got = preprocess.pixels(image, given)
        assert got.shape == (side, side, 3) and got.dtype == np.uint8
        np.testing.assert_array_equal(got, expected(image))


def test_every_family_is_written_out():
    modules = {path.stem for path in pathlib.Path(formats.__file__).parent.glob("*.py")}
    families = {name for name in modules if not name.startswith("_")} - {"ours"}
    assert families == {family for family, _ in REFERENCE} - {"hf_deit"}
    with pytest.raises(ValueError, match="'moco'.*did you mean 'moco_v3'"):
        preprocess.transform("moco", (224, 224))
    with pytest.raises(ValueError, match="'ours' have no transform of their own"):
        preprocess.transform("ours", (224, 224))


def test_the_middles_differ():
    """Otherwise the pictures above could not tell one rounding from the other."""
    one = [torchvision(256, BICUBIC, 224)(image).tobytes() for image in PICTURES]
    other = [hugging_face(256, BICUBIC, 224)(image).tobytes() for image in PICTURES]
    assert 0 < sum(a != b for a, b in zip(one, other, strict=True)) < len(PICTURES)


def test_normalised_values_are_those_of_torchvision():
    """ToTensor divides by 255 in float32; Normalize subtracts, then divides."""
    torch = pytest.importorskip("torch")
    given = preprocess.transform("mae", (224, 224))
    pixels = preprocess.pixels(PICTURES[0], given)
    got = preprocess.normalised(pixels, given)
    tensor = torch.from_numpy(pixels.copy()).to(torch.float32).div(255)
    tensor.sub_(torch.tensor(given.mean)).div_(torch.tensor(given.std))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, tensor.numpy())
    # What the device makes of the same pixels.
    ours = views.normalise(pixels.astype(np.float32), given.mean, given.std)
    np.testing.assert_allclose(got, ours, rtol=0, atol=1e-6)


def test_oblong_inputs():
    """The longer side of the input sets the size of the image's shorter one."""
    given = preprocess.transform("mae", (112, 224))
    assert given.resize == 256
    whole = torchvision_resize(PICTURES[0], 256, BICUBIC)
    left, top = round((whole.width - 224) / 2), round((whole.height - 112) / 2)
    got = preprocess.pixels(PICTURES[0], given)
    np.testing.assert_array_equal(got, whole.crop((left, top, left + 224, top + 112)))
    squeezed = preprocess.pixels(
        PICTURES[0], preprocess.transform("hf_vit", (112, 224))
    )
    np.testing.assert_array_equal(squeezed, PICTURES[0].resize((224, 112), BILINEAR))


def test_a_transform_is_a_host_view():
    view = preprocess.view(preprocess.transform("hf_beit", (32, 64)))
    assert isinstance(view, CenterCrop) and view.size == (32, 64) and view.name
    assert pickle.loads(pickle.dumps(view)) == view
    got = view(PICTURES[0], np.random.default_rng(0))
    np.testing.assert_array_equal(got, view(PICTURES[0]))
    with pytest.raises(ValueError, match=r"cannot cut \(9, 9\) .* to \(20, 8\)"):
        CenterCrop(name="e", size=(9, 9), resize=(20, 8), filter="bilinear")


def test_a_transform_says_what_it_does():
    assert str(preprocess.transform("moco_v3", (224, 224))) == (
        "shorter side to 256 (bilinear), middle 224x224, mean (0.485, 0.456, 0.406), "
        "std (0.229, 0.224, 0.225)"
    )
    assert str(preprocess.transform("hf_vit", (224, 224))) == (
        "224x224 (bilinear), mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)"
    )


# Settings that lie beside the weights

TIMM = {  # of vit_base_patch16_224.dino, as timm 1.0 writes it
    "architecture": "vit_base_patch16_224",
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}
DINOV2 = {  # of facebook/dinov2-base
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
OLD_BEIT = {  # of microsoft/beit-base-patch16-224
    "crop_size": 224,
    "do_center_crop": False,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "BeitFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "size": 224,
}


def timm(**changes):
    return TIMM["pretrained_cfg"] | changes


def from_timm(said):
    return preprocess.from_timm(preprocess.checked(said))


def from_hf(said):
    return preprocess.from_hf(preprocess.checked(said))


def test_settings_of_timm():
    wanted = preprocess.transform("timm", (224, 224))
    colour = {"mean": IMAGENET[0], "std": IMAGENET[1]}
    assert from_timm(timm()) == wanted._replace(**colour)
    large = timm(input_size=[3, 518, 518], crop_pct=1.0)
    assert from_timm(large).resize == 518
    squash = from_timm(timm(crop_mode="squash", interpolation="bilinear"))
    assert (squash.resize, squash.filter) == ((248, 248), "bilinear")


def test_settings_of_hugging_face():
    assert from_hf(DINOV2) == preprocess.transform("hf_dinov2", (224, 224))
    old = from_hf(OLD_BEIT)
    beit = preprocess.transform("hf_beit", (224, 224))
    assert old == beit._replace(filter="bilinear")
    # What a file leaves out is the processor's default; a number is one side.
    for name, family in (("ViT", "hf_vit"), ("Beit", "hf_beit")):
        bare = from_hf({"image_processor_type": f"{name}ImageProcessor"})
        assert bare == transform(family, 224)
    short = {k: v for k, v in DINOV2.items() if k != "crop_size"} | {"size": 256}
    assert from_hf(short) == from_hf(DINOV2)


def test_spellings_of_hugging_face():
    want = from_hf(DINOV2)
    for change in (
        {"size": {"shortest_edge": 256, "longest_edge": None}},
        {"crop_size": [224, 224]},
        {"crop_size": {"height": 224, "width": 224, "shortest_edge": None}},
    ):
        assert from_hf(DINOV2 | change) == want
    sides = from_hf({"image_processor_type": "ViTImageProcessor", "size": [32, 64]})
    assert sides.crop == sides.resize == (32, 64)  # rows, columns
    for one in (0.25, [0.25]):
        grey = from_hf(DINOV2 | {"image_mean": one, "image_std": one})
        assert (grey.mean, grey.std) == ((0.25,) * 3, (0.25,) * 3)
    none = from_hf(DINOV2 | {"do_normalize": False})
    assert none == want._replace(mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize(
    "read, config, message",
    [
        ("timm", {"mean": [0.5] * 3}, r"without input_size=.*got \['mean'\]"),
        (
            "timm",
            timm(crop_mode="border"),
            "crop_mode='border' of a timm config; known",
        ),
        ("timm", timm(interpolation="lanczos"), "resampling 'lanczos' of a prep"),
        ("hf", DINOV2 | {"resample": 1}, "resampling 1 of a preprocessing config; k"),
        ("hf", {"size": 4}, "image_processor_type=None; known are .* ViT, Beit, DeiT"),
        ("hf", DINOV2 | {"do_rescale": False}, "'do_rescale': False.*expected to re"),
        ("hf", DINOV2 | {"rescale_factor": 1 / 127.5}, "'rescale_factor': 0.0078"),
        ("hf", DINOV2 | {"do_center_crop": False}, "images of different sizes; exp"),
        ("hf", DINOV2 | {"size": {"max_height": 9}}, "size={'max_height': 9} in"),
    ],
)
def test_settings_that_are_not_understood(read, config, message):
    function = {"timm": from_timm, "hf": from_hf}[read]
    with pytest.raises(ValueError, match=message) as error:
        function(config)
    assert "\n" not in str(error.value)


PROCESSORS = {
    "vit": ("ViTImageProcessorPil", {}),
    "beit": ("BeitImageProcessorPil", {}),
    "deit": ("DeiTImageProcessorPil", {}),
    "bit": ("BitImageProcessorPil", {"size": {"shortest_edge": 256}}),
}


@pytest.mark.parametrize("module", PROCESSORS)
def test_pixels_are_those_of_the_live_processor(module):
    """By the settings that the processor itself writes."""
    transformers = pytest.importorskip("transformers")
    torchvision_stub.install()
    name, changes = PROCESSORS[module]
    processor = getattr(transformers, name)(**changes)
    given = from_hf(processor.to_dict())
    for image in PICTURES:
        theirs = processor(image, return_tensors="np")["pixel_values"][0]
        ours = preprocess.normalised(preprocess.pixels(image, given), given)
        np.testing.assert_allclose(ours.transpose(2, 0, 1), theirs, atol=1e-6)
