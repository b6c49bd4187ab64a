"""What sites said, as they signed it, against the records that were made of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coordinator.site_keys import SiteKeys
from shared.errors import DecodeError, LedgerDamagedError, SignatureError
from shared.protocol import wire
from shared.protocol.events import (
    AdapterEvaluated,
    DeltaSubmitted,
    ParticipantReady,
    RunDeclined,
    TrainingFailed,
    UnmaskAnswered,
)
from shared.protocol.messages import to_run
from shared.protocol.record import SaidRecord
from shared.protocol.records import (
    AcceptedRecord,
    DeclinedRecord,
    EvaluatedRecord,
    FailedRecord,
    MemberRecord,
    RefusedRecord,
    RejoinedRecord,
    UnmaskedRecord,
)
from shared.tensors.masked_file import MASKED
from shared.trust.keys import PublicKey

if TYPE_CHECKING:
    from coordinator.history import History
    from shared.protocol.events import Event
    from shared.protocol.ledger import Ledger
    from shared.protocol.record import Record

# Of what event a record is made, and what the two must say alike.
_JOINS = (
    "manifest",
    "fingerprint",
    "numerics",
    "examples",
    "bases",
    "base_parameters",
    "exchange",
)
_COUNTS = (
    "size",
    "examples",
    "tokens",
    "metrics",
    "state",
    "residual",
    "traffic",
    "masked",
    "privacy",
    "audit",
)
_MADE_OF: dict[type[SaidRecord], tuple[type[Event], tuple[str, ...]]] = {
    MemberRecord: (ParticipantReady, _JOINS),
    RejoinedRecord: (ParticipantReady, _JOINS),
    DeclinedRecord: (RunDeclined, ("reason",)),
    AcceptedRecord: (DeltaSubmitted, ("round", "sha", "number", *_COUNTS)),
    RefusedRecord: (DeltaSubmitted, ("round", "sha")),
    UnmaskedRecord: (UnmaskAnswered, ("round", "revealed")),
    FailedRecord: (TrainingFailed, ("round", "attempt", "reason", "retryable")),
    EvaluatedRecord: (AdapterEvaluated, ("round", "sha", "held_out", "traffic")),
}
LEEWAY_SECONDS = 600.0  # between the clocks of operator and coordinator, and to hear of it


@dataclass(frozen=True)
class Signer:
    """How many records of a run stand on one key of a site."""

    site: str
    fingerprint: str
    records: int


@dataclass
class Signatures:
    """A run's records, looked at one by one. ``problems``: by the record's key."""

    ledger: Ledger
    problems: list[tuple[int | None, str, str]] = field(default_factory=list)
    _deltas: list[tuple[int, str, DeltaSubmitted]] = field(default_factory=list)
    _counted: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        first = self.ledger.federation()
        self._config_digest = first.digest
        self.keys: SiteKeys | None = None
        if first.signed_by is None:
            return
        self.keys = SiteKeys(self.ledger.store, PublicKey(first.signed_by))
        try:
            self.keys.read_on()
        except LedgerDamagedError as error:  # those before it are good
            key, _, problem = str(error).partition(": ")
            self.problems.append((None, key, problem))

    @property
    def signers(self) -> list[Signer]:
        """Who signed how many of those that are as they should be, by site."""
        return [Signer(*who, count) for who, count in sorted(self._counted.items())]

    def see(self, record: Record, number: int | None) -> None:
        """Check one record as it lies in the store, if it is made of what a site said."""
        if self.keys is None or not isinstance(record, SaidRecord):
            return
        try:
            fingerprint = self._check(record, self.keys)
        except (SignatureError, DecodeError) as error:
            self.problems.append((number, record.key(self.ledger.run), f"said: {error}"))
        else:
            self._counted[_site(record), fingerprint] += 1

    def compare(self, history: History) -> None:
        """What sites signed of their accepted deltas, against the round that asked for them."""
        genesis = history.genesis
        for number, key, event in self._deltas:
            opened = history.round(number).opened
            wanted = {
                "source_sha": opened.source_sha if opened else event.source_sha,
                "fingerprint": genesis.fingerprint if genesis else event.fingerprint,
                "codec": MASKED if history.config.aggregation.secure else history.config.codec.name,
            }
            for name, expected in wanted.items():
                got = getattr(event, name)
                if got not in (None, expected):
                    problem = f"said: {name}: expected {expected}, got {got}"
                    self.problems.append((number, key, problem))

    def _check(self, record: SaidRecord, keys: SiteKeys) -> str:
        """The fingerprint of the key that signed it. Raises SignatureError, DecodeError."""
        site, said = _site(record), record.said
        if said is None:
            raise SignatureError(
                f"expected what {site} signed, since the run is signed by "
                f"{keys.coordinator.fingerprint}, got nothing"
            )
        key = keys.find(site, said.by)
        if key is None:
            raise SignatureError(f"expected a key that was enrolled for {site}, got {said.by}")
        until = record.time if key.revoked is None else key.revoked
        if not key.enrolled - LEEWAY_SECONDS <= record.time <= until + LEEWAY_SECONDS:
            raise SignatureError(
                f"expected a key in force at {record.time:.0f}, got {key.public.fingerprint}, "
                f"enrolled at {key.enrolled:.0f} and revoked at {key.revoked}"
            )
        seal = said.seal()
        seal.check(site, to_run(self.ledger.run, self.ledger.birth), key.public)
        event = wire.decode(seal.data).event
        for name, signed, recorded in self._pairs(record, event):
            if signed != recorded:
                raise SignatureError(
                    f"{name}: {site} signed {_short(signed)}, the record has {_short(recorded)}"
                )
        if isinstance(record, AcceptedRecord) and isinstance(event, DeltaSubmitted):
            self._deltas.append((record.round, record.key(self.ledger.run), event))
        return key.public.fingerprint

    def _pairs(self, record: SaidRecord, event: Event) -> list[tuple[str, Any, Any]]:
        kind, names = _MADE_OF[type(record)]
        pairs: list[tuple[str, Any, Any]] = [
            ("event", type(event).__name__, kind.__name__),
            ("run", getattr(event, "run", None), self.ledger.run),
        ]
        if type(event) is not kind:
            return pairs
        if isinstance(event, ParticipantReady):
            pairs.append(("config_digest", event.config_digest, self._config_digest))
        return pairs + [(name, getattr(event, name), getattr(record, name)) for name in names]


def _site(record: SaidRecord) -> str:
    return str(getattr(record, "site"))  # noqa: B009 - each class of them has one


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
