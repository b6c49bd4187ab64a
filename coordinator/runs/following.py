"""A run followed while it happens: from its newest round and the status object.

Whoever follows reads the store only, and little of it: the status object each second, the ledger
every few seconds or when the status says that something moved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from coordinator.liveness import AT_THE_SITE, away_since, is_away, read_status
from coordinator.runs.newest_round import Follower, awaited, round_now
from shared.errors import RunNotFoundError, StoreError
from shared.methods.rules import too_few
from shared.protocol.events import AWAITS_APPROVAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coordinator.liveness import RunStatus, SiteStatus
    from coordinator.runs.newest_round import News, RoundLoss, RoundNow
    from shared.stores.port import ObjectStore

REFRESH_SECONDS = 1.0
LEDGER_SECONDS = 3.0
SILENT_SECONDS = 30.0  # a coordinator writes every five
DOING = {
    "load": "loading",
    "evaluate": "evaluating",
    "train": "training",
    "upload": "uploading",
    AWAITS_APPROVAL: AT_THE_SITE,
}


@dataclass(frozen=True)
class SiteNow:
    """One participant. Times are seconds since the epoch.

    ``state``: waiting, loading, evaluating, training, uploading, accepted, counted, left out (by
    the rule), excluded, declined, does not fit (the others' base, tensors or versions), joined,
    idle (not in this round), away, or awaits approval at the site. ``eta_seconds``: to the end of
    the activity, at the speed so far. ``pending_since``: since when its word is awaited; None if it
    is not. Rates and bytes are as it told last.
    """

    site: str
    state: str
    step: int | None = None
    of: int | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    bytes_down: int | None = None
    bytes_up: int | None = None
    away_since: float | None = None
    pending_since: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class View:
    """The run at one moment. ``round`` -1: before round 0. ``seen``: when a coordinator last wrote.

    ``state``: waiting, open, closing, closed, paused, finished or failed. ``losses``: of rounds
    that closed since it is followed.
    """

    run: str
    round: int
    rounds: int
    state: str
    since: float
    seen: float | None
    coordinator_silent: bool
    reason: str = ""
    adapter_sha: str | None = None
    sites: list[SiteNow] = field(default_factory=list)
    losses: list[RoundLoss] = field(default_factory=list)


class Reading:
    """A run read again and again, little of it each time. Raises RunNotFoundError.

    ``whole``: as a follower's. ``seconds``: after which the ledger is listed again, whatever the
    status says.
    """

    def __init__(
        self,
        store: ObjectStore,
        run: str,
        *,
        whole: bool = False,
        seconds: float = LEDGER_SECONDS,
    ) -> None:
        self.follower = Follower(store, run, whole=whole)
        self._store, self._run, self._seconds = store, run, seconds
        self._now: RoundNow | None = None
        self._told_by: object = None
        self._due = 0.0

    def again(self, number: int | None = None) -> tuple[RoundNow, RunStatus | None]:
        """Round ``number`` or the newest one, and what a coordinator last saw."""
        status, news = self.news(number)
        return self.fold(news, number), status

    def news(self, number: int | None = None) -> tuple[RunStatus | None, News | None]:
        """What a coordinator last saw, and what is new; None where nobody looked for that yet."""
        status = read_status(self._store, self._run)
        moved = status and (status.round, status.state, status.waiting_for)
        if self._now is not None and moved == self._told_by and time.monotonic() < self._due:
            return status, None
        found = self.follower.news(number)
        self._told_by, self._due = moved, time.monotonic() + self._seconds
        return status, found

    def fold(self, news: News | None, number: int | None = None) -> RoundNow:
        """Round ``number`` or the newest one, with what is new."""
        if self._now is None or news is not None:
            if news is not None:
                self.follower.fold(news)
            self._now = round_now(self.follower.history, number)
        return self._now


def views(
    store: ObjectStore,
    run: str,
    number: int | None = None,
    *,
    away: Callable[[StoreError], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> Iterator[View]:
    """Each view that differs from the one before, until the run is finished, or the round closed.

    ``away``: told once when the store is away; it is waited for. Raises RunNotFoundError for a
    round that is not there yet.
    """
    reading = Reading(store, run)
    shown: View | None = None
    is_there = True
    while True:
        try:
            now, status = reading.again(number)
            if number is not None and number != now.number:
                raise _no_round(run, number)
            view = look(now, status, clock())
        except StoreError as error:
            if not error.retryable:
                raise
            if is_there:
                away(error)
            is_there = False
        else:
            is_there = True
            if shown is None or view != replace(shown, seen=view.seen):
                yield view  # the coordinator's clock alone makes no other view
                shown = view
            if view.state in ("finished", "failed") or (
                number is not None and view.state in ("closed", "paused")
            ):
                return
        sleep(REFRESH_SECONDS)


def look(now: RoundNow, status: RunStatus | None, clock: float) -> View:
    """The view that follows from what was read. ``clock``: this machine's time."""
    history, finished, state = now.history, now.history.finished, now.state
    paused = history.steering.paused
    if finished is not None:
        state = "failed" if finished.failed else "finished"
    elif paused is not None and state == "closed" and now.number == max(history.rounds):
        state = "paused"
    silent = status is not None and finished is None and clock - status.at > SILENT_SECONDS
    return View(
        run=history.run,
        round=now.number,
        rounds=history.total_rounds,
        state=state,
        since=now.since,
        seen=status.at if status else None,
        coordinator_silent=silent,
        reason=finished.reason if finished else paused or _in_the_way(now, status),
        adapter_sha=finished.sha if finished else None,
        sites=[_site(now, status, s, clock) for s in sorted(history.config.run.participants)],
        losses=now.losses,
    )


def _in_the_way(now: RoundNow, status: RunStatus | None) -> str:
    """Why nothing moves although nobody asked for that."""
    if status is not None and status.problem:
        return status.problem
    if now.unfit:  # the run cannot begin before somebody is fixed
        return f"waits until {', '.join(sorted(now.unfit))} is fixed and started again"
    settled = {*now.accepted, *now.excluded, *now.troubles}
    if now.number < 1 or now.state != "open" or not settled.issuperset(now.selected):
        return ""
    there = now.accepted.keys() - now.excluded.keys()  # nobody is at work any more
    return too_few(now.history.config.aggregation, len(there)) or ""


def _site(now: RoundNow, status: RunStatus | None, site: str, clock: float) -> SiteNow:
    told = status.sites.get(site) if status else None
    pending = not awaited(now, site).startswith("nothing")
    done, reason = _settled(now, site)
    base = SiteNow(
        site=site,
        state=done or "waiting",
        bytes_down=told.bytes_down if told else None,
        bytes_up=told.bytes_up if told else None,
        pending_since=now.since if pending else None,
        reason=reason,
    )
    if done is not None:
        return base
    if status is not None and is_away(site, status, clock):
        since, why = away_since(site, status)
        return replace(base, state="away", away_since=since, reason=reason or why)
    if told is None or not _is_of(told, now):
        return base
    return replace(
        base,
        state=DOING.get(told.activity or "", told.activity or "waiting"),
        step=told.step,
        of=told.of,
        tokens_per_second=told.tokens_per_second if told.activity == "train" else None,
        eta_seconds=_eta(told),
    )


def _settled(now: RoundNow, site: str) -> tuple[str | None, str]:
    """What the ledger says of it: a state that needs no word of progress, and the reason."""
    apart = {
        "declined": now.history.declined,
        "excluded": now.excluded,
        "left out": now.left_out,
        "does not fit": now.unfit,
    }
    for state, reasons in apart.items():
        if site in reasons:
            return state, reasons[site]
    if site in now.accepted:
        state = "counted" if now.state in ("closing", "closed") else "accepted"
        return state, now.accepted[site].remark
    if now.number < 1:
        return ("joined" if site in now.history.members else None), ""
    if site not in now.selected:
        return "idle", ""
    return None, now.troubles.get(site, "")


def _is_of(told: SiteStatus, now: RoundNow) -> bool:
    """Whether its last word of progress is about this round; both times are the coordinator's."""
    return (
        told.progress_at is not None
        and told.progress_at >= now.since
        and told.round in (max(now.number, 0), 0)
    )


def _eta(told: SiteStatus) -> float | None:
    if not told.step or told.of is None or told.seconds is None:
        return None
    return round(told.seconds / told.step * max(told.of - told.step, 0), 1)


def _no_round(run: str, number: int) -> RunNotFoundError:
    return RunNotFoundError(
        f"run {run} has no round {number} yet; leave it out to follow the newest, or see: "
        f"gradualdiff rounds list {run}"
    )
