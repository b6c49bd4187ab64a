"""Where each participant stands in a run now: from the ledger's newest round and the status object.

Reads one listing and the records that it did not read before, since records never change; so it
may be asked again and again. Needs neither torch nor numpy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from coordinator.liveness import ONLINE_SECONDS
from coordinator.round.controls import Steering, steer
from coordinator.round.members import unfit
from shared import topology
from shared.protocol.ledger import Ledger
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    ControlRecord,
    DeclinedRecord,
    FailedRecord,
    FinishedRecord,
    GenesisRecord,
    MemberRecord,
    OpenedRecord,
    OriginRecord,
    Record,
    RefusedRecord,
    RejoinedRecord,
)

if TYPE_CHECKING:
    from coordinator.liveness import RunStatus
    from coordinator.runs.inspection import SiteRow
    from shared.config import FederationConfig
    from shared.stores.port import ObjectStore

# Which record lies where below ``rounds/<t>/``; evaluations tell nothing of a round's standing.
_PLACES: dict[str, type[Record]] = {
    "opened.json": OpenedRecord,
    "accepted": AcceptedRecord,
    "refused": RefusedRecord,
    "failed": FailedRecord,
    "closing.json": ClosingRecord,
    "closed.json": ClosedRecord,
}


@dataclass(frozen=True)
class RoundNow:
    """One round. ``state``: waiting (for sites to join), open, closing or closed.

    ``since``: seconds since the epoch. ``troubles``: a site's newest failure or refusal.
    ``left_out``: counted deltas that the rule did not take. ``held_out``: before a closed round.
    """

    number: int
    state: str
    since: float
    selected: tuple[str, ...]
    accepted: dict[str, AcceptedRecord] = field(default_factory=dict)
    troubles: dict[str, str] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    held_out: float | None = None


@dataclass(frozen=True)
class RoundLoss:
    """A closed round's losses in nats per token: held out before it, and where it was trained to.

    ``last_step_nll``: the mean over sites of their last step's; None where no site tells.
    """

    round: int
    held_out_nll: float | None
    last_step_nll: float | None


class Standing:
    """A run's newest round, read anew by :meth:`refresh`. Raises RunNotFoundError."""

    def __init__(self, store: ObjectStore, run: str) -> None:
        self.run = run
        self._store = store
        self._ledger = Ledger(store, run, "reader", lambda: 0.0)
        self._read: dict[str, Record] = {}
        self._began = self._ledger.federation().time
        self.config: FederationConfig = self._ledger.config()
        self.members: frozenset[str] = frozenset()
        self.declined: dict[str, str] = {}
        self.unfit: dict[str, str] = {}
        self.finished: FinishedRecord | None = None
        self.steering = Steering()
        self.newest = -1
        self.losses: dict[int, RoundLoss] = {}  # of rounds that closed since the first look
        self.round = self._waiting()

    def refresh(self, number: int | None = None) -> RoundNow:
        """Read what is new; round ``number``, or the newest one."""
        prefix = topology.run_prefix(self.run)
        names = [info.key.removeprefix(prefix) for info in self._store.list(prefix)]
        words = {
            name: record
            for folder, kind in (("members/", MemberRecord), ("rejoined/", RejoinedRecord))
            for name in names
            if name.startswith(folder)
            and isinstance(record := self._record(kind, prefix + name), MemberRecord)
        }
        members = {record.site: record for record in words.values()}  # the last word counts
        self.members = frozenset(members)
        self.declined = {
            record.site: record.reason
            for name in names
            if name.startswith("declined/")
            and isinstance(record := self._record(DeclinedRecord, prefix + name), DeclinedRecord)
        }
        controls = [
            record
            for name in names
            if name.startswith("control/")
            and isinstance(record := self._record(ControlRecord, prefix + name), ControlRecord)
        ]
        self.steering = steer(controls)
        began = any(name.startswith("rounds/") for name in names)
        self.unfit = {} if began else self._unfit(members, names)
        if "finished.json" in names:
            finished = self._record(FinishedRecord, topology.finished_key(self.run))
            self.finished = finished if isinstance(finished, FinishedRecord) else None
        rounds = [name.split("/") for name in names if name.startswith("rounds/")]
        numbers = {int(parts[1]) for parts in rounds if parts[1].isdigit()}
        self.newest = max(numbers, default=-1)
        wanted = self.newest if number is None else number
        if wanted not in numbers:
            self.round = self._waiting()
            return self.round
        # Another round may be open by the time that one is seen to be closed.
        first = wanted if self.round.number < 0 else self.round.number
        for passed in sorted(n for n in {*numbers, wanted} if min(first, wanted) <= n <= wanted):
            folder = [parts for parts in rounds if parts[1].isdigit() and int(parts[1]) == passed]
            self.round = self._fold(passed, [self._at(prefix, parts) for parts in folder])
            if self.round.state == "closed" and passed > 0:
                self.losses[passed] = _loss(self.round)
        return self.round

    def _unfit(self, members: dict[str, MemberRecord], names: list[str]) -> dict[str, str]:
        origin = None
        if "origin.json" in names:
            origin = self._record(OriginRecord, topology.origin_key(self.run))
        known = origin if isinstance(origin, OriginRecord) else None
        return unfit(members, self.config, known, self.steering.excluded)

    def _waiting(self) -> RoundNow:
        return RoundNow(-1, "waiting", self._began, tuple(sorted(self.config.run.participants)))

    def _at(self, prefix: str, parts: list[str]) -> Record | None:
        kind = _PLACES.get(parts[2])
        if kind is ClosedRecord and int(parts[1]) == 0:
            kind = GenesisRecord
        return None if kind is None else self._record(kind, prefix + "/".join(parts))

    def _record(self, kind: type[Record], key: str) -> Record:
        if key not in self._read:
            self._read[key] = self._ledger.read(kind, key)
        return self._read[key]

    def _fold(self, number: int, records: list[Record | None]) -> RoundNow:
        accepted: dict[str, AcceptedRecord] = {}
        troubles: dict[str, tuple[float, str]] = {}
        excluded: dict[str, str] = {}
        state, since, selected = "open", self._began, tuple(sorted(self.members))
        kinds = {type(record) for record in records}
        for record in records:
            match record:
                case OpenedRecord():
                    since, selected = record.time, record.selected
                case AcceptedRecord():
                    accepted[record.site] = record
                case RefusedRecord():
                    told = (record.time, f"{record.verdict}: {record.reason}")
                    troubles[record.site] = max(told, troubles.get(record.site, told))
                case FailedRecord():
                    told = (record.time, f"failed (attempt {record.attempt}): {record.reason}")
                    troubles[record.site] = max(told, troubles.get(record.site, told))
                case ClosingRecord():
                    excluded = dict(record.excluded)
        if number > 0 and ClosingRecord not in kinds:  # what was decided stands in the decision
            excluded = self.steering.excluded_among(selected)
        if kinds & {ClosedRecord, GenesisRecord}:
            state = "closed"
        elif ClosingRecord in kinds:
            state = "closing"
        closed = next((r for r in records if isinstance(r, ClosedRecord)), None)
        left_out = dict(closed.left_out) if closed else {}
        held_out = closed.source_held_out.nll if closed and closed.source_held_out else None
        reasons = {site: reason for site, (_, reason) in troubles.items()}
        return RoundNow(
            number, state, since, selected, accepted, reasons, excluded, left_out, held_out
        )


def _loss(now: RoundNow) -> RoundLoss:
    told = [record.metrics.last_step_nll for record in now.accepted.values()]
    known = [loss for loss in told if loss is not None]
    return RoundLoss(now.number, now.held_out, sum(known) / len(known) if known else None)


def awaited(standing: Standing, site: str) -> str:
    """What the coordinator waits for from this site, in words; ``nothing`` and why, if so."""
    now = standing.round
    if standing.finished is not None:
        return "nothing: the run is finished"
    out = {"it declined": standing.declined, "an operator excluded it": standing.steering.excluded}
    for word, reasons in out.items():
        if site in reasons:
            return f"nothing: {word}: {reasons[site]}"
    if site in now.accepted:
        return f"nothing: its delta of round {now.number} is accepted"
    if site in standing.members and now.state == "open" and site in now.selected:
        trouble = f" ({now.troubles[site]})" if site in now.troubles else ""
        return f"its delta of round {now.number} is awaited since {moment(now.since)}{trouble}"
    odd = standing.unfit.get(site)
    if odd is None and (site in standing.members or now.number >= 0):
        return "nothing: it joined" if site in standing.members else "nothing: it did not join"
    again = "" if odd is None else f" ({odd})"
    return f"its answer that it is ready is awaited since {moment(now.since)}{again}"


def is_away(site: str, status: RunStatus | None, now: float) -> bool | None:
    """Whether a site is gone: nobody reads its queue, or it was silent, by the coordinator's clock.

    None: it was never heard, or no coordinator wrote for so long that nobody can say. ``now`` is
    this machine's time.
    """
    if status is None or now - status.at > ONLINE_SECONDS:
        return None
    if site in status.absent:
        return True
    told = status.sites.get(site)
    return None if told is None else status.at - told.seen > ONLINE_SECONDS


def away_since(site: str, status: RunStatus) -> tuple[float, str]:
    """Since when a site that is away is known to be, in seconds since the epoch, and why."""
    if site in status.absent:
        return status.absent[site], "no process reads its queue, says the broker"
    return status.sites[site].seen, "not heard since then"


def with_absence(rows: list[SiteRow], status: RunStatus | None) -> list[SiteRow]:
    """The rows of one round; a site that is awaited and away says so as its reason."""
    now = time.time()

    def told(row: SiteRow) -> SiteRow:
        if row.state != "pending" or status is None or not is_away(row.site, status, now):
            return row
        since, why = away_since(row.site, status)
        return replace(row, reason=f"away since {moment(since)}: {why}")

    return [told(row) for row in rows]


def moment(seconds: float | None) -> str | None:
    """Seconds since the epoch as date and time in UTC; None stays None."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
