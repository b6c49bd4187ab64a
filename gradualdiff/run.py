"""A run for scripts: its rounds, as they were on record when the run was opened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from coordinator.liveness import read_status
from coordinator.runs.inspection import (
    History,
    RoundSummary,
    RunSummary,
    SiteRow,
    show_round,
    summarise_round,
    summarise_rounds,
    summarise_run,
)
from coordinator.runs.standing import with_absence
from gradualdiff.rows import Rows

if TYPE_CHECKING:
    from pathlib import Path

    from shared.config import FederationConfig
    from shared.stores.port import ObjectStore


@dataclass(frozen=True)
class Round:
    """One round. ``problem``: why the step that comes next did not work, as a coordinator told."""

    summary: RoundSummary
    sites: Rows[SiteRow]
    problem: str = ""


class Run:
    """One run. It does not change: ask the store for the run again to see what came since.

    ``objects``: the store's objects. ``path``: what names that store. ``history``: the records.
    """

    def __init__(self, objects: ObjectStore, name: str, path: Path) -> None:
        self.name = name
        self.objects = objects
        self.path = path
        self.history = History(objects, name)

    def __repr__(self) -> str:
        return f"<Run {self.name} in {self.path}: {self.summary.state}>"

    @property
    def config(self) -> FederationConfig:
        """The run's settings."""
        return self.history.config

    @cached_property
    def summary(self) -> RunSummary:
        """The run in one line: its state, how far it is, its newest adapter and loss."""
        return summarise_run(self.history)

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
