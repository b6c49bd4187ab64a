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

# Values per block, 1 MB in fp64: small enough for the cache, large enough that numpy's price for
# each call is not seen.
BLOCK: Final = 131_072


def difference(local: NDArray[Any], source: NDArray[Any]) -> NDArray[np.float32]:
    """``local - source``, subtracted in fp32: a site's delta, in the shape of both.

    D_i(t) = theta_i(t) - A(t), Algorithm 2 of arXiv:2506.19164. Raises ValueError for two shapes:
    broadcasting would hide the mistake.
    """
    if local.shape != source.shape:
        raise ValueError(f"expected two tensors of one shape, got {local.shape} and {source.shape}")
    return np.subtract(local.astype(np.float32, copy=False), source.astype(np.float32, copy=False))


def squared_norm(values: NDArray[Any]) -> float:
    """Sum of the squares of a tensor, in fp64."""
    flat = values.reshape(-1)
    scratch = np.empty(min(BLOCK, flat.size), np.float64)
    sums = []
    for at in blocks(flat.size):
        block = scratch[: at.stop - at.start]
        np.copyto(block, flat[at])
        np.square(block, out=block)
        sums.append(float(np.sum(block)))
    return math.fsum(sums)


def square_and_product(values: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    """``squared_norm(values)`` and the sum of its products with ``other``, both in fp64.

    ``values`` is read once. Raises ValueError for two shapes.
    """
    if values.shape != other.shape:
        raise ValueError(f"expected two tensors of one shape, got {values.shape}, {other.shape}")
    left, right = values.reshape(-1), other.reshape(-1)
    wide, product = np.empty((2, min(BLOCK, left.size)), np.float64)
    squares, products = [], []
    for at in blocks(left.size):
        block, scratch = wide[: at.stop - at.start], product[: at.stop - at.start]
        np.copyto(block, left[at])
        np.multiply(block, right[at], out=scratch)
        products.append(float(np.sum(scratch)))
        np.square(block, out=block)
        squares.append(float(np.sum(block)))
    return math.fsum(squares), math.fsum(products)


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


def mean_of_sorted(rows: NDArray[np.float64], keep: slice, result: NDArray[np.float64]) -> None:
    """For each column of ``rows`` (deltas, values) the mean of its sorted values ``keep``.

    ``rows`` is overwritten. -0.0 becomes 0.0 first: sorting knows no order between the two.
    """
    np.add(rows, 0.0, out=rows)
    rows.sort(axis=0)
    chosen = rows[keep]
    np.copyto(result, chosen[0])
    for row in chosen[1:]:
        np.add(result, row, out=result)
    np.divide(result, len(chosen), out=result)
