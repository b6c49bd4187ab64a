"""What may be deleted of a run, what can then no longer be done, and the deleting.

Records are never deleted, only tensors and uploads. Which tensors go is pure, and on record before
the first of them does, so a deletion that was cut off is told from damage, and asking again
finishes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from coordinator.runs.branching import ADAPTER_FILES
from shared import topology
from shared.errors import ConfigError
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    FinishedRecord,
    GenesisRecord,
    OpenedRecord,
    PrunedRecord,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from shared.protocol.ledger import Ledger
    from shared.protocol.records import Record

LAST = re.compile(r"last:([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Doomed:
    """An object that is to go. ``size`` in bytes."""

    key: str
    round: int
    size: int


@dataclass(frozen=True)
class Plan:
    """What is to go, what stays although it was asked for, and what can then not be done.

    ``uploads``: what lies in the inbox and nobody takes any more; no record speaks of it.
    """

    run: str
    keep: str
    objects: tuple[Doomed, ...]
    kept: tuple[str, ...]
    consequences: tuple[str, ...]
    uploads: tuple[Doomed, ...] = ()

    @property
    def all(self) -> tuple[Doomed, ...]:
        """Every object that is to go."""
        return (*self.objects, *self.uploads)

    @property
    def bytes(self) -> int:
        """How much room it makes."""
        return sum(item.size for item in self.all)


@dataclass
class _Facts:
    """What the records say of tensors."""

    adapters: dict[int, str] = field(default_factory=dict)  # by the round that produced it
    states: dict[int, str] = field(default_factory=dict)  # the server optimiser's, likewise
    accepted: dict[tuple[str, int], str] = field(default_factory=dict)  # sha by site and round
    counted: dict[tuple[str, int], int] = field(default_factory=dict)  # the closed round it is in
    source_of_open: str | None = None
    finished: bool = False

    @property
    def last(self) -> int:
        """The last round with a result; -1 before genesis."""
        return max(self.adapters, default=-1)


def plan(run: str, records: Iterable[Record], sizes: Mapping[str, int], keep: str) -> Plan:
    """What ``keep`` (``all``, ``adapters`` or ``last:N``) lets go. ``sizes``: each object's bytes.

    Raises ConfigError for another word.
    """
    newest = _rounds_kept(keep)
    facts = _read(records)
    if keep == "all" or facts.last < 0:
        return Plan(run, keep, (), (), ())
    objects: list[Doomed] = []
    kept: list[str] = []
    first = facts.last + 1 if newest is None else facts.last + 1 - newest
    owners = {
        topology.delta_key(run, n, site, sha): (site, n)
        for (site, n), sha in facts.accepted.items()
    }
    for folder, key in _deltas(run, sizes):
        pair = owners.get(key)
        number = facts.counted.get(pair, folder) if pair else folder
        never_closed = facts.finished and number > facts.last
        if number >= first and not never_closed:
            continue
        why = _needed(facts, pair)
        if why:
            kept.append(f"{key}: {why}")
        else:
            objects.append(Doomed(key, number, sizes[key]))
    objects += _states(run, facts, sizes, facts.last if newest is None else first - 1)
    if newest is not None:
        # The source of the first round that is kept stays too: without it that round's deltas
        # could not be added up again.
        staying = {sha for number, sha in facts.adapters.items() if number >= first - 1}
        staying |= {facts.adapters[facts.last], facts.source_of_open or ""}
        gone = {sha: number for number, sha in facts.adapters.items() if sha not in staying}
        for sha, number in gone.items():
            keys = [topology.adapter_key(run, sha, file) for file in reversed(ADAPTER_FILES)]
            objects += [Doomed(key, number, sizes[key]) for key in keys if key in sizes]
    ordered = tuple(sorted(objects, key=lambda item: (item.round, item.key)))
    return Plan(run, keep, ordered, tuple(kept), _consequences(facts, ordered))


def read_plan(ledger: Ledger, keep: str) -> Plan:
    """The plan for a run as it is now. Raises RunNotFoundError, LedgerDamagedError, ConfigError."""
    records = list(ledger.history())
    prefix = topology.run_prefix(ledger.run)
    folders = (f"{prefix}adapters/", f"{prefix}deltas/", topology.server_state_prefix(ledger.run))
    sizes = {info.key: info.size for folder in folders for info in ledger.store.list(folder)}
    wanted = plan(ledger.run, records, sizes, keep)
    if keep == "all":
        return wanted
    return replace(wanted, uploads=tuple(_uploads(ledger, _read(records))))


def carry_out(
    ledger: Ledger, wanted: Plan, reason: str, by: str, report: Callable[[Doomed], None]
) -> PrunedRecord | None:
    """Record what goes, then delete it; None where nothing on record does.

    May be cut off and repeated.
    """

    def make(number: int) -> PrunedRecord:
        keys = tuple(item.key for item in wanted.objects)
        return PrunedRecord(number=number, keep=wanted.keep, keys=keys, reason=reason, by=by)

    record = None
    if wanted.objects:
        record = ledger.append(make, topology.pruned_prefix(ledger.run))
    for item in wanted.all:
        ledger.store.delete(item.key)
        report(item)
    return record


def _rounds_kept(keep: str) -> int | None:
    """N of ``last:N``; None for the other words."""
    if keep in ("all", "adapters"):
        return None
    found = LAST.fullmatch(keep)
    if found is None:
        raise ConfigError(
            f"--keep: expected all, adapters or last:N with N from 1, got {keep}; try --keep last:3"
        )
    return int(found[1])


def _read(records: Iterable[Record]) -> _Facts:
    facts = _Facts()
    closings: dict[int, ClosingRecord] = {}
    for record in records:
        match record:
            case GenesisRecord():
                facts.adapters[0] = record.adapter_sha
            case OpenedRecord():
                facts.source_of_open = record.source_sha
            case AcceptedRecord():
                facts.accepted[record.site, record.round] = record.sha
            case ClosingRecord():
                closings[record.round] = record
            case ClosedRecord() if record.round in closings:
                facts.adapters[record.round] = record.adapter_sha
                if record.server_sha is not None:
                    facts.states[record.round] = record.server_sha
                for item in closings[record.round].inputs:
                    facts.counted[item.site, item.from_round] = record.round
            case FinishedRecord():
                facts.finished = True
    return facts


def _deltas(run: str, sizes: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    prefix = f"{topology.run_prefix(run)}deltas/"
    for key in sizes:
        folder = key.removeprefix(prefix).partition("/")[0]
        if key.startswith(prefix) and folder.isdigit():
            yield int(folder), key


def _uploads(ledger: Ledger, facts: _Facts) -> Iterator[Doomed]:
    """What lies in the inbox of rounds that take nothing any more; after the end all of it."""
    newest = facts.last - ledger.config().policy.late_rounds
    for info in ledger.store.list(topology.inbox_prefix(ledger.run)):
        number = topology.round_of_inbox(info.key)
        if facts.finished or number <= newest:
            yield Doomed(info.key, number, info.size)


def _states(run: str, facts: _Facts, sizes: Mapping[str, int], oldest: int) -> Iterator[Doomed]:
    """States of the server's optimiser from which no round that can be recomputed goes on.

    ``oldest``: the first round whose state stays. An unfinished run goes on from the last one.
    """
    staying = {sha for n, sha in facts.states.items() if n >= min(oldest, facts.last)}
    gone = {sha: number for number, sha in facts.states.items() if sha not in staying}
    for sha, number in gone.items():
        key = topology.server_state_key(run, sha)
        if key in sizes:
            yield Doomed(key, number, sizes[key])


def _needed(facts: _Facts, pair: tuple[str, int] | None) -> str:
    """Why an unfinished run needs the delta of this site and round; empty when it does not."""
    if facts.finished or pair in facts.counted:
        return ""
    if pair is None:
        return "no record says yet what it is, and the run is not finished"
    return f"no round has counted it yet (of round {pair[1]}), and the run is not finished"


def _consequences(facts: _Facts, objects: tuple[Doomed, ...]) -> tuple[str, ...]:
    if not objects:
        return ()
    adapters = {item.round for item in objects if "/adapters/" in item.key}
    blind = {item.round for item in objects if "/deltas/" in item.key}
    states = {item.round for item in objects if "/server_state/" in item.key}
    blind |= {number + 1 for number in adapters | states}
    blind &= facts.adapters.keys()
    found = []
    if blind:
        found.append(
            f"runs verify can no longer recompute {_spans(blind)}; it still checks their records, "
            "and the bytes of every adapter that is kept"
        )
    if adapters:
        found.append(
            f"runs export and runs branch can no longer take the adapter of {_spans(adapters)}"
        )
    rest = "its result is" if facts.finished else "what the run needs to continue is"
    found.append(f"nothing else: {rest} kept")
    return tuple(found)


def _spans(numbers: Iterable[int]) -> str:
    """``round 3``, or ``rounds 1 to 3, 5``."""
    ordered = sorted(numbers)
    spans: list[list[int]] = []
    for number in ordered:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)
    return f"round{'s' if len(ordered) > 1 else ''} {text}"
