"""Steps that follow one from another are taken in a loop, in the order of what they follow from."""

from __future__ import annotations

import sys

from coordinator.effects import Effects
from coordinator.round.state import Aggregate, WriteRecord
from tests import federations
from tests.steering import ask


def depth() -> int:
    """How many calls are under way."""
    frame, count = sys._getframe(), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


def name_of(step) -> str:
    """What is recorded, or done."""
    return type(step.record if isinstance(step, WriteRecord) else step).__name__


def test_the_stack_does_not_grow_with_the_steps(tmp_path, monkeypatch):
    """Not within a chain of them, and not where an operator speaks in between."""
    taken, perform = [], Effects.perform

    def noted(self, step, state):
        taken.append((name_of(step), depth()))
        if isinstance(step, Aggregate):
            ask(tmp_path, "pause")
            ask(tmp_path, "resume")
        return perform(self, step, state)

    monkeypatch.setattr(Effects, "perform", noted)
    assert federations.run(federations.config(), tmp_path).last_round == 3
    a_round = ["OpenedRecord", "ClosingRecord", "Aggregate"]
    assert [name for name, _ in taken] == ["MakeGenesis", *a_round * 3, "FinishedRecord"]
    assert len({deep for _, deep in taken}) == 1
