"""What a federation in this process tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeAlias

if TYPE_CHECKING:
    from coordinator.round.state import RunState
    from participant.learner.port import Progress


@dataclass(frozen=True)
class SiteMoved:
    """A site went on in one piece of work. ``round``: None before the run begins."""

    site: str
    round: int | None
    step: Progress


@dataclass(frozen=True)
class RunMoved:
    """The coordinator learnt something.

    ``closed``: the last round with a result, -1 before round 0. ``rounds``: how many there will be.
    ``round``: the one that was opened last, None before the first; ``selected``: how many sites it
    asks, and ``waiting_for``: those whose delta is not there. ``held_out_nll``: of the adapter that
    the last closed round began from, ``adapter_sha``: of the one that it produced.
    """

    run: str
    closed: int
    rounds: int
    round: int | None
    selected: int
    waiting_for: tuple[str, ...]
    held_out_nll: float | None
    adapter_sha: str | None

    @classmethod
    def of(cls, state: RunState) -> Self:
        """What a coordinator's state says."""
        opened = state.opened
        return cls(
            run=state.config.run.name,
            closed=state.last_round,
            rounds=state.total_rounds,
            round=opened.round if opened else None,
            selected=len(opened.selected if opened else state.members),
            waiting_for=state.waiting_for if opened else (),
            held_out_nll=state.held_out[-1] if state.held_out else None,
            adapter_sha=state.adapter_sha,
        )


@dataclass(frozen=True)
class Said:
    """Something larger begins, in words."""

    text: str


Event: TypeAlias = SiteMoved | RunMoved | Said
