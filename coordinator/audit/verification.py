"""Recompute a run from its objects: anybody with the ledger can verify the recorded results.

Reads everything and writes nothing into the store. What only a site can know (its examples, tokens
and losses) is taken as recorded, and a record that nothing follows from (a site that declined, an
evaluation) is not missed. A finding names the round and the object; one damaged object hides no
other: what it should say is taken from what was made of it, and the check goes on from there.

What was deleted on purpose is a note and no finding; all that does not need it is still checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.aggregation.downlink import sends_updates
from coordinator.audit.checks import check_origin, check_records, check_told
from coordinator.audit.evidence import UNKNOWN, Verification
from coordinator.audit.links import NOTHING_KNOWN, check_links
from coordinator.audit.recomputing import Recomputing
from coordinator.round.controls import steer
from coordinator.round.selection import select
from coordinator.round.weighting import clips, shares
from shared import topology
from shared.adapters import kind_of
from shared.errors import LedgerDamagedError
from shared.methods.policies import get_policy
from shared.protocol.manifest import pool_held_out
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    GenesisRecord,
    Input,
    OpenedRecord,
)
from shared.seeds import derive_seed
from shared.tensors.genesis import draw_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coordinator.aggregation.closing import Aggregated
    from coordinator.audit.links import Expected
    from coordinator.history import RoundHistory
    from shared.protocol.ledger import Ledger

MOST_DRAWN = 2**30  # values of a first adapter, where the records are all there is


def verify_run(
    ledger: Ledger,
    scratch: Path,
    report: Callable[[int], None],
    expected: Expected = NOTHING_KNOWN,
) -> Verification:
    """Check the whole chain of a run. ``scratch``: an empty local folder; ``report(round)``.

    ``expected``: what the reader knows of the chain from elsewhere.

    Raises RunNotFoundError, LedgerDamagedError when the run's first record cannot be read (without
    its settings nothing can be recomputed), and MissingPackageError where a mode of it is not here.
    """
    return _Verifier(ledger, scratch).verify(report, expected)


def verify_records(ledger: Ledger, scratch: Path, expected: Expected) -> Verification:
    """The same where no tensor is there: whether the records fit each other, the seed and the keys.

    Raises as ``verify_run``.
    """
    return _OfRecords(ledger, scratch).verify(lambda _: None, expected)


class _Verifier(Recomputing):
    """Round by round, from the start to the end."""

    def verify(self, report: Callable[[int], None], expected: Expected) -> Verification:
        chain = self._chain
        check_records(chain, self._config)
        for number in chain.numbers:
            report(number)
            self._check(self._history.round(number))
            if chain.needs_result(number) and not chain.has_result(number):
                self._go_on_without(number)
        self._check_end()
        self.result.chain = check_links(self._ledger, chain, self._links, expected)
        return self.result

    def _check(self, there: RoundHistory) -> None:
        for opened in there.attempts:
            self._check_opened(opened)
            self._check_terms(opened)
        self._check_attempts(there.attempts)
        self._check_answers(there.number)
        if there.genesis is not None:
            self._check_genesis(there.genesis)
        if there.closed is not None:
            self.result.rounds += 1
            again = self._check_closed(there.closing, there.closed) if there.closing else None
            self._settle(there.closed, again)

    def _go_on_without(self, number: int) -> None:
        """A result that is missing is a finding already; what was made of it says which it was."""
        self.result.rounds += number > 0
        sha = self._chain.result_after(number)
        members = sorted(self._history.members)
        if number == 0 and sha is not None and members:
            one = self._history.members[members[0]]
            self._genesis = GenesisRecord(
                members=tuple(members),
                manifest=kind_of(one.manifest).manifest_for(one.manifest, self._config.lora),
                fingerprint=one.fingerprint,
                adapter_sha=sha,
                adapter_size=1,
                origin=self._history.origin.label if self._history.origin else None,
            )
        if sha is not None:
            self._check_adapter(number, sha)
        self.result.adapter_sha = sha
        if number > 0 and self._keeps_state:
            self._server_sha = UNKNOWN
        if number > 0 and sends_updates(self._config):
            self._exact_sha = UNKNOWN

    def _settle(self, closed: ClosedRecord, again: Aggregated | None) -> None:
        """Which adapter the round produced: of two words the one that the run went on from.

        Nothing but closed.json names the states beside it: of two words the recomputed one, if
        that comes with the adapter that the run went on from.
        """
        sha = closed.adapter_sha
        if again is not None and again.digest.sha256 == self._chain.result_after(closed.round):
            sha = again.digest.sha256
        self._check_adapter(closed.round, sha)
        self.result.adapter_sha = sha
        believed = again if again is not None and again.digest.sha256 == sha else None
        self._check_states(closed, believed)

    def _check_genesis(self, record: GenesisRecord) -> None:
        self._genesis = record
        self._check_bases(record.manifest.bases)
        key, origin = record.key(self._ledger.run), self._history.origin
        sha = record.adapter_sha
        if origin is not None:
            notes = check_origin(self._ledger, self._chain, record, self._config.lora)
            self.result.notes += notes
            sha = self._chain.result_after(0) or sha
        elif record.origin is not None:
            why = f"the run branches from {record.origin}"
            self._chain.miss(0, topology.origin_key(self._ledger.run), why)
        else:
            drawn = self._scratch / "genesis"
            digest = draw_adapter(record.manifest, self._config.run.seed, drawn)
            drawn.unlink()
            self._expect(0, key, "adapter_sha", digest.sha256, record.adapter_sha)
            self._expect(0, key, "adapter_size", digest.size, record.adapter_size)
            if digest.sha256 == self._chain.result_after(0):
                sha = digest.sha256
        self._check_adapter(0, sha)
        self.result.adapter_sha = sha

    def _members_in(self, number: int) -> tuple[str, ...]:
        """Who was there at the start and who joined since; nobody if the start is not on record."""
        if self._genesis is None:
            return ()
        opened = self._history.round(number).opened
        joined = {s for s, m in self._history.members.items() if 1 <= m.from_round <= number}
        if opened is not None and opened.rounds is not None:
            # A coordinator that was replaced may record a site too late for a round that is open.
            joined &= set(opened.members)
        return tuple(sorted(joined.union(self._genesis.members)))

    def _check_opened(self, record: OpenedRecord) -> None:
        run, number = self._config.run, record.round
        key = record.key(self._ledger.run)
        members = self._members_in(number) or record.members
        total = record.rounds or run.rounds
        if self._chain.knows(record.controls):
            members = steer(self._history.controls, record.controls).in_force(members)
        if record.rounds is not None:  # a record of before there were any controls names nobody
            self._expect(number, key, "members", members, record.members)
        if self.result.adapter_sha is not None:
            self._sources[number] = self.result.adapter_sha
            self._expect(number, key, "source_sha", self.result.adapter_sha, record.source_sha)
        self._expect(number, key, "seed", derive_seed(run.seed, "round", number), record.seed)
        chosen = select(self._config.selection, members, run.seed, number)
        self._selected[number] = chosen
        self._expect(number, key, "selected", chosen, record.selected)
        span = ((number - 1) / total, number / total)
        self._expect(number, key, "progress", span, (record.progress_from, record.progress_to))

    def _check_closed(self, closing: ClosingRecord, closed: ClosedRecord) -> Aggregated | None:
        """Everything a round's result comes from; the recomputed result, if any."""
        number, key = closing.round, closing.key(self._ledger.run)
        if self.result.adapter_sha is not None:
            self._sources.setdefault(number, self.result.adapter_sha)
            self._expect(number, key, "source_sha", self.result.adapter_sha, closing.source_sha)
        self._check_weights(closing)
        tells_of_all = get_policy(self._config.policy.kind).tells_of_all
        if tells_of_all and number in self._selected:
            check_told(self._chain, closing, self._selected[number])
        # What a wrong decision gives is no word against the result of the right one.
        decided = not any(finding.key == key for finding in self.result.findings)
        source = self._adapter_file(number, self._sources.get(number, closing.source_sha))
        deltas = [self._delta(closing, index) for index in range(len(closing.inputs))]
        self._check_held_out(closing, closed)
        files = self._round_files(closed, source)
        whole = [delta for delta in deltas if delta is not None]
        again = None
        complete = len(whole) == len(deltas)
        if self._config.aggregation.secure and complete:
            summed = self._summed(closing, whole)
            self._check_reaches(closed, summed)
            whole, complete = [summed.delta] if summed else [], summed is not None
        if decided and files is not None and complete:
            again = self._recompute(closing, closed, whole, files)
        for path in self._scratch.iterdir():
            path.unlink()
        return again

    def _check_held_out(self, closing: ClosingRecord, closed: ClosedRecord) -> None:
        accepted = [self._accepted.get((i.site, i.from_round)) for i in closing.inputs]
        found = [record for record in accepted if record is not None]
        if len(found) == len(closing.inputs):
            pooled = pool_held_out(record.metrics.held_out for record in found)
            key = closed.key(self._ledger.run)
            self._expect(closed.round, key, "source_held_out", pooled, closed.source_held_out)

    def _check_weights(self, closing: ClosingRecord) -> None:
        number, key = closing.round, closing.key(self._ledger.run)
        known: list[AcceptedRecord] = []
        for item in closing.inputs:
            pair = (item.site, item.from_round)
            record = self._accepted.get(pair)
            if pair in self._counted:
                self._find(number, key, f"counts {item.site} of round {item.from_round} again")
            if record is None or record.sha != item.sha:
                self._find_unaccepted(number, item, record)
                continue
            self._counted.add(pair)
            known.append(record)
        if len(known) == len(closing.inputs):
            share = shares(self._config.aggregation.weights, known, number)
            on_record = {item.label(number): item.weight for item in closing.inputs}
            self._expect(number, key, "weights", share, on_record)
            clipped = clips(self._config.aggregation, known, number)
            for item in closing.inputs:
                label = item.label(number)
                self._expect(number, key, f"scale of {label}", clipped[label], item.scale)

    def _find_unaccepted(self, number: int, item: Input, record: AcceptedRecord | None) -> None:
        opened = self._history.round(item.from_round).opened
        attempt = opened.number if opened is not None else 1
        key = topology.accepted_key(self._ledger.run, item.from_round, item.site, attempt)
        if record is None:
            self._chain.miss(number, key, f"round {number} counts {item.site} {item.sha[:12]}")
        else:
            self._expect(number, key, "sha", item.sha, record.sha)

    def _check_end(self) -> None:
        key, finished = topology.finished_key(self._ledger.run), self._history.finished
        if finished is None:
            return
        failed = self.result.adapter_sha is None
        self._expect(finished.round, key, "failed", failed, finished.failed)
        self._expect(finished.round, key, "sha", self.result.adapter_sha, finished.sha)
        self._expect(finished.round, key, "round", self.result.rounds, finished.round)


class _OfRecords(_Verifier):
    """That an object is not here says nothing. The records may be anybody's."""

    def _check_genesis(self, record: GenesisRecord) -> None:
        values = sum(spec.elements for spec in record.manifest.tensors)
        if values > MOST_DRAWN:
            raise LedgerDamagedError(
                f"{record.key(self._ledger.run)}: expected at most {MOST_DRAWN} values to draw "
                f"here, got {values}; verify the run at its store"
            )
        super()._check_genesis(record)

    def _find_missing(self, number: int, key: str) -> None:
        pass
