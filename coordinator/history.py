"""A run as its records tell it: each kind in a field of its own, each round's in its own value.

Whatever is asked of a run's past reads it here; the state machine alone folds for itself what
happens next. Nothing is computed that a record does not say.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.round.controls import Steering, steer
from coordinator.round.members import unfit
from shared.errors import LedgerDamagedError
from shared.protocol.ledger import Ledger
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    ControlRecord,
    DeclinedRecord,
    EvaluatedRecord,
    FailedRecord,
    FinishedRecord,
    GenesisRecord,
    MemberRecord,
    OpenedRecord,
    OriginRecord,
    PrunedRecord,
    RefusedRecord,
    UnmaskedRecord,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared.config import FederationConfig
    from shared.protocol.ledger import Place
    from shared.protocol.manifest import HeldOut
    from shared.protocol.record import Record
    from shared.protocol.records import FederationRecord, Input
    from shared.protocol.secure import Exchange
    from shared.stores.port import ObjectStore

    Damage = Callable[[Place, LedgerDamagedError], None]

NO_WORD = "no word from it yet"


@dataclass
class RoundHistory:
    """One round. What is not on record is None or not there.

    Round 0 has a ``genesis`` and no decision. ``accepted``, ``evaluated``: by site. ``refused``,
    ``failed``: any number of each site's. ``unmasked``: by site. ``earlier``: what is on
    record of attempts at it before the last, of which all else tells.
    """

    number: int
    genesis: GenesisRecord | None = None
    opened: OpenedRecord | None = None
    accepted: dict[str, AcceptedRecord] = field(default_factory=dict)
    refused: list[RefusedRecord] = field(default_factory=list)
    failed: list[FailedRecord] = field(default_factory=list)
    closing: ClosingRecord | None = None
    unmasked: dict[str, UnmaskedRecord] = field(default_factory=dict)
    closed: ClosedRecord | None = None
    evaluated: dict[str, EvaluatedRecord] = field(default_factory=dict)
    earlier: list[Record] = field(default_factory=list)

    @property
    def result(self) -> GenesisRecord | ClosedRecord | None:
        """The adapter that this round produced."""
        return self.closed or self.genesis

    @property
    def state(self) -> str:
        """How far it is: open, closing or closed."""
        return "closed" if self.result else "closing" if self.closing else "open"

    @property
    def records(self) -> list[Record]:
        """All of them, in the order in which they are folded."""
        found: list[Record | None] = [
            *self.earlier,
            self.opened,
            *self.accepted.values(),
            *self.refused,
            *self.failed,
            self.closing,
            *self.unmasked.values(),
            self.genesis,
            self.closed,
            *self.evaluated.values(),
        ]
        return [record for record in found if record is not None]

    def add(self, record: Record) -> None:
        """Fold one of its records."""
        match record:
            case GenesisRecord():
                self.genesis = record
            case OpenedRecord():
                self._begin(record)
            case AcceptedRecord():
                self.accepted[record.site] = record
            case RefusedRecord():
                self.refused.append(record)
            case FailedRecord():
                self.failed.append(record)
            case ClosingRecord():
                self.closing = record
            case UnmaskedRecord():
                self.unmasked[record.site] = record
            case ClosedRecord():
                self.closed = record
            case EvaluatedRecord():
                self.evaluated[record.site] = record

    def _begin(self, opened: OpenedRecord) -> None:
        own = [self.opened, *self.accepted.values(), self.closing, *self.unmasked.values()]
        self.earlier += [record for record in own if record is not None]
        self.opened, self.accepted, self.closing, self.unmasked = opened, {}, None, {}

    @property
    def attempts(self) -> list[OpenedRecord]:
        """How each attempt at it was opened, in order."""
        earlier = [record for record in self.earlier if isinstance(record, OpenedRecord)]
        return earlier if self.opened is None else [*earlier, self.opened]


@dataclass
class History:
    """A run. ``members``: each site's last word; ``exchanges``: each key it joined with.

    ``declined``: the reason by site. ``rounds``: of which anything is on record, in order.
    """

    run: str
    federation: FederationRecord
    config: FederationConfig
    origin: OriginRecord | None = None
    members: dict[str, MemberRecord] = field(default_factory=dict)
    exchanges: dict[str, list[Exchange]] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    controls: list[ControlRecord] = field(default_factory=list)
    pruned: list[PrunedRecord] = field(default_factory=list)
    rounds: dict[int, RoundHistory] = field(default_factory=dict)
    finished: FinishedRecord | None = None

    def add(self, record: Record, number: int | None) -> None:
        """Fold one record. ``number``: the round that it lies in, if any."""
        match record:
            case OriginRecord():
                self.origin = record
            case MemberRecord():  # the first words come first
                self.members[record.site] = record
                if record.exchange is not None:
                    self.exchanges.setdefault(record.site, []).append(record.exchange)
            case DeclinedRecord():
                self.declined[record.site] = record.reason
            case ControlRecord():
                self.controls.append(record)
            case PrunedRecord():
                self.pruned.append(record)
            case FinishedRecord():
                self.finished = record
            case _ if number is not None:
                self.rounds.setdefault(number, RoundHistory(number)).add(record)

    def round(self, number: int) -> RoundHistory:
        """One round; an empty one where nothing is on record."""
        return self.rounds.get(number) or RoundHistory(number)

    @property
    def genesis(self) -> GenesisRecord | None:
        """How the run began."""
        return self.round(0).genesis

    @property
    def accepted(self) -> dict[tuple[str, int], AcceptedRecord]:
        """Every valid delta by site and round."""
        return {
            (site, number): record
            for number, there in self.rounds.items()
            for site, record in there.accepted.items()
        }

    @property
    def counted(self) -> dict[tuple[str, int], tuple[int, Input]]:
        """By site and round of every counted delta: the (first) round that counted it, and how."""
        return {
            (item.site, item.from_round): (number, item)
            for number, there in reversed(self.rounds.items())
            for item in (there.closing.inputs if there.closing else ())
        }

    def held_out(self, number: int) -> dict[str, HeldOut]:
        """Each site's loss of the adapter that round ``number`` produced, as far as it is known.

        Sites measure it when the next round starts, and once more for the last adapter.
        """
        found = {
            site: record.metrics.held_out
            for site, record in self.round(number + 1).accepted.items()
            if record.metrics.held_out is not None
        }
        return found | {s: record.held_out for s, record in self.round(number).evaluated.items()}

    @property
    def steering(self) -> Steering:
        """What operators asked, as far as it came before the end."""
        return steer(self.controls, self.finished.controls if self.finished else None)

    @property
    def unfit(self) -> dict[str, str]:
        """Before the run begins: the sites that do not fit the others, and why."""
        if self.last_closed >= 0:
            return {}
        return unfit(self.members, self.config, self.origin, self.steering.excluded)

    @property
    def waits_for(self) -> dict[str, str]:
        """Before the run begins: each site that it waits for, and why."""
        if self.finished is not None or self.last_closed >= 0:
            return {}
        out, odd = self.steering.excluded, self.unfit
        said = {site: f"it declined: {why}" for site, why in self.declined.items()}
        sites = (site for site in sorted(self.config.run.participants) if site not in out)
        reasons = {
            site: odd.get(site) if site in self.members else said.get(site, NO_WORD)
            for site in sites
        }
        return {site: why for site, why in reasons.items() if why is not None}

    @property
    def total_rounds(self) -> int:
        """T with every extension."""
        return self.config.run.rounds + self.steering.more_rounds

    @property
    def last_closed(self) -> int:
        """The last round with a result; 0 is genesis; -1 before it."""
        return max((n for n, there in self.rounds.items() if there.result), default=-1)


def read_history(
    store: ObjectStore,
    run: str,
    damaged: Damage | None = None,
    see: Callable[[Record, int | None], None] = lambda _record, _number: None,
    met: Callable[[str, bytes, bool], None] = lambda _key, _data, _own: None,
) -> History:
    """Read every record of a run. ``damaged``: called with each that cannot be read.

    ``see``: called with each other one, whole as it lies in the store, and its round.
    ``met``: as the ledger's. Raises RunNotFoundError, and LedgerDamagedError, ConfigError and
    MissingPackageError for the first record; without ``damaged`` also LedgerDamagedError for any
    other, or if the settings have not their digest.
    """
    ledger = Ledger(store, run, "reader", lambda: 0.0)
    ledger.met = met
    federation = ledger.federation()
    config = ledger.config(federation) if damaged is None else federation.settings(run)
    history = History(run, federation, config)
    for place in ledger.places():
        try:
            record = ledger.read(place.kind, place.key)
            see(record, place.round)
            history.add(record.folded(), place.round)
        except LedgerDamagedError as error:
            if damaged is None:
                raise
            damaged(place, error)
    return history
