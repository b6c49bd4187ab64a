"""The arms over one federation.toml, one after the other: what ``gradualdiff tune-codec`` runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gradualdiff.embedded.sites import load_sites, make_pool
from gradualdiff.tuning.outcomes import Outcome, share_of_gain
from shared.config import load_federation
from shared.errors import ConfigError, DataError, DivergedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from gradualdiff.tuning.arms import Arm
    from participant.learner.model_pool import ModelPool
    from shared.config import FederationConfig


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
    if config.aggregation.averaging != "fedavg":
        raise ConfigError(
            f'aggregation.averaging: expected "fedavg", got "{config.aggregation.averaging}": arms '
            "are compared by the mean of what sites send; add --set aggregation.averaging=fedavg"
        )
    folder = file.resolve().parent
    pool = make_pool(load_sites(config, folder)[0][0].device.kind, folder)
    trials = _Trials(file, folder, pool, [*sets, f"run.rounds={rounds}"], should_stop)
    outcomes: list[Outcome] = []
    for arm in arms:
        outcome = trials.outcome(arm, config.training.learning_rate * arm.rate, report)
        reference = outcomes[0].loss if outcomes else outcome.loss
        share = share_of_gain(trials.base, reference, outcome.loss)
        outcomes.append(replace(outcome, share=share))
    return Compared(config.run.name, rounds, len(config.simulation.sites), trials.base, outcomes)


class _Trials:
    """One base model, and the sites' text as its tokens."""

    def __init__(
        self,
        file: Path,
        folder: Path,
        pool: ModelPool,
        sets: Sequence[str],
        should_stop: Callable[[], bool],
    ) -> None:
        self._file, self._folder, self._pool, self._sets = file, folder, pool, sets
        self._should_stop = should_stop
        self.base = float("nan")

    def outcome(self, arm: Arm, rate: float, report: Callable[[str, int], None]) -> Outcome:
        """Of one arm; its share is not known here."""
        from coordinator.runs.bases import named_bases
        from gradualdiff.tuning.trial import Trial, read_texts

        config, bases = named_bases(arm.settings(self._file, rate, self._sets), None, self._folder)
        threads = config.training.cpu_threads
        with self._pool.borrow(config.base, config.lora, threads, bases) as model:
            texts = read_texts(config, self._folder, model)
            held_out = [example for text in texts for example in text.held_out]
            if not held_out:
                raise _nothing_held_out(config)
            with Trial(config, arm, texts, model.manifest()) as trial:
                if self.base != self.base:
                    self.base = trial.loss(model, held_out, self._should_stop)
                try:
                    while trial.done < config.run.rounds:
                        trial.round(model, self._should_stop)
                        report(arm.name, trial.done)
                    loss = trial.loss(model, held_out, self._should_stop)
                except DivergedError:
                    loss = None
                return Outcome(
                    arm.name, arm.says, rate, trial.values, trial.up, trial.down, loss, None
                )


def _nothing_held_out(config: FederationConfig) -> DataError:
    from participant.data import NOTHING_HELD_OUT

    return DataError(f"{', '.join(config.run.participants)}: {NOTHING_HELD_OUT}")
