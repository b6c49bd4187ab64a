"""What the operators' records mean: pure, from the list of controls to what is in force.

The records lie beside the rounds and not in them, so the order in which the two are folded says
nothing. Whoever decides therefore writes into the decision how many of them it knew (``controls``
of opened, closing and finished); verification takes just as many and comes to the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.round.selection import is_among

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shared.protocol.records import AcceptedRecord, ControlRecord


@dataclass(frozen=True)
class Steering:
    """What is in force. ``paused``, ``stopped``: the reason, or None. ``number``: of the last one.

    ``more_rounds``: beyond those of the config. ``excluded``: sites that are not waited for, each
    with the operator's reason; nothing takes one in again.
    """

    number: int = 0
    paused: str | None = None
    stopped: str | None = None
    more_rounds: int = 0
    excluded: Mapping[str, str] = field(default_factory=dict)

    def in_force(self, members: Iterable[str]) -> tuple[str, ...]:
        """Those of the members that may be selected, in name order."""
        return tuple(sorted(site for site in members if site not in self.excluded))

    def is_in_force(self, site: str, members: Sequence[str]) -> bool:
        """Whether the site is one of them; ``members`` in name order."""
        return site not in self.excluded and is_among(site, members)

    def reachable(
        self, uncounted: Mapping[tuple[str, int], AcceptedRecord]
    ) -> dict[tuple[str, int], AcceptedRecord]:
        """The accepted deltas that may still count."""
        return {key: record for key, record in uncounted.items() if key[0] not in self.excluded}

    def excluded_among(self, selected: Iterable[str]) -> dict[str, str]:
        """The selected sites that an operator took out, with the reason."""
        return {site: self.excluded[site] for site in selected if site in self.excluded}


def steer(controls: Sequence[ControlRecord], known: int | None = None) -> Steering:
    """What the records say, or the first ``known`` of them. A stop is for good."""
    number, more = 0, 0
    paused: str | None = None
    stopped: str | None = None
    excluded: dict[str, str] = {}
    for control in controls:
        if known is not None and control.number > known:
            break
        number = control.number
        match control.action:
            case "pause":
                paused = control.reason
            case "resume":
                paused = None
            case "stop":
                stopped = control.reason if stopped is None else stopped
            case "extend":
                more += control.rounds or 0
            case "exclude":
                excluded.setdefault(control.site or "", control.reason)
    return Steering(number, paused, stopped, more, excluded)


def added(controls: tuple[ControlRecord, ...], control: ControlRecord) -> tuple[ControlRecord, ...]:
    """The list with one more, in order; one that is known already changes nothing."""
    if any(known.number == control.number for known in controls):
        return controls
    return tuple(sorted((*controls, control), key=lambda c: c.number))
