"""Carries out planned runs in this process, each once: what is finished is not run again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli.demo_files import write_tables
from cli.federation import Embedding, run_embedded
from cli.metering import Meter
from cli.reproduction.presets import federation_of
from coordinator.inspection import History
from participant.torch_learner import TorchLearner
from shared.config import DataSection
from shared.errors import InterruptedRunError
from shared.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli.progress import Display
    from cli.reproduction.arms import RunPlan
    from cli.reproduction.presets import Preset
    from coordinator.state import RunState
    from participant.model_shelf import ModelShelf
    from shared.config import FederationConfig
    from shared.directory_store import DirectoryStore


@dataclass
class Laboratory:
    """Where a reproduction lives: one store for all runs, one base model for all of them."""

    folder: Path
    store: DirectoryStore
    preset: Preset
    display: Display
    should_stop: Callable[[], bool]
    shelf: ModelShelf
    again: str

    def run(self, plan: RunPlan, data: Path) -> History:
        """Bring the run to its end, or find it there. ``data``: folder with SITE.jsonl of each.

        Raises InterruptedRunError naming the command that goes on, and what the run raises.
        """
        config = self.config(plan)
        home = self.folder / "runs" / plan.name
        home.mkdir(parents=True, exist_ok=True)
        self._write_settings(config, plan, data, home)
        if not self._is_finished(plan.name):
            meter = self._meter(plan.name)
            embedding = Embedding(
                store=self.store,
                folder=home,
                report=self.display.report,
                moved=lambda state: self._moved(state, home, meter),
                should_stop=self.should_stop,
                meter=meter,
            )
            try:
                run_embedded(config, self._learners(plan, data), embedding)
            except InterruptedRunError:
                raise InterruptedRunError(
                    f"run {plan.name} was stopped; nothing finished is lost. "
                    f"Go on with: {self.again}"
                ) from None
            self._save(home, meter)
        return History(self.store, plan.name)

    def config(self, plan: RunPlan) -> FederationConfig:
        """The run's settings. Raises ConfigError."""
        run = {
            "name": plan.name,
            "seed": plan.setting.seed,
            "rounds": self.preset.reproduce.rounds,
            "participants": list(plan.sites),
        }
        return federation_of(self.preset, run, plan.tables)

    def traffic(self, plan: RunPlan) -> Meter:
        """What the sites of a run sent and fetched."""
        return self._meter(plan.name)

    def _is_finished(self, run: str) -> bool:
        from shared.ledger import list_runs

        return run in list_runs(self.store) and History(self.store, run).finished is not None

    def _learners(self, plan: RunPlan, data: Path) -> dict[str, TorchLearner]:
        return {site: TorchLearner(site, site_data(site), data, self.shelf) for site in plan.sites}

    def _moved(self, state: RunState, home: Path, meter: Meter) -> None:
        self.display.moved(state)
        self._save(home, meter)

    def _meter(self, run: str) -> Meter:
        """The counts so far: a run that was interrupted goes on counting."""
        path = self.folder / "runs" / run / "traffic.json"
        return Meter.from_json(json.loads(path.read_text())) if path.exists() else Meter()

    def _save(self, home: Path, meter: Meter) -> None:
        write_atomically(home / "traffic.json", json.dumps(meter.as_json(), indent=1).encode())

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
