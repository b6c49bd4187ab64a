"""The discrete Gaussian, sampled exactly: P(x) in proportion to exp(-x^2 / (2 variance)), x whole.

By the algorithms 1 to 3 of Canonne, Kamath and Steinke (2020, arXiv:2004.00010), over arrays: whole
numbers only, no float and no table, so that no bit of a sum tells what was added to what.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from participant.privacy.noise import SecretStream

MOST_VARIANCE: Final = 2**24  # up to it no product here leaves 64 bits


def discrete_gaussian(stream: SecretStream, variance: int, count: int) -> NDArray[np.int64]:
    """Independent whole numbers: int64 [count]. Raises ValueError for a variance beyond the bounds.

    Their variance is ``variance`` but for less than 1e-6 of it, from 1 on.
    """
    if not 1 <= variance <= MOST_VARIANCE:
        raise ValueError(f"variance: expected 1 to {MOST_VARIANCE}, got {variance}")
    scale = math.isqrt(variance) + 1
    parts, missing = [np.empty(0, np.int64)], count
    while missing > 0:
        tried = _laplace(stream, scale, 2 * missing + 16)
        gaps = np.square(np.abs(tried) * scale - variance).astype(np.uint64)
        taken = tried[_exponential(stream, gaps, 2 * variance * scale**2)]
        parts.append(taken)
        missing -= len(taken)
    return np.concatenate(parts)[:count]


def _laplace(stream: SecretStream, scale: int, tries: int) -> NDArray[np.int64]:
    """P(x) in proportion to exp(-|x| / scale); fewer than ``tries``, since some are rejected."""
    low = _below(stream, scale, tries)
    low = low[_exponential(stream, low, scale)]
    high, alive = np.zeros(len(low), np.uint64), np.arange(len(low))
    while len(alive):
        alive = alive[_exponential(stream, np.ones(len(alive), np.uint64), 1)]
        high[alive] += np.uint64(1)
    size = (low + np.uint64(scale) * high).astype(np.int64)
    negative = _below(stream, 2, len(size)) == 1
    signed: NDArray[np.int64] = np.where(negative, -size, size)
    return np.asarray(signed[~(negative & (size == 0))])


def _exponential(
    stream: SecretStream, numerators: NDArray[np.uint64], denominator: int
) -> NDArray[np.bool_]:
    """True with probability exp(-numerator / denominator), each by itself."""
    below = np.uint64(denominator)
    wholes, alive = numerators // below, np.arange(len(numerators))
    found = _fraction(stream, numerators % below, denominator)
    alive = alive[found & (wholes > 0)]
    while len(alive):  # exp(-1) once for each whole
        kept = _fraction(stream, np.full(len(alive), below), denominator)
        found[alive[~kept]] = False
        wholes[alive] -= np.uint64(1)
        alive = alive[kept & (wholes[alive] > 0)]
    return found


def _fraction(
    stream: SecretStream, numerators: NDArray[np.uint64], denominator: int
) -> NDArray[np.bool_]:
    """The same for numerators up to the denominator, by von Neumann: the first failure is odd."""
    odd, alive, tries = np.zeros(len(numerators), bool), np.arange(len(numerators)), 0
    while len(alive):
        tries += 1
        went_on = _below(stream, denominator * tries, len(alive)) < numerators[alive]
        odd[alive[~went_on]] = tries % 2 == 1
        alive = alive[went_on]
    return odd


def _below(stream: SecretStream, bound: int, count: int) -> NDArray[np.uint64]:
    """Independent whole numbers from 0 to ``bound`` - 1, each as likely: uint64 [count]."""
    last = np.uint64(2**64 // bound * bound - 1)
    found = stream.words(count).copy()
    while len(beyond := np.flatnonzero(found > last)):
        found[beyond] = stream.words(len(beyond))
    return found % np.uint64(bound)
