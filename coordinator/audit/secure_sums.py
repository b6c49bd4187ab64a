"""The sum of a secure round, opened again from masked deltas and what survivors revealed."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from coordinator.aggregation.unmasking import next_reaches, open_sum, sum_deltas
from coordinator.audit.evidence import Evidence
from coordinator.round.controls import steer
from coordinator.round.unmasking import must_reopen, survivors_in, terms_for
from shared import topology
from shared.errors import DeltaRefusedError, LedgerError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.aggregation.unmasking import Summed
    from shared.methods.inputs import WeightedDelta
    from shared.protocol.records import ClosedRecord, ClosingRecord, OpenedRecord
    from shared.secure_sum.cohort import Survivors


class SecureSums(Evidence):
    """A round's terms, its survivors, and the mean that its masked deltas come to."""

    def _check_terms(self, record: OpenedRecord) -> None:
        """The cohort's keys are those that its sites joined with, and the scale follows."""
        members = dict(self._history.members)
        if self._genesis is None or not set(record.selected) <= members.keys():
            return
        for site, exchange in record.secure.roster.items() if record.secure else ():
            if exchange in self._history.exchanges.get(site, ()):  # it lost that key later
                members[site] = members[site].model_copy(update={"exchange": exchange})
        before = self._history.round(record.round - 1).closed
        wanted = terms_for(
            self._config,
            self._genesis.manifest,
            members,
            record.selected,
            record.round,
            before,
            record.number,
        )
        if wanted != record.secure:
            key = record.key(self._ledger.run)
            says = "secure: is not what the sites' keys and the round before give"
            self._find(record.round, key, says)

    def _check_attempts(self, attempts: Sequence[OpenedRecord]) -> None:
        """Each further attempt was called for: too few of the one before were still waited for."""
        for number, (before, record) in enumerate(pairwise(attempts), start=2):
            steering = steer(self._history.controls, record.controls)
            there = steering.in_force(before.selected)
            keys = record.secure.roster if record.secure else {}
            if record.number != number or not must_reopen(before, there, keys, there):
                key = record.key(self._ledger.run)
                says = (
                    f"attempt {record.number}: expected none, since the one before could be summed"
                )
                self._find(record.round, key, says)

    def _check_answers(self, number: int) -> None:
        """Nobody revealed anything that no decision on record asked for."""
        there = self._history.round(number)
        named = {item.site for item in there.closing.inputs} if there.closing else set()
        for site, record in there.unmasked.items():
            if site not in named or there.opened is None or there.opened.secure is None:
                key = record.key(self._ledger.run)
                self._find(number, key, "reveals what no decision on record asked for")

    def _summed(self, closing: ClosingRecord, deltas: list[WeightedDelta]) -> Summed | None:
        """The round's one input; None where it cannot be opened, which is a finding then."""
        number, key = closing.round, closing.key(self._ledger.run)
        there = self._history.round(number)
        try:
            survivors = survivors_in(self._ledger.run, there.opened, closing)
        except ProtocolError as error:
            self._find(number, key, str(error))
            return None
        if survivors is None or there.opened is None or there.opened.secure is None:
            return None
        try:
            return self._opened(survivors, there.opened, deltas)
        except (LedgerError, DeltaRefusedError) as error:
            self._find(
                number, f"{topology.round_prefix(self._ledger.run, number)}unmasked/", str(error)
            )
            return None

    def _opened(
        self, survivors: Survivors, opened: OpenedRecord, deltas: list[WeightedDelta]
    ) -> Summed:
        assert opened.secure is not None  # the caller looked
        number = opened.round
        accepted = {site: record for (site, of), record in self._accepted.items() if of == number}
        seeds = open_sum(survivors, accepted, self._history.round(number).unmasked)
        manifest = deltas[0].manifest
        assert manifest is not None  # each has its own
        paths = {delta.site: delta.path for delta in deltas}
        target = self._scratch / "sum"
        source_sha = self._sources.get(number, opened.source_sha)
        return sum_deltas(survivors, opened.secure, seeds, paths, source_sha, manifest, target)

    def _check_reaches(self, closed: ClosedRecord, summed: Summed | None) -> None:
        """What the next rounds' scales follow from."""
        if summed is None or self._genesis is None:
            return
        before = self._history.round(closed.round - 1).closed
        known = before.reaches if before is not None else None
        first = self._config.aggregation.secure_reach
        wanted = next_reaches(self._genesis.manifest, known, summed, first)
        self._expect(closed.round, closed.key(self._ledger.run), "reaches", wanted, closed.reaches)
