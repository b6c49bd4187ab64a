"""Carries out planned runs in this process, each once: what is finished is not run again."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coordinator.history import read_history
from coordinator.runs.retention import carry_out, read_plan
from gradualdiff.demo.files import write_tables
from gradualdiff.embedded.federation import Embedding, run_embedded
from gradualdiff.embedded.metering import Meter
from gradualdiff.events import RunMoved
from gradualdiff.reproduction.arms import config_of
from gradualdiff.reproduction.figures import largest
from gradualdiff.reproduction.kept import read_kept
from participant.learner.memory import peak_bytes, reset_peak
from participant.learner.torch_learner import TorchLearner
from shared.config import DataSection
from shared.disk.files import write_atomically
from shared.errors import DivergedError, RunStuckError
from shared.protocol.ledger import Ledger, list_runs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coordinator.history import History
    from gradualdiff.embedded.display import Display
    from gradualdiff.reproduction.arms import RunPlan
    from gradualdiff.reproduction.presets import Preset
    from participant.learner.model_pool import ModelPool
    from participant.learner.port import Learned
    from shared.config import FederationConfig
    from shared.stores.directory import DirectoryStore


class _Learner(TorchLearner):
    """Remembers that its training diverged: of a site's trouble a run only says the words."""

    diverged: DivergedError | None = None

    def learn(self, *args: Any, **named: Any) -> Learned:
        try:
            return super().learn(*args, **named)
        except DivergedError as error:
            self.diverged = error
            raise


@dataclass
class Laboratory:
    """Where a reproduction lives: one store for all runs, one base model for all of them."""

    folder: Path
    store: DirectoryStore
    preset: Preset
    display: Display
    should_stop: Callable[[], bool]
    pool: ModelPool

    def run(self, plan: RunPlan, data: Path) -> History:
        """Bring the run to its end, or find it there. ``data``: folder with SITE.jsonl of each.

        Raises DivergedError if a participant's training did, now or at an earlier start, and what
        the run raises.
        """
        config = self.config(plan)
        home = self._home(plan)
        home.mkdir(parents=True, exist_ok=True)
        diverged = home / "diverged.txt"
        if diverged.exists():
            raise DivergedError(diverged.read_text(encoding="utf-8"))
        self._write_settings(config, plan, data, home)
        if not self.is_finished(plan.name):
            reset_peak()
            meter = self.traffic(plan)
            meter.changed = lambda: self._save(plan, meter)
            learners = self._learners(plan, data)
            embedding = Embedding(
                store=self.store,
                folder=home,
                report=self.display.report,
                moved=lambda state: self.display.moved(RunMoved.of(state)),
                should_stop=self.should_stop,
                meter=meter,
            )
            try:
                run_embedded(config, learners, embedding)
            except RunStuckError:
                reason = next((one.diverged for one in learners.values() if one.diverged), None)
                if reason is None:
                    raise
                said = f"run {plan.name}: {reason}"
                write_atomically(diverged, said.encode())
                raise DivergedError(said) from None
            self._save(plan, meter)
        for folder in ("sites", "spool"):  # of use to nobody once the run is finished
            shutil.rmtree(home / folder, ignore_errors=True)
        return read_history(self.store, plan.name)

    def make_room(self, plan: RunPlan) -> None:
        """Keep of a run that was measured its last round, which can be recomputed; note what goes.

        A run of a small model is some gigabytes, and a reproduction is dozens of them.
        """
        ledger = Ledger(self.store, plan.name, "reproduce", time.time)
        wanted = read_plan(ledger, "last:1")
        carry_out(ledger, wanted, "measured", "gradualdiff reproduce", lambda _: None)

    def config(self, plan: RunPlan) -> FederationConfig:
        """The run's settings. Raises ConfigError."""
        return config_of(self.preset, plan)

    def traffic(self, plan: RunPlan) -> Meter:
        """What the sites of a run sent and fetched so far, at all starts."""
        return Meter.from_json(read_kept(self._home(plan) / "traffic.json"))

    def peak(self, plan: RunPlan) -> dict[str, int]:
        """The most memory that this process needed while the run went on, at any start."""
        return read_kept(self._home(plan) / "peak.json")

    def _home(self, plan: RunPlan) -> Path:
        return self.folder / "runs" / plan.name

    def is_finished(self, run: str) -> bool:
        """Whether a run is in the store and has ended."""
        return run in list_runs(self.store) and read_history(self.store, run).finished is not None

    def _learners(self, plan: RunPlan, data: Path) -> dict[str, _Learner]:
        return {site: _Learner(site, site_data(site), data, self.pool) for site in plan.sites}

    def _save(self, plan: RunPlan, meter: Meter) -> None:
        """What was counted, at once: a process that is killed takes nothing of it along."""
        peak = largest([self.peak(plan), peak_bytes()])
        for name, values in (("traffic", meter.as_json()), ("peak", peak)):
            path = self._home(plan) / f"{name}.json"
            write_atomically(path, json.dumps(values, indent=1).encode())

    def _write_settings(
        self, config: FederationConfig, plan: RunPlan, data: Path, home: Path
    ) -> None:
        """The run's TOML files, so that it can be read and run again by ``simulate``."""
        tables: dict[str, dict[str, Any]] = {
            name: {key: value for key, value in table.items() if value not in (None, {})}
            for name, table in config.recorded().items()
        }
        tables["store"] = {"directory": "../../store"}
        tables["simulation"] = {"sites": [f"{site}.toml" for site in plan.sites]}
        write_tables(home / "federation.toml", tables)
        for site in plan.sites:
            section = site_data(site).model_dump(mode="json", exclude_unset=True)
            section["path"] = str(data.resolve() / section["path"])
            write_tables(home / f"{site}.toml", {"site": {"name": site}, "data": section})


def site_data(site: str) -> DataSection:
    """How a participant's text is read: all of it is trained on, since dev and test lie apart."""
    return DataSection(
        path=f"{site}.jsonl", prompt="prompt", answer="answer", held_out_fraction=0.0
    )
