"""What is compared between runs: facts from their records, and when they are not comparable.

Held-out values after round n are of the adapter that round n produced; round 0 is the base model
(for a branch: the adapter it began with).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from coordinator.runs.differing import flat_settings
from coordinator.runs.inspection import perplexity
from coordinator.runs.wire import bytes_down, bytes_up, in_round
from shared.protocol.manifest import pool_held_out

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.history import History

# In the order in which they happen; a site may name others, which come after its own.
SITE_PHASES = ("fetch", "load", "evaluate", "train", "encode")
WAITING, CLOSING = "rest of the round", "closing"


@dataclass(frozen=True)
class ComparedRound:
    """One closed round of one run.

    ``uploaded``: bytes of valid deltas up to and with this round, by member. ``down``, ``up``: all
    bytes that a member moved up to this round's deltas, messages included; None where not told.
    ``cosine``, ``lowest_cosine``: of the deltas to their mean, over sites. ``slowest``: seconds by
    phase of the site that took longest (sites in parallel), then the rest of the round up to its
    decision (transfers, other sites) and its closing up to the next opening. ``in_turn``: seconds
    by phase summed over the sites.
    """

    round: int
    held_out_nll: float | None
    perplexity: float | None
    by_site: dict[str, float]
    uploaded: float
    cosine: float | None
    lowest_cosine: float | None
    slowest: dict[str, float]
    in_turn: dict[str, float]
    down: float | None = None
    up: float | None = None


@dataclass(frozen=True)
class ComparedRun:
    """One run.

    ``label``: its name, or STORE:RUN where names repeat, STORE without the folder that all have in
    common. ``held_out``: examples and tokens of each site's held-out text, as far as known.
    ``base``: fingerprint of the base model; None before the first adapter is there. ``settings``:
    what is on record, by name.
    """

    label: str
    run: str
    model: str
    base: str | None
    members: tuple[str, ...]
    held_out: dict[str, tuple[int, int]]
    rounds: tuple[ComparedRound, ...]
    settings: dict[str, Any]

    @property
    def last(self) -> ComparedRound | None:
        """The last closed round."""
        return self.rounds[-1] if self.rounds else None

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds by phase over all rounds, as in ``ComparedRound.slowest``."""
        total: Counter[str] = Counter()
        for facts in self.rounds:
            total.update(facts.slowest)
        return {phase: total[phase] for phase in phases([total])}


def gather(history: History, label: str) -> ComparedRun:
    """All facts of one run."""
    uploaded = down = up = 0
    rounds: list[ComparedRound] = []
    held_out: dict[str, tuple[int, int]] = {}
    for number in range(history.last_closed + 1):
        uploaded += sum(record.size for record in history.round(number).accepted.values())
        for site, loss in history.held_out(number).items():
            held_out.setdefault(site, (loss.examples, loss.tokens))
        members = max(len(history.members), 1)
        facts = compared_round(history, number, uploaded / members)
        moved = in_round(history.round(number))
        if moved is not None:
            down, up = down + bytes_down(moved), up + bytes_up(moved)
            facts = replace(facts, down=down / members, up=up / members)
        rounds.append(facts)
    return ComparedRun(
        label=label,
        run=history.run,
        model=history.config.base.model,
        base=history.genesis.fingerprint if history.genesis else None,
        members=tuple(sorted(history.members)),
        held_out=dict(sorted(held_out.items())),
        rounds=tuple(rounds),
        settings=flat_settings(history.config),
    )


def warnings(runs: Sequence[ComparedRun]) -> list[str]:
    """Why losses of these runs may not be set against each other, one line for each reason.

    No record holds held-out text or its digest: sites, examples and tokens are what is compared.
    """
    said: list[str] = []
    first = runs[0]
    for other in runs[1:]:
        if other.base is not None and first.base is not None and other.base != first.base:
            said.append(
                f"{first.label} and {other.label}: their losses are not of the same text by the "
                f"same model: the base is {first.model} ({first.base[:12]}) in one and "
                f"{other.model} ({other.base[:12]}) in the other"
            )
        elif first.held_out and other.held_out and first.held_out != other.held_out:
            said.append(
                f"{first.label} and {other.label}: their losses are not of the same text: "
                f"{_difference(first.held_out, other.held_out)}"
            )
    return said


def phases(counts: Sequence[Mapping[str, float]]) -> list[str]:
    """Every phase that is there, in the order in which they happen."""
    found = {phase for by_phase in counts for phase in by_phase}
    others = sorted(found - {*SITE_PHASES, WAITING, CLOSING})
    return [phase for phase in (*SITE_PHASES, *others, WAITING, CLOSING) if phase in found]


def closing_seconds(history: History, number: int) -> float | None:
    """From a round's decision to the next one's opening, or the end: the aggregation.

    None while that is not there, and where an operator let the run wait in between. A coordinator
    that was dead in between is counted: no record says that it was.
    """
    closing = history.round(number).closing
    following = history.round(number + 1).opened or history.finished
    if closing is None or following is None:
        return None
    if _was_paused(history, closing.time, following.time):
        return None
    return max(following.time - closing.time, 0.0)


def compared_round(history: History, number: int, uploaded: float) -> ComparedRound:
    """All facts of one round but ``down`` and ``up``, which add up over rounds."""
    by_site = history.held_out(number)
    pooled = pool_held_out(by_site.values())
    there = history.round(number)
    cosines = list(there.closed.cosines.values()) if there.closed else []
    in_turn: Counter[str] = Counter()
    spent = [_positive(r.metrics.seconds) for r in there.accepted.values()]
    for seconds in spent:
        in_turn.update(seconds)
    return ComparedRound(
        round=number,
        held_out_nll=pooled.nll if pooled else None,
        perplexity=perplexity(pooled),
        by_site={site: loss.nll for site, loss in sorted(by_site.items())},
        uploaded=uploaded,
        cosine=sum(cosines) / len(cosines) if cosines else None,
        lowest_cosine=min(cosines, default=None),
        slowest=_wall_clock(history, number, spent),
        in_turn=dict(in_turn),
    )


def _wall_clock(
    history: History, number: int, spent: Sequence[dict[str, float]]
) -> dict[str, float]:
    longest = max(spent, key=_total, default=None)
    slowest = dict(longest or {})
    opened, closing = history.round(number).opened, history.round(number).closing
    if opened is None or closing is None:
        return slowest
    # In a buffered run the slowest site may have begun before this round opened.
    rest = closing.time - opened.time - _total(slowest)
    slowest[WAITING] = max(rest, 0.0)
    ending = closing_seconds(history, number)
    if ending is not None:
        slowest[CLOSING] = ending
    return slowest


def _was_paused(history: History, begin: float, end: float) -> bool:
    """Whether somebody had a run wait between two times: that is no work."""
    return any(c.action == "resume" and begin <= c.time <= end for c in history.controls)


def _positive(seconds: Mapping[str, float]) -> dict[str, float]:
    """As a site says them: any finite number. Less than none cannot be stacked."""
    return {phase: max(value, 0.0) for phase, value in seconds.items()}


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _difference(one: Mapping[str, object], other: Mapping[str, object]) -> str:
    if set(one) != set(other):
        return (
            f"measured at {', '.join(sorted(one))} in one and at {', '.join(sorted(other))} "
            "in the other"
        )
    unlike = [site for site in sorted(one) if one[site] != other[site]]
    return f"another number of held-out examples or tokens at {', '.join(unlike)}"
