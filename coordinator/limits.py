"""What one site may cause, and who is over what: pure, without a clock, a store or a logger.

How much a site has on record follows from the ledger, so it is the same after a restart. The rate
of its messages and what was granted are kept in memory: they only have to hold while it floods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from coordinator.round.state import RunState
    from shared.config import LimitsSection
    from shared.protocol.events import TrainingFailed


@dataclass
class _Bucket:
    """Messages that may come at once; filled again as time passes."""

    left: float
    at: float


class Limits:
    """One run's limits. ``over``: by site, how often each limit was passed in this process."""

    def __init__(self, section: LimitsSection) -> None:
        self._section = section
        self._buckets: dict[str, _Bucket] = {}
        # By round, then by site.
        self._granted: dict[int, dict[str, set[str]]] = {}
        self._over: dict[str, dict[str, int]] = {}

    @property
    def over(self) -> Mapping[str, Mapping[str, int]]:
        """By site and limit: how much was counted and dropped."""
        return self._over

    def admits(self, site: str, now: float) -> bool:
        """Whether a message of ``site`` is looked at. ``now``: seconds that only grow."""
        full = float(self._section.burst)
        bucket = self._buckets.setdefault(site, _Bucket(full, now))
        grown = (now - bucket.at) * self._section.messages_per_second
        bucket.left, bucket.at = min(full, bucket.left + grown), now
        if bucket.left < 1:
            return self.count(site, "messages")
        bucket.left -= 1
        return True

    def records_verdict(self, state: RunState, site: str, number: int, sha: str) -> bool:
        """Whether another refusal of this site in round ``number`` goes on record."""
        known = state.verdicts.get((site, number), frozenset())
        if sha in known or len(known) < self._section.records:
            return True
        return self.count(site, "records")

    def records_failure(self, state: RunState, site: str, event: TrainingFailed) -> bool:
        """Whether another failure goes on record: nobody is asked more than ``max_attempts``."""
        if event.attempt <= state.config.policy.max_attempts:
            return True
        return self.count(site, "records")

    def grants(
        self, state: RunState, site: str, number: int, sha: str, present: Iterable[str]
    ) -> bool:
        """Whether a site may upload these bytes too. ``present``: whose bytes lie in its inbox.

        Each sha has room for the run's largest delta, so counting them is a quota of bytes.
        """
        if number not in self._granted:  # a new round: those that take nothing more are forgotten
            oldest = state.last_round - state.config.policy.late_rounds
            self._granted = {n: sites for n, sites in self._granted.items() if n > oldest}
        granted = self._granted.setdefault(number, {}).setdefault(site, set())
        granted.update(present, state.verdicts.get((site, number), ()))
        if sha in granted:
            return True
        if len(granted) >= self._section.uploads:
            return self.count(site, "uploads")
        granted.add(sha)
        return True

    def granted(self, site: str, number: int) -> AbstractSet[str]:
        """The shas that this process let a site upload for a round."""
        return self._granted.get(number, {}).get(site, frozenset())

    def count(self, site: str, limit: str) -> bool:
        """Note that a limit was passed (``account``: the site's has ended); always False."""
        counts = self._over.setdefault(site, {})
        counts[limit] = counts.get(limit, 0) + 1
        return False
