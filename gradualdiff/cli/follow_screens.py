"""How a followed round is shown: a table that changes in place, lines, or JSON lines."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from coordinator.liveness import moment
from gradualdiff.cli.output import console, make_table, make_title, round_line, say
from gradualdiff.units import fixed, megabytes

if TYPE_CHECKING:
    from rich.console import Group

    from coordinator.runs.following import SiteNow, View
    from coordinator.runs.newest_round import RoundLoss


class Screen(Protocol):
    """Where views go."""

    def show(self, view: View) -> None:
        """A view that differs from the one before."""

    def close(self) -> None:
        """The end."""


def make_screen(*, as_json: bool) -> Screen:
    """JSON lines, or a table on a terminal, or lines elsewhere."""
    if as_json:
        return JsonLines()
    return LiveTable() if console().is_terminal else Lines()


class JsonLines:
    """One object a line."""

    def show(self, view: View) -> None:
        """Print it."""
        print(json.dumps(asdict(view), sort_keys=True), flush=True)  # noqa: T201

    def close(self) -> None:
        """Nothing is left to do."""


class LiveTable:
    """One table that changes in place."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(console=console(), auto_refresh=False)
        self._live.start()

    def show(self, view: View) -> None:
        """Draw it anew."""
        self._live.update(table_of(view), refresh=True)

    def close(self) -> None:
        """Leave the last one standing."""
        self._live.stop()


class Lines:
    """One line for each round that closed, with its losses, and for the run and each site's state.

    Not for each step of a training: a log would be full of them.
    """

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def show(self, view: View) -> None:
        """Say what is new."""
        for loss in view.losses:
            self._say(f"round {loss.round}", _losses(view, loss))
        self._say("", headline(view))
        for site in view.sites:
            self._say(site.site, f"  {site.site}: {sentence(site)}")

    def close(self) -> None:
        """Nothing is left to do."""

    def _say(self, who: str, text: str) -> None:
        if self._said.get(who) != text:
            self._said[who] = text
            say(text)


def headline(view: View) -> str:
    """The run in one line."""
    where = f"round {view.round} of {view.rounds}" if view.round >= 0 else "before round 0"
    parts = [f"Run {view.run}, {where}: {view.state}"]
    if view.state in ("open", "waiting"):
        parts.append(f"since {moment(view.since)}")
    if view.reason:
        parts.append(f"({view.reason})")
    if view.adapter_sha:
        parts.append(f"adapter {view.adapter_sha}")
    if view.coordinator_silent:
        parts.append(f"- no coordinator wrote since {moment(view.seen)}")
    return " ".join(parts)


def sentence(site: SiteNow) -> str:
    """A participant in one line, without what changes by the second."""
    away = f" since {moment(site.away_since)}" if site.away_since is not None else ""
    return f"{site.state}{away}" + (f", {site.reason}" if site.reason else "")


def table_of(view: View) -> Group:
    """The view as a table below its headline and the losses of the round that closed last."""
    from rich.console import Group

    columns = (
        "site",
        "state",
        "tokens/s",
        "s to go",
        "MB down",
        "MB up",
        "pending since",
        "reason",
    )
    rows = [
        (
            site.site,
            _state(site),
            fixed(site.tokens_per_second, 1),
            fixed(site.eta_seconds, 0),
            megabytes(site.bytes_down),
            megabytes(site.bytes_up),
            moment(site.pending_since),
            site.reason,
        )
        for site in view.sites
    ]
    above = [headline(view)]
    above += [_losses(view, loss) for loss in view.losses[-1:]]
    return Group(*(make_title(line) for line in above), make_table(columns, rows))


def _losses(view: View, loss: RoundLoss) -> str:
    return round_line(loss.round, view.rounds, loss.held_out_nll, loss.last_step_nll)


def _state(site: SiteNow) -> str:
    if site.away_since is not None:
        return f"away since {moment(site.away_since)}"
    if site.of:
        return f"{site.state} {site.step} of {site.of}"
    return site.state
