"""Recompute a run from its objects: anybody with the ledger can tell whether it is what it says.

Reads everything and writes nothing into the store. What only a site can know (its examples, tokens
and losses) is taken as recorded. A finding names the round and the object; one
damaged object does not hide the findings of the rounds after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.aggregation import WeightedDelta, aggregate
from coordinator.genesis import adapter_config, draw_adapter
from coordinator.rounds import shares
from coordinator.selection import select
from shared import topology
from shared.codecs import get_codec
from shared.delta_file import DeltaHeader, check_delta
from shared.errors import DeltaRefusedError, LedgerError, ObjectMissingError
from shared.files import digest_file
from shared.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    FinishedRecord,
    GenesisRecord,
    MemberRecord,
    OpenedRecord,
    Record,
    pool_held_out,
)
from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shared.ledger import Ledger

NORM_TOLERANCE = 1e-6  # relative; norms are for people, the adapter's bytes are the result


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    round: int
    key: str
    problem: str


@dataclass
class Verification:
    """What was recomputed, and what was found."""

    run: str
    rounds: int = 0
    deltas: int = 0
    adapter_sha: str | None = None
    findings: list[Finding] = field(default_factory=list)


def verify_run(ledger: Ledger, scratch: Path, report: Callable[[int], None]) -> Verification:
    """Check the whole chain of a run. ``scratch``: an empty local folder; ``report(round)``.

    Raises RunNotFoundError, LedgerDamagedError (a record that cannot be read names its key).
    """
    return _Verifier(ledger, scratch).verify(report)


class _Verifier:
    def __init__(self, ledger: Ledger, scratch: Path) -> None:
        self._ledger = ledger
        self._scratch = scratch
        self._config = ledger.config()
        self._accepted: dict[tuple[str, int], AcceptedRecord] = {}
        self._counted: set[tuple[str, int]] = set()
        self._fingerprints: set[str] = set()
        self._manifests: set[str] = set()
        self._genesis: GenesisRecord | None = None
        self._members: dict[str, MemberRecord] = {}
        self._opened: dict[int, OpenedRecord] = {}
        self.result = Verification(ledger.run)

    def verify(self, report: Callable[[int], None]) -> Verification:
        for member in self._ledger.members():
            self._fingerprints.add(member.fingerprint)
            self._manifests.add(member.manifest.digest)
            self._members[member.site] = member
        for number, records in self._ledger.rounds():
            report(number)
            for record in records:
                self._check(number, record, records)
        self._check_end()
        return self.result

    def _check(self, number: int, record: Record, records: list[Record]) -> None:
        match record:
            case GenesisRecord():
                self._check_genesis(record)
            case OpenedRecord():
                self._check_opened(record)
            case AcceptedRecord():
                self._accepted[record.site, record.round] = record
            case ClosedRecord():
                if not any(isinstance(r, OpenedRecord) for r in records):
                    key = topology.round_key(self._ledger.run, number, "opened")
                    self._find(number, key, "is missing, but the round has a result")
                closing = next((r for r in records if isinstance(r, ClosingRecord)), None)
                if closing is None:
                    key = topology.round_key(self._ledger.run, number, "closing")
                    self._find(number, key, "is missing, but the round has a result")
                else:
                    self._check_closed(closing, record)

    def _check_genesis(self, record: GenesisRecord) -> None:
        self._genesis = record
        drawn = self._scratch / "genesis"
        digest = draw_adapter(record.manifest, self._config.run.seed, drawn)
        drawn.unlink()
        key = record.key(self._ledger.run)
        self._expect(0, key, "adapter_sha", digest.sha256, record.adapter_sha)
        self._expect(0, key, "adapter_size", digest.size, record.adapter_size)
        members = f"{topology.run_prefix(self._ledger.run)}members/"
        self._expect(0, members, "fingerprints", {record.fingerprint}, self._fingerprints)
        self._expect(0, members, "manifests", {record.manifest.digest}, self._manifests)
        self._check_adapter(0, record.adapter_sha)
        self.result.adapter_sha = record.adapter_sha

    def _check_opened(self, record: OpenedRecord) -> None:
        run, number = self._config.run, record.round
        key = record.key(self._ledger.run)
        self._opened[number] = record
        members = set(self._genesis.members if self._genesis else ())
        members |= {s for s, m in self._members.items() if 1 <= m.from_round <= number}
        self._expect(number, key, "source_sha", self.result.adapter_sha, record.source_sha)
        self._expect(number, key, "seed", derive_seed(run.seed, "round", number), record.seed)
        chosen = select(self._config.selection, members, run.seed, number)
        self._expect(number, key, "selected", chosen, record.selected)
        span = ((number - 1) / run.rounds, number / run.rounds)
        self._expect(number, key, "progress", span, (record.progress_from, record.progress_to))

    def _check_closed(self, closing: ClosingRecord, closed: ClosedRecord) -> None:
        number, key = closing.round, closing.key(self._ledger.run)
        self.result.rounds += 1
        self._expect(number, key, "source_sha", self.result.adapter_sha, closing.source_sha)
        self._check_weights(closing)
        source = self._adapter_file(number, closing.source_sha)
        deltas = [self._delta(closing, index) for index in range(len(closing.inputs))]
        self._check_adapter(number, closed.adapter_sha)
        self.result.adapter_sha = closed.adapter_sha
        whole = [delta for delta in deltas if delta is not None]
        if source is not None and len(whole) == len(deltas) and self._genesis is not None:
            self._recompute(closing, closed, source, whole)
        for path in self._scratch.iterdir():
            path.unlink()

    def _recompute(
        self,
        closing: ClosingRecord,
        closed: ClosedRecord,
        source: Path,
        deltas: list[WeightedDelta],
    ) -> None:
        assert self._genesis is not None  # checked by the caller
        number, key = closed.round, closed.key(self._ledger.run)
        try:
            again = aggregate(source, deltas, self._genesis.manifest, self._scratch / "again")
        except LedgerError as error:  # the decision itself cannot be carried out
            self._find(number, closing.key(self._ledger.run), str(error))
            return
        self._expect(number, key, "adapter_sha", again.digest.sha256, closed.adapter_sha)
        self._expect(number, key, "adapter_size", again.digest.size, closed.adapter_size)
        mine = _figures(again.mean_norm, again.delta_norms, again.cosines)
        theirs = _figures(closed.mean_norm, closed.delta_norms, closed.cosines)
        self._compare(number, key, mine, theirs)
        accepted = [self._accepted.get((i.site, i.from_round)) for i in closing.inputs]
        pooled = pool_held_out(r.metrics.held_out for r in accepted if r is not None)
        self._expect(number, key, "source_held_out", pooled, closed.source_held_out)

    def _check_weights(self, closing: ClosingRecord) -> None:
        number, key = closing.round, closing.key(self._ledger.run)
        known: list[AcceptedRecord] = []
        for item in closing.inputs:
            pair = (item.site, item.from_round)
            record = self._accepted.get(pair)
            if pair in self._counted:
                self._find(number, key, f"counts {item.site} of round {item.from_round} again")
            if record is None or record.sha != item.sha:
                self._find(number, key, f"counts {item.site} {item.sha[:12]}, never accepted")
                continue
            self._counted.add(pair)
            known.append(record)
        if len(known) == len(closing.inputs):
            share = shares(self._config.aggregation.weights, known, number)
            on_record = {item.label(number): item.weight for item in closing.inputs}
            self._expect(number, key, "weights", share, on_record)

    def _delta(self, closing: ClosingRecord, index: int) -> WeightedDelta | None:
        item = closing.inputs[index]
        key = topology.delta_key(self._ledger.run, item.from_round, item.site, item.sha)
        path = self._fetch(closing.round, key, item.sha, f"delta-{index}")
        if path is None or self._genesis is None:
            return None
        self.result.deltas += 1
        try:
            found = check_delta(path, self._genesis.manifest, self._header(closing, index), None)
        except DeltaRefusedError as error:
            self._find(closing.round, key, str(error))
            return None
        record = self._accepted.get((item.site, item.from_round))
        if record is not None:
            on_record = record.key(self._ledger.run)
            self._expect(closing.round, on_record, "size", path.stat().st_size, record.size)
            self._compare(closing.round, on_record, {"norm": found.norm}, {"norm": record.norm})
        return WeightedDelta(item.label(closing.round), path, item.weight)

    def _header(self, closing: ClosingRecord, index: int) -> DeltaHeader:
        item, codec = closing.inputs[index], get_codec(self._config.codec.name)
        opened = self._opened.get(item.from_round)
        return DeltaHeader(
            run=self._ledger.run,
            round=item.from_round,
            site=item.site,
            source_sha=opened.source_sha if opened else closing.source_sha,
            codec=codec.name,
            codec_version=codec.version,
        )

    def _adapter_file(self, number: int, sha: str) -> Path | None:
        return self._fetch(number, topology.adapter_key(self._ledger.run, sha), sha, "source")

    def _check_adapter(self, number: int, sha: str) -> None:
        """Both files of the PEFT directory that a round produced."""
        run = self._ledger.run
        key = topology.adapter_key(run, sha)
        try:
            self._expect(number, key, "sha256", sha, self._ledger.store.sha256(key))
            config_key = topology.adapter_key(run, sha, "adapter_config.json")
            stored = self._ledger.store.get(config_key)
        except ObjectMissingError as error:
            self._find(number, key, f"is missing: {error}")
            return
        if self._genesis is not None:
            made = adapter_config(self._config.base, self._config.lora, self._genesis.manifest)
            if made != stored:
                self._find(number, config_key, "is not the config that the run's record gives")

    def _check_end(self) -> None:
        key = topology.finished_key(self._ledger.run)
        try:
            finished = self._ledger.read(FinishedRecord, key)
        except ObjectMissingError:
            return
        failed = self.result.adapter_sha is None
        self._expect(finished.round, key, "failed", failed, finished.failed)
        self._expect(finished.round, key, "sha", self.result.adapter_sha, finished.sha)
        self._expect(finished.round, key, "round", self.result.rounds, finished.round)

    def _fetch(self, number: int, key: str, sha: str, name: str) -> Path | None:
        path = self._scratch / name
        try:
            self._ledger.store.fetch_file(key, path)
        except ObjectMissingError:
            self._find(number, key, "is missing")
            return None
        found, _ = digest_file(path)
        self._expect(number, key, "sha256", sha, found)
        return path if found == sha else None

    def _compare(
        self, number: int, key: str, mine: dict[str, float], theirs: dict[str, float]
    ) -> None:
        """Figures for people: equal but for the last digits."""
        for name in sorted({*mine, *theirs}):
            one, other = mine.get(name, math.nan), theirs.get(name, math.nan)
            if not math.isclose(one, other, rel_tol=NORM_TOLERANCE, abs_tol=NORM_TOLERANCE):
                self._find(number, key, f"{name}: expected {one}, got {other}")

    def _expect(self, number: int, key: str, name: str, expected: object, got: object) -> None:
        if expected != got:
            self._find(number, key, f"{name}: expected {expected}, got {got}")

    def _find(self, number: int, key: str, problem: str) -> None:
        self.result.findings.append(Finding(number, key, problem))


def _figures(
    mean_norm: float, norms: dict[str, float], cosines: dict[str, float]
) -> dict[str, float]:
    named = {f"norm of {site}": value for site, value in norms.items()}
    named |= {f"cosine of {site}": value for site, value in cosines.items()}
    return {"norm of the mean": mean_norm, **named}
