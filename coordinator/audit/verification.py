"""Recompute a run from its objects: anybody with the ledger can verify the recorded results.

Reads everything and writes nothing into the store. What only a site can know (its examples, tokens
and losses) is taken as recorded, and a record that nothing follows from (a site that declined, an
evaluation) is not missed. A finding names the round and the object; one damaged object hides no
other: what it should say is taken from what was made of it, and the check goes on from there.

What was deleted on purpose is a note and no finding; all that does not need it is still checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from coordinator.aggregation.closing import Aggregated, Method, aggregate
from coordinator.aggregation.exactness import ROUNDING
from coordinator.aggregation.genesis import draw_adapter
from coordinator.aggregation.server_optimizer import StateFiles
from coordinator.audit.chain import Chain, Finding, accepted_records, read_chain
from coordinator.audit.checks import check_origin, check_records, check_told
from coordinator.round.controls import steer
from coordinator.round.machine import clips, shares
from coordinator.round.selection import select
from shared import modes, topology
from shared.adapters import kind_of
from shared.errors import (
    DecodeError,
    DeltaRefusedError,
    LedgerError,
    ObjectMissingError,
)
from shared.methods.averaging import delta_manifest, get_averaging
from shared.methods.inputs import WeightedDelta
from shared.methods.policies import get_policy
from shared.methods.server_optimizers import get_server_optimizer
from shared.protocol.manifest import pool_held_out
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    GenesisRecord,
    Input,
    OpenedRecord,
    Record,
)
from shared.seeds import derive_seed
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader, check_delta

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shared.config import FederationConfig, LoraSection
    from shared.protocol.ledger import Ledger

UNKNOWN = "unknown"
GAP_TOLERANCE = 2e-3  # relative; one unit of its last of four digits
NORM_TOLERANCE = 1e-6  # relative; norms are for people, the adapter's bytes are the result


@dataclass
class Verification:
    """What was recomputed, and what was found. ``notes``: what can no longer be told, and why."""

    run: str
    rounds: int = 0
    recomputed: int = 0
    deltas: int = 0
    adapter_sha: str | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)


def verify_run(ledger: Ledger, scratch: Path, report: Callable[[int], None]) -> Verification:
    """Check the whole chain of a run. ``scratch``: an empty local folder; ``report(round)``.

    Raises RunNotFoundError, LedgerDamagedError when the run's first record cannot be read (without
    its settings nothing can be recomputed), and MissingPackageError where a mode of it is not here.
    """
    return _Verifier(ledger, scratch).verify(report)


class _Verifier:
    def __init__(self, ledger: Ledger, scratch: Path) -> None:
        self._ledger = ledger
        self._scratch = scratch
        self.result = Verification(ledger.run)
        self._config = self._settings()
        self._chain = Chain(ledger.run)
        self._accepted: dict[tuple[str, int], AcceptedRecord] = {}
        self._counted: set[tuple[str, int]] = set()
        self._genesis: GenesisRecord | None = None
        self._sources: dict[int, str] = {}  # as the chain says, whatever a record of the round does
        self._selected: dict[int, tuple[str, ...]] = {}
        # The server optimiser's state after the last round: None where a round begins without
        # one, UNKNOWN where no record says which it is.
        self._server_sha: str | None = None

    def _settings(self) -> FederationConfig:
        record, key = self._ledger.federation(), topology.federation_key(self._ledger.run)
        modes.require(record.modes, f"run {self._ledger.run}")
        config = record.settings(self._ledger.run)
        if config.digest != record.digest:
            self._expect(0, key, "digest", record.digest, config.digest)
        return config

    @property
    def _keeps_state(self) -> bool:
        return get_server_optimizer(self._config.server.optimizer).rows > 0

    def verify(self, report: Callable[[int], None]) -> Verification:
        self._chain = chain = read_chain(self._ledger)
        chain.findings[:0] = self.result.findings
        self.result.findings = chain.findings
        check_records(chain, self._config)
        self._accepted = accepted_records(chain)
        for number in chain.numbers:
            report(number)
            for record in chain.rounds.get(number, ()):
                self._check(number, record)
            if chain.needs_result(number) and not chain.has_result(number):
                self._go_on_without(number)
        self._check_end()
        return self.result

    def _check(self, number: int, record: Record) -> None:
        match record:
            case GenesisRecord():
                self._check_genesis(record)
            case OpenedRecord():
                self._check_opened(record)
            case ClosedRecord():
                self.result.rounds += 1
                closing = self._chain.one(number, ClosingRecord)
                again = self._check_closed(closing, record) if closing is not None else None
                self._settle(record, again)

    def _go_on_without(self, number: int) -> None:
        """A result that is missing is a finding already; what was made of it says which it was."""
        self.result.rounds += number > 0
        sha = self._chain.result_after(number)
        members = sorted(self._chain.members)
        if number == 0 and sha is not None and members:
            one = self._chain.members[members[0]]
            self._genesis = GenesisRecord(
                members=tuple(members),
                manifest=kind_of(one.manifest).manifest_for(one.manifest, self._config.lora),
                fingerprint=one.fingerprint,
                adapter_sha=sha,
                adapter_size=1,
                origin=self._chain.origin.label if self._chain.origin else None,
            )
        if sha is not None:
            self._check_adapter(number, sha)
        self.result.adapter_sha = sha
        if number > 0 and self._keeps_state:
            self._server_sha = UNKNOWN

    def _settle(self, closed: ClosedRecord, again: Aggregated | None) -> None:
        """Which adapter the round produced: of two words the one that the run went on from.

        Nothing but closed.json names the state beside it: of two words the recomputed one, if
        that comes with the adapter that the run went on from.
        """
        sha, server_sha = closed.adapter_sha, closed.server_sha
        if again is not None and again.digest.sha256 == self._chain.result_after(closed.round):
            sha = again.digest.sha256
        if again is not None and again.stepped is not None and again.digest.sha256 == sha:
            server_sha = again.stepped.state.sha256
        self._check_adapter(closed.round, sha)
        self.result.adapter_sha = sha
        if self._keeps_state:
            self._check_state(closed.round, server_sha)

    def _check_genesis(self, record: GenesisRecord) -> None:
        self._genesis = record
        key, origin = record.key(self._ledger.run), self._chain.origin
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
        opened = self._chain.one(number, OpenedRecord)
        joined = {s for s, m in self._chain.members.items() if 1 <= m.from_round <= number}
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
            members = steer(self._chain.controls, record.controls).in_force(members)
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
        state = self._state_files(closed)
        whole = [delta for delta in deltas if delta is not None]
        again = None
        if decided and source is not None and state is not None and len(whole) == len(deltas):
            again = self._recompute(closing, closed, source, whole, state)
        for path in self._scratch.iterdir():
            path.unlink()
        return again

    def _recompute(
        self,
        closing: ClosingRecord,
        closed: ClosedRecord,
        source: Path,
        deltas: list[WeightedDelta],
        state: StateFiles,
    ) -> Aggregated | None:
        assert self._genesis is not None  # without it no delta was found whole
        number, key = closed.round, closed.key(self._ledger.run)
        try:
            target = self._scratch / "again"
            method = Method.of(self._config)
            again = aggregate(
                source, deltas, self._genesis.manifest, target, method=method, state=state
            )
        except LedgerError as error:  # the decision itself cannot be carried out
            self._find(number, closing.key(self._ledger.run), str(error))
            return None
        self.result.recomputed += 1
        sha = again.digest.sha256
        if sha != closed.adapter_sha and self._is_as_good(closed, target):
            sha = closed.adapter_sha
        self._expect(number, key, "adapter_sha", sha, closed.adapter_sha)
        self._expect(number, key, "adapter_size", again.digest.size, closed.adapter_size)
        self._expect(number, key, "left_out", again.left_out, closed.left_out)
        mine, theirs = _figures(again), _figures(closed)
        if again.stepped is not None:
            self._expect(number, key, "server_sha", again.stepped.state.sha256, closed.server_sha)
            mine["norm of the step"] = again.stepped.norm
        if closed.step_norm is not None:
            theirs["norm of the step"] = closed.step_norm
        self._compare(number, key, mine, theirs)
        gap, known = again.exactness_gap, closed.exactness_gap
        if known is not None:  # a record of before there was one says nothing
            # What may be rounding here and recorded as 0 elsewhere: see exactness.py.
            rounding = ROUNDING * max(again.delta_norms.values()) ** 2
            same = math.isclose(gap or 0.0, known, rel_tol=GAP_TOLERANCE, abs_tol=rounding)
            self._expect(number, key, "exactness_gap", known if same else gap, known)
        return again

    def _is_as_good(self, closed: ClosedRecord, again: Path) -> bool:
        """Whether a fit that differs does so by rounding only; a note says by how much.

        LAPACK's last digits, for instance, are another CPU's own.
        """
        mode = get_averaging(self._config.aggregation.averaging)
        if not mode.tolerance or self._genesis is None:
            return False
        stored = self._scratch / "stored"
        key = topology.adapter_key(self._ledger.run, closed.adapter_sha)
        try:
            if self._ledger.store.spool([key], stored).sha256 != closed.adapter_sha:
                return False
            apart = mode.distance(stored, again, self._genesis.manifest)
        except (ObjectMissingError, KeyError, ValueError, DecodeError):
            return False  # what is wrong with it is found where both its files are looked at
        if not apart <= mode.tolerance:
            return False
        says = (
            f"adapter: equal to within {apart:.1e}, not to the byte: another CPU's linear algebra"
        )
        self._note(closed.round, closed.key(self._ledger.run), says)
        return True

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
        key = topology.accepted_key(self._ledger.run, item.from_round, item.site)
        if record is None:
            self._chain.miss(number, key, f"round {number} counts {item.site} {item.sha[:12]}")
        else:
            self._expect(number, key, "sha", item.sha, record.sha)

    def _delta(self, closing: ClosingRecord, index: int) -> WeightedDelta | None:
        item = closing.inputs[index]
        key = topology.delta_key(self._ledger.run, item.from_round, item.site, item.sha)
        path = self._fetch(closing.round, key, item.sha, f"delta-{index}")
        if path is None or self._genesis is None:
            return None
        self.result.deltas += 1
        manifest = delta_manifest(self._genesis.manifest, self._config, item.site, item.from_round)
        try:
            found = check_delta(path, manifest, self._header(closing, index), None)
        except DeltaRefusedError as error:
            self._find(closing.round, key, str(error))
            return None
        record = self._accepted.get((item.site, item.from_round))
        if record is not None:
            on_record = record.key(self._ledger.run)
            self._expect(closing.round, on_record, "size", path.stat().st_size, record.size)
            self._compare(closing.round, on_record, {"norm": found.norm}, {"norm": record.norm})
        return WeightedDelta(item.label(closing.round), path, item.weight, item.scale, manifest)

    def _header(self, closing: ClosingRecord, index: int) -> DeltaHeader:
        item, codec = closing.inputs[index], get_codec(self._config.codec.name)
        return DeltaHeader(
            run=self._ledger.run,
            round=item.from_round,
            site=item.site,
            source_sha=self._sources.get(item.from_round, closing.source_sha),
            codec=codec.name,
            codec_version=codec.version,
        )

    def _adapter_file(self, number: int, sha: str) -> Path | None:
        return self._fetch(number, topology.adapter_key(self._ledger.run, sha), sha, "source")

    def _check_adapter(self, number: int, sha: str) -> None:
        """Both files of the PEFT directory that a round produced."""
        run = self._ledger.run
        key = topology.adapter_key(run, sha)
        config_key = topology.adapter_key(run, sha, "adapter_config.json")
        try:
            self._expect(number, key, "sha256", sha, self._ledger.store.sha256(key))
        except ObjectMissingError:
            self._find_missing(number, key)
        try:
            stored = self._ledger.store.get(config_key)
        except ObjectMissingError:
            self._find_missing(number, config_key)
            return
        lora = self._lora_after(number)
        if self._genesis is not None and lora is not None:
            made = kind_of(lora).peft_config(self._config.base, lora, self._genesis.manifest)
            if made != stored:
                self._find(number, config_key, "is not the config that the run's record gives")

    def _lora_after(self, number: int) -> LoraSection | None:
        """As PEFT needs it; None where a rank that grows follows from a record that is missing."""
        closings = (self._chain.one(n, ClosingRecord) for n in range(1, number + 1))
        mode = get_averaging(self._config.aggregation.averaging)
        return mode.lora_after(closings, self._config.lora)

    def _state_files(self, closed: ClosedRecord) -> StateFiles | None:
        """The state the round went on from; None if it is not there whole."""
        if not self._keeps_state or self._server_sha is None:
            return StateFiles(None, self._scratch / "state-again")
        if self._server_sha == UNKNOWN:
            says = "the state of the server's optimiser before it is on no record"
            key = closed.key(self._ledger.run)
            self._note(closed.round, key, f"cannot be recomputed: {says}")
            return None
        path = self._scratch / "state"
        key = topology.server_state_key(self._ledger.run, self._server_sha)
        try:
            whole = self._ledger.store.spool([key], path).sha256 == self._server_sha
        except ObjectMissingError:
            return None  # said of the round that it came from
        return StateFiles(path, self._scratch / "state-again") if whole else None

    def _check_state(self, number: int, sha: str | None) -> None:
        """What the next round goes on from is there, and is what its name says."""
        self._server_sha = sha or UNKNOWN
        if sha is None:
            return  # said of the record
        key = topology.server_state_key(self._ledger.run, sha)
        try:
            self._expect(number, key, "sha256", sha, self._ledger.store.sha256(key))
        except ObjectMissingError:
            self._find_missing(number, key)

    def _check_end(self) -> None:
        key, finished = topology.finished_key(self._ledger.run), self._chain.finished
        if finished is None:
            return
        failed = self.result.adapter_sha is None
        self._expect(finished.round, key, "failed", failed, finished.failed)
        self._expect(finished.round, key, "sha", self.result.adapter_sha, finished.sha)
        self._expect(finished.round, key, "round", self.result.rounds, finished.round)

    def _fetch(self, number: int, key: str, sha: str, name: str) -> Path | None:
        path = self._scratch / name
        try:
            found = self._ledger.store.spool([key], path).sha256
        except ObjectMissingError:
            self._find_missing(number, key)
            return None
        self._expect(number, key, "sha256", sha, found)
        return path if found == sha else None

    def _find_missing(self, number: int, key: str) -> None:
        pruned = self._chain.pruned_by(key)
        if pruned is None:
            self._find(number, key, "is missing")
            return
        day = datetime.fromtimestamp(pruned.time, UTC).strftime("%Y-%m-%d")
        self._note(number, key, f"pruned on {day}: cannot be recomputed")

    def _note(self, number: int, key: str, says: str) -> None:
        note = Finding(number, key, says)
        if note not in self.result.notes:
            self.result.notes.append(note)

    def _compare(
        self, number: int, key: str, mine: dict[str, float], theirs: dict[str, float]
    ) -> None:
        """Figures for people: equal but for the last digits."""
        for name in sorted({*mine, *theirs}):
            one, other = mine.get(name, math.nan), theirs.get(name, math.nan)
            # A cosine near 0 has no digits of its own; a norm has, however small.
            room = NORM_TOLERANCE if name.startswith("cosine") else 0.0
            if not math.isclose(one, other, rel_tol=NORM_TOLERANCE, abs_tol=room):
                self._find(number, key, f"{name}: expected {one}, got {other}")

    def _expect(self, number: int, key: str, name: str, expected: object, got: object) -> None:
        if expected != got:
            self._find(number, key, f"{name}: expected {expected}, got {got}")

    def _find(self, number: int, key: str, problem: str) -> None:
        self.result.findings.append(Finding(number, key, problem))


def _figures(result: Aggregated | ClosedRecord) -> dict[str, float]:
    named = {f"norm of {site}": value for site, value in result.delta_norms.items()}
    named |= {f"cosine of {site}": value for site, value in result.cosines.items()}
    return {"norm of the mean": result.mean_norm, **named}
