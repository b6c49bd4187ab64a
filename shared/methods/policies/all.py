"""all: a round closes when every selected site's delta is in (Algorithm 2), or it is excluded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.methods.policies import Decision, Policy, fresh_deltas, given_up, in_order

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.config import PolicySection
    from shared.methods.policies import Trouble, Uncounted
    from shared.protocol.records import OpenedRecord


def all_in(
    section: PolicySection,
    opened: OpenedRecord,
    uncounted: Uncounted,
    troubles: Mapping[str, Trouble],
) -> Decision | None:
    """Every selected site's delta is in, or the site is excluded.

    A site that is given up is excluded only with ``on_failure = "exclude"``, and a round that
    nobody is left in is never closed: it waits for a person.
    """
    fresh = fresh_deltas(opened, uncounted)
    excluded = {
        site: troubles[site].reason
        for site in opened.selected
        if site not in fresh and site in troubles and given_up(section, troubles[site])
    }
    if section.on_failure != "exclude":
        excluded = {}
    if not fresh or len(fresh) + len(excluded) < len(opened.selected):
        return None
    return Decision(in_order(fresh.values()), excluded)


class Everybody(Policy):
    """Nobody is left out for being slow."""

    reasons_on_record = True

    def least(self, _section: PolicySection, opened: OpenedRecord, _now: float, /) -> int:
        """All of them."""
        return len(opened.selected)

    def decide(
        self,
        section: PolicySection,
        opened: OpenedRecord,
        uncounted: Uncounted,
        troubles: Mapping[str, Trouble],
        _now: float,
        /,
    ) -> Decision | None:
        """As soon as all are in."""
        return all_in(section, opened, uncounted, troubles)


MODE = Everybody()
