"""The arms over one federation.toml, one after the other: what ``gradualdiff tune-codec`` runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from coordinator.runs.bases import bases_here
from gradualdiff.embedded.sites import load_sites, make_pool
from gradualdiff.tuning.outcomes import Outcome, share_of_gain
from shared.config import AggregationSection, load_federation
from shared.errors import ConfigError, DataError, DivergedError
from shared.stores.directory import DirectoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gradualdiff.tuning.arms import Arm
    from gradualdiff.tuning.trial import SiteText, Trial
    from participant.learner.model_pool import ModelPool
    from participant.model import LocalModel


@dataclass(frozen=True)
class Compared:
    """``base``: held-out nats per answer token of the base model, over all sites' text."""

    run: str
    rounds: int
    sites: int
    base: float
    arms: list[Outcome]


def compare_arms(
    file: Path,
    arms: Sequence[Arm],
    rounds: int,
    sets: Sequence[str] = (),
    *,
    report: Callable[[str, int], None] = lambda _arm, _round: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Compared:
    """Each arm for ``rounds`` rounds; the first one is what the others' gain is a share of.

    ``file``: a federation.toml whose ``simulation.sites`` are here. ``report`` is called after
    every round. Nothing is written. Raises ConfigError, DataError, ModelError,
    MissingPackageError; InterruptedRunError once ``should_stop``.
    """
    config = load_federation(file, sets)
    mean, got = AggregationSection().averaging, config.aggregation.averaging
    if got != mean:
        raise ConfigError(
            f'aggregation.averaging: expected "{mean}", got "{got}": arms are compared by the mean '
            f"of what sites send; add --set aggregation.averaging={mean}"
        )
    folder = file.resolve().parent
    pool = make_pool(load_sites(config, folder)[0][0].device.kind, folder)
    bench = _Bench(file, folder, pool, [*sets, f"run.rounds={rounds}"], report, should_stop)
    found = [bench.outcome(arm, config.training.learning_rate * arm.rate) for arm in arms]
    shares = [share_of_gain(bench.base, found[0].loss, one.loss) for one in found]
    outcomes = [replace(one, share=share) for one, share in zip(found, shares, strict=True)]
    return Compared(config.run.name, rounds, len(config.simulation.sites), bench.base, outcomes)


@dataclass
class _Bench:
    """One base model, the sites' text as its tokens, and its loss on what they hold out."""

    file: Path
    folder: Path
    pool: ModelPool
    sets: Sequence[str]
    report: Callable[[str, int], None]
    should_stop: Callable[[], bool]
    texts: list[SiteText] = field(default_factory=list)
    base: float = 0.0

    def outcome(self, arm: Arm, rate: float) -> Outcome:
        """Of one arm; its share is not known here."""
        from gradualdiff.tuning.trial import Trial, read_texts

        config = arm.settings(self.file, rate, self.sets)
        place = self.folder / config.store.directory
        store = DirectoryStore(place) if (place / "runs").is_dir() else None  # which makes nothing
        threads = config.training.cpu_threads
        with (
            bases_here(config, store, self.folder) as (config, bases),
            self.pool.borrow(config.base, config.lora, threads, bases) as model,
        ):
            first = not self.texts
            self.texts = self.texts or read_texts(config, self.folder, model)
            with Trial(config, arm, self.texts, model.manifest()) as trial:
                if first:  # an adapter that nobody trained changes nothing
                    self.base = self._loss(trial, model)
                try:
                    while trial.done < config.run.rounds:
                        trial.round(model, self.should_stop)
                        self.report(arm.name, trial.done)
                    loss = self._loss(trial, model)
                except DivergedError:
                    loss = None
                told = (rate, trial.values, trial.up, trial.down)
                return Outcome(arm.name, arm.says, *told, loss, share=None)

    def _loss(self, trial: Trial, model: LocalModel) -> float:
        from participant.data import NOTHING_HELD_OUT

        held_out = [example for text in self.texts for example in text.held_out]
        if not held_out:
            raise DataError(f"{', '.join(text.site for text in self.texts)}: {NOTHING_HELD_OUT}")
        return trial.loss(model, held_out, self.should_stop)
