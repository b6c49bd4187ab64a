"""What a verification reads and what it has found so far.

A finding names the round and the object. An object that was deleted on purpose is a note and no
finding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from coordinator.audit.chain import Finding, read_chain
from coordinator.audit.links import Linked, walk_links
from shared import modes
from shared.errors import ObjectMissingError
from shared.methods.server_optimizers import get_server_optimizer

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.audit.signatures import Signer
    from shared.protocol.ledger import Ledger
    from shared.protocol.records import GenesisRecord

UNKNOWN = "unknown"
NORM_TOLERANCE = 1e-6  # relative; norms are for people, the adapter's bytes are the result


@dataclass
class Verification:
    """What was recomputed, and what was found. ``notes``: what can no longer be told, and why.

    ``signers``: whose keys proved how many records; empty where nobody signs.
    ``chain``: what the links say that name all records.
    """

    run: str
    rounds: int = 0
    recomputed: int = 0
    deltas: int = 0
    adapter_sha: str | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    signers: list[Signer] = field(default_factory=list)
    chain: Linked = field(default_factory=Linked)


class Evidence:
    """A run's records and objects, and what is known of them by the round that is looked at."""

    def __init__(self, ledger: Ledger, scratch: Path) -> None:
        self._ledger = ledger
        self._scratch = scratch
        self._links = walk_links(ledger)
        self._chain = read_chain(ledger)
        self._history = self._chain.history
        self._config = self._history.config
        modes.require(self._history.federation.modes, f"run {ledger.run}")
        self.result = Verification(ledger.run, findings=self._chain.findings)
        self.result.signers += self._chain.signers
        self._accepted = self._history.accepted
        self._counted: set[tuple[str, int]] = set()
        self._genesis: GenesisRecord | None = None
        self._sources: dict[int, str] = {}  # as the chain says, whatever a record of the round does
        self._selected: dict[int, tuple[str, ...]] = {}
        # The server optimiser's state after the last round: None where a round begins without
        # one, UNKNOWN where no record says which it is.
        self._server_sha: str | None = None
        self._exact_sha: str | None = None  # likewise the exact adapter; None: the run's own

    @property
    def _keeps_state(self) -> bool:
        return get_server_optimizer(self._config.server.optimizer).rows > 0

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
        self._note(number, key, f"{pruned.did} on {day}: cannot be recomputed")

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
