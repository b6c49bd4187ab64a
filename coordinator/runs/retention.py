"""What may be deleted of a run, what can then no longer be done, and the deleting.

Records are never deleted, only tensors and uploads. Which tensors go is pure, and on record before
the first of them does, so a deletion that was cut off is told from damage, and asking again
finishes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from coordinator.history import read_history
from coordinator.runs.branching import ADAPTER_FILES
from shared import topology
from shared.errors import ConfigError
from shared.protocol.records import PrunedRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from coordinator.history import History
    from shared.protocol.ledger import Ledger
    from shared.protocol.records import ClosedRecord

# What a result names beside its adapter: how its key is made, and the field.
_BESIDE_ADAPTERS: Final = (
    (topology.server_state_key, "server_sha"),
    (topology.server_state_key, "exact_sha"),
    (topology.update_key, "update_sha"),
)
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
    ``erased``: what content is to be gone, empty where room is to be made.
    """

    run: str
    keep: str
    objects: tuple[Doomed, ...]
    kept: tuple[str, ...]
    consequences: tuple[str, ...]
    uploads: tuple[Doomed, ...] = ()
    erased: str = ""

    @property
    def all(self) -> tuple[Doomed, ...]:
        """Every object that is to go."""
        return (*self.objects, *self.uploads)

    @property
    def bytes(self) -> int:
        """How much room it makes."""
        return sum(item.size for item in self.all)


def plan(history: History, sizes: Mapping[str, int], keep: str) -> Plan:
    """What ``keep`` (``all``, ``adapters`` or ``last:N``) lets go. ``sizes``: each object's bytes.

    Raises ConfigError for another word.
    """
    newest, last = _rounds_kept(keep), history.last_closed
    if keep == "all" or last < 0:
        return Plan(history.run, keep, (), (), ())
    # The source of the first round that is kept stays too: without it that round's deltas could
    # not be added up again.
    source = last if newest is None else last - newest
    objects, kept = _deltas(history, sizes, source + 1)
    results = {n: there.closed for n, there in history.rounds.items() if there.closed}
    gone = [
        (key_of(history.run, sha), number)
        for key_of, name in _BESIDE_ADAPTERS
        for sha, number in _before(source, _shas(results, name))
    ]
    if newest is not None:
        gone += [
            (topology.adapter_key(history.run, sha, file), number)
            for sha, number in _before(source, _adapters(history))
            for file in reversed(ADAPTER_FILES)
        ]
    objects += [Doomed(key, number, sizes[key]) for key, number in gone if key in sizes]
    ordered = tuple(sorted(objects, key=lambda item: (item.round, item.key)))
    return Plan(history.run, keep, ordered, tuple(kept), _consequences(history, ordered))


def read_plan(ledger: Ledger, keep: str) -> Plan:
    """The plan for a run as it is now. Raises RunNotFoundError, LedgerDamagedError, ConfigError."""
    history = read_history(ledger.store, ledger.run)
    wanted = plan(history, sizes_of(ledger), keep)
    if keep == "all":
        return wanted
    return replace(wanted, uploads=tuple(uploads_of(ledger, history)))


def sizes_of(ledger: Ledger) -> dict[str, int]:
    """The bytes of every tensor file of a run, by key."""
    run = ledger.run
    folders = (
        f"{topology.run_prefix(run)}adapters/",
        topology.deltas_prefix(run),
        topology.server_state_prefix(run),
        topology.updates_prefix(run),
        topology.bases_prefix(run),
    )
    return {info.key: info.size for folder in folders for info in ledger.store.list(folder)}


def carry_out(
    ledger: Ledger, wanted: Plan, reason: str, by: str, report: Callable[[Doomed], None]
) -> PrunedRecord | None:
    """Record what goes, then delete it; None where nothing on record does.

    May be cut off and repeated.
    """

    def make(number: int) -> PrunedRecord:
        keys = tuple(item.key for item in wanted.objects)
        return PrunedRecord(
            number=number, keep=wanted.keep, erased=wanted.erased, keys=keys, reason=reason, by=by
        )

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


def _adapters(history: History) -> dict[int, str]:
    """Every adapter by the round that produced it."""
    return {n: there.result.adapter_sha for n, there in history.rounds.items() if there.result}


def _shas(results: Mapping[int, ClosedRecord], name: str) -> dict[int, str]:
    """What a field of the results names, by round."""
    found = {number: getattr(closed, name) for number, closed in results.items()}
    return {number: sha for number, sha in found.items() if sha is not None}


def _before(oldest: int, shas: Mapping[int, str]) -> list[tuple[str, int]]:
    """What only rounds before ``oldest`` made, with the last of them that did."""
    staying = {sha for number, sha in shas.items() if number >= oldest}
    return list({sha: n for n, sha in shas.items() if sha not in staying}.items())


def _deltas(
    history: History, sizes: Mapping[str, int], first: int
) -> tuple[list[Doomed], list[str]]:
    """The deltas that no round from ``first`` on is made of, and what stays of them, and why."""
    objects: list[Doomed] = []
    kept: list[str] = []
    counted = {p: n for p, (n, _) in history.counted.items() if history.round(n).closed}
    owners = {
        topology.delta_key(history.run, number, site, record.sha): (site, number)
        for (site, number), record in history.accepted.items()
    }
    prefix = f"{topology.run_prefix(history.run)}deltas/"
    for key in sizes:
        folder = key.removeprefix(prefix).partition("/")[0]
        if not key.startswith(prefix) or not folder.isdecimal():
            continue
        pair = owners.get(key)
        number = counted.get(pair, int(folder)) if pair else int(folder)
        never_closed = history.finished is not None and number > history.last_closed
        if number >= first and not never_closed:
            continue
        if history.finished is not None or pair in counted:
            objects.append(Doomed(key, number, sizes[key]))
        elif pair is None:
            kept.append(f"{key}: no record says yet what it is, and the run is not finished")
        else:
            why = f"no round has counted it yet (of round {pair[1]})"
            kept.append(f"{key}: {why}, and the run is not finished")
    return objects, kept


def uploads_of(ledger: Ledger, history: History) -> Iterator[Doomed]:
    """What lies in the inbox of rounds that take nothing any more; after the end all of it."""
    newest = history.last_closed - history.config.policy.late_rounds
    for info in ledger.store.list(topology.inbox_prefix(ledger.run)):
        number = topology.round_of_inbox(info.key)
        if history.finished is not None or number <= newest:
            yield Doomed(info.key, number, info.size)


def _consequences(history: History, objects: tuple[Doomed, ...]) -> tuple[str, ...]:
    if not objects:
        return ()
    rest = "its result is" if history.finished else "what the run needs to continue is"
    return (*what_is_lost(history, objects), f"nothing else: {rest} kept")


def what_is_lost(history: History, objects: tuple[Doomed, ...]) -> list[str]:
    """What can no longer be done without these objects, a line each."""
    adapters = {item.round for item in objects if "/adapters/" in item.key}
    blind = {item.round for item in objects if "/deltas/" in item.key}
    states = {item.round for item in objects if "/server_state/" in item.key}
    blind |= {number + 1 for number in adapters | states}
    blind &= _adapters(history).keys()
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
    return found


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
