"""Floating-point operations of a training step, counted by hand, and of devices.

The convention of model FLOP utilisation (Chowdhery et al. 2022, appendix B): a multiply
and an add are two operations, only products of matrices count (no norm, activation,
softmax or optimizer), the backward pass costs twice the forward pass of what is
trained, what is frozen has a forward pass alone, and what is computed a second time to
save memory does not count. All numbers are per image.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from clvsmim.vit import Spec


class Forward(NamedTuple):
    """Operations of the forward passes of one image in a training step.

    Attributes:
      trained: of what gradients go through.
      frozen: of what has none: a teacher, the encoder below a probe.
    """

    trained: float
    frozen: float = 0.0

    @property
    def step(self) -> float:
        """Operations of a training step per image, forward and backward."""
        return 3 * self.trained + self.frozen


def embed(spec: Spec) -> float:
    """Pixels to patch embeddings, by one product or by the convolutions of a stem."""
    if spec.stem == "patch":
        return linear(math.prod(spec.grid), 3 * spec.patch**2, spec.width)
    count = int(math.log2(spec.patch))
    widths = [3, *(spec.width >> (count - 1 - i) for i in range(count))]
    places = [math.prod(spec.image) / 4**i for i in range(1, count + 1)]
    stem = sum(linear(n, 9 * widths[i], widths[i + 1]) for i, n in enumerate(places))
    return stem + linear(places[-1], spec.width, spec.width)


def encode(spec: Spec, tokens: float | None = None) -> float:
    """The blocks of an encoder, on all T tokens or on so many."""
    return blocks(
        spec.tokens if tokens is None else tokens,
        width=spec.width,
        depth=spec.depth,
        # SwiGLU has three products of the hidden width, not two.
        mlp_ratio=spec.mlp_ratio * (1.5 if spec.mlp == "swiglu" else 1.0),
    )


def blocks(tokens: float, *, width: int, depth: int, mlp_ratio: float = 4.0) -> float:
    """Transformer blocks: q, k, v and output, attention, MLP."""
    hidden = round(mlp_ratio * width)
    dense = 4 * linear(tokens, width, width) + 2 * linear(tokens, width, hidden)
    attention = 2 * linear(tokens, width, tokens)  # queries x keys, attention x values
    return depth * (dense + attention)


def mlp(width: int, widths: Sequence[int]) -> float:
    """An MLP on one vector: from `width` to each of `widths` in turn."""
    return sum(linear(1, a, b) for a, b in zip((width, *widths), widths, strict=False))


def linear(rows: float, inputs: float, outputs: float) -> float:
    """A product of (rows, inputs) and (inputs, outputs)."""
    return 2.0 * rows * inputs * outputs


# Dense bfloat16 products per second of one device as JAX counts devices, from the data
# sheets: TPU v2 and v3 have two devices a chip, so does v7. The V100 and the T4 know
# float16 alone. Names begin so; the first that fits counts.
PEAK = (
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p
    ("TPU v6", 918e12),  # v6e
    ("TPU7x", 1153.5e12),
    ("TPU v7", 1153.5e12),
    ("NVIDIA H200", 989.4e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989.4e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA V100", 125e12),
    ("Tesla V100", 125e12),
    ("NVIDIA T4", 65e12),
    ("Tesla T4", 65e12),
)


def peak(kind: str) -> float | None:
    """Operations per second of a device of this `device_kind`; None if unknown."""
    return next((x for name, x in PEAK if _begins(kind.lower(), name.lower())), None)


def _begins(kind: str, name: str) -> bool:
    """Whether the words of `name` begin `kind`: an L40 is no L4."""
    return kind.startswith(name) and not kind[len(name) :][:1].isdigit()
