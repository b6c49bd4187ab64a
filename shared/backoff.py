"""Pauses that grow: for whatever is tried again."""

from __future__ import annotations

import random

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 30.0


def pause_after(
    failures: int, *, first: float = FIRST_SECONDS, longest: float = LONGEST_SECONDS
) -> float:
    """Seconds to wait after so many failures in a row: doubling, and up to ``longest``.

    Spread by half, so that many do not come at once.
    """
    pause = min(first * 2.0 ** min(failures - 1, 100), longest)
    return pause * random.uniform(0.5, 1.5)  # noqa: S311 - no secret, only spread


class Backoff:
    """Counts the failures of something that is tried again without end."""

    def __init__(self) -> None:
        self._failures = 0

    def next(self) -> float:
        """It failed: seconds to wait now."""
        self._failures += 1
        return pause_after(self._failures)

    def reset(self) -> None:
        """It worked: begin anew."""
        self._failures = 0
