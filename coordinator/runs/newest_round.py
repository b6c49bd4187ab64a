"""What the records say of a run's newest round, read again and again.

A look reads one listing, and of the newest round the records that it did not read before, since
records never change. Needs neither torch nor numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.history import History, RoundHistory
from coordinator.liveness import moment
from shared.protocol.ledger import Ledger
from shared.protocol.records import EvaluatedRecord, OriginRecord, PrunedRecord

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.protocol.ledger import Place
    from shared.protocol.record import Record
    from shared.protocol.records import AcceptedRecord
    from shared.stores.port import ObjectStore

WHOLE_EVERY = 30  # looks


@dataclass(frozen=True)
class RoundLoss:
    """A closed round's losses in nats per token: held out before it, and where it was trained to.

    ``last_step_nll``: the mean over sites of their last step's; None where no site tells.
    """

    round: int
    held_out_nll: float | None
    last_step_nll: float | None


@dataclass(frozen=True)
class RoundNow:
    """What the records say of a run's newest round, or of the one that is asked for.

    ``number`` -1: before round 0. ``state``: waiting (for sites to join), open, closing or closed.
    ``since``: seconds since the epoch. ``troubles``: a site's newest failure or refusal.
    ``excluded``: from this round; ``out``: by an operator, from all that follow. ``left_out``:
    counted deltas that the rule did not take. ``losses``: of closed rounds, as far as they were
    read.
    """

    history: History
    number: int
    state: str
    since: float
    selected: tuple[str, ...]
    out: Mapping[str, str]
    unfit: Mapping[str, str]
    accepted: Mapping[str, AcceptedRecord] = field(default_factory=dict)
    troubles: Mapping[str, str] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    losses: list[RoundLoss] = field(default_factory=list)


@dataclass(frozen=True)
class News:
    """Records that were read and not folded. ``newest``: the highest round that is listed."""

    records: list[tuple[Place, Record]]
    newest: int


class Follower:
    """A run's records, as far as its newest round needs them. Raises RunNotFoundError.

    ``whole``: every record of every round, for whoever shows all of them.
    """

    def __init__(self, store: ObjectStore, run: str, *, whole: bool = False) -> None:
        self._ledger = Ledger(store, run, "reader", lambda: 0.0)
        federation = self._ledger.federation()
        self._history = History(run, federation, self._ledger.config(federation))
        self._read: set[str] = set()
        self._whole = whole
        self._looks = 0
        self.count = 0  # of records that were read, folded or not

    @property
    def history(self) -> History:
        """All that was folded."""
        return self._history

    @property
    def keys(self) -> set[str]:
        """Where the records that were read lie, but for the first one."""
        return self._read

    def look(self, number: int | None = None) -> RoundNow:
        """Read what is new; round ``number``, or the newest one."""
        self.fold(self.news(number))
        return round_now(self._history, number)

    def news(self, number: int | None = None) -> News:
        """What is in the store and not read yet, as far as it is needed. Nothing is folded."""
        places = self._ledger.places(self._first_listed())
        numbers = {place.round for place in places if place.round is not None}
        wanted = max(numbers, default=-1) if number is None else number
        # Another round may be open by the time that one is seen to be closed.
        first = 0 if self._whole else min(max(self._history.rounds, default=wanted), wanted)
        unneeded = (EvaluatedRecord, PrunedRecord, *([OriginRecord] if numbers else []))
        skipped = () if self._whole else unneeded
        found = News([], max(numbers, default=-1))
        for place in places:
            beside = place.round is None or first <= place.round <= wanted
            if beside and place.kind not in skipped and place.key not in self._read:
                record = self._ledger.read(place.kind, place.key).folded()
                found.records.append((place, record))
                self.count += 1
        return found

    def fold(self, found: News) -> None:
        """Take it into the history."""
        for place, record in found.records:
            self._history.add(record, place.round)
            self._read.add(place.key)
        if found.newest >= 0:
            self._history.rounds.setdefault(found.newest, RoundHistory(found.newest))

    def _first_listed(self) -> int:
        """A long run is listed whole now and then only: late words of an old round can wait."""
        self._looks += 1
        if not self._whole or self._looks % WHOLE_EVERY == 1:
            return 0
        return max(max(self._history.rounds, default=0) - 1, 0)


def round_now(history: History, number: int | None = None) -> RoundNow:
    """What ``history`` says of round ``number``, or of the newest one."""
    out, began = history.steering.excluded, history.federation.time
    there = history.rounds.get(max(history.rounds, default=-1) if number is None else number)
    if there is None:
        sites = tuple(sorted(history.config.run.participants))
        unfit = {} if history.rounds else history.unfit
        return RoundNow(history, -1, "waiting", began, sites, out, unfit)
    selected = there.opened.selected if there.opened else tuple(sorted(history.members))
    excluded: Mapping[str, str] = {}
    if there.closing is not None:  # what was decided stands in the decision
        excluded = there.closing.excluded
    elif there.number > 0:
        excluded = history.steering.excluded_among(selected)
    return RoundNow(
        history,
        there.number,
        there.state,
        there.opened.time if there.opened else began,
        selected,
        out,
        {},
        there.accepted,
        _troubles(there),
        excluded,
        there.closed.left_out if there.closed else {},
        [_loss(n, r) for n, r in history.rounds.items() if r.closed and n <= there.number],
    )


def _troubles(there: RoundHistory) -> dict[str, str]:
    told = [(r.time, r.site, f"{r.verdict}: {r.reason}") for r in there.refused]
    told += [(r.time, r.site, f"failed (attempt {r.attempt}): {r.reason}") for r in there.failed]
    return {site: reason for _, site, reason in sorted(told)}  # the last one stays


def _loss(number: int, there: RoundHistory) -> RoundLoss:
    before = there.closed.source_held_out if there.closed else None
    told = [record.metrics.last_step_nll for record in there.accepted.values()]
    known = [loss for loss in told if loss is not None]
    mean = sum(known) / len(known) if known else None
    return RoundLoss(number, before.nll if before else None, mean)


def awaited(now: RoundNow, site: str) -> str:
    """What the coordinator waits for from this site, in words; ``nothing`` and why, if so."""
    history = now.history
    if history.finished is not None:
        return "nothing: the run is finished"
    for word, reasons in (
        ("it declined", history.declined),
        ("an operator excluded it", now.out),
    ):
        if site in reasons:
            return f"nothing: {word}: {reasons[site]}"
    if site in now.accepted:
        return f"nothing: its delta of round {now.number} is accepted"
    if site in history.members and now.state == "open" and site in now.selected:
        trouble = f" ({now.troubles[site]})" if site in now.troubles else ""
        return f"its delta of round {now.number} is awaited since {moment(now.since)}{trouble}"
    odd = now.unfit.get(site)
    if odd is None and (site in history.members or now.number >= 0):
        return "nothing: it joined" if site in history.members else "nothing: it did not join"
    again = "" if odd is None else f" ({odd})"
    return f"its answer that it is ready is awaited since {moment(now.since)}{again}"
