"""What can be said of a delta's numbers: difference, norm, inner product. Pure.

Every sum is taken in fp64 over blocks of fixed size by ``np.sum`` and joined by ``math.fsum``,
never by BLAS: a BLAS dot product depends on the number of threads, and these numbers stand in the
ledger, where anybody must be able to recompute them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

# Values per block: two fp64 blocks of this size stay in a core's cache.
BLOCK: Final = 65_536


def difference(local: NDArray[Any], source: NDArray[Any]) -> NDArray[np.float32]:
    """``local - source``, subtracted in fp32: a site's delta, in the shape of both.

    D_i(t) = theta_i(t) - A(t), Algorithm 2 of arXiv:2506.19164. Raises ValueError for two shapes:
    broadcasting would hide the mistake.
    """
    if local.shape != source.shape:
        raise ValueError(f"expected two tensors of one shape, got {local.shape} and {source.shape}")
    return np.subtract(local.astype(np.float32, copy=False), source.astype(np.float32, copy=False))


def inner_product(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Sum of the products of two tensors of one shape, in fp64, whatever their dtypes.

    Raises ValueError for two shapes.
    """
    if first.shape != second.shape:
        raise ValueError(f"expected two tensors of one shape, got {first.shape}, {second.shape}")
    left, right = first.reshape(-1), second.reshape(-1)
    return math.fsum(
        float(np.sum(_as_fp64(left[at]) * _as_fp64(right[at]))) for at in blocks(left.size)
    )


def squared_norm(values: NDArray[Any]) -> float:
    """Sum of the squares of a tensor, in fp64."""
    flat = values.reshape(-1)
    return math.fsum(float(np.sum(np.square(_as_fp64(flat[at])))) for at in blocks(flat.size))


def is_finite(values: NDArray[Any]) -> bool:
    """Whether no value of a tensor is NaN or infinite."""
    return bool(np.isfinite(values).all())


def significant(value: float, digits: int = 9) -> float:
    """``value`` rounded to so many significant digits, as norms and cosines are recorded."""
    return float(f"{value:.{digits}g}")


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``count`` values in order."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _as_fp64(values: NDArray[Any]) -> NDArray[np.float64]:
    return values.astype(np.float64, copy=False)
