"""Pauses that grow: for whatever is tried again without end."""

from __future__ import annotations

import random

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 30.0


class Backoff:
    """Doubling pauses up to ``longest``, each spread by half, so that many do not come at once."""

    def __init__(self, first: float = FIRST_SECONDS, longest: float = LONGEST_SECONDS) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def next(self) -> float:
        """Seconds to wait now."""
        pause, self._next = self._next, min(self._next * 2, self._longest)
        return pause * random.uniform(0.5, 1.5)  # noqa: S311 - no secret, only spread

    def reset(self) -> None:
        """It worked: begin anew."""
        self._next = self._first
