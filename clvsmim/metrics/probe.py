"""Ridge probe: what a linear classifier reads off each block (Fig. 10), in closed form.

One vector per image and block, the mean over patch tokens or CLS, is regressed on
one-hot classes. Nothing is trained in steps: sums over the training images are enough,
they are exact, and they merge over batches and processes.

Features are standardised with the mean and standard deviation of the training images;
the intercept is not penalised. A fixed tenth of the training images chooses the penalty
by squared error, since accuracy cannot be had from sums; the probe is then fitted to
all training images with the chosen alpha / n. The test images are classified once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim import plugin
from clvsmim.metrics import (
    Features,
    Metric,
    Series,
    State,
    add,
    block_axis,
    image_features,
    join,
    keep,
)

__all__ = ["RidgeProbe", "ridge_predict", "ridge_probe"]

POOLS = ("patches", "cls")
ALPHAS = 10.0 ** np.arange(-4, 5)  # each times the number of images
# A feature that varies less than this, relative to its mean, is a constant that float32
# has rounded; standardised, it would be noise as large as any other feature.
FLAT = 1e-6


class RidgeProbe(NamedTuple):
    """Scores of features (n, D) are (features - mean) @ weights + intercept.

    `mean` (D,) of the features, `weights` (D, K), `intercept` (K,). The mean is kept
    apart because residual streams have channels whose mean is far above their spread.
    """

    mean: jax.Array
    weights: jax.Array
    intercept: jax.Array


def ridge_probe(
    features: jax.Array, targets: jax.Array, alpha: jax.Array | float
) -> RidgeProbe:
    """Least squares with penalty alpha |weights|^2, on standardised features.

    Args:
      features: (n, D), one vector per image; those that do not vary are ignored.
      targets: (n, K), such as one-hot classes.
      alpha: > 0, on the scale of the sum over images. In float32, alpha / n should be
        1e-3 or more if there are many features.

    Returns:
      float32 weights for the features as they are given, not standardised.
    """
    x, y = features.astype(jnp.float32), targets.astype(jnp.float32)
    mean, intercept = x.mean(axis=0), y.mean(axis=0)
    x = x - mean[None]
    std = jnp.sqrt(jnp.square(x).mean(axis=0))
    flat = std <= FLAT * jnp.abs(mean)
    scale = jnp.where(flat, 0.0, 1 / jnp.where(flat, 1.0, std))  # (D,)
    x = x * scale[None]
    exact = jax.lax.Precision.HIGHEST
    xx = jnp.matmul(x.T, x, precision=exact)  # (D, D)
    xy = jnp.matmul(x.T, y - intercept[None], precision=exact)  # (D, K)
    penalty = alpha * jnp.eye(len(xx), dtype=jnp.float32)
    weights = jax.scipy.linalg.solve(xx + penalty, xy, assume_a="pos")
    return RidgeProbe(mean, weights * scale[:, None], intercept)


def ridge_predict(probe: RidgeProbe, features: jax.Array) -> jax.Array:
    """The class of the highest score: features (n, D) -> (n,) int32."""
    x = features.astype(jnp.float32) - probe.mean[None]
    scores = jnp.matmul(x, probe.weights, precision=jax.lax.Precision.HIGHEST)
    return (scores + probe.intercept[None]).argmax(axis=1).astype(jnp.int32)


def validation_images(index: np.ndarray) -> np.ndarray:
    """Which training images choose the penalty: (n,) numbers -> (n,) bool, a tenth.

    The numbers are hashed (splitmix64): every tenth image could be all of one class.
    """
    x = np.asarray(index).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) % np.uint64(10) == 0


def make(*, prefix: int, classes: int, pool: str = "patches") -> Metric:
    """Accuracy of a ridge probe after each block, and the penalty chosen."""
    if pool not in POOLS:
        raise ValueError(plugin.unknown("pool", pool, POOLS))
    if pool == "cls" and prefix < 1:
        raise ValueError("pool 'cls' needs a CLS token, but there is no prefix token")

    def update(features: Features, weights: jax.Array) -> dict[str, Any]:
        return {
            "weight": weights,
            "index": features["index"],
            "label": features["label"],
            "features": image_features(
                features["residual"], prefix=prefix, pool=pool
            ),  # (B, L+1, D)
        }

    def fit_state(rows: dict[str, Any]) -> State:
        kept = keep(rows)
        check_labels(kept["label"], classes)
        held = validation_images(kept["index"])
        sums = {
            part: _sums(kept["features"][at], kept["label"][at], classes)
            for part, at in (("fit", ~held), ("validation", held))
        }
        return {**sums, "nonfinite": kept["nonfinite"]}

    def fit_merge(a: State, b: State) -> State:
        sums = {k: _merge(a[k], b[k]) for k in ("fit", "validation")}
        return {**sums, "nonfinite": a["nonfinite"] + b["nonfinite"]}

    def compute(train: State, test: State) -> list[Series]:
        check_labels(test["label"], classes)
        fit, held = train["fit"], train["validation"]
        both = _merge(fit, held)
        axis = block_axis(len(both["mean"]))
        n, trained = len(test["label"]), int(both["count"])
        alphas, right = np.full((2, len(axis.values)), np.nan)
        for block in range(len(alphas) if trained else 0):
            alphas[block] = _choose(_block(fit, block), _block(held, block))
            probe = _ridge(_block(both, block), alphas[block])
            x = test["features"][:, block].astype(np.float64) - probe.mean
            found = (x @ probe.weights + probe.intercept).argmax(axis=1)
            right[block] = (found == test["label"]).mean() if n else np.nan
        about = {"axes": (axis,), "kind": "depth", "source": "Fig. 10"}
        notes = _training_notes(train, both, classes)
        return [
            Series(
                name="ridge probe accuracy",
                values=100 * right,
                stderr=percent_error(right, n),
                unit="%",
                count=n,
                notes=(*notes, *image_notes(n, test["nonfinite"])),
                **about,
            ),
            Series(
                name="ridge probe alpha",
                values=alphas,
                stderr=None,
                unit="per image",
                count=trained,
                notes=notes,
                **about,
            ),
        ]

    return Metric(
        needs=("residual", "label", "index"),
        update=update,
        compute=compute,
        to_state=keep,
        merge=join,
        fit_state=fit_state,
        fit_merge=fit_merge,
        parts=("train", "test"),
    )


def check_labels(labels: np.ndarray, classes: int) -> None:
    """Raise ValueError unless all labels are in 0 ... classes - 1."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise ValueError(
            f"got an image of class {wrong[0]}, expected 0 to {classes - 1}; give the "
            "number of classes of the data"
        )


def percent_error(right: np.ndarray, n: int) -> np.ndarray | None:
    """Binomial standard error in percent of the fractions `right` of n images."""
    return 100 * np.sqrt(right * (1 - right) / n) if n > 1 else None


def image_notes(n: int, lost: float, kind: str = "images") -> tuple[str, ...]:
    """What a reader must know of n images measured and `lost` left out."""
    notes = ()
    if lost:
        notes += (f"{lost:.0f} of {n + lost:.0f} {kind} left out: not finite",)
    if not n:
        notes += (f"no {kind.removesuffix('s')} to average",)
    return notes


def _training_notes(train: State, both: State, classes: int) -> tuple[str, ...]:
    n, lost = int(both["count"]), train["nonfinite"]
    notes = (f"{n} training images; chance is {100 / classes:.3g}%",)
    notes += image_notes(n, lost, "training images")
    missing = int((both["target"] == 0).sum())
    if n and missing:
        notes += (f"{missing} of {classes} classes have no training image",)
    if n and not min(train[k]["count"] for k in ("fit", "validation")):
        notes += ("too few training images to choose alpha: 1 per image taken",)
    return notes


def _sums(x: np.ndarray, labels: np.ndarray, classes: int) -> State:
    """Means and centred products of features (n, L+1, D) and one-hot labels (n,)."""
    x, n = np.moveaxis(x, 1, 0).astype(np.float64), max(len(labels), 1)
    mean = x.sum(axis=1) / n
    x = x - mean[:, None]
    found, which = np.unique(labels, return_inverse=True)
    yx = np.zeros((len(x), classes, x.shape[2]))
    yx[:, found] = np.eye(len(found))[:, which] @ x
    return {
        "count": np.float64(len(labels)),
        "mean": mean,  # (L+1, D)
        "target": np.bincount(labels, minlength=classes) / n,  # (K,)
        "xx": x.swapaxes(1, 2) @ x,  # (L+1, D, D)
        "yx": yx,  # (L+1, K, D)
    }


def _merge(a: State, b: State) -> State:
    """`_sums` of both sets of images (Chan et al. 1983): exact, also far from 0."""
    total = add(a, b)
    share = b["count"] / max(total["count"], 1)
    between = a["count"] * share
    x, y = b["mean"] - a["mean"], b["target"] - a["target"]
    for block, step in enumerate(x):  # (D,); in place, these are large
        total["xx"][block] += between * np.outer(step, step)
        total["yx"][block] += between * np.outer(y, step)
    return {**total, "mean": a["mean"] + share * x, "target": a["target"] + share * y}


def _block(sums: State, block: int) -> State:
    """Of one block, per image: mean (D,), target (K,), xx (D, D), xy (D, K)."""
    n = max(sums["count"], 1)
    return {
        "count": sums["count"],
        "mean": sums["mean"][block],
        "target": sums["target"],
        "xx": sums["xx"][block] / n,
        "xy": sums["yx"][block].T / n,
    }


def _standardise(block: State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One over the standard deviation (D, 1), or 0; xx and xy of features so scaled."""
    std = np.sqrt(block["xx"].diagonal())
    flat = std <= FLAT * np.abs(block["mean"])
    scale = np.where(flat, 0, 1 / np.where(flat, 1, std))[:, None]  # (D, 1)
    return scale, scale * block["xx"] * scale.T, scale * block["xy"]


def _ridge(block: State, alpha: float) -> RidgeProbe:
    """`ridge_probe` from sums, in float64, with `alpha` per image."""
    scale, xx, xy = _standardise(block)
    weights = scale * np.linalg.solve(xx + alpha * np.eye(len(xx)), xy)
    return RidgeProbe(block["mean"], weights, block["target"])


def _choose(fit: State, held: State) -> float:
    """The alpha per image whose probe of `fit` has the least squared error on `held`.

    In the basis of eigenvectors of xx, the weights for any alpha are d * b with
    d = 1 / (eigenvalue + alpha) and b the same for all; so one decomposition serves.
    The error is mean |y|^2 - 2 mean y'Wx + mean |Wx|^2; the first term is the same for
    all.
    """
    if not min(fit["count"], held["count"]):
        return 1.0
    scale, xx, xy = _standardise(fit)
    values, vectors = np.linalg.eigh(xx)
    b = vectors.T @ xy  # (D, K)
    x = scale * (held["mean"] - fit["mean"])[:, None]  # (D, 1)
    y = held["target"] - fit["target"]  # (K,)
    held_xx = scale * held["xx"] * scale.T + x @ x.T  # about the mean of `fit`
    held_xy = scale * held["xy"] + x * y
    d = 1 / (values + ALPHAS[:, None])  # (alphas, D)
    product = (b * (vectors.T @ held_xy)).sum(axis=1)  # (D,)
    square = (b @ b.T) * (vectors.T @ held_xx @ vectors)  # (D, D)
    return ALPHAS[np.argmin(((d @ square) * d).sum(axis=1) - 2 * d @ product)]
