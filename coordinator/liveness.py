"""Liveness: who was seen when, and how far it is. For people, never for a decision.

Kept in memory and written over one object outside the run every few seconds. Losing it loses a
look; the ledger knows nothing of it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationError

from shared import topology
from shared.config import Name, canonical_json
from shared.errors import ObjectMissingError, StoreError
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.protocol.events import AWAITS_APPROVAL
from shared.protocol.manifest import Schema

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coordinator.round.state import RunState
    from shared.protocol.events import TrainingProgressed
    from shared.stores.port import ObjectStore

ONLINE_SECONDS = 150.0  # a site says every 60 s that it is there
AT_THE_SITE = "awaits approval at the site"


class SiteStatus(Schema):
    """One site: when it was last heard (seconds since the epoch) and what it is doing."""

    seen: float
    """When it was last heard, seconds since the epoch."""
    progress_at: float | None = None
    """When it last told how far it is."""
    round: int | None = None
    """The round it is at."""
    activity: str | None = None
    step: int | None = None
    of: int | None = None
    seconds: float | None = None
    """Since this activity began."""
    tokens_per_second: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0


class RunStatus(Schema):
    """What a coordinator last saw."""

    run: Name
    writer: str
    at: float
    """When this was written, seconds since the epoch."""
    round: int
    state: str
    """``waiting``, ``open``, ``closing`` or ``finished``."""
    since: float
    """Since when it waits for them, seconds since the epoch."""
    waiting_for: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Sites that the run waits for."""
    sites: dict[str, SiteStatus] = Field(default_factory=dict)
    """Each site that was heard."""
    absent: dict[str, float] = Field(default_factory=dict)
    """Awaited sites whose queue has no consumer: since when (a restart starts the count again)."""
    problem: str = ""
    """Why the step that comes next did not work, and what to do; else empty."""
    over: dict[str, dict[str, int]] = Field(default_factory=dict)
    """By site and limit of ``[limits]``: how much was counted and dropped."""


class Liveness:
    """The coordinator's side: remember and write. ``over``: as in ``RunStatus``, kept by others."""

    def __init__(
        self, store: ObjectStore, run: str, writer: str, over: Mapping[str, Mapping[str, int]]
    ) -> None:
        self._store = store
        self._over = over
        self._run = run
        self._writer = writer
        self._sites: dict[str, SiteStatus] = {}
        self._absent: dict[str, float] = {}
        self.problem = ""

    def saw(self, site: str, now: float) -> None:
        """A message of this site (or of the coordinator itself) was handled."""
        if site != topology.COORDINATOR:
            known = self._sites.get(site) or SiteStatus(seen=now)
            self._sites[site] = known.model_copy(update={"seen": now})

    def progressed(self, event: TrainingProgressed, site: str, now: float) -> None:
        """How far a site says it is."""
        told = event.model_dump(exclude={"run"})
        self._sites[site] = SiteStatus(seen=now, progress_at=now, **told)

    def counted(self, consumers: Mapping[str, int], awaited: Iterable[str], now: float) -> None:
        """How many consumers the broker counts on the queues of some of the awaited sites.

        A process that was killed is gone from there at once; its last words say nothing of that.
        Without any count nobody can say who is there.
        """
        known = set(awaited) - {site for site, count in consumers.items() if count}
        absent = {site: now for site, count in consumers.items() if not count}
        if consumers:
            absent |= {site: since for site, since in self._absent.items() if site in known}
        self._absent = absent

    def write(self, state: RunState, now: float) -> None:
        """Write the status object. A store that is away is no error: the next tick comes."""
        opened = state.open_round
        if state.finished is not None:
            word, since = "finished", state.finished.time
        elif opened is not None:
            word, since = "open", opened.time
        else:
            word, since = ("closing" if state.closing else "waiting"), state.began
        participants, awaited = state.config.run.participants, state.waiting_for
        status = RunStatus(
            run=self._run,
            writer=self._writer,
            at=now,
            round=opened.round if opened else max(state.last_round, 0),
            state=word,
            since=since,
            waiting_for=awaited,
            sites={site: self._sites[site] for site in participants if site in self._sites},
            absent={site: self._absent[site] for site in awaited if site in self._absent},
            problem=self.problem,
            over={site: dict(counts) for site, counts in self._over.items()},
        )
        failpoint("status.before")
        try:
            self._store.put(
                topology.status_key(self._run), canonical_json(status.model_dump(mode="json"))
            )
            failpoint("status.after")
        except StoreError as error:
            get_logger().debug("status.skipped", reason=str(error))


def read_status(store: ObjectStore, run: str) -> RunStatus | None:
    """What the run's coordinator last saw; None if none ever wrote, or it cannot be read."""
    try:
        return RunStatus.model_validate_json(store.get(topology.status_key(run)))
    except (ObjectMissingError, ValidationError, json.JSONDecodeError):
        return None


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


def awaits_approval(site: str, status: RunStatus | None) -> bool:
    """Whether a site said of late that a person there is still to approve the run."""
    told = status.sites.get(site) if status else None
    if status is None or told is None or told.progress_at is None:
        return False
    is_fresh = status.at - told.progress_at <= ONLINE_SECONDS
    return told.activity == AWAITS_APPROVAL and is_fresh


def away_since(site: str, status: RunStatus) -> tuple[float, str]:
    """Since when a site that is away is known to be, in seconds since the epoch, and why."""
    if site in status.absent:
        return status.absent[site], "no process reads its queue, says the broker"
    return status.sites[site].seen, "not heard since then"


def moment(seconds: float | None) -> str | None:
    """Seconds since the epoch as date and time in UTC; None stays None."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
