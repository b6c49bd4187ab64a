"""Every record of a run, read one by one, so that a damaged one hides no other.

What cannot be read is a finding with the object's key and round. No tensor is looked at here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from coordinator.audit.signatures import Signatures
from coordinator.history import read_history
from shared import topology

if TYPE_CHECKING:
    from coordinator.audit.signatures import Signer
    from coordinator.history import History
    from coordinator.site_keys import SiteKeys
    from shared.errors import LedgerDamagedError
    from shared.protocol.ledger import Ledger, Place
    from shared.protocol.records import PrunedRecord

MOST_LOST_ROUNDS = 100


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be (or, as a note, that cannot be told any more)."""

    round: int
    key: str
    problem: str


@dataclass
class Chain:
    """A run's history, and what is missing in it. ``reported``: keys that are on the list already.

    An object that is there and cannot be read is one of them. ``digests``: the sha256 of each
    record's bytes, by its name below the run. ``keys``: the sites', where everybody signs.
    """

    history: History
    reported: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)
    signers: list[Signer] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    keys: SiteKeys | None = None

    @property
    def run(self) -> str:
        """The run's name."""
        return self.history.run

    @cached_property
    def numbers(self) -> range:
        """Every round there must be, also those of which nothing is left."""
        last, done = -1, self.history.finished
        for number in sorted(self.history.rounds):
            if number > last + MOST_LOST_ROUNDS:
                break  # a made-up record, not the end of a run that lost so many
            last = number
        result = self.history.round(last).result
        if done is not None and not done.failed and (not result or result.adapter_sha != done.sha):
            # The end knows of more rounds; if it is the end that is wrong, it may say any number.
            last = max(last, min(done.round, last + MOST_LOST_ROUNDS))
        return range(last + 1)

    def knows(self, number: int) -> bool:
        """Whether every control up to this number can be read."""
        return len({c.number for c in self.history.controls if c.number <= number}) == number

    def has_result(self, number: int) -> bool:
        """Whether the round's result can be read."""
        return self.history.round(number).result is not None

    def needs_result(self, number: int) -> bool:
        """Whether something on record came after this round's result."""
        if number + 1 in self.numbers:
            return True
        done = self.history.finished
        return done is not None and not done.failed and done.round >= number

    def result_after(self, number: int) -> str | None:
        """What the next record calls the adapter that round ``number`` produced."""
        after, done = self.history.round(number + 1), self.history.finished
        decided = after.opened or after.closing
        if decided is not None:
            return decided.source_sha
        return done.sha if done is not None and done.round == number else None

    def pruned_by(self, key: str) -> PrunedRecord | None:
        """The record that says that this object was deleted on purpose."""
        return next((record for record in self.history.pruned if key in record.keys), None)

    def find(self, number: int, key: str, problem: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(number, key, problem))

    def miss(self, number: int, key: str, why: str) -> None:
        """Note once that an object is missing; that it is there and unreadable was noted before."""
        if key not in self.reported:
            self.reported.add(key)
            self.find(number, key, f"is missing, but {why}")


def read_chain(ledger: Ledger) -> Chain:
    """Read every record. Raises RunNotFoundError, and LedgerDamagedError for the first of them."""
    found: list[tuple[Place, LedgerDamagedError]] = []
    signatures = Signatures(ledger)
    digests: dict[str, str] = {}
    prefix = topology.run_prefix(ledger.run)

    def met(key: str, data: bytes, _own: bool) -> None:
        digests[key.removeprefix(prefix)] = hashlib.sha256(data).hexdigest()

    history = read_history(
        ledger.store, ledger.run, lambda *damage: found.append(damage), signatures.see, met
    )
    reported = {place.key for place, _ in found}
    chain = Chain(history, reported, [], signatures.signers, digests, signatures.keys)
    first, digest = history.federation, history.config.digest
    if digest != first.digest:
        chain.find(0, first.key(chain.run), f"digest: expected {first.digest}, got {digest}")
    for place, error in found:
        chain.find(place.round or 0, place.key, str(error).removeprefix(f"{place.key}: "))
    signatures.compare(history)
    for number, key, problem in signatures.problems:
        chain.find(number or 0, key, problem)
    return chain
