"""On-device augmentations against Pillow, and the laws of their randomness."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from clvsmim import views
from clvsmim.data import photos

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# MoCo v3's published recipes, as in the configs.
COMMON = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "jitter_p": 0.8,
    "grey_p": 0.2,
    "blur_sigma": (0.1, 2.0),
    "flip_p": 0.5,
}
RECIPES = {
    "view 1": COMMON | {"blur_p": 1.0, "solarize_p": 0.0},
    "view 2": COMMON | {"blur_p": 0.1, "solarize_p": 0.2},
}
DRAWS = 20_000


@pytest.fixture(scope="module")
def images():
    """Real photographs as Pillow images, not square."""
    names = ("astronaut", "cat", "china", "flower", "galaxies", "tissue", "grass")
    files = [photos.SCENES[name][0][0] for name in names]
    return [photos.read_photo(file).resize((90, 64)) for file in files]


def device(image):
    return jnp.asarray(np.asarray(image), jnp.float32)


@functools.cache
def compiled(name):
    """An operation on a batch of images, compiled once for all factors."""
    op = getattr(views, name)
    return jax.jit(lambda x, *factor: jax.vmap(lambda i: op(i, *factor))(x))


def worst(images, name, factor, theirs):
    """Largest mean absolute difference over the images, in levels of 255."""
    batch = jnp.stack([device(i) for i in images])
    ours = np.asarray(compiled(name)(batch, *factor))
    other = np.stack([np.asarray(theirs(i), np.float32) for i in images])
    return np.abs(ours - other).mean((1, 2, 3)).max()


def pillow_hue(image, shift):
    """torchvision on Pillow images: shift the byte H of HSV, with wrap-around."""
    h, s, v = image.convert("HSV").split()
    h = (np.asarray(h).astype(int) + shift) % 256
    h = Image.fromarray(h.astype(np.uint8))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    "name, enhance",
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
def test_enhancements_are_pillows(images, name, enhance, factor):
    gap = worst(images, name, [factor], lambda i: enhance(i).enhance(factor))
    assert gap <= 1.0


@pytest.mark.parametrize("shift", [-100, -25, 0, 10, 25, 128])
def test_hue_is_pillows(images, shift):
    gap = worst(images, "hue", [shift / 256], lambda i: pillow_hue(i, shift))
    assert gap <= 2.0


def test_hue_turns():
    primary = jnp.eye(3).reshape(1, 3, 3) * 200.0
    third = views.hue(primary, 1 / 3)
    np.testing.assert_allclose(third, jnp.roll(primary, 1, axis=-1), atol=1e-3)
    np.testing.assert_allclose(views.hue(primary, -2.0), primary, atol=1e-3)


def test_grey_is_pillows(images):
    gap = worst(images, "grayscale", [], lambda i: i.convert("L").convert("RGB"))
    assert gap <= 1.0


@pytest.mark.parametrize("threshold", [64, 128])
def test_solarize_is_pillows(images, threshold):
    gap = worst(
        images, "solarize", [threshold], lambda i: ImageOps.solarize(i, threshold)
    )
    assert gap == 0.0


def test_flip_is_pillows(images):
    assert worst(images, "flip", [], ImageOps.mirror) == 0.0


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_pillows(images, sigma):
    pillow = ImageFilter.GaussianBlur(sigma)
    assert worst(images, "blur", [sigma], lambda i: i.filter(pillow)) <= 2.0


def test_blur_extends_the_edge():
    """Pillow's edge, not only its mean. A mirrored edge would be 6 levels off."""
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (24, 1))] * 3, axis=-1))
    theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(2.0)), np.float32)
    ours = np.asarray(compiled("blur")(device(image)[None], 2.0)[0])
    assert np.abs(ours - theirs)[:, [0, 1, -2, -1]].max() <= 3.0


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.3, 2.0])
def test_blur_matrix_has_the_asked_width(sigma):
    matrix = np.asarray(jax.jit(views.blur_matrix, static_argnums=0)(41, sigma))
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)
    offset = np.arange(41) - 20
    variance = (matrix[20] * offset**2).sum()
    assert abs(math.sqrt(variance) - sigma) <= 0.1


def test_normalise_inverts():
    image = jnp.arange(4 * 5 * 3, dtype=jnp.float32).reshape(4, 5, 3) * 4
    unit = views.normalise(image, MEAN, STD)
    expected = (np.asarray(image)[1, 2] / 255 - MEAN) / STD
    np.testing.assert_allclose(unit[1, 2], expected, rtol=1e-5)
    np.testing.assert_allclose(views.denormalise(unit, MEAN, STD), image, atol=1e-4)
    with pytest.raises(ValueError, match="mean has 1 values, expected 3"):
        views.normalise(image, (0.5,), STD)


def test_jitter_is_its_operations_in_any_order(images):
    """All 24 orders against the four operations called one after the other."""
    factors = jnp.asarray([1.35, 0.65, 1.2, -0.1])
    names = ("brightness", "contrast", "saturation", "hue")
    batch = device(images[0])[None]
    orders = list(itertools.permutations(range(4)))
    jitter = jax.jit(jax.vmap(views.color_jitter, in_axes=(None, None, 0)))
    results = np.asarray(jitter(batch[0], factors, jnp.asarray(orders)))
    for order, got in zip(orders, results, strict=True):
        expected = batch
        for op in order:
            expected = compiled(names[op])(expected, factors[op])
        assert np.abs(got - np.asarray(expected[0])).max() <= 1e-2, order
    # The orders are told apart, so a jitter that ignored them would fail above.
    gaps = [np.abs(a - b).mean() for a, b in itertools.combinations(results, 2)]
    assert np.mean(np.asarray(gaps) > 0.05) > 0.9


@jax.jit
def draw(keys, recipe):
    return jax.vmap(lambda key: views.moco_draws(key, **recipe))(keys)


@functools.cache
def draws(recipe):
    keys = jax.random.split(jax.random.key(7), DRAWS)
    return jax.tree.map(np.asarray, draw(keys, RECIPES[recipe]))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["jitter", "grey", "blur", "solarize", "flip"])
def test_probabilities(recipe, name):
    p = RECIPES[recipe][f"{name}_p"]
    sigma = math.sqrt(p * (1 - p) / DRAWS)
    assert abs(draws(recipe)[name].mean() - p) <= 3 * sigma


def uniform_within(values, low, high):
    """Inside the range, and the first two moments of a uniform within 3 sigma."""
    width = high - low
    assert values.min() >= low and values.max() <= high
    assert values.min() <= low + 0.01 * width and values.max() >= high - 0.01 * width
    unit = (values - low) / width
    assert abs(unit.mean() - 1 / 2) <= 3 * math.sqrt(1 / 12 / len(unit))
    assert abs((unit**2).mean() - 1 / 3) <= 3 * math.sqrt(4 / 45 / len(unit))


def test_ranges():
    drawn = draws("view 1")
    bounds = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    for values, (low, high) in zip(drawn["factors"].T, bounds, strict=True):
        uniform_within(values.astype(np.float64), low - 1e-7, high + 1e-7)
    uniform_within(drawn["sigma"].astype(np.float64), 0.1, 2.0)


def test_brightness_never_turns_negative():
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = draw(keys, RECIPES["view 1"] | {"brightness": 1.8})
    assert 0.0 <= drawn["factors"][:, views.BRIGHTNESS].min() < 0.01


def test_every_order_is_as_likely():
    order = draws("view 1")["order"]
    codes = order @ np.array([64, 16, 4, 1])
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 24
    expected = DRAWS / 24
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - 23) <= 3 * math.sqrt(2 * 23)


def test_draws_are_independent():
    """No two draws of a view are correlated, nor are those of neighbouring keys."""
    drawn = draws("view 2")
    columns = [drawn[n] for n in ("jitter", "grey", "blur", "solarize", "flip")]
    table = np.stack([*columns, *drawn["factors"].T, drawn["sigma"]]).astype(float)
    table = np.concatenate([table[:, :-1], table[:, 1:]])
    correlation = np.corrcoef(table) - np.eye(len(table))
    # 190 pairs: the largest of so many is below 4.5 sigma.
    assert np.abs(correlation).max() <= 4.5 / math.sqrt(DRAWS)


def test_view_is_its_operations_in_the_papers_order(images):
    """Jitter, grey, blur, solarize, flip, normalise, one after the other."""
    apply = jax.jit(
        functools.partial(
            views.moco_apply, solarize_threshold=128.0, mean=MEAN, std=STD
        )
    )
    image = jnp.asarray(np.asarray(images[1]))
    drawn = {
        "factors": jnp.asarray([0.8, 1.3, 1.1, 0.07]),
        "order": jnp.asarray([2, 3, 0, 1]),
        "sigma": jnp.asarray(1.2),
    }
    jitter = jax.jit(views.color_jitter)
    jittered = jitter(device(images[1]), drawn["factors"], drawn["order"])[None]
    names = ("jitter", "grey", "blur", "solarize", "flip")
    for happens in itertools.product([False, True], repeat=5):
        on = dict(zip(names, happens, strict=True))
        x = jittered if on["jitter"] else device(images[1])[None]
        x = compiled("grayscale")(x) if on["grey"] else x
        x = compiled("blur")(x, drawn["sigma"]) if on["blur"] else x
        x = compiled("solarize")(x, 128.0) if on["solarize"] else x
        x = compiled("flip")(x) if on["flip"] else x
        expected = (np.asarray(x[0]) / 255 - MEAN) / STD
        gap = np.abs(np.asarray(apply(image, drawn | on)) - expected)
        # Solarizing jumps at the threshold: rounding may put a pixel on either side.
        assert np.mean(gap > 1e-3) <= 1e-3, on


def test_view_of_a_batch_is_that_of_each_image():
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.integers(0, 256, (4, 16, 20, 3), dtype=np.uint8))
    keys = jax.random.split(jax.random.key(3), 4)
    view = functools.partial(
        views.moco_view,
        **RECIPES["view 2"],
        solarize_threshold=128.0,
        mean=MEAN,
        std=STD,
    )
    together = jax.jit(jax.vmap(view))(keys, batch)
    assert together.shape == (4, 16, 20, 3) and together.dtype == jnp.float32
    alone = jax.jit(view)
    for i in (0, 3):
        np.testing.assert_allclose(together[i], alone(keys[i], batch[i]), atol=1e-4)


def test_simmim_view_only_mirrors(images):
    image = jnp.asarray(np.asarray(images[0]))
    plain = views.normalise(image.astype(jnp.float32), MEAN, STD)
    view = jax.vmap(
        functools.partial(views.simmim_view, flip_p=0.5, mean=MEAN, std=STD),
        in_axes=(0, None),
    )
    out = np.asarray(jax.jit(view)(jax.random.split(jax.random.key(1), 200), image))
    same = np.array([np.allclose(x, plain, atol=1e-5) for x in out])
    mirrored = np.array([np.allclose(x[:, ::-1], plain, atol=1e-5) for x in out])
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) <= 3 * math.sqrt(0.25 / 200)
