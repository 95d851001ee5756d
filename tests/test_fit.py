"""Fitting weights to another input, against the libraries that do it too."""

import importlib
import itertools
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torchvision_stub
from models import MAE, SIMMIM, tiny

from clvsmim import plugin, transfer, tree
from clvsmim.formats import _fit
from clvsmim.inits import position_init, relative_index

GRIDS = [(4, 6), (14, 16), (14, 7), (16, 37), (37, 16), (3, 1), (1, 4), (5, 5)]


def table(grid, prefix=1, width=6, seed=0):
    rng = np.random.default_rng(seed)
    shape = (1, prefix + grid[0] * grid[1], width)
    return rng.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def timm():
    """timm's own functions."""
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchvision_stub.install()
        pytest.importorskip("timm")
        load = importlib.import_module
        return types.SimpleNamespace(
            positions=load("timm.layers.pos_embed").resample_abs_pos_embed,
            patch=load("timm.layers.patch_embed").resample_patch_embed,
            channels=load("timm.models._manipulate").adapt_input_conv,
        )


# Positions


def test_positions_of_the_recording(golden):
    """MAE's own function, 4x4 to 6x6 and CLS."""
    recorded = golden("posembed_interpolation")
    got = _fit.position_table(recorded["source_4x4"], (6, 6), prefix=1, how="bicubic")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, recorded["target_6x6"], rtol=0, atol=1e-5)


VECTORS = {
    "bicubic": "-.0412 .55780 2.61938 6.36646 11.80103 18.85278 27.35767 37.05786 "
    "47.76636 60.24487 74.68042 91.02612 109.14136 128.79175 150.22760 170.02997",
    "dino": "-.04274 .54349 2.57745 6.29129 11.67522 18.63603 26.97402 36.38293 "
    "46.94881 59.42816 73.85129 90.12500 108.04957 127.31876 147.73306 168.59163",
}


@pytest.mark.parametrize("how", VECTORS)
def test_one_axis_by_hand(how):
    """i^2 from 14 to 16 samples, worked out with a = -0.75 and a repeated border."""
    expected = [float(x) for x in VECTORS[how].split()]
    got = _fit.axis(14, 16, how) @ np.arange(14.0) ** 2
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["bicubic", "dino", "antialias"])
def test_an_axis_is_that_of_torch(how):
    torch = pytest.importorskip("torch")
    for old, new in GRIDS:
        signal = torch.randn(1, 2, old, 3, dtype=torch.float64)
        asked = {"size": (new, 4), "antialias": how == "antialias"}
        if how == "dino":
            asked = {"scale_factor": ((new + 0.1) / old, 4.1 / 3)}
        theirs = torch.nn.functional.interpolate(signal, mode="bicubic", **asked)
        ours = _fit.axis(old, new, how) @ signal.numpy() @ _fit.axis(3, 4, how).T
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_a_linear_axis_is_that_of_scipy():
    """As big_vision zooms; between the corners, which stay."""
    from scipy.ndimage import zoom

    for old, new in [pair for pair in GRIDS if min(pair) > 1]:
        field = np.random.default_rng(old).normal(size=(old, old, 2))
        theirs = zoom(field, (new / old, new / old, 1), order=1)
        matrix = _fit.axis(old, new, "linear")
        ours = np.einsum("ri,cj,ijd->rcd", matrix, matrix, field)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    constant = _fit.axis(1, 3, "linear"), _fit.axis(3, 1, "linear")
    np.testing.assert_array_equal(constant[0], [[1], [1], [1]])
    np.testing.assert_array_equal(constant[1], [[1, 0, 0]])


@pytest.mark.parametrize("how", ["bicubic", "dino", "antialias", "linear"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_rows_columns_and_prefix_keep_their_places(how, prefix):
    """A table of its own coordinates: rows grow downwards, columns to the right."""
    given = np.zeros((1, prefix + 15, 2), np.float32)
    given[0, prefix:] = np.indices((3, 5)).reshape(2, -1).T
    given[0, :prefix] = 7
    got = _fit.position_table(given, (6, 7), prefix=prefix, how=how, old=(3, 5))
    assert got.shape == (1, prefix + 42, 2)
    np.testing.assert_array_equal(got[0, :prefix], given[0, :prefix])
    patches = got[0, prefix:].reshape(6, 7, 2)
    assert (np.diff(patches[..., 0], axis=0) > 0.1).all()
    assert (np.diff(patches[..., 1], axis=1) > 0.1).all()
    np.testing.assert_allclose(np.diff(patches[..., 0], axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(np.diff(patches[..., 1], axis=0), 0, atol=1e-6)


def test_positions_are_those_of_timm(timm):
    import torch

    given = table((14, 14), prefix=2)
    for grid in [(16, 16), (7, 7), (14, 28), (37, 37)]:
        theirs = timm.positions(
            torch.from_numpy(given), list(grid), num_prefix_tokens=2
        )
        ours = _fit.position_table(given, grid, prefix=2, how="antialias")
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_table_that_fits_comes_back_untouched():
    given = table((4, 4))
    for how in _fit.HOW:
        assert _fit.position_table(given, (4, 4), prefix=1, how=how) is given


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"how": "bicubik"}, "unknown way .* 'bicubik': did you mean 'bicubic'"),
        ({"prefix": 0}, r"\(1, 17, 6\) is not for 0 prefix rows and 4x4 patches; exp"),
        ({"old": (4, 5)}, r"is not for 1 prefix rows and 4x5 patches; .*\(1, 21, D"),
    ],
)
def test_other_tables_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        asked = {"prefix": 1, "how": "bicubic"} | changes
        _fit.position_table(table((4, 4)), (6, 6), **asked)
    assert "\n" not in str(error.value)


# What the code of each passes to `interpolate`, or to `zoom`.
WAYS = {
    "bicubic": {"mae", "moco_v3", "deit", "hf_vit", "hf_vitmae", "hf_dinov2"},
    "dino": {"dino", "ibot", "dinov2"},
    "antialias": {"timm"},
    "linear": {"google"},
}
OTHERS = {"ours", "beit", "hf_beit", "simmim"}  # no code, or no such table


def test_each_family_has_its_own_way():
    """A converted network is fitted so; the ways differ, or this could not be seen."""
    families = set().union(*WAYS.values(), OTHERS)
    assert families == set(plugin.names("formats"))
    there, here = (tiny(MAE, image=side).spec for side in ((32, 32), (48, 64)))
    params = {"pos_embed": table((4, 4)), "patch_embed": {"kernel": np.ones((8, 8, 3))}}
    tables = []
    for how, names in WAYS.items():
        tables.append(
            _fit.position_table(params["pos_embed"], (6, 8), prefix=1, how=how)
        )
        for name in names:
            given = transfer.Given({"params": params}, there, {}, name, "")
            found, lines = transfer.resized(given, here)
            np.testing.assert_array_equal(
                found["params"]["pos_embed"], tables[-1], name
            )
            assert lines == [f"pos_embed: 4x4 -> 6x8 patches, {_fit.HOW[how]}"]
    for one, other in itertools.combinations(tables, 2):
        assert np.abs(one - other).max() > 0.01


def test_dinov2_with_registers_is_fitted_in_another_way():
    for family in ("dinov2", "hf_dinov2"):
        assert _fit.reference(family, registers=True) == "antialias"
        assert _fit.reference(family) != "antialias"


# Relative positions


def beit(given, old, new):
    """The loop of BEiT's fine-tuning, one head at a time, with FITPACK."""
    from scipy.interpolate import RectBivariateSpline

    def places(old, new):
        low, high = 1.01, 1.5
        while high - low > 1e-6:
            q = (low + high) / 2
            if (1 - q ** (old - 1)) / (1 - q) > new - 1:
                high = q
            else:
                low = q
        found, here = [], 1
        for i in range(old - 1):
            found.append(here)
            here += q ** (i + 1)
        return [-x for x in reversed(found)] + [0] + found

    rows, columns = (places(o, n) for o, n in zip(old, new, strict=True))
    wanted = [np.arange(-(n - 1), n) for n in new]
    heads = [
        RectBivariateSpline(rows, columns, z.reshape(len(rows), -1))(*wanted).ravel()
        for z in given[:-3].T.astype(np.float64)
    ]
    return np.concatenate([np.stack(heads, axis=1), given[-3:]])


@pytest.mark.parametrize("old, new", [((14, 14), (24, 24)), ((14, 14), (7, 7)),
                                      ((4, 4), (9, 9)), ((4, 6), (9, 7))])  # fmt: skip
def test_relative_tables_are_those_of_beit(old, new):
    count = (2 * old[0] - 1) * (2 * old[1] - 1) + 3
    given = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    ours, theirs = _fit.relative_table(given, old, new), beit(given, old, new)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * abs(theirs).max())


def test_ratio_of_the_geometric_sampling():
    assert abs(_fit.ratio(14, 24) - 1.090307) < 2e-6
    assert abs(_fit.ratio(14, 28) - 1.114428) < 2e-6
    np.testing.assert_allclose(_fit.spread(14, 24)[[0, 13, 14, -1]], [-23, 0, 1, 23],
                               atol=1e-4)  # fmt: skip


def test_relative_tables_keep_offsets_and_prefix():
    """A bias that grows with the row's offset still does, and is even in columns."""
    old, new = (5, 4), (8, 4)
    row, column = np.meshgrid(np.arange(-4, 5), np.arange(-3, 4), indexing="ij")
    field = np.stack([row, column**2], -1).reshape(-1, 2)
    given = np.concatenate([field, [[70, 7], [80, 8], [90, 9]]]).astype(np.float32)
    got = _fit.relative_table(given, old, new)
    np.testing.assert_array_equal(got[-3:], given[-3:])
    got = got[:-3].reshape(15, 7, 2)
    assert (np.diff(got[..., 0], axis=0) > 0.1).all()
    assert np.ptp(got[..., 0], axis=1).max() < 1e-5
    np.testing.assert_allclose(got[..., 1], np.tile(np.arange(-3, 4) ** 2, (15, 1)),
                               atol=1e-5)  # fmt: skip
    # And the index of the network reads them where they were meant: 3 rows below.
    index = relative_index(new, 1)
    query, key = 1 + 3 * 4 + 2, 1 + 0 * 4 + 2
    assert got.reshape(-1, 2)[index[query, key], 0] == got[7 + 3, 3, 0]


def test_relative_tables_of_the_smallest_grids():
    """Two patches have three offsets, one has one: splines of lower degree."""
    for old in [(1, 1), (1, 2), (2, 2)]:
        count = (2 * old[0] - 1) * (2 * old[1] - 1) + 3
        got = _fit.relative_table(np.full((count, 2), 0.5, np.float32), old, (3, 3))
        np.testing.assert_allclose(got, np.full((28, 2), 0.5), atol=1e-6)
    given = np.zeros((52, 2), np.float32)
    assert _fit.relative_table(given, (4, 4), (4, 4)) is given
    with pytest.raises(ValueError, match=r"\(52, 2\) is not for 4x5 patches; .*\(66,"):
        _fit.relative_table(given, (4, 5), (6, 6))


# Patches and channels


def test_patch_kernels_are_those_of_timm(timm):
    import torch

    kernel = np.random.default_rng(0).normal(size=(16, 16, 3, 5)).astype(np.float32)
    conv = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    for patch in (8, 14, 32):
        theirs = timm.patch(conv, [patch, patch]).numpy().transpose(2, 3, 1, 0)
        ours = _fit.patch_kernel(kernel, patch)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_an_enlarged_patch_gives_the_same_embedding():
    """What FlexiViT's pseudo-inverse is for; a plain resize of the kernel does not."""
    rng = np.random.default_rng(0)
    kernel, patch = rng.normal(size=(8, 8, 3, 4)), rng.normal(size=(8, 8, 3))
    enlarge = _fit.axis(8, 12, "antialias")
    large = np.einsum("ri,sj,ijc->rsc", enlarge, enlarge, patch)

    def embed(patch, kernel):
        return np.einsum("ijc,ijcd->d", patch, kernel)

    fitted = _fit.patch_kernel(kernel, 12)
    np.testing.assert_allclose(embed(large, fitted), embed(patch, kernel), atol=1e-9)
    assert _fit.patch_kernel(kernel, 8) is kernel


def test_channels_are_those_of_timm(timm):
    import torch

    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 5)).astype(np.float32)
    conv = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    for count in (1, 2, 3, 4, 7):
        theirs = timm.channels(count, conv).numpy().transpose(2, 3, 1, 0)
        np.testing.assert_allclose(_fit.channels(kernel, count), theirs, atol=1e-6)


def test_a_grey_kernel_sees_the_mean_of_the_channels():
    kernel = np.random.default_rng(0).normal(size=(4, 4, 1, 5))
    image = np.random.default_rng(1).normal(size=(4, 4, 3))
    got = np.einsum("ijc,ijcd->d", image, _fit.channels(kernel, 3))
    grey = np.einsum("ij,ijd->d", image.mean(axis=2), kernel[:, :, 0])
    np.testing.assert_allclose(got, grey, atol=1e-12)
    with pytest.raises(ValueError, match="for 4 input channels cannot be fitted to 3"):
        _fit.channels(np.zeros((4, 4, 4, 5)), 3)


# A whole encoder


def weights(encoder):
    """Random parameters of an encoder, as numpy, without compiling it."""
    rng = np.random.default_rng(0)
    images = jnp.zeros((1, *encoder.spec.image, 3))
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype("float32"), shapes)


def fitted(there, here, how="bicubic"):
    """(before, after, lines), after checking that it is what `here` wants."""
    before = weights(there)
    after, lines = _fit.fit_encoder(before, there.spec, here.spec, how)
    wanted = tree.named(weights(here))
    assert {k: x.shape for k, x in tree.named(after).items()} == {
        k: x.shape for k, x in wanted.items()
    }
    assert {x.dtype for x in jax.tree.leaves(after)} == {np.dtype("float32")}
    return tree.named(before), tree.named(after), lines


def changed(before, after):
    return {k for k in before if not np.array_equal(before[k], after[k])}


def test_an_encoder_for_more_and_oblong_patches():
    there, here = tiny(MAE), tiny(MAE, image=(48, 64))
    before, after, lines = fitted(there, here)
    assert changed(before, after) == {"pos_embed"}
    assert lines == [f"pos_embed: 4x4 -> 6x8 patches, {_fit.HOW['bicubic']}"]
    back = _fit.fit_encoder(tree.nest(before), there.spec, there.spec, "bicubic")
    assert back[1] == [] and not changed(before, tree.named(back[0]))


def test_an_encoder_with_registers():
    """Registers have no row of the table."""
    there = tiny(position="learned", prefix=3)
    _, after, _ = fitted(there, tiny(position="learned", prefix=3, image=(16, 64)))
    assert after["pos_embed"].shape == (1, 1 + 16, 48)


@pytest.mark.parametrize("relative", ["shared", "per_block"])
def test_an_encoder_with_relative_positions(relative):
    there, here = (
        tiny(SIMMIM, relative=relative, image=image) for image in [(32, 32), (48, 40)]
    )
    before, after, lines = fitted(there, here)
    tables = {k for k in before if k.endswith("rel_table")}
    assert changed(before, after) == tables and len(lines) == 1
    assert lines[0].startswith(f"rel_table ({len(tables)}): 4x4 -> 6x5 patches, geom")
    for name in tables:
        own = _fit.relative_table(before[name], (4, 4), (6, 5))
        np.testing.assert_array_equal(after[name], own)


def test_an_encoder_for_larger_patches_and_grey_weights():
    """Twice the image with twice the patch: the grid stays, and so do positions."""
    there, here = tiny(MAE), tiny(MAE, image=(64, 64), patch=16)
    before, after, lines = fitted(there, here)
    assert changed(before, after) == {"patch_embed/kernel"}
    assert lines == ["patch_embed/kernel: patch 8 -> 16, pseudo-inverse"]
    grey = before | {"patch_embed/kernel": before["patch_embed/kernel"][:, :, :1]}
    after, lines = _fit.fit_encoder(tree.nest(grey), there.spec, here.spec, "dino")
    assert after["patch_embed"]["kernel"].shape == (16, 16, 3, 48)
    assert [line.split(":")[1] for line in lines] == [
        " 1 -> 3 input channels", " patch 8 -> 16, pseudo-inverse"
    ]  # fmt: skip


def test_sincos_positions_are_computed_anew():
    there, here = tiny(MAE), tiny(MAE, image=(48, 64))
    new = position_init(here.spec)(None, (1, 49, 48))
    before, after, lines = fitted(there, here, "sincos")
    np.testing.assert_array_equal(after["pos_embed"][:, 1:], new[:, 1:])
    np.testing.assert_array_equal(after["pos_embed"][:, :1], before["pos_embed"][:, :1])
    assert lines[0].endswith(_fit.HOW["sincos"])
    learned = tiny(position="learned"), tiny(position="learned", image=(48, 64))
    with pytest.raises(ValueError, match="that are learned cannot be computed anew; u"):
        fitted(*learned, "sincos")


def test_a_conv_stem_keeps_its_patch():
    there, here = tiny(stem="conv"), tiny(stem="conv", patch=16, image=(64, 64))
    with pytest.raises(ValueError, match="conv stem for patch 8 cannot be .* patch 16"):
        _fit.fit_encoder(weights(there), there.spec, here.spec, "bicubic")
    _, after, lines = fitted(there, tiny(stem="conv", image=(64, 64)))
    assert lines == []  # it has no table that would need to grow
