"""The numbers of the recipes are those of the papers and of their code."""

import re

import numpy as np
import pytest
from recipes import CONFIGS, get, leaves, shallow

from clvsmim import build, meta, optim, tree

# From the papers and their code, not from the recipes. A key is a path in the config.
MOCO_V3 = {
    "batch": 4096,
    "epochs": 300,
    "encoder.patch": 16,
    "encoder.position": "moco_sincos",
    "encoder.relative": "none",
    "encoder.drop_path": 0,
    "encoder.init": "moco_v3",
    "objective.crop.area": (0.08, 1),
    "objective.crop.filter": "bilinear",
    "objective.view_1.blur_p": 1,
    "objective.view_2.blur_p": 0.1,
    "objective.view_1.solarize_p": 0,
    "objective.view_2.solarize_p": 0.2,
    "objective.view_1.blur_sigma": (0.1, 2),
    "objective.view_2.saturation": 0.2,
    "objective.view_2.jitter_p": 0.8,
    "objective.projector": (4096, 4096, 256),
    "objective.predictor": (4096, 256),
    "objective.tau": 0.2,
    "objective.momentum": 0.99,
    "optim.name": "adamw",
    "optim.b1": 0.9,
    "optim.b2": 0.999,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.1,
    "optim.clip": None,
    "optim.no_decay": None,
    "optim.frozen": ("encoder/patch_embed/.*", "encoder/pos_embed"),
    "optim.schedule.name": "cosine",
    "optim.schedule.base": 2.4e-3,
    "optim.schedule.minimum": 0,
    "optim.schedule.warmup_epochs": 40,
}
SIMMIM = {
    "batch": 2048,
    "epochs": 800,
    "encoder.patch": 16,
    "encoder.position": "none",
    "encoder.relative": "shared",
    "encoder.layer_scale": 0.1,
    "encoder.qkv_bias": "qv",
    "encoder.drop_path": 0.1,
    "encoder.final_norm": True,
    "encoder.init": "simmim",
    "objective.crop.area": (0.67, 1),
    "objective.crop.filter": "bilinear",
    "objective.mask_unit": 32,
    "objective.mask_ratio": 0.6,
    "optim.name": "adamw",
    "optim.b1": 0.9,
    "optim.b2": 0.999,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.05,
    "optim.clip": 5,
    "optim.frozen": None,
    "optim.schedule.name": "milestones",
    "optim.schedule.base": 4e-4,
    "optim.schedule.start": 2e-6,
    "optim.schedule.warmup_epochs": 10,
    "optim.schedule.milestones": (0.875,),
    "optim.schedule.factor": 0.1,
    "optim.schedule.lag": 1,
}
MAE = {
    "batch": 4096,
    "epochs": 800,
    "encoder.patch": 16,
    "encoder.position": "mae_sincos",
    "encoder.relative": "none",
    "encoder.drop_path": 0,
    "encoder.init": "mae",
    "objective.crop.area": (0.2, 1),
    "objective.crop.filter": "bicubic",
    "objective.mask_ratio": 0.75,
    "objective.norm_pix": True,
    "objective.decoder.width": 512,
    "objective.decoder.depth": 8,
    "objective.decoder.heads": 16,
    "optim.name": "adamw",
    "optim.b1": 0.9,
    "optim.b2": 0.95,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.05,
    "optim.clip": None,
    "optim.frozen": ("encoder/pos_embed",),
    "optim.schedule.name": "cosine",
    "optim.schedule.base": 2.4e-3,
    "optim.schedule.minimum": 0,
    "optim.schedule.warmup_epochs": 40,
}
TABLE_A1 = {  # Park et al. 2023: how they pre-train themselves
    "batch": 1024,
    "epochs": 100,
    "encoder.drop_path": 0.1,
    "optim.name": "adamw",
    "optim.b1": 0.9,
    "optim.b2": 0.999,
    "optim.weight_decay": 0.05,
    "optim.clip": 5,
    "optim.schedule.name": "milestones",
    "optim.schedule.base": 2e-4,
    "optim.schedule.start": 1e-6,
    "optim.schedule.warmup_epochs": 10,
    "optim.schedule.milestones": (0.875,),
    "optim.schedule.factor": 0.1,
}
GONE = {"optim.schedule.minimum", "optim.no_decay"}  # with MoCo v3's own optimizer
CL_100 = {k: v for k, v in (MOCO_V3 | TABLE_A1).items() if k not in GONE}
BRANCHES = {
    f"objective.{branch}.{key.removeprefix('objective.')}": value
    for branch, method in (("mim", SIMMIM), ("cl", MOCO_V3))
    for key, value in method.items()
    if key.startswith("objective.")
}
OF_SIMMIM = {k: v for k, v in SIMMIM.items() if not k.startswith("objective.")}
HYBRID = OF_SIMMIM | TABLE_A1 | BRANCHES | {"objective.lam": 0.2}
# With labels (DeiT, SimMIM's and MAE's fine-tuning have timm's pictures in common).
PROBE = {
    "data.repeats": None,
    "encoder.drop_path": 0,
    "encoder.final_norm": True,
    "objective.name": "classify",
    "objective.classes": 1000,
    "objective.tune": "head",
    "objective.head_std": 0.01,
    "objective.crop.area": (0.08, 1),
    "objective.crop.aspect": (3 / 4, 4 / 3),
    "objective.crop.filter": "bilinear",
    "objective.crop.once": None,
    "objective.eval_crop.resize": 256,
    "objective.eval_crop.filter": "bilinear",
    "objective.flip_p": 0.5,
    "objective.rand_augment": None,
    "objective.erasing": None,
    "objective.mix": None,
    "objective.smoothing": 0,
    "objective.average": 0,
    "optim.name": "sgd",
    "optim.momentum": 0.9,
    "optim.weight_decay": 0,
    "optim.clip": None,
    "optim.layer_decay": None,
    "optim.schedule.name": "cosine",
    "optim.schedule.minimum": 0,
    "optim.schedule.warmup_epochs": 0,
}
TIMM = {
    "batch": 1024,
    "data.repeats": None,
    "encoder.patch": 16,
    "encoder.drop_path": 0.1,
    "objective.name": "classify",
    "objective.classes": 1000,
    "objective.tune": "all",
    "objective.blocks": "last",
    "objective.rates": (1,),
    "objective.crop.area": (0.08, 1),
    "objective.crop.aspect": (3 / 4, 4 / 3),
    "objective.crop.filter": "bicubic",
    "objective.crop.once": None,
    "objective.eval_crop.resize": 256,
    "objective.eval_crop.filter": "bicubic",
    "objective.flip_p": 0.5,
    "objective.rand_augment.ops": 2,
    "objective.rand_augment.p": 0.5,
    "objective.rand_augment.magnitude": 9,
    "objective.rand_augment.spread": 0.5,
    "objective.erasing.p": 0.25,
    "objective.erasing.area": (0.02, 1 / 3),
    "objective.erasing.aspect": (0.3, 1 / 0.3),
    "objective.mix.mixup": 0.8,
    "objective.mix.cutmix": 1,
    "objective.mix.switch_p": 0.5,
    "objective.smoothing": 0.1,
    "objective.average": 0,
    "optim.name": "adamw",
    "optim.b1": 0.9,
    "optim.b2": 0.999,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.05,
    "optim.clip": None,
    "optim.layer_decay": None,
    "optim.frozen": None,
}
OF_MOCO_V3 = {  # the encoders
    "encoder.patch": 16,
    "encoder.position": "moco_sincos",
    "encoder.relative": "none",
    "encoder.layer_scale": 0,
    "encoder.qkv_bias": "qkv",
    "encoder.init": "moco_v3",
}
OF_MAE = OF_MOCO_V3 | {"encoder.position": "mae_sincos", "encoder.init": "mae"}
OF_MIM = {
    "encoder.patch": 16,
    "encoder.position": "none",
    "encoder.relative": "shared",
    "encoder.layer_scale": 0.1,
    "encoder.qkv_bias": "qv",
    "encoder.init": "simmim",
}
CLS = {  # after the final norm
    "encoder.final_norm": True,
    "objective.blocks": "last",
    "objective.pool": "cls",
}
PATCHES = {  # their mean, behind a new norm instead of the final one
    "encoder.final_norm": False,
    "objective.pool": "patches",
    "objective.norm": "layer",
    "objective.head_std": 2e-5,
}
PER_EPOCH = {
    "objective.norm": "none",
    "objective.head_std": 0.02,
    "optim.schedule.name": "timm_cosine",
    "optim.schedule.base": 1e-3,
    "optim.schedule.start": 1e-6,
    "optim.schedule.minimum": 1e-5,
    "optim.schedule.warmup_epochs": 5,
    "optim.schedule.lag": 1,
    "optim.schedule.per": "epoch",
}
DEIT = (
    TIMM
    | OF_MOCO_V3
    | CLS
    | PER_EPOCH
    | {"epochs": 300, "data.repeats": 3, "objective.average": 0.99996}
    | {"encoder.position": "learned", "encoder.init": "timm"}
)
FINETUNE = {
    "simmim": TIMM
    | OF_MIM
    | PATCHES
    | {
        "batch": 2048,
        "epochs": 100,
        "encoder.relative": "per_block",
        "optim.clip": 5,
        "optim.layer_decay": 0.65,
        "optim.schedule.name": "timm_cosine",
        "optim.schedule.base": 5e-3,
        "optim.schedule.start": 1e-6,
        "optim.schedule.minimum": 1e-6,
        "optim.schedule.warmup_epochs": 20,
        "optim.schedule.lag": 1,
        "optim.schedule.per": "step",
    },
    "mae": TIMM
    | OF_MAE
    | PATCHES
    | {
        "epochs": 100,
        "optim.layer_decay": 0.65,
        "optim.schedule.name": "cosine",
        "optim.schedule.base": 2e-3,
        "optim.schedule.minimum": 1e-6,
        "optim.schedule.warmup_epochs": 5,
        "optim.schedule.per": None,
    },
    "deit": TIMM | OF_MOCO_V3 | CLS | PER_EPOCH | {"epochs": 150},
}
FINETUNE_L = FINETUNE["mae"] | {
    "epochs": 50,
    "encoder.drop_path": 0.2,
    "optim.layer_decay": 0.75,
    "optim.schedule.base": 4e-3,
}
TABLE_A1_PROBE = (
    PROBE
    | OF_MIM
    | {
        "batch": 1024,
        "epochs": 50,
        "objective.pool": "patches",
        "objective.norm": "batch",
        "objective.rates": (0.1, 0.3, 1, 3, 10),
        "optim.schedule.base": 2,
        "optim.schedule.per": "step",
    }
)
LINEAR_PROBE = {
    "paper": TABLE_A1_PROBE | {"encoder.dtype": "float32", "objective.blocks": "all"},
    "simmim": TABLE_A1_PROBE | {"objective.blocks": 8},
    "moco_v3": PROBE
    | OF_MOCO_V3
    | CLS
    | {
        "batch": 1024,
        "epochs": 90,
        "objective.norm": "none",
        "objective.rates": (1,),
        "optim.schedule.base": 12,
        "optim.schedule.per": "epoch",
    },
    "mae": PROBE
    | OF_MAE
    | CLS
    | {
        "batch": 16384,
        "epochs": 90,
        "objective.norm": "batch",
        "objective.rates": (1,),
        "objective.crop.filter": "bicubic",
        "objective.crop.once": True,
        "objective.eval_crop.filter": "bicubic",
        "optim.name": "lars",
        "optim.trust_coefficient": 1e-3,
        "optim.no_trust": (".*/bias",),
        "optim.schedule.base": 6.4,
        "optim.schedule.warmup_epochs": 10,
        "optim.schedule.per": None,
    },
}


def sized(width, depth, heads):
    return {"encoder.width": width, "encoder.depth": depth, "encoder.heads": heads}


SIZES = {
    "Ti": sized(192, 12, 3),
    "S": sized(384, 12, 12),  # MoCo v3's; DeiT's has 6 heads
    "B": sized(768, 12, 12),
    "L": sized(1024, 24, 16),
    "H": sized(1280, 32, 16),
}
IMAGENET = {
    "encoder.image": (224, 224),
    "encoder.dtype": "bfloat16",
    "input.mean": (0.485, 0.456, 0.406),
    "input.std": (0.229, 0.224, 0.225),
    "data.source.dataset": "imagenet2012",
    "data.source.train": "train",
    "data.source.test": "validation",
    "data.source.lengths": (1281167, 50000),
}
PUBLISHED = [
    *(("moco_v3", size, MOCO_V3) for size in ("Ti", "S", "B", "L")),
    *(("moco_v3", f"{size},100ep", CL_100) for size in ("Ti", "S", "B", "L")),
    *(("simmim", size, SIMMIM) for size in ("Ti", "S", "B", "L")),
    *(("simmim", f"{size},100ep", SIMMIM | TABLE_A1) for size in ("Ti", "S", "B", "L")),
    ("mae", "B", MAE),
    ("mae", "L", MAE),
    ("mae", "H", MAE | {"encoder.patch": 14}),
    ("mae", "B,1600ep", MAE | {"epochs": 1600}),
    ("mae", "L,1600ep", MAE | {"epochs": 1600}),
    ("mae", "H,1600ep", MAE | {"epochs": 1600, "encoder.patch": 14}),
    ("hybrid", "B", HYBRID),
    ("deit", "Ti", DEIT),
    ("deit", "S", DEIT | {"encoder.heads": 6}),
    ("deit", "B", DEIT),
    *(("finetune", protocol, table) for protocol, table in FINETUNE.items()),
    *(("linear_probe", protocol, table) for protocol, table in LINEAR_PROBE.items()),
]


def value(plain, path):
    for key in path.split("."):
        plain = plain.get(key) if plain is not None else None
    return plain


def assert_equal(got, want, what):
    """Equal but for the rounding of what is computed; None is equal to None alone."""
    if isinstance(want, (float, tuple)) and got is not None:
        want = pytest.approx(want, rel=1e-12) if numeric(want) else want
    assert got == want, what


def numeric(x):
    return isinstance(x, float) or all(isinstance(each, (int, float)) for each in x)


def assert_holds(config, table):
    plain = build.plain(config)
    for path, want in table.items():
        assert_equal(value(plain, path), want, path)


@pytest.mark.parametrize("name, variant, table", PUBLISHED)
def test_the_numbers_are_the_published_ones(name, variant, table):
    size = SIZES.get(variant.partition(",")[0], SIZES["B"])
    assert_holds(get(name, variant), IMAGENET | size | table)


def test_every_published_recipe_is_compared():
    compared = {(name, variant) for name, variant, _ in PUBLISHED}
    own = {("hybrid", "B,mae")}  # ours: nobody has published it
    names = ("moco_v3", "simmim", "mae", "hybrid", "deit", "finetune", "linear_probe")
    assert compared | own == {c for c in CONFIGS if c[0] in names}


@pytest.mark.parametrize(
    "size, patch, table",
    [
        ("Ti", 16, FINETUNE["mae"]),  # none published: as the smallest that is
        ("L", 16, FINETUNE_L),
        ("H", 14, FINETUNE_L | {"encoder.patch": 14, "encoder.drop_path": 0.3}),
    ],
)
def test_mae_is_fine_tuned_by_the_size_of_its_run(tmp_path, size, patch, table):
    config = get("mae", "H" if size == "H" else "B")
    width, depth, heads = SIZES[size].values()
    config.encoder.update(width=width, depth=depth, heads=heads)
    meta.write_meta(str(tmp_path), {"config": build.plain(config)})
    found = get("finetune", f"mae,{tmp_path}")
    assert_holds(found, IMAGENET | SIZES[size] | table)


@pytest.mark.parametrize(
    "protocol, side, resize",
    [("simmim", 448, 512), ("deit", 448, 512), ("mae", 448, 448), ("mae", 192, 219)],
)
def test_other_sizes_are_evaluated_as_published(tmp_path, protocol, side, resize):
    """On 7/8 of the image, but by MAE on the whole of it where it is above 224."""
    config = get("mae", "B")
    config.encoder.image = (side, side)
    meta.write_meta(str(tmp_path), {"config": build.plain(config)})
    found = get("finetune", f"{protocol},{tmp_path}")
    assert found.objective.eval_crop.resize == resize


@pytest.mark.parametrize(
    "name, variant, vectors, others",
    [
        ("simmim", "B", True, ("encoder/cls_token",)),
        ("moco_v3", "B,100ep", True, ("encoder/cls_token",)),
        ("moco_v3", "B", False, ()),
        ("mae", "B", True, ()),
        ("hybrid", "B", True, ("encoder/cls_token",)),
    ],
)
def test_what_is_not_decayed(name, variant, vectors, others):
    made = build.build(shallow(name, variant))
    rules = get(name, variant).optim.to_dict()
    rules = {k: rules[k] for k in ("no_decay", "frozen") if k in rules}
    spared = {
        leaf
        for leaf, group in tree.named(optim.groups(made.state.params, **rules)).items()
        if not group.decay
    }
    one_dimensional = {
        leaf
        for leaf in tree.named(made.state.params)
        if re.search(r"/(bias|scale|gamma_[12])$", leaf)
    }
    assert spared == (one_dimensional if vectors else set()) | set(others)


RATES = {  # (steps per epoch, {finished steps: rate}), from the formulas by hand
    "moco_v3:B": (
        312,
        {0: 0, 1: 1.9230769e-7, 20 * 312: 1.2e-3, 40 * 312: 2.4e-3}
        | {105 * 312: 2.0485281e-3, 170 * 312: 1.2e-3, 235 * 312: 3.5147186e-4},
    ),
    "mae:B": (
        312,
        {20 * 312: 1.2e-3, 40 * 312: 2.4e-3, 230 * 312: 2.0485281e-3}
        | {420 * 312: 1.2e-3, 610 * 312: 3.5147186e-4},
    ),
    # The scheduler runs one step late: rate(t + 1) is the formula's at t.
    "simmim:B": (
        625,
        {0: 2e-6, 1: 2e-6, 2: 2.06368e-6, 3126: 2.01e-4, 6251: 4e-4}
        | {437_500: 4e-4, 437_501: 4e-5},
    ),
    "simmim:B,100ep": (
        1251,
        {0: 1e-6, 12_511: 2e-4, 109_463: 2e-4, 109_464: 2e-5},
    ),
    "hybrid:B": (1251, {0: 1e-6, 12_511: 2e-4, 109_463: 2e-4, 109_464: 2e-5}),
    "finetune:mae": (
        1251,
        {1251: 4e-4, 5 * 1251: 2e-3, 50 * 1251: 1.0830381e-3, 99 * 1251: 1.5464693e-6},
    ),
    "finetune:simmim": (
        625,
        {1: 1e-6, 6251: 2.5005e-3, 12_500: 4.9996001e-3, 12_501: 4.5226380e-3}
        | {31_251: 2.5005e-3},
    ),
    # One epoch late too: epoch e has the formula's rate at e - 1.
    "deit:B": (
        1251,
        {0: 1e-6, 1251: 1e-6, 2 * 1251: 2.008e-4, 5 * 1251: 8.002e-4}
        | {6 * 1251: 9.9932162e-4, 151 * 1251: 5.05e-4, 299 * 1251: 1.0108563e-5},
    ),
}


@pytest.mark.parametrize("recipe", RATES)
def test_the_learning_rate_at_a_few_steps(recipe):
    config = get(*recipe.split(":"))
    steps_per_epoch, rates = RATES[recipe]
    assert 1281167 // config.batch == steps_per_epoch
    schedule = build.plain(config)["optim"]["schedule"]
    rate = optim.schedule(
        total_steps=round(config.epochs * steps_per_epoch),
        steps_per_epoch=steps_per_epoch,
        **schedule,
    )
    for step, want in rates.items():
        np.testing.assert_allclose(rate(step), want, rtol=2e-5, err_msg=str(step))


PER_IMAGE = {  # learning rate over batch
    "photos_moco_v3": 1.5e-4 / 256,
    "photos_simmim": 1e-4 / 512,
    "photos_hybrid": 1e-4 / 512,
    "photos_mae": 1.5e-4 / 256,
    "moco_v3:B": 1.5e-4 / 256,
    "moco_v3:S": 1.5e-4 / 256,
    "moco_v3:B,100ep": 1e-4 / 512,
    "simmim:B": 1e-4 / 512,
    "simmim:B,100ep": 1e-4 / 512,
    "mae:B": 1.5e-4 / 256,
    "hybrid:B": 1e-4 / 512,
    "deit:S": 5e-4 / 512,
    "finetune:simmim": 1.25e-3 / 512,
    "finetune:mae": 5e-4 / 256,
    "finetune:deit": 5e-4 / 512,
    "linear_probe:paper": 1.0 / 512,
    "linear_probe:moco_v3": 3.0 / 256,
    "linear_probe:mae": 0.1 / 256,
    "linear_probe:simmim": 1.0 / 512,
    "cifar10:moco_v3": 1.5e-4 / 256,
    "cifar10:simmim": 1e-4 / 512,
    "cifar10:mae": 1.5e-4 / 256,
    "cifar10:hybrid": 1e-4 / 512,
    "cifar10:supervised": 5e-4 / 512,
    "imagenette:mae,S": 1.5e-4 / 256,
}


@pytest.mark.parametrize("recipe", PER_IMAGE)
def test_the_learning_rate_follows_the_batch(recipe):
    config = get(*recipe.split(":"))
    for batch in (256, 1024):
        config.batch = batch
        schedule = config.optim.schedule.to_dict()
        want = PER_IMAGE[recipe] * batch
        assert schedule["base"] == pytest.approx(want, rel=1e-12)
        if schedule["name"] == "milestones":
            want = 5e-7 * batch / 512
            assert schedule["start"] == pytest.approx(want, rel=1e-12)
    assert build.plain(config)["optim"]["schedule"]["base"] == schedule["base"]


OURS = [r for r in PER_IMAGE if re.match("photos|cifar10|imagenette", r)]


@pytest.mark.parametrize("recipe", OURS)
def test_warmup_follows_the_epochs_where_the_length_is_ours(recipe):
    config = get(*recipe.split(":"))
    epochs, warmup = config.epochs, config.optim.schedule.warmup_epochs
    config.epochs = 3 * epochs
    assert config.optim.schedule.warmup_epochs == pytest.approx(3 * warmup, rel=1e-12)
    assert 0 < config.optim.schedule.warmup_epochs < config.epochs / 4


SMALL = {"cifar10": (32, 4), "imagenette": (160, 16)}  # image, patch
LIKE = {  # the ImageNet recipe of each of their methods
    "moco_v3": ("moco_v3", "B"),
    "simmim": ("simmim", "B"),
    "mae": ("mae", "B"),
    "hybrid": ("hybrid", "B"),
    "supervised": ("deit", "B"),
}


def rules(config):
    """What a method is, by path, at one batch, the warmup as a share of the run."""
    config.batch = 1024
    plain = build.plain(config)
    plain["optim"]["schedule"]["warmup_epochs"] /= plain["epochs"]
    whole = {key: plain[key] for key in ("encoder", "input", "objective", "optim")}
    found = {path: value(plain, path) for path in leaves(whole)}
    found["optim.no_decay"] = spared(found.get("optim.no_decay", ()), plain["encoder"])
    return found


def spared(patterns, encoder):
    """What is not decayed of a few parameters: an expression has many spellings."""
    names = ["cls_token", "block_0/attn/q/bias", "block_0/ln1/scale", "ln_final/bias"]
    names += ["block_0/mlp/fc1/kernel", "patch_embed/kernel"]
    names += ["block_0/gamma_2"] if encoder["layer_scale"] else []
    names += ["pos_embed"] if encoder["position"] != "none" else ["rel_table"]
    return {n for n in names for p in patterns if re.fullmatch(p, f"encoder/{n}")}


def changed(name, method, size):
    """The changes that the docstrings of the two recipes name, by path."""
    image, patch = SMALL[name]
    found = {
        "encoder.image": (image, image),
        "encoder.patch": patch,
        "encoder.remat": False,
        **SIZES[size],
    }
    if name == "cifar10":  # its own pixels
        found["input.mean"] = (0.4914, 0.4822, 0.4465)
        found["input.std"] = (0.2470, 0.2435, 0.2616)
    cl = mim = ""
    if method == "hybrid":
        cl, mim = "cl.", "mim."
    if method in ("moco_v3", "hybrid"):
        sigma = (0.1 * image / 224, 2.0 * image / 224)
        found |= {f"objective.{cl}view_{i}.blur_sigma": sigma for i in (1, 2)}
    if method in ("simmim", "hybrid"):
        found[f"objective.{mim}mask_unit"] = {"cifar10": 8, "imagenette": 32}[name]
    if method in ("moco_v3", "hybrid", "supervised") and name == "cifar10":
        found[f"objective.{cl}crop.area"] = (0.2, 1.0)
    if method == "mae":
        width, heads = {"Ti": (96, 3), "S": (192, 6)}[size]
        decoder = {"width": width, "depth": 4, "heads": heads}
        found |= {f"objective.decoder.{key}": x for key, x in decoder.items()}
    if method == "supervised":
        resize = {"cifar10": 32, "imagenette": 183}[name]
        found |= {"objective.classes": 10, "objective.eval_crop.resize": resize}
        found["objective.average"] = 0.0  # a copy that is not the published number
    return found


@pytest.mark.parametrize("size", ["Ti", "S"])
@pytest.mark.parametrize("method", LIKE)
@pytest.mark.parametrize("name", SMALL)
def test_small_data_have_the_rules_of_imagenet_but_for_what_is_named(
    name, method, size
):
    want = rules(get(*LIKE[method])) | changed(name, method, size)
    got = rules(get(name, method if size == "Ti" else f"{method},S"))
    assert set(got) == set(want)
    for path, x in want.items():
        assert_equal(got[path], x, path)
