"""When a round closes, as a value: a policy looks at an open round and decides, or not yet.

A decision lists which accepted deltas count and who is left out, and why. Carrying it out
(``closing.json``, aggregation) is the same for all policies. Checking it is not: a further policy
is one more function in ``POLICIES``, and its rules for ``runs verify`` in ``chain_checks.py`` (what
a decision may say) and ``verification.py`` (whether each selected site is counted or left out).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shared.config import AggregationSection, PolicySection
    from shared.protocol.records import AcceptedRecord, OpenedRecord

LEAST_TIMES = 3  # fewer past times say nothing about the next
LEAST_SECONDS = 1.0
LEAST_SPREAD = 0.1  # of the median: equal times in the past are no promise of the same second
MAD_TO_DEVIATION = 1.4826  # of a normal distribution (Rousseeuw and Croux, 1993)


@dataclass(frozen=True)
class Trouble:
    """What went wrong at a site in this round. ``final``: trying again cannot help by itself."""

    attempts: int
    final: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """The accepted deltas that count, in site order, and the sites left out with the reason."""

    counted: tuple[AcceptedRecord, ...]
    excluded: Mapping[str, str]


class Policy(Protocol):
    """``uncounted`` holds every accepted delta that no round has counted yet."""

    def __call__(
        self,
        section: PolicySection,
        opened: OpenedRecord,
        uncounted: Mapping[tuple[str, int], AcceptedRecord],
        troubles: Mapping[str, Trouble],
        now: float,
    ) -> Decision | None:
        """What to do with the open round at time ``now``; None: keep it open."""


def all_in(
    section: PolicySection,
    opened: OpenedRecord,
    uncounted: Mapping[tuple[str, int], AcceptedRecord],
    troubles: Mapping[str, Trouble],
    now: float,  # noqa: ARG001 - part of the policy's contract; this one has no deadline
) -> Decision | None:
    """Every selected site's delta is in (Algorithm 2), or the site is excluded.

    A site that is given up is excluded only with ``on_failure = "exclude"``, and a round that
    nobody is left in is never closed: it waits for a person.
    """
    fresh = _fresh(opened, uncounted)
    excluded = {
        site: troubles[site].reason
        for site in opened.selected
        if site not in fresh and site in troubles and given_up(section, troubles[site])
    }
    if section.on_failure != "exclude":
        excluded = {}
    if not fresh or len(fresh) + len(excluded) < len(opened.selected):
        return None
    return Decision(_in_order(fresh.values()), excluded)


def quorum(
    section: PolicySection,
    opened: OpenedRecord,
    uncounted: Mapping[tuple[str, int], AcceptedRecord],
    troubles: Mapping[str, Trouble],
    now: float,
) -> Decision | None:
    """As ``all_in``; once deadline and grace are over, ``section.quorum`` deltas are enough.

    Below the quorum the round stays open: too few deltas are worse than a late round. With
    ``late = "carry"`` the uncounted deltas of earlier rounds count too, but not for the quorum.
    """
    assert section.quorum is not None  # the config says so
    complete = all_in(section, opened, uncounted, troubles, now)
    fresh = _fresh(opened, uncounted)
    over = opened.closes_at is not None and now >= opened.closes_at
    if complete is None and not (over and len(fresh) >= section.quorum):
        return None
    waited = (opened.deadline_seconds or 0.0) + opened.grace_seconds
    missing = f"no delta within {waited:.0f} s"
    excluded = {
        site: troubles[site].reason if site in troubles else missing
        for site in opened.selected
        if site not in fresh
    }
    carried = _carried(section, opened, uncounted)
    return Decision(_in_order((*fresh.values(), *carried)), excluded)


def buffered(
    section: PolicySection,
    opened: OpenedRecord,
    uncounted: Mapping[tuple[str, int], AcceptedRecord],
    troubles: Mapping[str, Trouble],
    now: float,  # noqa: ARG001 - there is no deadline
) -> Decision | None:
    """As soon as ``section.buffer`` deltas are there, of this round or an earlier one.

    Nobody is left out: who is still at work counts in a later round. Where nobody is at work any
    more the buffer closes as it is: a site that was taken out, or was not selected, fills it never.
    """
    assert section.buffer is not None  # the config says so
    fresh = _fresh(opened, uncounted)
    there = (*fresh.values(), *_carried(section, opened, uncounted))
    gone = {
        s for s, t in troubles.items() if section.on_failure == "exclude" and given_up(section, t)
    }
    at_work = set(opened.selected) - fresh.keys() - gone
    full = len(there) >= section.buffer or (bool(fresh) and not at_work)
    return Decision(_in_order(there), {}) if full else None


def too_few(section: AggregationSection, count: int) -> str | None:
    """Why ``count`` deltas are not enough for the run's rule, in words; None if they are.

    The mean needs no more than any policy asks for.
    """
    if section.rule == "mean" or count >= section.least_deltas:
        return None
    bad = "" if section.rule == "median" else f" and assumed_bad = {section.assumed_bad}"
    return (
        f'aggregation.rule = "{section.rule}"{bad} needs {section.least_deltas} deltas, got {count}'
    )


def weighting(section: PolicySection, mode: str) -> str:
    """The rule that gives a round's weights, as ``closing.json`` says it."""
    return f"{mode} / sqrt(1 + staleness)" if section.carries else mode


def given_up(section: PolicySection, trouble: Trouble) -> bool:
    """Whether the coordinator asks this site again by itself in this round."""
    return trouble.final or trouble.attempts >= section.max_attempts


def deadline_seconds(section: PolicySection, times: Sequence[float]) -> float | None:
    """How long the next round waits for everybody. ``times``: seconds that past deltas took.

    ``adaptive``: median + k times the (normalised) median absolute deviation, at most the fixed
    one, which also serves until there are enough times.
    """
    limit = section.deadline_seconds
    if limit is None or section.deadline == "fixed" or len(times) < LEAST_TIMES:
        return limit
    median = statistics.median(times)
    spread = MAD_TO_DEVIATION * statistics.median(abs(time - median) for time in times)
    spread = max(spread, LEAST_SPREAD * median)
    return min(limit, max(LEAST_SECONDS, round(median + section.deadline_spread * spread, 3)))


def _fresh(
    opened: OpenedRecord, uncounted: Mapping[tuple[str, int], AcceptedRecord]
) -> dict[str, AcceptedRecord]:
    """The open round's own deltas by site."""
    return {
        site: uncounted[site, opened.round]
        for site in opened.selected
        if (site, opened.round) in uncounted
    }


def _carried(
    section: PolicySection,
    opened: OpenedRecord,
    uncounted: Mapping[tuple[str, int], AcceptedRecord],
) -> list[AcceptedRecord]:
    """Uncounted deltas of earlier rounds that are not too old."""
    if not section.carries:
        return []
    oldest = opened.round - section.max_staleness
    return [record for (_, number), record in uncounted.items() if oldest <= number < opened.round]


def _in_order(records: Iterable[AcceptedRecord]) -> tuple[AcceptedRecord, ...]:
    return tuple(sorted(records, key=lambda record: (record.site, record.round)))


POLICIES: Mapping[str, Policy] = {"all": all_in, "quorum": quorum, "buffered": buffered}
