"""When a round closes, as a value: a policy looks at an open round and decides, or not yet.

A decision lists which accepted deltas count and who is left out, and why. A further policy
(quorum, deadline, buffered) is one more function in ``POLICIES``; everything after the decision
(``closing.json``, aggregation, verification) is the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.config import PolicySection
    from shared.records import AcceptedRecord, OpenedRecord


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
    counted = {
        site: uncounted[site, opened.round]
        for site in opened.selected
        if (site, opened.round) in uncounted
    }
    excluded = {
        site: troubles[site].reason
        for site in opened.selected
        if site not in counted and site in troubles and given_up(section, troubles[site])
    }
    if section.on_failure != "exclude":
        excluded = {}
    if not counted or len(counted) + len(excluded) < len(opened.selected):
        return None
    return Decision(tuple(counted[site] for site in sorted(counted)), excluded)


def given_up(section: PolicySection, trouble: Trouble) -> bool:
    """Whether the coordinator asks this site again by itself in this round."""
    return trouble.final or trouble.attempts >= section.max_attempts


POLICIES: Mapping[str, Policy] = {"all": all_in}
