"""The run's records in the store: how one is written, and how all are read back in order.

Order is the protocol: upload, record, announce. A record is a conditional create and is never
overwritten. Whoever restarts folds ``history()`` and knows all that was ever decided.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from shared import modes, topology
from shared.errors import (
    FencedError,
    LedgerDamagedError,
    ObjectExistsError,
    ObjectMissingError,
    RunExistsError,
    RunNotFoundError,
)
from shared.failpoints import failpoint
from shared.protocol.chain import signed_json
from shared.protocol.messages import Voice
from shared.protocol.record import MOST, Record, StampedRecord
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    ControlRecord,
    DeclinedRecord,
    EvaluatedRecord,
    FailedRecord,
    FederationRecord,
    FinishedRecord,
    GenesisRecord,
    MemberRecord,
    OpenedRecord,
    OriginRecord,
    PrunedRecord,
    RefusedRecord,
    RejoinedRecord,
    UnmaskedRecord,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shared.config import FederationConfig
    from shared.stores.port import ObjectInfo, ObjectStore
    from shared.trust.keys import SigningKey

AnyRecord = TypeVar("AnyRecord", bound=Record)

# Where records lie below the run and what they are, in the order in which they are folded: round
# after round, the end last. The result of round 0 is a GenesisRecord.
_ORDER: tuple[tuple[str, type[Record]], ...] = (
    ("origin.json", OriginRecord),
    ("members/", MemberRecord),
    ("rejoined/", RejoinedRecord),
    ("declined/", DeclinedRecord),
    ("control/", ControlRecord),
    ("pruned/", PrunedRecord),
    ("rounds/*/opened.json", OpenedRecord),
    ("rounds/*/accepted/", AcceptedRecord),
    ("rounds/*/refused/", RefusedRecord),
    ("rounds/*/failed/", FailedRecord),
    ("rounds/*/closing.json", ClosingRecord),
    ("rounds/*/unmasked/", UnmaskedRecord),
    ("rounds/*/closed.json", ClosedRecord),
    ("rounds/*/evaluated/", EvaluatedRecord),
    ("finished.json", FinishedRecord),
)


_AFTER_ATTEMPTS = (ClosedRecord, EvaluatedRecord)  # of a round, whichever attempt led to it


@dataclass(frozen=True)
class Place:
    """Where a record lies and of what kind it is. ``round``: None beside the rounds."""

    key: str
    kind: type[Record]
    round: int | None


class Ledger:
    """One run's records. ``writer`` names this process; ``clock`` gives seconds since the epoch.

    ``key``: what this coordinator signs all its records with; None for whoever reads, for an
    operator, and where nobody signs.
    ``met``: told of each record that is read or written here, its key, its bytes, and whether this
    process wrote them just now.
    """

    def __init__(
        self,
        store: ObjectStore,
        run: str,
        writer: str,
        clock: Callable[[], float],
        key: SigningKey | None = None,
    ) -> None:
        self.store = store
        self.run = run
        self.writer = writer
        self.key = key
        self._clock = clock
        self.met: Callable[[str, bytes, bool], None] = lambda _key, _data, _own: None

    @cached_property
    def birth(self) -> str:
        """sha256 of the run's first record: no other run has it, of the same name neither.

        Raises ObjectMissingError before there is one.
        """
        return hashlib.sha256(self.store.get(topology.federation_key(self.run))).hexdigest()

    @property
    def voice(self) -> Voice | None:
        """What signs this coordinator's words in the run; None where nobody signs."""
        return Voice(self.key, self.birth) if self.key else None

    def where(self, key: str) -> str:
        """The place for which a record is signed: in this very run, whatever its name."""
        first = key == topology.federation_key(self.run)
        return key if first else f"{self.birth}/{key.removeprefix(topology.run_prefix(self.run))}"

    def bytes_of(self, record: Record) -> bytes:
        """The bytes of a record as it is stored, signed where this ledger has a key."""
        where = self.where(record.key(self.run)) if self.key else ""
        return signed_json(record.model_dump(mode="json"), where, self.key)

    def begin(self, config: FederationConfig) -> FederationRecord:
        """Record the config, or meet the equal one of an earlier start.

        Raises RunExistsError naming each setting that differs from what is on record, for a run
        that is being deleted, and for one that another key signs; MissingPackageError where it
        began with other modes. A run keeps its key, or that it has none, to its end.
        """
        if self.is_dying():
            raise RunExistsError(_dying(self.run))
        mine = FederationRecord(
            config=config.recorded(),
            digest=config.digest,
            modes=modes.origins(config),
            signed_by=self.key.public.text if self.key else None,
        )
        theirs = self.write(mine)
        if theirs.digest != mine.digest:
            changes = "; ".join(_differences(theirs.config, mine.config))
            raise RunExistsError(
                f"run {self.run} is on record with another config: {changes}. "
                "Restore these settings to resume it, choose another run.name, or delete the run: "
                f"gradualdiff runs delete {self.run}"
            )
        modes.require(theirs.modes, f"run {self.run}")
        if theirs.signed_by != mine.signed_by:
            do = "Name that key in trust.key_file" if theirs.signed_by else "Take [trust] out"
            raise RunExistsError(
                f"run {self.run} is on record as signed by {theirs.signed_by or 'nobody'}, and "
                f"this process signs with {mine.signed_by or 'no key'}. {do}, or choose another "
                "run.name"
            )
        return theirs

    def write(self, record: AnyRecord) -> AnyRecord:
        """Write a record once; on meeting an earlier one, adopt that.

        Raises as :meth:`put`.
        """
        return self.put(self.stamped(record))

    def stamped(self, record: AnyRecord) -> AnyRecord:
        """The record with writer and time, if its kind has them."""
        if not isinstance(record, StampedRecord):
            return record
        return record.model_copy(update={"writer": self.writer, "time": self._clock()})

    def put(self, record: AnyRecord) -> AnyRecord:
        """Write a record as it is: this very object, or an earlier one that is adopted.

        Several threads may do so at once. Raises FencedError when a deciding record is another
        writer's, and LedgerDamagedError when a result on record is not the one computed here.
        """
        key = record.key(self.run)
        data = self.bytes_of(record)
        word = type(record).__name__.removesuffix("Record").lower()
        failpoint("record.before", word)
        try:
            self.store.create(key, data)
        except ObjectExistsError:
            return self._adopt(record, self.read(type(record), key))
        self.met(key, data, True)
        failpoint("record.after", word)
        return record

    def _adopt(self, mine: AnyRecord, theirs: AnyRecord) -> AnyRecord:
        key = mine.key(self.run)
        if not isinstance(theirs, StampedRecord):
            if theirs != mine:
                raise LedgerDamagedError(
                    f"{key}: the result on record is not the one computed here from the same "
                    f"inputs; run: gradualdiff runs verify {self.run}"
                )
        elif theirs.decides and theirs.writer != self.writer:
            raise FencedError(
                f"{key} was written by {theirs.writer}, not by this process ({self.writer}): "
                "another coordinator is active for this run"
            )
        return theirs

    def read(self, kind: type[AnyRecord], key: str) -> AnyRecord:
        """One record. Raises ObjectMissingError, LedgerDamagedError."""
        return self.parse(kind, key, self.store.get(key))

    def parse(self, kind: type[AnyRecord], key: str, data: bytes) -> AnyRecord:
        """One record from its bytes. Raises LedgerDamagedError."""
        try:
            record = kind.model_validate_json(data)
        except ValidationError as error:
            detail = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(str(part) for part in detail["loc"]) or "the object"
            raise LedgerDamagedError(
                f"{key}: expected a {kind.__name__}, but {field}: {detail['msg']}; restore this "
                "object from a copy of the store, or begin a new run"
            ) from None
        if record.key(self.run) != key:
            raise LedgerDamagedError(
                f"{key}: what it says belongs to {record.key(self.run)}; restore this object from "
                "a copy of the store"
            )
        self.met(key, data, False)
        return record

    def config(self, record: FederationRecord | None = None) -> FederationConfig:
        """The config on record, or in ``record``.

        Raises RunNotFoundError, LedgerDamagedError, ConfigError, MissingPackageError.
        """
        record = record or self.federation()
        config = record.settings(self.run)
        if config.digest != record.digest:
            raise LedgerDamagedError(
                f"{topology.federation_key(self.run)}: the config does not have its digest "
                f"{record.digest[:12]}; restore this object"
            )
        return config

    def federation(self) -> FederationRecord:
        """The run's first record. Raises RunNotFoundError."""
        try:
            return self.read(FederationRecord, topology.federation_key(self.run))
        except ObjectMissingError:
            if self.is_dying():
                raise RunNotFoundError(_dying(self.run)) from None
            raise RunNotFoundError(
                f"no run {self.run!r} in this store; see: gradualdiff runs list"
            ) from None

    def is_dying(self) -> bool:
        """Whether the run is being deleted, or was until that was cut off."""
        try:
            self.store.stat(topology.deleting_key(self.run))
        except ObjectMissingError:
            return False
        return True

    def history(self) -> Iterator[Record]:
        """Every record that says what happens next, in the order and form in which it is folded."""
        yield self.federation()
        for place in self.places():
            record = self.read(place.kind, place.key)
            if place.kind is not PrunedRecord:
                yield record.folded()

    def places(self, first: int = 0) -> list[Place]:
        """Where every record but the first lies, in the order in which they are folded.

        ``first``: of the rounds before it none is listed. The end is there only if all that came
        before it is.
        """
        prefix = topology.run_prefix(self.run)
        found: list[tuple[tuple[bool, int, int, int], Place]] = []
        for info in self._listed(first):
            name, number, attempt = info.key.removeprefix(prefix), None, 1
            parts = name.split("/", 2)
            if len(parts) == 3 and parts[0] == "rounds" and parts[1].isdecimal():
                number, (attempt, rest) = int(parts[1]), _attempt_in(parts[2])
                name = f"rounds/*/{rest}"
            for index, (place, kind) in enumerate(_ORDER):
                if name == place or (place.endswith("/") and name.startswith(place)):
                    actual = GenesisRecord if number == 0 and kind is ClosedRecord else kind
                    rank = (
                        kind is FinishedRecord,
                        -1 if number is None else number,
                        MOST if kind in _AFTER_ATTEMPTS else attempt,
                        index,
                    )
                    found.append((rank, Place(info.key, actual, number)))
                    break
        return [place for _, place in sorted(found, key=lambda ranked: ranked[0])]

    def _listed(self, first: int) -> Iterator[ObjectInfo]:
        """One listing, or the end first and the rounds last."""
        prefix = topology.run_prefix(self.run)
        if first <= 0:
            yield from self.store.list(prefix)
            return
        for place, _ in reversed(_ORDER):
            if not place.startswith("rounds/"):
                yield from self.store.list(prefix + place)
        while found := list(self.store.list(topology.round_prefix(self.run, first))):
            yield from found
            first += 1

    def origin(self) -> OriginRecord | None:
        """Where the run branches from; None for a run of its own."""
        try:
            return self.read(OriginRecord, topology.origin_key(self.run))
        except ObjectMissingError:
            return None

    def controls(self, after: int = 0) -> Iterator[ControlRecord]:
        """What operators asked beyond record number ``after``, in order."""
        for info in self.store.list(topology.control_prefix(self.run)):
            if info.key > topology.control_key(self.run, after):
                yield self.read(ControlRecord, info.key)

    def pruned(self) -> Iterator[PrunedRecord]:
        """What was deleted on purpose, in order."""
        prefix = topology.pruned_prefix(self.run)
        yield from (self.read(PrunedRecord, info.key) for info in self.store.list(prefix))

    def append(self, make: Callable[[int], AnyRecord], prefix: str) -> AnyRecord:
        """Write the record ``make(number)`` at the next free number below ``prefix``.

        Whoever is not first takes the next: no number is left out, and none is written twice.
        """
        taken = [info.key for info in self.store.list(prefix)]
        number = int(taken[-1].removeprefix(prefix).removesuffix(".json")) + 1 if taken else 1
        while True:
            mine = make(number)
            written = self.write(mine)
            if getattr(written, "writer", None) == self.writer:
                return written
            number += 1


def _attempt_in(name: str) -> tuple[int, str]:
    """Of a round's record: which attempt it belongs to, and its name there."""
    again, _, rest = name.partition("/")
    number, _, inner = rest.partition("/")
    if again == topology.AGAIN and number.isdecimal() and int(number) > 1:
        return int(number), inner
    return 1, name


def list_runs(store: ObjectStore) -> dict[str, bool]:
    """The names of all runs in a store, in order; whether each is being deleted."""
    found: dict[str, bool] = {}
    for info in store.list("runs/"):
        _, run, *rest = info.key.split("/")
        if rest == ["deleting.json"]:
            found[run] = True
        elif rest == ["federation.json"]:
            found.setdefault(run, False)
    return found


def _dying(run: str) -> str:
    return f"run {run} is being deleted; finish that first: gradualdiff runs delete {run}"


def _differences(old: object, new: object, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
    elif old != new:
        yield f"{path} is {json.dumps(old)} on record, {json.dumps(new)} here"
