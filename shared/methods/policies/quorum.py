"""quorum: as all, but once deadline and grace are over a given number of deltas is enough."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from shared.methods.policies import Decision, Policy, carried_deltas, fresh_deltas, in_order
from shared.methods.policies.all import all_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shared.config import PolicySection
    from shared.methods.policies import Trouble, Uncounted
    from shared.protocol.records import ClosingRecord, OpenedRecord

LEAST_TIMES: Final = 3  # fewer past times say nothing about the next
LEAST_SECONDS: Final = 1.0
LEAST_SPREAD: Final = 0.1  # of the median: equal times in the past do not promise the same second
MAD_TO_DEVIATION: Final = 1.4826  # of a normal distribution (Rousseeuw and Croux, 1993)


class Quorum(Policy):
    """Below the quorum the round stays open: too few deltas are worse than a late round.

    With ``late = "carry"`` the uncounted deltas of earlier rounds count too, but not for the
    quorum.
    """

    needs = ("quorum", "deadline_seconds")
    takes = ("late", "deadline", "grace_seconds")
    fewest = "quorum"

    def carried_by(self, section: PolicySection, /) -> str:
        """Where it is asked for."""
        return 'late = "carry"' if section.late == "carry" else ""

    def least(self, section: PolicySection, opened: OpenedRecord, now: float, /) -> int:
        """All of them, or the quorum once time is over."""
        return (section.quorum or 1) if _is_over(opened, now) else len(opened.selected)

    def decide(
        self,
        section: PolicySection,
        opened: OpenedRecord,
        uncounted: Uncounted,
        troubles: Mapping[str, Trouble],
        now: float,
        /,
    ) -> Decision | None:
        """All are in, or time is over and a quorum is."""
        assert section.quorum is not None  # the config says so
        complete = all_in(section, opened, uncounted, troubles)
        fresh = fresh_deltas(opened, uncounted)
        if complete is None and not (_is_over(opened, now) and len(fresh) >= section.quorum):
            return None
        waited = (opened.deadline_seconds or 0.0) + opened.grace_seconds
        missing = f"no delta within {waited:.0f} s"
        excluded = {
            site: troubles[site].reason if site in troubles else missing
            for site in opened.selected
            if site not in fresh
        }
        carried = carried_deltas(section, opened, uncounted)
        return Decision(in_order((*fresh.values(), *carried)), excluded)

    def deadline(self, section: PolicySection, times: Sequence[float], /) -> float | None:
        """``adaptive``: median + k times the (normalised) median absolute deviation.

        At most the fixed one, which also serves until there are enough times.
        """
        limit = section.deadline_seconds
        if limit is None or section.deadline == "fixed" or len(times) < LEAST_TIMES:
            return limit
        median = statistics.median(times)
        spread = MAD_TO_DEVIATION * statistics.median(abs(time - median) for time in times)
        spread = max(spread, LEAST_SPREAD * median)
        return min(limit, max(LEAST_SECONDS, round(median + section.deadline_spread * spread, 3)))

    def may_wait(self, section: PolicySection, seconds: float | None, /) -> bool:
        """The fixed one, or less where it adapts."""
        limit = section.deadline_seconds
        adapted = section.deadline == "adaptive" and 0 < (seconds or 0) <= (limit or 0)
        return seconds == limit or adapted

    def audit(
        self,
        section: PolicySection,
        opened: OpenedRecord,
        closing: ClosingRecord,
        left_out: Mapping[str, str],
        /,
    ) -> Iterator[str]:
        """Whoever is left out for being slow was waited for, and a quorum was there."""
        if not left_out or section.on_failure == "exclude":
            return
        fresh = [item.site for item in closing.inputs if item.from_round == closing.round]
        if len(fresh) < (section.quorum or 0):
            yield f"inputs: expected a quorum of {section.quorum}, got {len(fresh)}"
        if opened.closes_at is not None and closing.time < opened.closes_at:
            yield f"excluded: left out {sorted(left_out)} before deadline and grace were over"


def _is_over(opened: OpenedRecord, now: float) -> bool:
    return opened.closes_at is not None and now >= opened.closes_at


MODE = Quorum()
