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

_PIECE: Final = 1 << 16  # values: what a core's cache holds
ROOM: Final = 1.5  # between one site's values and what the mean of many leads to expect


def step_of(reach: float, levels: int) -> np.float32:
    """The distance of two levels, > 0, as every site computes it: one division in fp32."""
    step = np.float32(reach) / np.float32(levels)
    return np.float32(max(step, np.finfo(np.float32).tiny))


def quantise(
    values: NDArray[np.float32], step: np.float32, levels: int, sent: NDArray[np.float32]
) -> NDArray[np.int16]:
    """The levels of finite flat ``values``, and in ``sent``, of their size, what they stand for.

    ``levels``: 32,767 at most.
    """
    numbers = np.empty(values.size, np.int16)
    for begin in range(0, values.size, _PIECE):
        piece = slice(begin, begin + _PIECE)
        here = sent[piece]
        with np.errstate(over="ignore"):
            np.divide(values[piece], step, out=here)
        np.rint(here, out=here)
        np.clip(here, -levels, levels, out=here)
        numbers[piece] = here
        here += 0.0  # whole numbers know no -0.0
        here *= step
    return numbers


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
