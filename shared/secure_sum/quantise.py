"""From values to whole numbers on a scale that is public and the same at every site.

A tensor's values become q = clip(round(x / step), -levels, levels), half to even, with
step = reach / levels. ``reach`` is the largest magnitude that passes unclipped. What was clipped or
rounded away is the site's residual (``shared/tensors/residual.py``), and travels later.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOM: Final = 1.5  # between one site's values and what the mean of many leads to expect


def step_of(reach: float, levels: int) -> np.float32:
    """The distance of two levels, > 0, as every site computes it: one division in fp32."""
    step = np.float32(reach) / np.float32(levels)
    return np.float32(max(step, np.finfo(np.float32).tiny))


def quantise(values: NDArray[np.float32], step: np.float32, levels: int) -> NDArray[np.int32]:
    """The levels of finite ``values``, in their shape."""
    with np.errstate(over="ignore"):
        scaled = np.rint(values / step)
    clipped: NDArray[np.int32] = np.clip(scaled, -levels, levels).astype(np.int32)
    return clipped


def values_of(numbers: NDArray[np.int32], step: np.float32) -> NDArray[np.float32]:
    """What levels stand for, in fp32."""
    return numbers.astype(np.float32) * step


def mean_of(total: NDArray[np.int64], step: np.float32, weight: int) -> NDArray[np.float32]:
    """The mean that a sum of weighted levels stands for; computed in fp64, one way everywhere."""
    return (total.astype(np.float64) * (float(step) / weight)).astype(np.float32)


def next_reach(reach: float, levels: int, peak: int, weight: int, cohort: int) -> float:
    """The next round's reach: ``ROOM sqrt(cohort)`` times the largest value of this one's mean.

    ``peak``: the largest magnitude in the sum of levels; ``weight``: the sum of weights.
    Independent values are sqrt(cohort) times as large as their mean. A sum of zeros says that steps
    are too large: a quarter then.
    """
    if peak == 0:
        return float(np.float32(reach / 4))
    largest = peak * float(step_of(reach, levels)) / weight
    return float(np.float32(ROOM * math.sqrt(cohort) * largest))
