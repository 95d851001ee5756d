"""Initial values of a ViT: initialisers by family, position tables and indices."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from clvsmim.vit import Spec


def fan_in_uniform(fan_in: int) -> Callable:
    """U(-a, a), a = 1/sqrt(fan_in): PyTorch's default for Linear and Conv."""
    return symmetric_uniform(1.0 / math.sqrt(fan_in))


def symmetric_uniform(limit: float) -> Callable:
    """U(-limit, limit) whatever the shape: for limits that Flax's fans get wrong."""

    def init(key: jax.Array, shape: tuple, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def initializers(spec: "Spec", index: int = 0) -> dict[str, Callable]:
    """Initialisers by role for block `index`, as the family's public code has them.

    Roles: patch, patch_bias, qkv, linear (fc1), residual (attention output and fc2),
    token (CLS, registers), table (learned positions).
    """
    d, patch = spec.width, 3 * spec.patch**2
    xavier = jax.nn.initializers.xavier_uniform()
    normal = jax.nn.initializers.normal
    zeros = jax.nn.initializers.zeros
    # On the kernel (P, P, 3, D) Flax's xavier would count the patch in both fans.
    patch_xavier = symmetric_uniform(math.sqrt(6 / (patch + d)))
    if spec.init == "moco_v3":
        # q, k and v each count as a square matrix.
        roles = (patch_xavier, zeros, xavier, xavier, xavier, normal(1e-6))
    elif spec.init == "mae":
        # q, k, v are one (D, 3D) matrix to xavier; the patch bias is PyTorch's default.
        fused = symmetric_uniform(math.sqrt(6 / (4 * d)))
        roles = (
            patch_xavier,
            fan_in_uniform(patch),
            fused,
            xavier,
            xavier,
            normal(0.02),
        )
    elif spec.init == "simmim":
        tn, scale = cut_normal(0.02, 1), math.sqrt(2 * (index + 1))
        roles = (tn, zeros, tn, tn, cut_normal(0.02, 1, scale), tn)
    else:
        tn = cut_normal(0.02, 100)  # timm cuts at +-2 absolute: 100 sigma
        roles = (fan_in_uniform(patch), fan_in_uniform(patch), tn, tn, tn, tn)
    names = ("patch", "patch_bias", "qkv", "linear", "residual", "token")
    return dict(zip(names, roles, strict=True)) | {"table": cut_normal(0.02, 100)}


def cut_normal(std: float, cut: float, divide: float = 1.0) -> Callable:
    """normal(0, std) cut at +-cut*std, not rescaled, then divided.

    `jax.nn.initializers.truncated_normal` cuts at 2 sigma and rescales: another
    distribution.
    """

    def init(key: jax.Array, shape: tuple, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.truncated_normal(key, -cut, cut, shape, dtype) * (
            std / divide
        )

    return init


# Positions


def sincos_table(grid: tuple[int, int], width: int, rows_first: bool) -> np.ndarray:
    """Fixed 2-D sin-cos table (N, D), float64, of integer grid coordinates.

    Each half is [sin, cos] of one coordinate times 10000^(-j/m), m = D/4. MoCo v3 has
    the row in its first half, MAE the column.
    """
    m = width // 4
    omega = 10000.0 ** (-np.arange(m) / m)
    row, column = np.indices(grid).reshape(2, -1, 1) * omega  # each (N, m)
    halves = [np.sin(row), np.cos(row)], [np.sin(column), np.cos(column)]
    first, second = halves if rows_first else halves[::-1]
    return np.concatenate(first + second, axis=1)


def position_init(spec: "Spec") -> Callable:
    """Initialiser of `pos_embed`: learned, or sin-cos under a zero CLS row."""
    if spec.position == "learned":
        return initializers(spec)["table"]
    table = sincos_table(spec.grid, spec.width, spec.position == "moco_sincos")
    table = np.concatenate([np.zeros((min(spec.prefix, 1), spec.width)), table])
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(
        table.reshape(shape), dtype
    )


def relative_shape(spec: "Spec") -> tuple[int, int]:
    """(rows, H) of a relative table: every offset, then three rows for the prefix."""
    rows, columns = spec.grid
    return (2 * rows - 1) * (2 * columns - 1) + 3, spec.heads


def relative_index(grid: tuple[int, int], prefix: int) -> np.ndarray:
    """(T, T) row of the relative table for each (query, key) (BEiT, SimMIM).

    The offset is query minus key, row-major; the last three table rows are
    prefix to patch, patch to prefix and prefix to prefix.
    """
    rows, columns = grid
    place = np.indices(grid).reshape(2, -1)  # (2, N)
    offset = place[:, :, None] - place[:, None, :]  # (2, N query, N key)
    patches = (offset[0] + rows - 1) * (2 * columns - 1) + offset[1] + columns - 1
    last = (2 * rows - 1) * (2 * columns - 1)
    index = np.full((prefix + len(patches),) * 2, last)
    index[:, :prefix] = last + 1
    index[:prefix, :prefix] = last + 2
    index[prefix:, prefix:] = patches
    return index


def relative_bias(table: jax.Array, spec: "Spec") -> jax.Array:
    """(rows, H) table -> (H, T, T) bias, float32."""
    index = relative_index(spec.grid, spec.prefix)
    return table[index].transpose(2, 0, 1)  # (T, T, H) -> (H, T, T)
