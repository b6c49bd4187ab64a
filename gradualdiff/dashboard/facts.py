"""What is shown of a run's rounds, computed once for each that is closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.runs.comparison import compared_round
from coordinator.runs.inspection import summarise_round

if TYPE_CHECKING:
    from coordinator.history import History, RoundHistory
    from coordinator.runs.comparison import ComparedRound
    from coordinator.runs.inspection import RoundSummary


@dataclass(frozen=True)
class RoundFacts:
    """One round: as ``rounds list`` has it, and as ``runs compare`` has it."""

    summary: RoundSummary
    compared: ComparedRound


class Facts:
    """The rounds of one run."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[tuple[object, ...], RoundFacts]] = {}

    def of(self, history: History) -> list[RoundFacts]:
        """Every round, in order. Records only ever come, so as many of them say the same."""
        return [self._round(history, number) for number in sorted(history.rounds)]

    def _round(self, history: History, number: int) -> RoundFacts:
        there, after = history.round(number), history.round(number + 1)
        told_by = (_count(there), _count(after), len(history.controls), history.finished is None)
        known = self._known.get(number)
        if known is None or known[0] != told_by:
            facts = RoundFacts(
                summarise_round(history, number), compared_round(history, number, 0.0)
            )
            known = self._known[number] = (told_by, facts)
        return known[1]


def _count(there: RoundHistory) -> int:
    found = (there.opened, there.closing, there.closed, there.genesis)
    many = (there.accepted, there.evaluated, there.unmasked, there.refused, there.failed)
    return sum(record is not None for record in found) + sum(len(records) for records in many)
