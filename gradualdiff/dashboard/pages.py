"""What each page shows: facts of the read model, put in the order in which they are read."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coordinator.liveness import away_since, is_away
from coordinator.runs.inspection import DYING, show_round, summarise_round, with_absence
from coordinator.runs.wire import bytes_down, bytes_up
from gradualdiff.dashboard.charts import Chart, Points, bar_chart, line_chart
from gradualdiff.dashboard.watching import StillReadingError
from gradualdiff.dashboard.words import sentence
from shared import topology
from shared.errors import GradualDiffError, ObjectMissingError, RunNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coordinator.runs.following import SiteNow
    from coordinator.runs.inspection import SiteRow
    from gradualdiff.dashboard.facts import RoundFacts
    from gradualdiff.dashboard.watching import Moment, Watching
    from shared.protocol.record import Record
    from shared.stores.port import ObjectStore

Context = dict[str, Any]
FEW_SITES = 8  # as many as colours: more are shown as a band


@dataclass(frozen=True)
class SiteInRound:
    """One site in one round: what it is doing (``now``), what it sent (``row``), its records."""

    site: str
    now: SiteNow | None
    row: SiteRow | None
    records: list[tuple[str, str]]

    @property
    def state(self) -> str:
        """What it is doing while it is waited for, what became of its delta then."""
        if self.row is not None and (self.now is None or self.now.pending_since is None):
            return self.row.state
        return self.now.state if self.now else "unknown"

    @property
    def reason(self) -> str:
        """Why it is in that state."""
        told = [part.reason for part in (self.row, self.now) if part is not None and part.reason]
        return told[0] if told else ""


def runs_page(watching: Watching) -> Context:
    """Every run in one line; one that cannot be read hides no other."""
    rows = []
    for run, dying in watching.runs().items():
        row: Context = {"run": run, "summary": None, "sentence": None, "problem": ""}
        if dying:
            row["problem"] = DYING
        else:
            try:
                with watching.run(run).looking() as seen:
                    row |= {"summary": seen.summary, "sentence": sentence(seen)}
            except StillReadingError as reading:
                row["problem"] = f"its records are being read: {reading.count} so far"
            except GradualDiffError as error:
                row["problem"] = str(error)
        rows.append(row)
    return {"rows": rows, "changes": "/changes"}


def run_page(seen: Moment) -> Context:
    """One run: how it is, who is awaited, its curves, its rounds."""
    history = seen.history
    rounds = seen.facts.of(history)
    return {
        **_of_run(seen),
        "summary": seen.summary,
        "sites": seen.view.sites,
        "charts": [chart for chart in _charts(seen, rounds) if chart is not None],
        "rounds": [facts.summary for facts in reversed(rounds)],
        "strip": [facts.summary for facts in rounds],
        "records": _beside_rounds(seen),
        "base": history.config.base.model,
        "digest": history.federation.digest,
    }


def round_page(seen: Moment, number: int) -> Context:
    """One round, site by site. Raises RunNotFoundError."""
    history, status = seen.history, seen.status
    summary = summarise_round(history, number)
    rows = {row.site: row for row in with_absence(show_round(history, number), status)}
    newest = max(history.rounds)
    now = {site.site: site for site in seen.view.sites} if number == newest else {}
    there = history.round(number)
    by_site = _by_site(history.run, [*there.accepted.values(), *there.refused, *there.failed])
    sites = [
        SiteInRound(site, now.get(site), rows.get(site), by_site.get(site, []))
        for site in sorted({*rows, *now})
    ]
    decided = [r for r in (there.opened, there.closing, there.genesis, there.closed) if r]
    return {
        **_of_run(seen),
        "summary": summary,
        "sites": sites,
        "newest": newest,
        "records": [_link(history.run, record) for record in decided],
        "opened": there.opened,
    }


def sites_page(seen: Moment) -> Context:
    """Every site of a run: when it was heard, what it computes with, since when it is away."""
    history, status, now = seen.history, seen.status, time.time()
    members = history.members
    rows = []
    for site in sorted(history.config.run.participants):
        told = status.sites.get(site) if status else None
        away = status is not None and is_away(site, status, now)
        member = members.get(site)
        rows.append(
            {
                "site": site,
                "member": member,
                "seen": told.seen if told else None,
                "away": away_since(site, status) if away and status else None,
                "over": status.over.get(site, {}) if status else {},
                "records": [_link(history.run, member)] if member else [],
                "declined": history.declined.get(site, ""),
                "excluded": history.steering.excluded.get(site, ""),
            }
        )
    return {**_of_run(seen), "rows": rows}


def record_page(seen: Moment, objects: ObjectStore, name: str) -> Context:
    """A record as it lies in the store, with its sha256. Raises RunNotFoundError for anything else.

    ``name``: its key below the run's.
    """
    key = record_key(seen, name)
    data = read_record(objects, key)
    try:
        text = json.dumps(json.loads(data), indent=2, sort_keys=True)
    except ValueError:
        text = data.decode(errors="backslashreplace")
    return {
        **_of_run(seen),
        "changes": None,
        "key": key,
        "name": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "text": text,
    }


def record_key(seen: Moment, name: str) -> str:
    """The key of one of the run's records: no other object is shown. Raises RunNotFoundError."""
    run = seen.history.run
    key = topology.run_prefix(run) + name
    if key in seen.keys or key == topology.federation_key(run):
        return key
    raise RunNotFoundError(f"run {run} has no record {name!r}; its rounds' pages link to each")


def read_record(objects: ObjectStore, key: str) -> bytes:
    """Its bytes. Raises RunNotFoundError where they went since."""
    try:
        return objects.get(key)
    except ObjectMissingError as error:
        raise RunNotFoundError(str(error)) from None


def _of_run(seen: Moment) -> Context:
    return {
        "run": seen.history.run,
        "view": seen.view,
        "sentence": sentence(seen),
        "changes": f"/runs/{seen.history.run}/changes",
        "total_rounds": seen.history.total_rounds,
    }


def _charts(seen: Moment, rounds: list[RoundFacts]) -> list[Chart | None]:
    compared = {facts.compared.round: facts.compared for facts in rounds}
    pooled = {n: c.held_out_nll for n, c in compared.items() if c.held_out_nll is not None}
    held: dict[str, Points] = {"all sites": pooled}
    sites = sorted({site for facts in compared.values() for site in facts.by_site})
    band = None
    if len(sites) <= FEW_SITES:
        for site in sites:
            held[site] = {n: c.by_site[site] for n, c in compared.items() if site in c.by_site}
    else:
        there = {n: c.by_site.values() for n, c in compared.items() if c.by_site}
        band = (
            {n: min(values) for n, values in there.items()},
            {n: max(values) for n, values in there.items()},
        )
    trained = {
        loss.round: loss.last_step_nll
        for loss in seen.view.losses
        if loss.last_step_nll is not None
    }
    norms = {f.summary.round: f.summary.mean_norm for f in rounds if f.summary.mean_norm}
    cosines = {
        "mean over sites": {n: c.cosine for n, c in compared.items() if c.cosine is not None},
        "lowest": {n: c.lowest_cosine for n, c in compared.items() if c.lowest_cosine is not None},
    }
    return [
        line_chart("Held-out loss", "nats per token", held, bold="all sites", band=band),
        line_chart("Training loss at the last step", "nats per token", {"all sites": trained}),
        line_chart("Bytes", "MB", _bytes(rounds)),
        bar_chart("Seconds by phase", "s", {n: c.slowest for n, c in compared.items() if n > 0}),
        line_chart("Norm of the mean delta", "L2", {"mean delta": norms}),
        line_chart("Cosine of each delta to the mean", "cosine", cosines),
    ]


def _bytes(rounds: list[RoundFacts]) -> Mapping[str, Points]:
    """All that the sites moved, where they told; else what the store took."""
    moved = {facts.summary.round: facts.summary.traffic for facts in rounds}
    told = {number: traffic for number, traffic in moved.items() if traffic is not None}
    if not told:
        return {"deltas": {f.summary.round: f.summary.bytes / 1e6 for f in rounds[1:]}}
    return {
        "down": {number: bytes_down(traffic) / 1e6 for number, traffic in told.items()},
        "up": {number: bytes_up(traffic) / 1e6 for number, traffic in told.items()},
    }


def _beside_rounds(seen: Moment) -> list[tuple[str, str]]:
    history = seen.history
    found: list[Record | None] = [history.federation, history.origin, history.finished]
    found += [*history.controls, *history.pruned]
    return [_link(history.run, record) for record in found if record is not None]


def _link(run: str, record: Record) -> tuple[str, str]:
    """What a record is called, and its key below the run's."""
    name = record.key(run).removeprefix(topology.run_prefix(run))
    return name.rsplit("/", 1)[-1].removesuffix(".json"), name


def _by_site(run: str, records: Iterable[Record]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        kind = type(record).__name__.removesuffix("Record").lower()
        found.setdefault(getattr(record, "site", ""), []).append((kind, _link(run, record)[1]))
    return found
