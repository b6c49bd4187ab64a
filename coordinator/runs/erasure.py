"""What a run's text was pressed into, gone on purpose: all of it, a round's, or one site's.

Records stay with all their digests, counts and losses: that a run was, what it came to and who took
part can be shown afterwards, and nothing of what was learned can be read. As with pruning, what
goes is on record before the first object does; asking again finishes one that was cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.arrivals import Arrivals
from coordinator.history import read_history
from coordinator.runs.branching import ADAPTER_FILES
from coordinator.runs.retention import (
    Doomed,
    Plan,
    carry_out,
    plan,
    sizes_of,
    uploads_of,
    what_is_lost,
)
from shared import topology
from shared.errors import ConfigError, LedgerError, RunNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from coordinator.history import History
    from shared.protocol.ledger import Ledger
    from shared.protocol.records import PrunedRecord

RECORDS = "records"  # what an erasure keeps


def read_erasure(ledger: Ledger, *, number: int | None = None, site: str | None = None) -> Plan:
    """What goes of a run as it is now: of a round, of a site, of both, or all.

    Of an unfinished run only a site's deltas that closed rounds have counted: the others are still
    needed. Raises RunNotFoundError, ConfigError (no such site), LedgerError (not finished),
    LedgerDamagedError.
    """
    history, sizes = read_history(ledger.store, ledger.run), sizes_of(ledger)
    _check(history, number, site)
    if history.finished is None:
        pruned = plan(history, sizes, "adapters")
        mine = f"/{site}-"
        found = [item for item in pruned.objects if "/deltas/" in item.key]
        kept = tuple(line for line in pruned.kept if mine in line)
    else:
        found, kept = list(_content(history, sizes)), ()
    objects = tuple(
        sorted(
            (item for item in found if _is_meant(history, item, number, site)),
            key=lambda item: (item.round, item.key),
        )
    )
    uploads = tuple(
        item
        for item in uploads_of(ledger, history)
        if site in (None, topology.site_of_inbox(item.key)) and number in (None, item.round)
    )
    lost = _consequences(history, objects, site)
    return Plan(ledger.run, RECORDS, objects, kept, lost, uploads, _scope(number, site))


def erase(
    ledger: Ledger, wanted: Plan, reason: str, by: str, report: Callable[[Doomed], None]
) -> PrunedRecord | None:
    """Record what goes, then delete it; None where nothing on record does.

    May be cut off and repeated. Uploads in parts that were begun and never completed go too.
    """
    record = carry_out(ledger, wanted, reason, by, report)
    if read_history(ledger.store, ledger.run).finished is not None:
        Arrivals(ledger.store).abort(topology.deltas_prefix(ledger.run))
    return record


def _check(history: History, number: int | None, site: str | None) -> None:
    if site is not None and site not in history.config.run.participants:
        known = ", ".join(history.config.run.participants)
        raise ConfigError(f"--site: expected one of {known}, got {site}")
    if number is not None and number not in history.rounds:
        raise RunNotFoundError(
            f"run {history.run} has no round {number}; see: gradualdiff rounds list {history.run}"
        )
    if history.finished is None and site is None:
        raise LedgerError(
            f"run {history.run} is not finished and goes on from what would be erased; end it "
            f"first: gradualdiff runs stop {history.run}, or erase one site's: --site"
        )


def _scope(number: int | None, site: str | None) -> str:
    if number is None:
        return "all" if site is None else f"site {site}"
    return f"round {number}" + ("" if site is None else f" of site {site}")


def _content(history: History, sizes: Mapping[str, int]) -> Iterator[Doomed]:
    """Every tensor file of a finished run, with the round that it is of.

    A delta is of the round that counted it; what no result names is of round 0.
    """
    counted = {pair: number for pair, (number, _) in history.counted.items()}
    made = {key: number for number in sorted(history.rounds) for key in _made_in(history, number)}
    for key, size in sizes.items():
        number = made.get(key, 0)
        if key.startswith(topology.deltas_prefix(history.run)):
            own = topology.round_of_delta(key)
            number = counted.get((topology.site_and_sha_of_delta(key)[0], own), own)
        yield Doomed(key, number, size)


def _made_in(history: History, number: int) -> Iterator[str]:
    """The keys of what came out of a round beside deltas."""
    there, run = history.round(number), history.run
    if there.result is not None:
        for file in ADAPTER_FILES:
            yield topology.adapter_key(run, there.result.adapter_sha, file)
    if there.closed is not None:
        for sha in (there.closed.server_sha, there.closed.exact_sha):
            yield topology.server_state_key(run, sha or "")
        yield topology.update_key(run, there.closed.update_sha or "")


def _is_meant(history: History, item: Doomed, number: int | None, site: str | None) -> bool:
    """Whether it is of this round and site. A round's are also the deltas that were sent for it."""
    is_delta = item.key.startswith(topology.deltas_prefix(history.run))
    if site is not None and not (is_delta and topology.site_and_sha_of_delta(item.key)[0] == site):
        return False
    own = topology.round_of_delta(item.key) if is_delta else item.round
    return number in (None, item.round, own)


def _consequences(
    history: History, objects: tuple[Doomed, ...], site: str | None
) -> tuple[str, ...]:
    if not objects:
        return ()
    found = what_is_lost(history, objects)
    if site is not None:
        found.append(
            f"the adapters that {site} gave its deltas to are kept, with what they learned of "
            "them: erase those rounds or the run if that must go too"
        )
    found.append("records stay, with digests, counts and losses of every site")
    found.append("copies elsewhere stay: backups, older versions in the bucket, exports, branches")
    return tuple(found)
