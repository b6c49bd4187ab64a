"""``gradualdiff rounds show --follow``: who is where in the round at hand, again every second.

Reads the store only, and little of it: the status object each second, the ledger every few seconds
or when the status says that something moved; records that were read are not read again.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import typer

from coordinator.liveness import read_status
from coordinator.round.policies import too_few
from coordinator.runs.standing import Standing, awaited, away_since, is_away
from gradualdiff.cli.output import say
from shared.errors import RunNotFoundError, StoreError, StoreMissingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coordinator.liveness import RunStatus, SiteStatus
    from coordinator.runs.standing import RoundLoss, RoundNow
    from shared.stores.port import ObjectStore

REFRESH_SECONDS = 1.0
LEDGER_SECONDS = 3.0
SILENT_SECONDS = 30.0  # a coordinator writes every five
DOING = {"load": "loading", "evaluate": "evaluating", "train": "training", "upload": "uploading"}
INTERRUPTED = 130


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


def follow(path: Path, run: str, number: int | None, *, as_json: bool) -> None:
    """Show the run's newest round, or round ``number``, until the run is finished or it is closed.

    Waits for a run that has not begun. Raises RunNotFoundError for a round that has not. On Ctrl-C
    the process ends with 130.
    """
    from gradualdiff.cli.follow_screens import make_screen

    screen = make_screen(as_json=as_json)
    try:
        watch(wait_for_run(path, run), run, number, screen.show)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    finally:
        screen.close()


def wait_for_run(path: Path, run: str, sleep: Callable[[float], None] = time.sleep) -> ObjectStore:
    """The store at ``path`` once it holds the run: whoever follows may be there first."""
    from gradualdiff.store import open_store

    told = False
    while True:
        try:
            store = open_store(path).objects
            Standing(store, run)
        except (StoreMissingError, RunNotFoundError) as error:
            if not told:
                say(f"{error}\nwaiting until it begins; Ctrl-C ends", stderr=True)
            told = True
            sleep(REFRESH_SECONDS)
        else:
            return store


def watch(
    store: ObjectStore,
    run: str,
    number: int | None,
    show: Callable[[View], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.time,
) -> None:
    """Call ``show`` with each view that differs from the one before, until the end."""
    standing = Standing(store, run)
    shown: View | None = None
    told_by: object = None
    read_at = -LEDGER_SECONDS
    away = False
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
            if not away:
                say(f"the store is away, trying again: {error}", stderr=True)
            away = True
        else:
            away = False
            if shown is None or _lasting(view) != _lasting(shown):
                show(view)
                shown = view
            if view.state in ("finished", "failed") or (
                number is not None and view.state in ("closed", "paused")
            ):
                return
        sleep(REFRESH_SECONDS)


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
    if status is not None and is_away(site, status, now):
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
