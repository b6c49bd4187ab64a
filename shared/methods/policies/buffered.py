"""buffered: a round closes as soon as a buffer of deltas is full (FedBuff, arXiv:2106.06639)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.methods.policies import (
    Decision,
    Policy,
    carried_deltas,
    fresh_deltas,
    given_up,
    in_order,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from shared.config import PolicySection
    from shared.methods.policies import Trouble, Uncounted
    from shared.protocol.records import ClosingRecord, OpenedRecord


class Buffered(Policy):
    """Deltas of this round or an earlier one. Who is still at work counts in a later round.

    Where nobody is at work any more the buffer closes as it is: a site that was taken out, or was
    not selected, fills it never.
    """

    needs = ("buffer",)
    fewest = "buffer"
    tells_of_all = False

    def carried_by(self, _section: PolicySection, /) -> str:
        """Always."""
        return 'kind = "buffered"'

    def decide(
        self,
        section: PolicySection,
        opened: OpenedRecord,
        uncounted: Uncounted,
        troubles: Mapping[str, Trouble],
        _now: float,
        /,
    ) -> Decision | None:
        """Nobody is left out."""
        assert section.buffer is not None  # the config says so
        fresh = fresh_deltas(opened, uncounted)
        there = (*fresh.values(), *carried_deltas(section, opened, uncounted))
        gone = {
            site
            for site, trouble in troubles.items()
            if section.on_failure == "exclude" and given_up(section, trouble)
        }
        at_work = set(opened.selected) - fresh.keys() - gone
        full = len(there) >= section.buffer or (bool(fresh) and not at_work)
        return Decision(in_order(there), {}) if full else None

    def audit(
        self,
        _section: PolicySection,
        _opened: OpenedRecord,
        _closing: ClosingRecord,
        left_out: Mapping[str, str],
        /,
    ) -> Iterator[str]:
        """Nobody may be left out but by an operator."""
        if left_out:
            yield f"excluded: a buffer leaves nobody out, got {sorted(left_out)}"


MODE = Buffered()
