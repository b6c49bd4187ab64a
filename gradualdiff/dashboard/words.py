"""What a run's state means, in one plain sentence, and what happens next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.liveness import moment

if TYPE_CHECKING:
    from coordinator.runs.following import SiteNow, View
    from gradualdiff.dashboard.watching import Moment

WELL, WAITS, TROUBLE = "well", "waits", "trouble"
NAMED = 3  # sites in a sentence; more are counted


@dataclass(frozen=True)
class Sentence:
    """``level``: well, waits or trouble. ``next``: what happens or is to be done then."""

    level: str
    text: str
    next: str = ""


def sentence(seen: Moment) -> Sentence:
    """How the run is."""
    view = seen.view
    if view.state == "finished":
        after = seen.history.last_closed
        return Sentence(WELL, f"Finished: {after} rounds are closed, and the result is on record.")
    if view.state == "failed":
        return Sentence(TROUBLE, f"The run failed: {view.reason}")
    if view.coordinator_silent:
        return Sentence(
            TROUBLE,
            f"No coordinator has written since {moment(view.seen)}.",
            "Start it again: it resumes where it was, and nothing is lost.",
        )
    if view.state == "paused":
        return Sentence(
            WAITS, f"Paused: {view.reason}", f"It resumes with: gradualdiff runs resume {view.run}"
        )
    if view.state in ("open", "waiting"):
        return _under_way(seen, view)
    return Sentence(WELL, f"All is well: {_where(view)} is {view.state}.")


def _under_way(seen: Moment, view: View) -> Sentence:
    awaited = [site for site in view.sites if site.pending_since is not None]
    gone = [site for site in awaited if site.state == "away"]
    if view.reason:
        return Sentence(TROUBLE, f"Nothing moves in {_where(view)}: {view.reason}")
    if gone:
        since = min(site.away_since or view.since for site in gone)
        text = f"{_where(view).capitalize()} waits for {_names(gone)}, away since {moment(since)}."
        return Sentence(TROUBLE, text, _without(seen, gone))
    waits = f"it waits for {_names(awaited)}" if awaited else "it waits for nobody"
    if view.state == "waiting":
        return Sentence(WAITS, f"The run has not begun: {waits}, since {moment(view.since)}.")
    there = sum(site.state in ("accepted", "counted") for site in view.sites)
    of = len(awaited) + there
    text = f"All is well: {_where(view)} has {there} of {of} deltas; {waits}."
    return Sentence(WELL, text)


def _without(seen: Moment, gone: list[SiteNow]) -> str:
    """What becomes of a round that waits for a site which is not there."""
    opened = seen.history.round(seen.view.round).opened
    it = "it" if len(gone) == 1 else "them"
    again = "Start a participant that is away again: it resumes where it was."
    if opened is not None and opened.closes_at is not None:
        at = moment(opened.closes_at)
        return f"{again} From {at} the round closes without {it} where enough others are in."
    leave = f"gradualdiff runs exclude {seen.view.run} {gone[0].site} --reason WHY"
    return f"{again} The round waits as long; to go on without {it}: {leave}"


def _where(view: View) -> str:
    return f"round {view.round} of {view.rounds}" if view.round >= 0 else "the run before round 0"


def _names(sites: list[SiteNow]) -> str:
    names = [site.site for site in sites[:NAMED]]
    more = len(sites) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
