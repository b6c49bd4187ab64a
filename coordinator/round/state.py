"""What the state machine knows and what it asks for: the run's state, its effects. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from coordinator.round.controls import Steering, steer
from coordinator.round.members import unfit
from coordinator.round.selection import is_among
from coordinator.round.unmasking import survivors_in
from shared.config.secure import two_thirds
from shared.protocol.record import Record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.config import FederationConfig
    from shared.methods.policies import Trouble
    from shared.protocol.records import (
        AcceptedRecord,
        ClosedRecord,
        ClosingRecord,
        ControlRecord,
        FinishedRecord,
        GenesisRecord,
        MemberRecord,
        OpenedRecord,
        OriginRecord,
        RefusedRecord,
        UnmaskedRecord,
    )
    from shared.secure_sum.cohort import Survivors


@dataclass(frozen=True)
class Ticked:
    """Time passed: seconds since the epoch."""

    now: float


@dataclass(frozen=True)
class SetSigned:
    """A site signed the survivors of the decision at hand. It is asked again after a restart."""

    round: int
    site: str
    signature: str


@dataclass(frozen=True)
class Update:
    """What led from the adapter ``source_sha`` to the one of a round. ``size`` in bytes."""

    round: int
    source_sha: str
    sha: str
    size: int


# Effects: durable steps ------------------------------------------------------------------------


@dataclass(frozen=True)
class MakeGenesis:
    """Draw the first adapter, store it, record round 0 with these members."""

    members: tuple[str, ...]


@dataclass(frozen=True)
class WriteRecord:
    """Write this decision."""

    record: OpenedRecord | ClosingRecord | FinishedRecord


@dataclass(frozen=True)
class Aggregate:
    """Carry out the decision: compute, store and record the round's result."""

    closing: ClosingRecord


# Effects: notifications --------------------------------------------------------------------------


@dataclass(frozen=True)
class AnnounceRun:
    """Tell sites that the run is there."""

    sites: tuple[str, ...]


@dataclass(frozen=True)
class AnnounceRound:
    """Tell sites to train in the open round."""

    sites: tuple[str, ...]


@dataclass(frozen=True)
class AnswerDelta:
    """Tell a site what became of its delta."""

    record: AcceptedRecord | RefusedRecord


@dataclass(frozen=True)
class AskUnmask:
    """Ask survivors of the decision to reveal what opens the sum."""

    sites: tuple[str, ...]


@dataclass(frozen=True)
class AnnounceClosed:
    """Tell members a round's result."""

    closed: ClosedRecord
    sites: tuple[str, ...]


@dataclass(frozen=True)
class AnnounceFinished:
    """Tell members the end."""

    sites: tuple[str, ...]


Step = MakeGenesis | WriteRecord | Aggregate
Notification = (
    AnnounceRun | AnnounceRound | AnswerDelta | AskUnmask | AnnounceClosed | AnnounceFinished
)
Effect = Step | Notification
Fact = Record | Ticked | SetSigned


@dataclass(frozen=True)
class RunState:
    """All that is known of a run. ``held_out``: nats of A(1), A(2), ..., None where unknown.

    ``words``: how often each site's word to join was recorded. ``openings``: every round that was
    opened. ``times``: of each closed round, the seconds that its deltas took to arrive.
    ``verdicts``: the shas that were refused or late, by site and round. ``updates``: the newest, in
    order, without a gap. ``telling``: the sites whose newest delta came with a held-out loss.
    ``unmasked``: by site what was revealed for the decision at hand; ``signatures``: of its set.
    """

    config: FederationConfig
    began: float = 0.0
    now: float = 0.0
    members: Mapping[str, MemberRecord] = field(default_factory=dict)
    words: Mapping[str, int] = field(default_factory=dict)
    declined: Mapping[str, str] = field(default_factory=dict)
    genesis: GenesisRecord | None = None
    opened: OpenedRecord | None = None
    closing: ClosingRecord | None = None
    closed: ClosedRecord | None = None
    held_out: tuple[float | None, ...] = ()
    uncounted: Mapping[tuple[str, int], AcceptedRecord] = field(default_factory=dict)
    troubles: Mapping[str, Trouble] = field(default_factory=dict)
    verdicts: Mapping[tuple[str, int], frozenset[str]] = field(default_factory=dict)
    counted_rounds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    last_counted: Mapping[str, str] = field(default_factory=dict)
    openings: Mapping[int, OpenedRecord] = field(default_factory=dict)
    times: tuple[tuple[float, ...], ...] = ()
    updates: tuple[Update, ...] = ()
    controls: tuple[ControlRecord, ...] = ()
    origin: OriginRecord | None = None
    finished: FinishedRecord | None = None
    evaluated: frozenset[str] = frozenset()
    telling: frozenset[str] = frozenset()
    unmasked: Mapping[str, UnmaskedRecord] = field(default_factory=dict)
    signatures: Mapping[str, str] = field(default_factory=dict)

    @property
    def owed_losses(self) -> frozenset[str]:
        """Of a finished run: who is still to say its held-out loss of the last adapter."""
        has_result = self.finished is not None and self.finished.sha is not None
        return self.telling - self.evaluated if has_result else frozenset()

    @property
    def last_round(self) -> int:
        """The last closed round; 0 after genesis; -1 before."""
        return self.closed.round if self.closed else 0 if self.genesis else -1

    @property
    def adapter_sha(self) -> str | None:
        """The newest global adapter."""
        if self.closed:
            return self.closed.adapter_sha
        return self.genesis.adapter_sha if self.genesis else None

    @property
    def open_round(self) -> OpenedRecord | None:
        """The round that sites may submit to; None once its decision is on record."""
        return self.opened if self.closing is None and self.finished is None else None

    def takes(self, site: str, number: int) -> OpenedRecord | None:
        """The round ``number`` as it was opened, if a delta of ``site`` for it is still taken.

        That is the open round; where late deltas are carried, also an earlier one that is not too
        old. A delta that was counted already is not taken again.
        """
        opened, policy = self.openings.get(number), self.config.policy
        if opened is None or not is_among(site, opened.selected) or self.finished is not None:
            return None
        if opened is self.open_round:
            return opened
        late = self.last_round - policy.late_rounds < number <= self.last_round
        if not late or number in self.counted_rounds.get(site, ()):
            return None
        return opened

    def last_accepted(self, site: str) -> str | None:
        """Sha of the site's delta of the highest round, whether it was counted or may be later."""
        waiting = self.uncounted.get((site, self.last_trained(site)))
        return waiting.sha if waiting else self.last_counted.get(site)

    def last_trained(self, site: str) -> int:
        """The highest round of which a delta of the site was accepted; 0: none was."""
        counted = max(self.counted_rounds.get(site, ()), default=0)
        rounds = range(self.last_round + 1, counted, -1)
        return next((number for number in rounds if (site, number) in self.uncounted), counted)

    def members_in(self, number: int) -> tuple[str, ...]:
        """Who takes part in round ``number``: who was there at the start, and who joined since."""
        assert self.genesis is not None  # no round comes before it
        joined = {s for s, m in self.members.items() if 1 <= m.from_round <= number}
        return tuple(sorted(joined.union(self.genesis.members)))

    @property
    def is_incomplete(self) -> bool:
        """Before genesis: whether a site must be silent, by counting.

        Asked with each site that joins, where ``silent`` would look at all of them.
        """
        spoke = len(self.members) + len(self.declined) + len(self.steering.excluded)
        return self.genesis is None and spoke < len(self.config.run.participants)

    @property
    def silent(self) -> tuple[str, ...]:
        """Before genesis: the sites that said neither that they are ready nor that they decline."""
        if self.genesis is not None:
            return ()
        known = {*self.members, *self.declined, *self.steering.excluded}
        return tuple(s for s in sorted(self.config.run.participants) if s not in known)

    @cached_property
    def unfit(self) -> dict[str, str]:
        """Before genesis: the sites whose word does not fit the others', each with the reason."""
        if self.genesis is not None:
            return {}
        return unfit(self.members, self.config, self.origin, self.steering.excluded)

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """Sites whose word is missing: to join, for the open round, or for a decided one's sum."""
        if self.finished is not None:
            return ()
        if self.genesis is None:
            return self.silent or self.steering.in_force(self.unfit)
        if self.closing is not None:
            return self.silent_survivors
        opened = self.open_round
        if opened is None:
            return ()
        out = self.steering.excluded
        waited = (s for s in opened.selected if s not in out)
        return tuple(s for s in waited if (s, opened.round) not in self.uncounted)

    @cached_property
    def survivors(self) -> Survivors | None:
        """Whose masked deltas the decision sums that is to be carried out now; None: of nobody."""
        return survivors_in(self.config.run.name, self.opened, self.closing)

    @property
    def silent_survivors(self) -> tuple[str, ...]:
        """Those of them who have not answered."""
        there = self.survivors
        return tuple(s for s in sorted(there.shas if there else ()) if s not in self.unmasked)

    @property
    def may_unmask(self) -> bool:
        """Whether sites act on the decision's set: two thirds signed it, or nobody signs."""
        terms = self.opened.secure if self.opened else None
        if terms is None or not terms.identities:
            return True
        return len(self.signatures) >= two_thirds(len(terms.roster))

    @property
    def steering(self) -> Steering:
        """What the operators' records mean for what happens next."""
        return steer(self.controls)

    @property
    def total_rounds(self) -> int:
        """T with every extension."""
        return self.config.run.rounds + self.steering.more_rounds
