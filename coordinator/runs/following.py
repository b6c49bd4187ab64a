"""A run followed while it happens: who is where in the round at hand, looked at every second.

Reads the store only, and little of it: the status object each second, the ledger every few seconds
or when the status says that something moved; records that were read are not read again.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from coordinator.liveness import read_status
from coordinator.runs.standing import Standing, awaited, away_since
from coordinator.runs.standing import is_away as is_gone
from shared.errors import RunNotFoundError, StoreError
from shared.methods.rules import too_few

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coordinator.liveness import RunStatus, SiteStatus
    from coordinator.runs.standing import RoundLoss, RoundNow
    from shared.stores.port import ObjectStore

REFRESH_SECONDS = 1.0
LEDGER_SECONDS = 3.0
SILENT_SECONDS = 30.0  # a coordinator writes every five
DOING = {"load": "loading", "evaluate": "evaluating", "train": "training", "upload": "uploading"}


@dataclass(frozen=True)
class SiteNow:
    """One participant. Times are seconds since the epoch.

    ``state``: waiting, loading, evaluating, training, uploading, accepted, counted, left out (by
    the rule), excluded, declined, does not fit (the others' base, tensors or versions), joined,
    idle (not in this round) or away. ``eta_seconds``: to the end of the activity, at the speed so
    far. ``pending_since``: since when its word is awaited; None if it is not. Rates and bytes are
    as it told last.
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


def views(
    store: ObjectStore,
    run: str,
    number: int | None = None,
    *,
    away: Callable[[StoreError], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> Iterator[View]:
    """Each view that differs from the one before: of the newest round until the run ends.

    ``number``: of this round, until it is closed. ``away`` is told once each time that the store
    cannot be read; it is tried again. Raises RunNotFoundError for a round that has not begun.
    """
    standing = Standing(store, run)
    shown: View | None = None
    told_by: object = None
    read_at = -LEDGER_SECONDS
    is_away = False
    while True:
        try:
            status = read_status(store, run)
            moved = status and (status.round, status.state, status.waiting_for)
            if moved != told_by or time.monotonic() - read_at >= LEDGER_SECONDS:
                standing.refresh(number)
                told_by, read_at = moved, time.monotonic()
                if number is not None and number != standing.round.number:
                    raise _no_round(run, number)
            view = look(standing, status, clock())
        except StoreError as error:
            if not error.retryable:
                raise
            if not is_away:
                away(error)
            is_away = True
        else:
            is_away = False
            if shown is None or _lasting(view) != _lasting(shown):
                yield view
                shown = view
            if _is_last(view, number):
                return
        sleep(REFRESH_SECONDS)


def _is_last(view: View, number: int | None) -> bool:
    if view.state in ("finished", "failed"):
        return True
    return number is not None and view.state in ("closed", "paused")


def look(standing: Standing, status: RunStatus | None, now: float) -> View:
    """The view that follows from what was read. ``now``: this machine's time."""
    current, finished = standing.round, standing.finished
    state = current.state
    if finished is not None:
        state = "failed" if finished.failed else "finished"
    paused = standing.steering.paused
    is_last = state == "closed" and current.number == standing.newest
    if finished is None and paused is not None and is_last:
        state = "paused"
    silent = status is not None and finished is None and now - status.at > SILENT_SECONDS
    return View(
        run=standing.run,
        round=current.number,
        rounds=standing.config.run.rounds + standing.steering.more_rounds,
        state=state,
        since=current.since,
        seen=status.at if status else None,
        coordinator_silent=silent,
        reason=finished.reason if finished else paused or _in_the_way(standing, status),
        adapter_sha=finished.sha if finished else None,
        sites=[
            _site(standing, status, site, now) for site in sorted(standing.config.run.participants)
        ],
        losses=list(standing.losses.values()),
    )


def _in_the_way(standing: Standing, status: RunStatus | None) -> str:
    """Why nothing moves although nobody asked for that."""
    return (status.problem if status else "") or _odd(standing) or _too_few(standing)


def _odd(standing: Standing) -> str:
    """Who has to be fixed before the run can begin, if anybody has."""
    odd = sorted(standing.unfit)
    return f"waits until {', '.join(odd)} is fixed and started again" if odd else ""


def _too_few(standing: Standing) -> str:
    """Why the round stays open although nobody is at work any more, if its rule says so."""
    current = standing.round
    settled = {*current.accepted, *current.excluded, *current.troubles}
    if current.number < 1 or current.state != "open" or not settled.issuperset(current.selected):
        return ""
    there = current.accepted.keys() - current.excluded.keys()
    return too_few(standing.config.aggregation, len(there)) or ""


def _site(standing: Standing, status: RunStatus | None, site: str, now: float) -> SiteNow:
    current = standing.round
    told = status.sites.get(site) if status else None
    pending = not awaited(standing, site).startswith("nothing")
    done, reason = _settled(standing, site)
    base = SiteNow(
        site=site,
        state=done or "waiting",
        bytes_down=told.bytes_down if told else None,
        bytes_up=told.bytes_up if told else None,
        pending_since=current.since if pending else None,
        reason=reason,
    )
    if done is not None:
        return base
    if status is not None and is_gone(site, status, now):
        since, why = away_since(site, status)
        return _changed(base, state="away", away_since=since, reason=reason or why)
    if told is None or not _is_of(told, current):
        return base
    return _changed(
        base,
        state=DOING.get(told.activity or "", told.activity or "waiting"),
        step=told.step,
        of=told.of,
        tokens_per_second=told.tokens_per_second if told.activity == "train" else None,
        eta_seconds=_eta(told),
    )


def _settled(standing: Standing, site: str) -> tuple[str | None, str]:
    """What the ledger says of it: a state that needs no word of progress, and the reason."""
    current = standing.round
    apart = {
        "declined": standing.declined,
        "excluded": current.excluded,
        "left out": current.left_out,
        "does not fit": standing.unfit,
    }
    for state, reasons in apart.items():
        if site in reasons:
            return state, reasons[site]
    if site in current.accepted:
        counted = current.state in ("closing", "closed")
        return ("counted" if counted else "accepted"), ""
    if current.number < 1:
        return ("joined" if site in standing.members else None), ""
    if site not in current.selected:
        return "idle", ""
    return None, current.troubles.get(site, "")


def _is_of(told: SiteStatus, current: RoundNow) -> bool:
    """Whether its last word of progress is about this round; both times are the coordinator's."""
    return (
        told.progress_at is not None
        and told.progress_at >= current.since
        and told.round in (max(current.number, 0), 0)
    )


def _eta(told: SiteStatus) -> float | None:
    if not told.step or told.of is None or told.seconds is None:
        return None
    return round(told.seconds / told.step * max(told.of - told.step, 0), 1)


def _changed(site: SiteNow, **values: object) -> SiteNow:
    return SiteNow(**{**asdict(site), **values})


def _lasting(view: View) -> dict[str, object]:
    """What makes a view another one: the coordinator's clock alone does not."""
    return {**asdict(view), "seen": None}


def _no_round(run: str, number: int) -> RunNotFoundError:
    return RunNotFoundError(
        f"run {run} has no round {number} yet; leave it out to follow the newest, or see: "
        f"gradualdiff rounds list {run}"
    )
