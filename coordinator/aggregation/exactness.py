"""How far the mean of A and of B is from the mean of what they do: ||mean(BA) - mean(B) mean(A)||.

A site's adapter changes a layer by its product B_i A_i; fedavg averages the two factors apart. The
difference is sum_i w_i (B_i - mean B)(A_i - mean A), as of any covariance with weights that sum to
1: so the adapter that all started from drops out, the deltas suffice, and no two large numbers are
subtracted. With Y_i = A_i Z it is, applied to Z, sum_i w_i B_i (Y_i - mean Y): linear in the number
of deltas, and never the (outputs, inputs) matrix.

Z has at most DIRECTIONS columns. For a layer with no more inputs it is the identity, and the norm
is exact. Otherwise it holds random signs, the same whenever they are drawn: E ||M Z||^2 = ||M||^2
(Hutchinson), with a standard error of at most sqrt(2 / DIRECTIONS) of one layer's square, so 12 %
of one layer's norm and below 1 % over the 224 layers of LLaMA-2-7B. The exact way, by Gram matrices
of the stacked factors, is quadratic in the number of deltas: with five it took longer than the rest
of closing a round.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from shared.adapters import Layer
    from shared.protocol.manifest import TensorSpec

DIRECTIONS: Final = 32
MOST_KEPT: Final = 64  # deltas: of more, what they do to Z is computed twice and not kept
# The products are fp32, which costs half of fp64: right to some 1e-7, and another BLAS or CPU may
# differ there. The record must come out equal all the same, so it says four digits.
DIGITS: Final = 4
# What rounding leaves of a difference that is none, as part of its terms: it must not be recorded
# as a number, since its digits are another BLAS's or CPU's.
ROUNDING: Final = 1e-6


def squared_gap(
    layer: Layer,
    reads: Sequence[Callable[[TensorSpec], NDArray[np.float32]]],
    weights: Sequence[float],
    scales: Sequence[float],
) -> float:
    """Square of one layer's gap, of the factors before their scaling by alpha.

    ``reads``: each delta's tensors by spec, which may be read again and again; the values count
    times ``scales``. ``weights`` sum to 1. Takes a few factors of the layer as memory, and a right
    factor's size for each delta up to ``MOST_KEPT``.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        square = _square(layer, reads, weights, scales, np.float32)
    if math.isfinite(square):
        return square
    return _square(layer, reads, weights, scales, np.float64)  # values beyond any training's


def _square(
    layer: Layer,
    reads: Sequence[Callable[[TensorSpec], NDArray[np.float32]]],
    weights: Sequence[float],
    scales: Sequence[float],
    dtype: type[np.floating[Any]],
) -> float:
    signs = _directions(layer, dtype)

    def projected(number: int) -> NDArray[np.float64]:
        right = reads[number](layer.right).astype(dtype, copy=False)
        return scales[number] * _times(right, signs).astype(np.float64)

    values_of = functools.cache(projected) if len(reads) <= MOST_KEPT else projected
    mean = np.zeros_like(values_of(0))
    for number, weight in enumerate(weights):
        mean += weight * values_of(number)
    gap, terms = np.zeros((layer.left.shape[0], mean.shape[1])), 0.0
    product = np.empty(gap.shape, dtype)  # fresh memory for each costs more than multiplying
    for number, (read, weight, scale) in enumerate(zip(reads, weights, scales, strict=True)):
        b, values = read(layer.left).astype(dtype, copy=False), values_of(number)
        apart = ((weight * scale) * (values - mean)).astype(dtype)
        gap += np.matmul(b, apart, out=product)
        terms += weight * scale * float(np.linalg.norm(b)) * float(np.linalg.norm(values))
    square = float(np.sum(np.square(gap, out=gap)))
    if not math.isfinite(square + terms):
        return math.inf
    return square if math.sqrt(square) > ROUNDING * terms else 0.0


def _directions(layer: Layer, dtype: type[np.floating[Any]]) -> NDArray[Any] | None:
    """Z, (inputs, DIRECTIONS), scaled so that E Z Z^T = I; None for the identity."""
    inputs = layer.right.shape[1]
    if inputs <= DIRECTIONS:
        return None
    generator = np.random.Philox(key=derive_seed("exactness", layer.name))
    words = generator.random_raw(-(-inputs * DIRECTIONS // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: inputs * DIRECTIONS]
    signs = bits.reshape(inputs, DIRECTIONS).astype(dtype)
    size = dtype(1 / math.sqrt(DIRECTIONS))
    signs *= 2 * size  # a sign that is 0 or 1 becomes one of -size or size, both exactly
    signs -= size
    return signs


def _times(a: NDArray[Any], signs: NDArray[Any] | None) -> NDArray[Any]:
    return a if signs is None else np.asarray(a @ signs)
