"""What an arm came to, and which arms are worth choosing. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Outcome:
    """``up``, ``down``: bytes of one site in one round, files' headers included.

    ``values``: numbers that are trained. ``loss``: held-out nats per answer token at the end; None
    for an arm whose training diverged. ``share``: of the gain that fp32 has.
    """

    arm: str
    says: str
    rate: float
    values: int
    up: float
    down: float
    loss: float | None
    share: float | None

    @property
    def bytes(self) -> float:
        """Both ways."""
        return self.up + self.down


def share_of_gain(base: float, reference: float | None, loss: float | None) -> float | None:
    """(base - loss) / (base - reference); None where there is no gain to have a share of."""
    if reference is None or loss is None or reference >= base:
        return None
    return (base - loss) / (base - reference)


def frontier(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those to which no other is better in loss at no more bytes, fewest bytes first."""
    best, found = float("inf"), []
    known = [one for one in outcomes if one.loss is not None]
    for one in sorted(known, key=lambda one: (one.bytes, one.loss)):
        if one.loss is not None and one.loss < best:
            best = one.loss
            found.append(one)
    return found
