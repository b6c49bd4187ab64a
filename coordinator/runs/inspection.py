"""Read-only views of the ledger for people and for ``--json``. Needs neither torch nor numpy.

All figures come from records; nothing is computed that a record does not say, but sums and
token-weighted means. Seconds are wall-clock at the sites, bytes are what the store took.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from coordinator.history import NO_WORD, read_history
from coordinator.liveness import AT_THE_SITE, awaits_approval, away_since, is_away, moment
from coordinator.runs.wire import in_round
from shared.errors import MissingPackageError, RunNotFoundError
from shared.methods.rules import too_few
from shared.protocol.ledger import list_runs
from shared.protocol.manifest import pool_held_out

if TYPE_CHECKING:
    from coordinator.history import History, RoundHistory
    from coordinator.liveness import RunStatus
    from shared.protocol.manifest import AuditFigures, HeldOut, Traffic
    from shared.protocol.privacy import PrivacySpent
    from shared.protocol.records import Input
    from shared.stores.port import ObjectStore

DYING = "being deleted"
LACKING = "needs a package"


@dataclass(frozen=True)
class RunSummary:
    """One line on a run.

    ``state``: waiting, round n open or closed, paused, finished, failed, being deleted, or
    needs a package that is not here, with the reason.
    ``rounds`` counts every extension. ``paused``: the reason, also while a round is still open.
    ``waits_for``: before the run begins, each site that it waits for, and why. ``excluded``: by an
    operator. ``origin``: what it branches from, ``RUN@ROUND``.
    """

    run: str
    state: str
    rounds_closed: int
    rounds: int
    participants: int
    began: float
    adapter_sha: str | None
    held_out_nll: float | None
    reason: str
    paused: str | None = None
    excluded: dict[str, str] = field(default_factory=dict)
    origin: str | None = None
    waits_for: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundSummary:
    """One line on a round. ``held_out``: of the adapter that this round produced.

    ``clipped``: by counted delta, what it was multiplied by. ``left_out``: counted deltas that the
    rule did not take, and why. ``waits_for``: why an open round has too few deltas for its rule.
    ``server_sha`` and ``step_norm``: of the server's optimiser, where there is one. ``bytes``: of
    the deltas; ``traffic``: all that the sites moved, None where none told. ``adapter_bytes``: of
    the adapter that the round produced, ``update_bytes``: of what leads to it from the one before,
    None where it travels whole.
    """

    round: int
    state: str
    selected: int
    counted: int
    excluded: int
    adapter_sha: str | None
    mean_norm: float | None
    held_out_nll: float | None
    perplexity: float | None
    tokens: int
    bytes: int
    seconds: float | None
    clipped: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    waits_for: str = ""
    server_sha: str | None = None
    step_norm: float | None = None
    traffic: Traffic | None = None
    adapter_bytes: int | None = None
    update_bytes: int | None = None


@dataclass(frozen=True)
class SiteRow:
    """One site in one round. Held-out values are of the adapter the round began from.

    ``weight`` and ``scale``: as decided; a delta that the rule left out has them too. ``traffic``:
    bytes that it moved since its delta before. ``privacy``: what its noise leaves to be learnt of
    a record, by its word; None in a run without.
    """

    site: str
    state: str
    reason: str
    held_out_nll: float | None = None
    perplexity: float | None = None
    first_step_nll: float | None = None
    last_step_nll: float | None = None
    examples: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    seconds: float | None = None
    norm: float | None = None
    cosine: float | None = None
    weight: float | None = None
    scale: float | None = None
    traffic: Traffic | None = None
    privacy: PrivacySpent | None = None
    audit: AuditFigures | None = None


def summarise_runs(store: ObjectStore) -> list[RunSummary]:
    """Every run in the store, in name order."""
    found = []
    for run, dying in list_runs(store).items():
        try:
            state, reason = DYING, f"gradualdiff runs delete {run} ends it"
            if not dying:
                found.append(summarise_run(read_history(store, run)))
                continue
        except MissingPackageError as error:  # one run hides no other
            state, reason = LACKING, str(error)
        found.append(RunSummary(run, state, 0, 0, 0, 0.0, None, None, reason))
    return found


def summarise_run(history: History) -> RunSummary:
    """One run's summary."""
    last = history.last_closed
    result = history.round(last).result
    pooled = pool_held_out(history.held_out(last).values())
    finished, steering = history.finished, history.steering
    paused = steering.paused if finished is None else None
    if finished is not None:
        state = "failed" if finished.failed else "finished"
    elif history.round(last + 1).opened:
        state = f"round {last + 1} open" + (", then paused" if paused is not None else "")
    elif paused is not None and last >= 0:
        state = f"paused after round {last}"
    else:
        state = "waiting for sites" if last < 0 else f"round {last} closed"
    return RunSummary(
        run=history.run,
        state=state,
        rounds_closed=max(last, 0),
        rounds=history.total_rounds,
        participants=len(history.members),
        began=history.federation.time,
        adapter_sha=result.adapter_sha if result else None,
        held_out_nll=pooled.nll if pooled else None,
        reason=finished.reason if finished else "",
        paused=paused,
        excluded=dict(steering.excluded),
        origin=history.origin.label if history.origin else None,
        waits_for=history.waits_for,
    )


def summarise_rounds(history: History) -> list[RoundSummary]:
    """Every round of a run, genesis (0) first."""
    return [summarise_round(history, number) for number in history.rounds]


def summarise_round(history: History, number: int) -> RoundSummary:
    """One round's summary. Raises RunNotFoundError when there is no such round."""
    there = history.rounds.get(number)
    if there is None:
        raise RunNotFoundError(
            f"run {history.run} has no round {number}; see: gradualdiff rounds list {history.run}"
        )
    opened, closing, closed = there.opened, there.closing, there.closed
    accepted = there.accepted.values()
    inputs = closing.inputs if closing else ()
    short = None
    if closing is None and opened is not None:
        reachable = there.accepted.keys() - history.steering.excluded.keys()
        short = too_few(history.config.aggregation, len(reachable))
    pooled = pool_held_out(history.held_out(number).values())
    return RoundSummary(
        round=number,
        state=there.state,
        selected=len(opened.selected) if opened else 0,
        counted=len(inputs) or len(accepted),
        excluded=len(closing.excluded) if closing else 0,
        adapter_sha=there.result.adapter_sha if there.result else None,
        mean_norm=closed.mean_norm if closed else None,
        held_out_nll=pooled.nll if pooled else None,
        perplexity=perplexity(pooled),
        tokens=sum(r.tokens for r in accepted),
        bytes=sum(r.size for r in accepted),
        seconds=round(closing.time - opened.time, 3) if opened and closing else None,
        clipped={item.label(number): item.scale for item in inputs if item.scale != 1},
        left_out=dict(closed.left_out) if closed else {},
        waits_for=short or "",
        server_sha=closed.server_sha if closed else None,
        step_norm=closed.step_norm if closed else None,
        traffic=in_round(there),
        adapter_bytes=there.result.adapter_size if there.result else None,
        update_bytes=closed.update_size if closed else None,
    )


def show_round(history: History, number: int) -> list[SiteRow]:
    """Each selected site of one round, in name order. Raises RunNotFoundError."""
    summarise_round(history, number)
    opened, counted = history.round(number).opened, history.counted
    sites = opened.selected if opened else tuple(history.members)
    return [_row(history, number, site, counted.get((site, number))) for site in sorted(sites)]


def with_absence(rows: list[SiteRow], status: RunStatus | None) -> list[SiteRow]:
    """The rows of one round; a site that is awaited and away says so as its reason."""
    now = time.time()

    def told(row: SiteRow) -> SiteRow:
        if row.state != "pending" or status is None or not is_away(row.site, status, now):
            return row
        since, why = away_since(row.site, status)
        return replace(row, reason=f"away since {moment(since)}: {why}")

    return [told(row) for row in rows]


def with_approvals(summary: RunSummary, status: RunStatus | None) -> RunSummary:
    """The run; a site of which no word is on record says so if a person there is still asked."""
    waits_for = {
        site: f"it {AT_THE_SITE}" if why == NO_WORD and awaits_approval(site, status) else why
        for site, why in summary.waits_for.items()
    }
    return replace(summary, waits_for=waits_for)


def perplexity(held_out: HeldOut | None) -> float | None:
    """exp(NLL), capped where it would overflow."""
    return None if held_out is None else math.exp(min(held_out.nll, 700.0))


def _row(history: History, number: int, site: str, counted: tuple[int, Input] | None) -> SiteRow:
    there = history.round(number)
    accepted, closed = there.accepted.get(site), there.closed
    if accepted is None:
        return SiteRow(site, *_trouble(there, site))
    state, reason = "accepted", ""
    if counted is not None:
        state, reason = _counted(history, number, *counted)
    elif closed is not None:
        state, reason = "late", f"came after round {number} closed"
    if counted is None and there.closing is not None and site in there.closing.excluded:
        state, reason = "excluded", there.closing.excluded[site]
    reason = "; ".join(said for said in (reason, accepted.remark) if said)
    metrics = accepted.metrics
    return SiteRow(
        site=site,
        state=state,
        reason=reason,
        held_out_nll=metrics.held_out.nll if metrics.held_out else None,
        perplexity=perplexity(metrics.held_out),
        first_step_nll=metrics.first_step_nll,
        last_step_nll=metrics.last_step_nll,
        examples=accepted.examples,
        tokens=accepted.tokens,
        bytes=accepted.size,
        seconds=round(sum(metrics.seconds.values()), 3),
        norm=accepted.norm,
        cosine=closed.cosines.get(site) if closed else None,
        weight=counted[1].weight if counted else None,
        scale=counted[1].scale if counted else None,
        traffic=accepted.traffic,
        privacy=accepted.privacy,
        audit=accepted.audit,
    )


def privacy_of(history: History, last: int) -> dict[str, PrivacySpent]:
    """What each site's deltas up to round ``last`` told of its privacy, the last word of each."""
    return {
        site: accepted.privacy
        for number in sorted(history.rounds)
        if number <= last
        for site, accepted in sorted(history.round(number).accepted.items())
        if accepted.privacy is not None
    }


def _counted(history: History, number: int, counted_in: int, item: Input) -> tuple[str, str]:
    """State and reason of a delta of round ``number`` that round ``counted_in`` decided on."""
    state = "counted" if counted_in == number else f"counted in {counted_in}"
    closed = history.round(counted_in).closed
    why = closed.left_out.get(item.label(counted_in)) if closed else None
    return (state, "") if why is None else ("left out", why)


def _trouble(there: RoundHistory, site: str) -> tuple[str, str]:
    """State and reason of a site without a valid delta."""
    state, reason = "pending", ""
    for refused in there.refused:
        if refused.site == site:
            state, reason = refused.verdict, refused.reason
    for failed in there.failed:
        if failed.site == site:
            state, reason = f"failed (attempt {failed.attempt})", failed.reason
    if there.closing is not None and site in there.closing.excluded:
        state, reason = "excluded", there.closing.excluded[site]
    if there.genesis is not None:
        state = "member" if site in there.genesis.members else "left out"
    return state, reason
