"""A run for scripts: its rounds, adapters, what recomputing it says, and what happens in it now."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.history import read_history
from coordinator.liveness import read_status
from coordinator.runs.following import View, views
from coordinator.runs.inspection import (
    RoundSummary,
    RunSummary,
    SiteRow,
    privacy_of,
    show_round,
    summarise_round,
    summarise_rounds,
    summarise_run,
    with_absence,
    with_approvals,
)
from coordinator.runs.wire import Wire, of_run
from gradualdiff.adapter import Adapter
from gradualdiff.attesting import own_key, save
from gradualdiff.comparison import Comparison, compare
from gradualdiff.rows import Rows
from shared.errors import ConfigError, RunNotFoundError
from shared.protocol.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from matplotlib.axes import Axes

    from coordinator.audit.evidence import Verification
    from coordinator.history import History
    from shared.config import FederationConfig
    from shared.errors import StoreError
    from shared.protocol.privacy import PrivacySpent
    from shared.stores.port import ObjectStore


@dataclass(frozen=True)
class Round:
    """One round. ``problem``: why the step that comes next did not work, as a coordinator told."""

    summary: RoundSummary
    sites: Rows[SiteRow]
    problem: str = ""


class Run:
    """One run. Its records are read once: ask the store for the run again to see what came since.

    ``objects``: the store's objects. ``path``: what names that store.
    """

    def __init__(self, objects: ObjectStore, name: str, path: Path) -> None:
        self.name = name
        self.objects = objects
        self.path = path
        self._ledger().federation()  # it is there

    def _ledger(self) -> Ledger:
        return Ledger(self.objects, self.name, "reader", lambda: 0.0)

    @cached_property
    def history(self) -> History:
        """The records. Raises LedgerDamagedError, which ``verify`` does not."""
        return read_history(self.objects, self.name)

    def __repr__(self) -> str:
        return f"<Run {self.name} in {self.path}: {self.summary.state}>"

    @property
    def config(self) -> FederationConfig:
        """The run's settings."""
        return self.history.config

    @cached_property
    def summary(self) -> RunSummary:
        """The run in one line: its state, how far it is, its newest adapter and loss."""
        summary = summarise_run(self.history)
        if not summary.waits_for:
            return summary
        return with_approvals(summary, read_status(self.objects, self.name))

    @property
    def rounds(self) -> Rows[RoundSummary]:
        """A line on every round; the first one is round 0, the adapter drawn from the seed."""
        return Rows(RoundSummary, summarise_rounds(self.history))

    def round(self, number: int) -> Round:
        """One round, site by site. Raises RunNotFoundError."""
        summary = summarise_round(self.history, number)
        status = read_status(self.objects, self.name)
        rows = with_absence(show_round(self.history, number), status)
        problem = status.problem if status is not None and self.history.finished is None else ""
        return Round(summary, Rows(SiteRow, rows), problem)

    @property
    def wire(self) -> Wire | None:
        """What the run cost on the wire, as its sites counted it; None where none told."""
        return of_run(self.history)

    @property
    def privacy(self) -> dict[str, PrivacySpent]:
        """What each site told last of its differential privacy; empty in a run without."""
        return privacy_of(self.history, self.history.last_closed)

    @property
    def best_round(self) -> int:
        """The round whose adapter has the lowest held-out loss. Raises RunNotFoundError."""
        from coordinator.runs.export import best_round

        return best_round(self.history)

    def adapter(self, number: int | None = None) -> Adapter:
        """The adapter after a round, of the last one if none is given. Raises RunNotFoundError."""
        number = self.history.last_closed if number is None else number
        sha = next((row.adapter_sha for row in self.rounds if row.round == number), None)
        if sha is None:
            raise RunNotFoundError(f"run {self.name} has no result of round {number} to export")
        return Adapter(self, number, sha)

    def attest(
        self,
        to: Path | str,
        report: Callable[[int], None] = lambda _: None,
        *,
        key: str | None = None,
        against: str | None = None,
    ) -> Verification:
        """Verify the run; without a finding write the file ``to``, which proves it to others.

        Signed where the store's federation.toml names the coordinator's key and that is here.
        Raises as ``verify``, ConfigError where there is such a file, StoreUnavailableError.
        """
        to = Path(to)
        if to.exists():
            raise ConfigError(
                f"--to: expected a new file, got {to}, which is there; choose another"
            )
        found = self.verify(report, key=key, against=against)
        if not found.findings:
            save(self._ledger(), found, to, own_key(self.path))
        return found

    def verify(
        self,
        report: Callable[[int], None] = lambda _: None,
        *,
        key: str | None = None,
        against: str | None = None,
    ) -> Verification:
        """Recompute every round; what differs from the record is in ``findings``.

        ``report`` is told each round that begins. ``key``: the coordinator's public key, as you
        have it from elsewhere; without it the one that the store's federation.toml names, if any.
        ``against``: a head that a site kept, ``N:SHA256``. Raises ConfigError for what is no key or
        no head, LedgerDamagedError where the run's first record cannot be read.
        """
        from coordinator.audit.links import Expected
        from coordinator.audit.verification import verify_run
        from shared.protocol.chain import Head
        from shared.trust.keys import PublicKey

        own = own_key(self.path)
        expected = Expected(
            key=PublicKey(key) if key else own.public if own else None,
            demanded=key is not None,
            against=Head.parse(against, "--against") if against else None,
        )
        with tempfile.TemporaryDirectory(prefix="gradualdiff-verify-") as scratch:
            return verify_run(self._ledger(), Path(scratch), report, expected)

    def compare(self, *others: Run) -> Comparison:
        """Set this run beside others. Raises ConfigError for a run that is there twice."""
        return compare([self, *others])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw held-out loss by round on ``ax``, or on a new figure; the axes, to be restyled.

        Raises MissingPackageError without matplotlib.
        """
        from gradualdiff.figures.held_out import plot_held_out

        return plot_held_out(self.history, ax)

    def follow(
        self, number: int | None = None, *, away: Callable[[StoreError], None] = lambda _: None
    ) -> Iterator[View]:
        """What happens now: a view whenever it changed, until the run ends.

        ``number``: until this round is closed. ``away`` is told once that the store cannot be
        read; it is tried again each second. Raises RunNotFoundError for a round that has not begun.
        """
        return views(self.objects, self.name, number, away=away)
