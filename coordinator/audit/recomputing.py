"""A closed round's numbers computed again from its objects, and compared with those on record."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from coordinator.aggregation.downlink import RoundFiles, close_round, sends_updates
from coordinator.aggregation.exactness import ROUNDING
from coordinator.aggregation.server_optimizer import StateFiles
from coordinator.audit.evidence import UNKNOWN
from coordinator.audit.secure_sums import SecureSums
from shared import topology
from shared.adapters import kind_of
from shared.errors import DecodeError, DeltaRefusedError, LedgerError, ObjectMissingError
from shared.methods.averaging import delta_manifest, get_averaging
from shared.methods.inputs import WeightedDelta
from shared.tensors.delta_file import DeltaHeader, check_delta
from shared.tensors.masked_file import check_masked, masked_header, ring_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coordinator.aggregation.closing import Aggregated
    from shared.adapters import AdapterSettings
    from shared.protocol.manifest import Manifest
    from shared.protocol.records import ClosedRecord, ClosingRecord

ENERGY_TOLERANCE = 2e-4  # relative; two units of the last of its five digits
GAP_TOLERANCE = 2e-3  # relative; one unit of its last of four digits


class Recomputing(SecureSums):
    """The arithmetic of a round, with the objects that it begins with and those that it leaves."""

    def _recompute(
        self,
        closing: ClosingRecord,
        closed: ClosedRecord,
        deltas: list[WeightedDelta],
        files: RoundFiles,
    ) -> Aggregated | None:
        assert self._genesis is not None  # without it no delta was found whole
        number, key = closed.round, closed.key(self._ledger.run)
        try:
            again = close_round(self._config, closing, deltas, self._genesis.manifest, files)
        except LedgerError as error:  # the decision itself cannot be carried out
            self._find(number, closing.key(self._ledger.run), str(error))
            return None
        self.result.recomputed += 1
        sha = again.digest.sha256
        if sha != closed.adapter_sha and self._is_as_good(closed, files.target):
            sha = closed.adapter_sha
        self._expect(number, key, "adapter_sha", sha, closed.adapter_sha)
        self._expect(number, key, "adapter_size", again.digest.size, closed.adapter_size)
        self._expect(number, key, "left_out", again.left_out, closed.left_out)
        mine, theirs = _figures(again), _figures(closed)
        if again.stepped is not None:
            self._expect(number, key, "server_sha", again.stepped.state.sha256, closed.server_sha)
            mine["norm of the step"] = again.stepped.norm
        if (sent := again.sent_down) is not None:
            self._expect(number, key, "exact_sha", sent.exact.sha256, closed.exact_sha)
            self._expect(number, key, "update_sha", sent.update.sha256, closed.update_sha)
            self._expect(number, key, "update_size", sent.update.size, closed.update_size)
        if closed.step_norm is not None:
            theirs["norm of the step"] = closed.step_norm
        self._compare(number, key, mine, theirs)
        self._compare_energy(number, key, again, closed)
        gap, known = again.exactness_gap, closed.exactness_gap
        if known is not None:  # a record of before there was one says nothing
            # What may be rounding here and recorded as 0 elsewhere: see exactness.py.
            rounding = ROUNDING * max(again.delta_norms.values()) ** 2
            same = math.isclose(gap or 0.0, known, rel_tol=GAP_TOLERANCE, abs_tol=rounding)
            self._expect(number, key, "exactness_gap", known if same else gap, known)
        return again

    def _compare_energy(
        self, number: int, key: str, again: Aggregated, closed: ClosedRecord
    ) -> None:
        """By layer and to within what another CPU's linear algebra may change."""
        mine, theirs = again.gradient_energy, closed.gradient_energy
        layers = sorted(mine.keys() | theirs.keys())
        for name in layers:
            one, other = mine.get(name, ()), theirs.get(name, ())
            near = len(one) == len(other) and all(
                math.isclose(a, b, rel_tol=ENERGY_TOLERANCE)
                for a, b in zip(one, other, strict=True)
            )
            if not near:
                self._expect(number, key, f"gradient_energy of {name}", one, other)

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

    def _delta(self, closing: ClosingRecord, index: int) -> WeightedDelta | None:
        item = closing.inputs[index]
        key = topology.delta_key(self._ledger.run, item.from_round, item.site, item.sha)
        path = self._fetch(closing.round, key, item.sha, f"delta-{index}")
        if path is None or self._genesis is None:
            return None
        self.result.deltas += 1
        manifest = delta_manifest(self._genesis.manifest, self._config, item.site, item.from_round)
        try:
            norm = self._norm(closing, index, path, manifest)
        except DeltaRefusedError as error:
            self._find(closing.round, key, str(error))
            return None
        record = self._accepted.get((item.site, item.from_round))
        if record is not None:
            on_record = record.key(self._ledger.run)
            self._expect(closing.round, on_record, "size", path.stat().st_size, record.size)
            self._compare(closing.round, on_record, {"norm": norm}, {"norm": record.norm})
        return WeightedDelta(item.label(closing.round), path, item.weight, item.scale, manifest)

    def _norm(self, closing: ClosingRecord, index: int, path: Path, manifest: Manifest) -> float:
        """Of a delta that is as it should be; 0 of a masked one. Raises DeltaRefusedError."""
        opened, item = self._history.round(closing.round).opened, closing.inputs[index]
        if opened is None or opened.secure is None:
            return check_delta(path, manifest, self._header(closing, index), None).norm
        source_sha = self._sources.get(item.from_round, closing.source_sha)
        header = masked_header(self._ledger.run, item.from_round, item.site, source_sha)
        check_masked(path, manifest, header, ring_of(opened.secure))
        return 0.0

    def _header(self, closing: ClosingRecord, index: int) -> DeltaHeader:
        item = closing.inputs[index]
        return DeltaHeader.of(
            self._config.codec.name,
            run=self._ledger.run,
            number=item.from_round,
            site=item.site,
            source_sha=self._sources.get(item.from_round, closing.source_sha),
        )

    def _adapter_file(self, number: int, sha: str) -> Path | None:
        return self._fetch(number, topology.adapter_key(self._ledger.run, sha), sha, "source")

    def _check_bases(self, sha: str | None) -> None:
        """What the cores stand between is there, is what its name says, and is the run's."""
        run, wanted = self._ledger.run, self._config.lora.bases_sha
        self._expect(0, topology.round_key(run, 0, "closed"), "manifest.bases", wanted, sha)
        if sha is None:
            return
        key = topology.bases_key(run, sha)
        try:
            self._expect(0, key, "sha256", sha, self._ledger.store.sha256(key))
        except ObjectMissingError:
            self._find_missing(0, key)

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
        settings = self._settings_after(number)
        if self._genesis is not None and settings is not None:
            made = kind_of(settings).peft_config(
                self._config.base, settings, self._genesis.manifest
            )
            if made != stored:
                self._find(number, config_key, "is not the config that the run's record gives")

    def _settings_after(self, number: int) -> AdapterSettings | None:
        """As PEFT needs it; None where a rank that grows follows from a record that is missing."""
        closings = (self._history.round(n).closing for n in range(1, number + 1))
        mode = get_averaging(self._config.aggregation.averaging)
        return mode.settings_after(closings, self._config.lora)

    def _round_files(self, closed: ClosedRecord, source: Path | None) -> RoundFiles | None:
        """What the round went on from, and where it goes again; None if that is not there whole."""
        server = self._before(
            closed, "state", self._server_sha, "the state of the server's optimiser"
        )
        exact = self._before(closed, "exact", self._exact_sha, "the exact adapter")
        if source is None or server is None or exact is None:
            return None
        again, update = self._scratch / "again", self._scratch / "update-again"
        return RoundFiles(source, again, server, exact, update)

    def _before(
        self, closed: ClosedRecord, name: str, sha: str | None, what: str
    ) -> StateFiles | None:
        """One of the coordinator's states before a round, if it is there, and where it goes."""
        after = self._scratch / f"{name}-again"
        if sha is None:
            return StateFiles(None, after)
        if sha == UNKNOWN:
            says = f"cannot be recomputed: {what} before it is on no record"
            self._note(closed.round, closed.key(self._ledger.run), says)
            return None
        path = self._scratch / name
        key = topology.server_state_key(self._ledger.run, sha)
        try:
            whole = self._ledger.store.spool([key], path).sha256 == sha
        except ObjectMissingError:
            return None  # said of the round that it came from
        return StateFiles(path, after) if whole else None

    def _check_states(self, closed: ClosedRecord, again: Aggregated | None) -> None:
        """What the next round and the sites go on from is there, and is what its name says.

        ``again``: what is to be believed where the record says something else.
        """
        number = closed.round
        server, exact, update = closed.server_sha, closed.exact_sha, closed.update_sha
        if again is not None and again.stepped is not None:
            server = again.stepped.state.sha256
        if again is not None and again.sent_down is not None:
            exact, update = again.sent_down.exact.sha256, again.sent_down.update.sha256
        if self._keeps_state:
            self._server_sha = server or UNKNOWN
            self._check_object(number, server, topology.server_state_key)
        if sends_updates(self._config):
            self._exact_sha = exact or UNKNOWN
            self._check_object(number, exact, topology.server_state_key)
            self._check_object(number, update, topology.update_key)

    def _check_object(
        self, number: int, sha: str | None, key_of: Callable[[str, str], str]
    ) -> None:
        if sha is None:
            return  # said of the record
        key = key_of(self._ledger.run, sha)
        try:
            self._expect(number, key, "sha256", sha, self._ledger.store.sha256(key))
        except ObjectMissingError:
            self._find_missing(number, key)


def _figures(result: Aggregated | ClosedRecord) -> dict[str, float]:
    named = {f"norm of {site}": value for site, value in result.delta_norms.items()}
    named |= {f"cosine of {site}": value for site, value in result.cosines.items()}
    return {"norm of the mean": result.mean_norm, **named}
