"""Every record of a run, read one by one, so that a damaged one hides no other.

What cannot be read is a finding with the object's key and round. No tensor is looked at here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from shared.errors import LedgerDamagedError
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
    PrunedRecord,
    Record,
)

if TYPE_CHECKING:
    from shared.protocol.ledger import Ledger

AnyRecord = TypeVar("AnyRecord", bound=Record)
MOST_LOST_ROUNDS = 100


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be (or, as a note, that cannot be told any more)."""

    round: int
    key: str
    problem: str


@dataclass
class Chain:
    """A run's records by kind. ``reported``: keys whose absence is on the list already.

    An object that is there and cannot be read is one of them.
    """

    run: str
    members: dict[str, MemberRecord] = field(default_factory=dict)
    controls: list[ControlRecord] = field(default_factory=list)
    pruned: list[PrunedRecord] = field(default_factory=list)
    rounds: dict[int, list[Record]] = field(default_factory=dict)
    origin: OriginRecord | None = None
    finished: FinishedRecord | None = None
    reported: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)

    @property
    def numbers(self) -> range:
        """Every round there must be, also those of which nothing is left."""
        last, done = -1, self.finished
        for number in sorted(self.rounds):
            if number > last + MOST_LOST_ROUNDS:
                break  # a made-up record, not the end of a run that lost so many
            last = number
        result = self.one(last, ClosedRecord) or self.one(last, GenesisRecord)
        if done is not None and not done.failed and (not result or result.adapter_sha != done.sha):
            # The end knows of more rounds; if it is the end that is wrong, it may say any number.
            last = max(last, min(done.round, last + MOST_LOST_ROUNDS))
        return range(last + 1)

    def one(self, number: int, kind: type[AnyRecord]) -> AnyRecord | None:
        """The round's record of a kind there is only one of."""
        return next((r for r in self.rounds.get(number, ()) if isinstance(r, kind)), None)

    def knows(self, number: int) -> bool:
        """Whether every control up to this number can be read."""
        return len({c.number for c in self.controls if c.number <= number}) == number

    def has_result(self, number: int) -> bool:
        """Whether the round's result can be read."""
        return bool(self.one(number, ClosedRecord) or self.one(number, GenesisRecord))

    def needs_result(self, number: int) -> bool:
        """Whether something on record came after this round's result."""
        if number + 1 in self.numbers:
            return True
        done = self.finished
        return done is not None and not done.failed and done.round >= number

    def result_after(self, number: int) -> str | None:
        """What the next record calls the adapter that round ``number`` produced."""
        opened = self.one(number + 1, OpenedRecord)
        closing = self.one(number + 1, ClosingRecord)
        if opened is not None:
            return opened.source_sha
        if closing is not None:
            return closing.source_sha
        last = self.finished is not None and self.finished.round == number
        return self.finished.sha if self.finished is not None and last else None

    def pruned_by(self, key: str) -> PrunedRecord | None:
        """The record that says that this object was deleted on purpose."""
        return next((record for record in self.pruned if key in record.keys), None)

    def find(self, number: int, key: str, problem: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(number, key, problem))

    def miss(self, number: int, key: str, why: str) -> None:
        """Note once that an object is missing; that it is there and unreadable was noted before."""
        if key not in self.reported:
            self.reported.add(key)
            self.find(number, key, f"is missing, but {why}")


def read_chain(ledger: Ledger) -> Chain:
    """Read every record but the first. Raises StoreUnavailableError."""
    chain = Chain(ledger.run)
    for place in ledger.places():
        try:
            record = ledger.read(place.kind, place.key)
        except LedgerDamagedError as error:
            chain.reported.add(place.key)
            chain.find(place.round or 0, place.key, str(error).removeprefix(f"{place.key}: "))
        else:
            _keep(chain, record, place.round)
    return chain


def _keep(chain: Chain, record: Record, number: int | None) -> None:
    match record:
        case MemberRecord():  # listed first word first: the last one counts
            chain.members[record.site] = record
        case ControlRecord():
            chain.controls.append(record)
        case PrunedRecord():
            chain.pruned.append(record)
        case OriginRecord():
            chain.origin = record
        case FinishedRecord():
            chain.finished = record
        case _ if number is not None:
            chain.rounds.setdefault(number, []).append(record)


def accepted_records(chain: Chain) -> dict[tuple[str, int], AcceptedRecord]:
    """Every valid delta by site and round."""
    found = (record for records in chain.rounds.values() for record in records)
    return {(r.site, r.round): r for r in found if isinstance(r, AcceptedRecord)}
