"""When a round closes: one file in this folder per policy, found by its name.

A policy looks at an open round and decides, or not yet. A decision lists which accepted deltas
count and who is left out, and why. Carrying it out (``closing.json``, aggregation) is the same for
all policies.

A new policy is a new file here that sets ``MODE``, or another package's: ``shared/modes.py``.
Settings, the round machine and verification ask that object and compare no name. A policy imports
records only: a coordinator folds its ledger with it, so it is pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from shared import modes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from shared.config import PolicySection
    from shared.protocol.records import AcceptedRecord, ClosingRecord, OpenedRecord

    Uncounted = Mapping[tuple[str, int], AcceptedRecord]


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


class Policy:
    """One way to close rounds. What stands here: no deadline, and no delta of an earlier round.

    All methods are pure functions of their arguments. Times are in seconds since the epoch,
    durations in seconds.
    """

    needs: tuple[str, ...] = ()
    """Settings of ``[policy]`` that must be given."""

    takes: tuple[str, ...] = ()
    """Settings of ``[policy]`` that may be given; those of no policy's own always may."""

    fewest: str = ""
    """The setting that says how many deltas are enough; empty: those of all selected sites."""

    tells_of_all: bool = True
    """Whether a decision counts or leaves out every site that was selected."""

    reasons_on_record: bool = False
    """Whether a site is left out only for what its own failure or refusal has on record."""

    def carried_by(self, _section: PolicySection, /) -> str:
        """The setting by which a delta counts after its round closed; empty: it does not."""
        return ""

    def decide(
        self,
        section: PolicySection,
        opened: OpenedRecord,
        uncounted: Uncounted,
        troubles: Mapping[str, Trouble],
        now: float,
        /,
    ) -> Decision | None:
        """What to do with the open round at time ``now``; None: keep it open.

        ``uncounted``: every accepted delta that no round has counted yet, by site and round.
        """
        raise NotImplementedError

    def least(self, _section: PolicySection, _opened: OpenedRecord, _now: float, /) -> int:
        """Below so many deltas and sites that failed or were taken out, :meth:`decide` says None.

        It is asked first, with every delta: in a large federation that is a round's cost.
        """
        return 1

    def deadline(self, _section: PolicySection, _times: Sequence[float], /) -> float | None:
        """How long the next round waits for everybody; ``_times``: what past deltas took."""
        return None

    def may_wait(self, _section: PolicySection, seconds: float | None, /) -> bool:
        """Whether a round's deadline on record can be one that :meth:`deadline` gave."""
        return seconds is None

    def audit(
        self,
        _section: PolicySection,
        _opened: OpenedRecord,
        _closing: ClosingRecord,
        _left_out: Mapping[str, str],
        /,
    ) -> Iterator[str]:
        """What a decision on record says that this policy would not: field, expected, got.

        ``_left_out``: the sites that it leaves out and no operator did, with the reasons.
        """
        yield from ()


def get_policy(name: str) -> Policy:
    """The policy of this name. Raises ConfigError that lists the known ones."""
    return cast("Policy", modes.get("policies", name))


def weighting(section: PolicySection, mode: str) -> str:
    """The rule that gives a round's weights, as ``closing.json`` says it."""
    return f"{mode} / sqrt(1 + staleness)" if section.carries else mode


def given_up(section: PolicySection, trouble: Trouble) -> bool:
    """Whether the coordinator asks this site again by itself in this round."""
    return trouble.final or trouble.attempts >= section.max_attempts


def fresh_deltas(opened: OpenedRecord, uncounted: Uncounted) -> dict[str, AcceptedRecord]:
    """The open round's own deltas by site."""
    return {
        site: uncounted[site, opened.round]
        for site in opened.selected
        if (site, opened.round) in uncounted
    }


def carried_deltas(
    section: PolicySection, opened: OpenedRecord, uncounted: Uncounted
) -> list[AcceptedRecord]:
    """Uncounted deltas of earlier rounds that are not too old."""
    oldest = opened.round - section.late_rounds
    return [record for (_, number), record in uncounted.items() if oldest <= number < opened.round]


def in_order(records: Iterable[AcceptedRecord]) -> tuple[AcceptedRecord, ...]:
    """By site, then by round: the order in which deltas are counted."""
    return tuple(sorted(records, key=lambda record: (record.site, record.round)))
