"""Measurements of a trained encoder; docs/metrics.md defines each, with a picture.

Kernels are plain functions of one example, batched by `jax.vmap`, that need jax and
numpy only: `from clvsmim.metrics import attention_distance`. By file and figure:

attention of one head, (T, T)
  distance      attention_distance     pixels from a query to what it attends (Fig. 3)
                grid_distances         distances between patches
                patch_attention        attention among patches, rows of sum 1
                cls_mass               what patches give to CLS and registers
                cls_attention          what CLS gives to a patch
                null_rows              queries that attend to no patch
  nmi           attention_nmi          dependence on the query, 0 to 1 (Fig. 4)
                attention_information  with its parts, an AttentionInformation
  offsets       aligned_attention      attention by offset from the query
                offset_visits          queries that have a patch at an offset
                mean_offset            where a canvas points
                offset_heads           whether a head looks at one fixed offset
                distance_histogram     attention by distance
                distinct_distances     the distances of that
  rollout       attention_rollout      attention through all blocks
  diversity     row_deviation          how much queries differ
                head_cosine            how alike the heads of a block are
  maps          query_map              where one query looks (Fig. 2)
                key_map                where all look
                mass_mask              the fewest entries that hold most of it
similarity of features of the same images, (n, p) and (n, q)
  cka           linear_cka             unbiased CKA of one mini-batch (Fig. 5)
                centred_gram           U-centred Gram matrix
                hsic                   unbiased HSIC of two of those
                feature_hsic           the same from features
                biased_cka             as others compute it
                biased_floor           what that gives for noise
  grams         cross_model_cka        CKA between blocks of two models, from states
                between_models         the same as a Series
spectra
  spectrum      token_spectrum         of the tokens of an image, float64 (Fig. 7)
                token_log_spectrum     its logarithms in float32, under `jit`
  rank          image_log_spectrum     of the features of many images (Fig. 7)
  dimension     rank_me                RankMe; of a spectrum, as are those below
                effective_rank         exp of the entropy
                participation_ratio    inverse of the summed squares of shares
                stable_rank            sum over largest
                numerical_rank         how many exceed a threshold
                alpha_req              power of the decay, an AlphaReQ
                normalised_std         spread of features of length 1
  lidar         lidar_rank             directions that tell images apart
tokens of one image at one tap, (T, D)
  smoothing     token_cosine           how alike they are
  variance      map_variance           how much they differ over the grid
  displacement  token_displacement     how far a block moves them (Fig. 11), a
                                       TokenDisplacement
                translation_share      how much of it is common to all (Fig. 6)
  clusters      neighbour_purity       nearest tokens of the same group
                silhouette             distance between groups against within
  fourier       delta_log_amplitude    high frequencies relative to the mean (Fig. 8)
                log_amplitude          the same, absolute
                half_diagonal          the frequencies of both
  amplitude     log_amplitude_plane    all frequencies
                radial_average         averaged over directions
                radial_frequencies     the frequencies of that
probes of features of labelled images
  probe         ridge_probe            linear classifier (Fig. 10), a RidgeProbe
                ridge_predict          its classes
  knn           nearest                most similar images of one query, a Nearest
                merge_nearest          of two parts of the images
                knn_scores             votes of neighbours
                knn_predict            classes of most votes

For the analysis, `plugin.load("metrics", "nmi", prefix=1)` calls `make(prefix=1)` of
`nmi.py`, which returns a `Metric`. A new metric is one new file with a `make` and with
its kernels named in `__all__`; no list of code has to learn of it. A file has a short
name of one word, a kernel one of several or one that is no file's: importing a
submodule `metrics.x` would overwrite a function `metrics.x`. A file without `make`
(`maps`, `dimension`, `clusters`) holds kernels only. A metric that looks at the
attention of one block, or at one tap, of one image at a time is made by `of_each`; all
such metrics share one loop.

Features, the first argument of `update`, are a dict of tuples over blocks, never
stacked, so that a block's tensors are freed before the next block runs:
  "residual"      2L+1 arrays (B, T, D), the stream before the final norm, in the order
                  of `taps(L)`: embed, block 1 attn, block 1 mlp, block 2 attn, ...
  "attention"     L arrays (B, H, T, T), probabilities after the softmax, rows = queries
  "head_outputs"  L arrays (B, H, T, d), attention @ values, heads not yet joined
and three that are arrays: "output" (B, T, D), the tokens after the final norm, "label"
and "index" (B,) int32, the class of an image and its number in the data.

Static facts come as keywords of `make`, each metric taking those it needs: `grid` =
(rows, columns) of patches, `patch` = side of a patch in pixels, `prefix` = number of
tokens before the patches (CLS, registers), `depth` = number of blocks, `group` =
images of one mini-batch of CKA, `classes` = number of classes of the data.

A metric reads the images that are measured, the part "test". One that learns reads
"train" too, one that compares views reads "views", where each of the measured images
comes several times in a row, cropped at random.

The way of a number: `update` (device) -> rows, a pytree of arrays whose leading axis is
in image order -> `to_state` (host) -> float64 sums, or the rows kept -> `merge` over
batches and processes -> `compute` -> list of `Series`. Nothing is summed over images on
the device, so no result depends on how many devices there were.
"""

import importlib
from typing import Any

from clvsmim import plugin
from clvsmim.metrics._contract import (
    DECODER,
    FEATURES,
    KINDS,
    PARTS,
    Axis,
    Features,
    Image,
    Metric,
    Series,
    block_axis,
    check_tokens,
    continued,
    group_weights,
    image_features,
    mean_series,
    pooled,
    shared,
    taps,
)
from clvsmim.metrics._each import (
    PLACES,
    of_each,
    over_each,
    over_images,
    stored,
)
from clvsmim.metrics._states import State, add, join, keep, moments


def __getattr__(name: str) -> Any:
    """The public kernel `name` of whichever file lists it in `__all__`."""
    if name == "__all__":  # what `help` and `import *` look at
        return kernels()
    if not name.startswith("_"):
        for file in plugin.names("metrics"):
            module = importlib.import_module(f"{__name__}.{file}")
            if name == file:
                return module
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *kernels()})


def kernels() -> list[str]:
    """The names of all public kernels."""
    files = [__getattr__(file).__all__ for file in plugin.names("metrics")]
    return sorted(name for file in files for name in file)
