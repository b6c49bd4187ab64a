"""Bounds on a probability from how often something happened."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HALVINGS = 60  # to less than fp64 can tell


def at_least(count: int, trials: int, probability: float) -> float:
    """P[Bin(trials, probability) >= count]."""
    if count <= 0:
        return 1.0
    if probability in (0.0, 1.0):
        return probability
    log_p, log_q = math.log(probability), math.log1p(-probability)
    top = math.lgamma(trials + 1)
    return math.fsum(
        math.exp(
            top
            - math.lgamma(k + 1)
            - math.lgamma(trials - k + 1)
            + k * log_p
            + (trials - k) * log_q
        )
        for k in range(count, trials + 1)
    )


def upper_bound(count: int, trials: int, level: float = 0.95) -> float:
    """The one-sided Clopper-Pearson bound: the p at which P[Bin(trials, p) <= count] = 1 - level.

    Clopper and Pearson (Biometrika 26, 1934). 1 without trials.
    """
    if count >= trials:
        return 1.0
    return _bisect(lambda p: at_least(count + 1, trials, p) < level)


def lower_bound(count: int, trials: int, level: float = 0.95) -> float:
    """The p at which P[Bin(trials, p) >= count] = 1 - level; 0 where nothing happened."""
    if count <= 0:
        return 0.0
    return _bisect(lambda p: at_least(count, trials, p) < 1 - level)


def _bisect(is_below: Callable[[float], bool]) -> float:
    """Where in (0, 1) ``is_below`` turns false."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2
