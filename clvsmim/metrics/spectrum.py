"""Token-level singular values: how much room the tokens of one image take (Fig. 7).

The N patch tokens of one image at one tap are N observations of C channels. Measured
are the logarithms of the singular values of their covariance, which are its eigenvalues
and the squares of the singular values of the centred tokens over N - 1; averaged over
images after the logarithm.

They come from the smaller Gram matrix, which squares the condition number: in float32
it is off by 0.02 to 0.05 where ln(s_1 / s_last) is 16, and useless from 18. So the
device hands over the tokens and the host works in float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clvsmim import plugin
from clvsmim.metrics import (
    Axis,
    Features,
    Metric,
    Series,
    State,
    mean_series,
    moments,
    taps,
)
from clvsmim.metrics._covariance import (
    eigenvalues,
    floor_notes,
    floored_log,
    in_threads,
    log_spectrum,
    rank_count,
)

__all__ = ["token_log_spectrum", "token_spectrum"]

REFERENCES = {
    "none": "no reference subtracted",
    "first_rank": "relative to the first rank of the same image and depth",
    "embed": "relative to the embedding of the same image and rank",
}


def token_spectrum(tokens: np.ndarray, *, prefix: int) -> np.ndarray:
    """Eigenvalues of the covariance of patch tokens, in float64 on the host.

    Args:
      tokens: (..., T, C); leading axes are images.
      prefix: number of tokens before the patches.

    Returns:
      (..., K) float64, descending, not negative, K = min(N - 1, C). Within 1e-7 of the
      float64 singular values of the tokens, in ln, up to ln(s_1 / s_K) = 21.

    Raises:
      ValueError: fewer than 2 patches.

    Source: Fig. 7.
    """
    x = np.asarray(tokens)[..., prefix:, :].astype(np.float64)  # (..., N, C)
    ranks = rank_count(*x.shape[-2:])
    x -= x.mean(axis=-2, keepdims=True)
    y = x.swapaxes(-1, -2)
    gram = x @ y if x.shape[-2] < x.shape[-1] else y @ x
    return eigenvalues(gram / (x.shape[-2] - 1), ranks)


def token_log_spectrum(tokens: jax.Array, *, prefix: int) -> jax.Array:
    """Logarithms of `token_spectrum` in float32, of one image, for use inside `jit`.

    By QR and the singular values of R, never a Gram matrix: for 196 tokens within 1e-5
    of float64 where ln(s_1 / s_K) is 12, 1e-4 at 20, 2e-4 at 21. On TPU an svd compiles
    for minutes; use `token_spectrum`.

    Args:
      tokens: (T, C) of one image at one tap.
      prefix: number of tokens before the patches.

    Returns:
      (K,) float32, descending, K = min(N - 1, C). No entry is below ln(1e-12) plus the
      first; all are -87.3 if the tokens are equal.

    Raises:
      ValueError: fewer than 2 patches.

    Source: Fig. 7.
    """
    return log_spectrum(tokens[prefix:])


def make(*, prefix: int, limit: int = 64, reference: str = "none") -> Metric:
    """Spectra at every tap, and their mean over ranks, of the first `limit` images.

    `reference` is what the logarithms are relative to: "none", "first_rank" or "embed".
    """
    if reference not in REFERENCES:
        raise ValueError(plugin.unknown("reference", reference, REFERENCES))

    def update(features: Features, weights: jax.Array) -> dict[str, Any]:
        tokens = (x[:, prefix:].astype(jnp.float32) for x in features["residual"])
        return {"weight": weights, "tokens": tuple(tokens)}  # 2L+1 of (B, N, C)

    def to_state(rows: dict[str, Any]) -> State:
        logs, low = log_spectra(rows["weight"], rows["tokens"])  # (B, 2L+1, K)
        if reference == "first_rank":
            logs = logs - logs[..., :1]
        if reference == "embed":
            logs = logs - logs[:, :1]
        values = {"log": logs, "mean": logs.mean(axis=2), "floored": low.sum(axis=2)}
        return moments({"weight": rows["weight"], "values": values})

    def compute(state: State) -> list[Series]:
        depths, ranks = np.shape(state["sum"]["log"])
        depth = Axis("depth", taps(depths // 2))
        rank = Axis("rank", (*range(1, ranks + 1),))
        measured = state["count"] * depths * ranks
        low = floor_notes(np.sum(state["sum"]["floored"]), measured)
        notes = (REFERENCES[reference], *low)
        common = {"unit": "", "source": "Fig. 7", "notes": notes}
        return [
            mean_series(
                state,
                "mean",
                name="token-level log singular value, mean over ranks",
                axes=(depth,),
                kind="depth",
                **common,
            ),
            mean_series(
                state,
                "log",
                name="token-level log singular values",
                axes=(depth, rank),
                kind="curve",
                **common,
            ),
        ]

    return Metric(
        needs=("residual",),
        update=update,
        to_state=to_state,
        compute=compute,
        limit=limit,
    )


def log_spectra(
    weight: np.ndarray, tokens: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Floored log spectra of patch tokens, and where the floor was reached.

    Both (B, taps, K). They are NaN and False for padding and for images that are not
    finite, which LAPACK must not see.
    """
    good = np.asarray(weight) > 0
    for finite in in_threads(lambda x: np.isfinite(x).all(axis=(1, 2)), tokens):
        good &= finite
    chosen = slice(None) if good.all() else good  # a slice copies nothing
    spectra = in_threads(lambda x: token_spectrum(x[chosen], prefix=0), tokens)
    log, low = floored_log(np.stack(spectra, axis=1))
    logs = np.full((len(good), *log.shape[1:]), np.nan)
    lows = np.zeros(logs.shape, bool)
    logs[good], lows[good] = log, low
    return logs, lows
