"""Whether training records can be told from held-out ones of the same site by their loss.

The score is how much lower the loss is than the base model's. A reference takes away how easy a
text is by itself, and the base is one that every attacker has (LoRA-Leak, arXiv:2507.18302).
A second score needs no reference: Min-K%++ (arXiv:2404.02936).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FALSE_ALARMS = 0.01
LEAST_FOR_TPR = 100  # with fewer, 1 % of them is none
LEAST_LIKELY = 0.2  # the share of a text's tokens that Min-K%++ looks at
LEAST = 16  # with fewer on a side, chance alone has areas above .75


def min_k(deviations: NDArray[np.float32]) -> float:
    """The mean of the lowest fifth (at least one) of a text's deviations, float32 [n > 0].

    What was trained on has no token that is much less likely than others in its place.
    """
    count = max(1, int(LEAST_LIKELY * len(deviations)))
    return float(np.sort(deviations)[:count].mean(dtype=np.float64))


def area_under_curve(members: list[float], others: list[float]) -> float:
    """P[a member's score > another's] + P[equal] / 2: the area under the ROC curve, in [0, 1].

    From the rank sum of Mann and Whitney; equal scores share a rank.
    """
    scores = np.array([*members, *others])
    values, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    del values
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    count = len(members)
    above = float(ranks[:count].sum()) - count * (count + 1) / 2
    return above / (count * len(others))


def found_at(members: list[float], others: list[float], false_alarms: float) -> float:
    """The share of members above a threshold that at most ``false_alarms`` of the others pass."""
    allowed = int(false_alarms * len(others))
    threshold = sorted(others, reverse=True)[allowed]
    return sum(score > threshold for score in members) / len(members)
