"""Read-only views of the ledger for people and for ``--json``. Needs neither torch nor numpy.

All figures come from records; nothing is computed that a record does not say, but sums and
token-weighted means. Seconds are wall-clock at the sites, bytes are what the store took.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.round.controls import Steering, steer
from coordinator.round.members import unfit
from shared.errors import RunNotFoundError
from shared.methods.rules import too_few
from shared.protocol.ledger import Ledger, list_runs
from shared.protocol.manifest import pool_held_out
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    ControlRecord,
    DeclinedRecord,
    EvaluatedRecord,
    FailedRecord,
    FederationRecord,
    FinishedRecord,
    GenesisRecord,
    Input,
    MemberRecord,
    OpenedRecord,
    OriginRecord,
    Record,
    RefusedRecord,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shared.protocol.manifest import HeldOut
    from shared.stores.port import ObjectStore

READER = "reader"
DYING = "being deleted"


@dataclass(frozen=True)
class RunSummary:
    """One line on a run.

    ``state``: waiting, round n open or closed, paused, finished, failed, or being deleted.
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
    ``server_sha`` and ``step_norm``: of the server's optimiser, where there is one.
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


@dataclass(frozen=True)
class SiteRow:
    """One site in one round. Held-out values are of the adapter the round began from.

    ``weight`` and ``scale``: as decided; a delta that the rule left out has them too.
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


class History:
    """A run's records, grouped once. Raises RunNotFoundError, LedgerDamagedError."""

    def __init__(self, store: ObjectStore, run: str) -> None:
        self.run = run
        self.by_round: dict[int, list[Record]] = defaultdict(list)
        self.members: dict[str, MemberRecord] = {}
        self.declined: dict[str, str] = {}
        self.finished: FinishedRecord | None = None
        self.controls: list[ControlRecord] = []
        self.origin: OriginRecord | None = None
        ledger = Ledger(store, run, READER, lambda: 0.0)
        self.config = ledger.config()
        for record in ledger.history():
            match record:
                case FederationRecord():
                    self.federation = record
                case MemberRecord():  # a site's last word is the last one
                    self.members[record.site] = record
                case DeclinedRecord():
                    self.declined[record.site] = record.reason
                case FinishedRecord():
                    self.finished = record
                case ControlRecord():
                    self.controls.append(record)
                case OriginRecord():
                    self.origin = record
                case _:
                    number = getattr(record, "round", None)
                    if number is not None:
                        self.by_round[number].append(record)

    def one(self, number: int, kind: type[Record]) -> Record | None:
        """The round's record of a kind there is only one of."""
        return next((r for r in self.by_round.get(number, ()) if isinstance(r, kind)), None)

    def accepted(self, number: int) -> dict[str, AcceptedRecord]:
        """A round's valid deltas by site."""
        records = self.by_round.get(number, ())
        return {r.site: r for r in records if isinstance(r, AcceptedRecord)}

    def counted(self, site: str, number: int) -> tuple[int, Input] | None:
        """Which round counted the delta that a site made in round ``number``, and how."""
        for records in self.by_round.values():
            for closing in records:
                if isinstance(closing, ClosingRecord):
                    for item in closing.inputs:
                        if (item.site, item.from_round) == (site, number):
                            return closing.round, item
        return None

    def held_out(self, number: int) -> dict[str, HeldOut]:
        """Each site's loss of the adapter that round ``number`` produced, as far as it is known.

        Sites measure it when the next round starts, and once more for the last adapter.
        """
        found: dict[str, HeldOut] = {}
        for record in self.accepted(number + 1).values():
            if record.metrics.held_out is not None:
                found[record.site] = record.metrics.held_out
        for other in self.by_round.get(number, ()):
            if isinstance(other, EvaluatedRecord):
                found[other.site] = other.held_out
        return found

    @property
    def steering(self) -> Steering:
        """What operators asked, as far as it came before the end."""
        return steer(self.controls, self.finished.controls if self.finished else None)

    @property
    def waits_for(self) -> dict[str, str]:
        """Before the run begins: each site that it waits for, and why."""
        if self.finished is not None or self.last_closed >= 0:
            return {}
        out = self.steering.excluded
        odd = unfit(self.members, self.config, self.origin, out)
        said = {site: f"it declined: {why}" for site, why in self.declined.items()}
        sites = (site for site in sorted(self.config.run.participants) if site not in out)
        reasons = {
            site: odd.get(site) if site in self.members else said.get(site, "no word from it yet")
            for site in sites
        }
        return {site: why for site, why in reasons.items() if why is not None}

    @property
    def total_rounds(self) -> int:
        """T with every extension."""
        return self.config.run.rounds + self.steering.more_rounds

    @property
    def last_closed(self) -> int:
        """The last round with a result; 0 is genesis; -1 before it."""
        closed = [
            number
            for number, records in self.by_round.items()
            if any(isinstance(r, ClosedRecord | GenesisRecord) for r in records)
        ]
        return max(closed, default=-1)


def summarise_runs(store: ObjectStore) -> list[RunSummary]:
    """Every run in the store, in name order."""
    return [
        RunSummary(run, DYING, 0, 0, 0, 0.0, None, None, f"gradualdiff runs delete {run} ends it")
        if dying
        else summarise_run(History(store, run))
        for run, dying in list_runs(store).items()
    ]


def summarise_run(history: History) -> RunSummary:
    """One run's summary."""
    last = history.last_closed
    result = history.one(last, ClosedRecord) or history.one(last, GenesisRecord)
    pooled = pool_held_out(history.held_out(last).values())
    finished, steering = history.finished, history.steering
    paused = steering.paused if finished is None else None
    if finished is not None:
        state = "failed" if finished.failed else "finished"
    elif history.one(last + 1, OpenedRecord):
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
        adapter_sha=getattr(result, "adapter_sha", None),
        held_out_nll=pooled.nll if pooled else None,
        reason=finished.reason if finished else "",
        paused=paused,
        excluded=dict(steering.excluded),
        origin=history.origin.label if history.origin else None,
        waits_for=history.waits_for,
    )


def summarise_rounds(history: History) -> list[RoundSummary]:
    """Every round of a run, genesis (0) first."""
    return [summarise_round(history, number) for number in sorted(history.by_round)]


def summarise_round(history: History, number: int) -> RoundSummary:
    """One round's summary. Raises RunNotFoundError when there is no such round."""
    if number not in history.by_round:
        raise RunNotFoundError(
            f"run {history.run} has no round {number}; see: gradualdiff rounds list {history.run}"
        )
    opened = history.one(number, OpenedRecord)
    closing = history.one(number, ClosingRecord)
    closed = history.one(number, ClosedRecord) or history.one(number, GenesisRecord)
    accepted = history.accepted(number).values()
    inputs = closing.inputs if isinstance(closing, ClosingRecord) else ()
    short = None
    if closing is None and isinstance(opened, OpenedRecord):
        there = [r for r in accepted if r.site not in history.steering.excluded]
        short = too_few(history.config.aggregation, len(there))
    pooled = pool_held_out(history.held_out(number).values())
    state = "closed" if closed else "closing" if closing else "open"
    return RoundSummary(
        round=number,
        state=state,
        selected=len(opened.selected) if isinstance(opened, OpenedRecord) else 0,
        counted=len(inputs) or len(accepted),
        excluded=len(closing.excluded) if isinstance(closing, ClosingRecord) else 0,
        adapter_sha=getattr(closed, "adapter_sha", None),
        mean_norm=getattr(closed, "mean_norm", None),
        held_out_nll=pooled.nll if pooled else None,
        perplexity=perplexity(pooled),
        tokens=sum(r.tokens for r in accepted),
        bytes=sum(r.size for r in accepted),
        seconds=_span(opened, closing),
        clipped={item.label(number): item.scale for item in inputs if item.scale != 1},
        left_out=dict(closed.left_out) if isinstance(closed, ClosedRecord) else {},
        waits_for=short or "",
        server_sha=getattr(closed, "server_sha", None),
        step_norm=getattr(closed, "step_norm", None),
    )


def show_round(history: History, number: int) -> list[SiteRow]:
    """Each selected site of one round, in name order. Raises RunNotFoundError."""
    summarise_round(history, number)
    opened = history.one(number, OpenedRecord)
    sites = opened.selected if isinstance(opened, OpenedRecord) else tuple(history.members)
    return [_row(history, number, site) for site in sorted(sites)]


def perplexity(held_out: HeldOut | None) -> float | None:
    """exp(NLL), capped where it would overflow."""
    return None if held_out is None else math.exp(min(held_out.nll, 700.0))


def _row(history: History, number: int, site: str) -> SiteRow:
    accepted = history.accepted(number).get(site)
    if accepted is None:
        return SiteRow(site, *_trouble(history.by_round[number], site))
    closed = history.one(number, ClosedRecord)
    counted = history.counted(site, number)
    state, reason = "accepted", ""
    if counted is not None:
        state, reason = _counted(history, number, *counted)
    elif closed is not None:
        state, reason = "late", f"came after round {number} closed"
    closing = history.one(number, ClosingRecord)
    if counted is None and isinstance(closing, ClosingRecord) and site in closing.excluded:
        state, reason = "excluded", closing.excluded[site]
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
        cosine=closed.cosines.get(site) if isinstance(closed, ClosedRecord) else None,
        weight=counted[1].weight if counted else None,
        scale=counted[1].scale if counted else None,
    )


def _counted(history: History, number: int, counted_in: int, item: Input) -> tuple[str, str]:
    """State and reason of a delta of round ``number`` that round ``counted_in`` decided on."""
    state = "counted" if counted_in == number else f"counted in {counted_in}"
    closed = history.one(counted_in, ClosedRecord)
    why = closed.left_out.get(item.label(counted_in)) if isinstance(closed, ClosedRecord) else None
    return (state, "") if why is None else ("left out", why)


def _trouble(records: Iterable[Record], site: str) -> tuple[str, str]:
    """State and reason of a site without a valid delta."""
    state, reason = "pending", ""
    for record in records:
        if isinstance(record, RefusedRecord) and record.site == site:
            state, reason = record.verdict, record.reason
        elif isinstance(record, FailedRecord) and record.site == site:
            state, reason = f"failed (attempt {record.attempt})", record.reason
        elif isinstance(record, ClosingRecord) and site in record.excluded:
            state, reason = "excluded", record.excluded[site]
        elif isinstance(record, GenesisRecord):
            state = "member" if site in record.members else "left out"
    return state, reason


def _span(opened: Record | None, closing: Record | None) -> float | None:
    if isinstance(opened, OpenedRecord) and isinstance(closing, ClosingRecord):
        return round(closing.time - opened.time, 3)
    return None
