"""Runs the arms of a reproduction one after the other and gathers their figures.

Everything that is done is on file (the runs in the store, the measurements beside it), so a second
start goes through the same steps, finds what is there, and goes on where the first one ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradualdiff.reproduction.arms import ARMS, UNTRAINED, RunPlan, Setting, plans
from gradualdiff.reproduction.fedavg import average_weights
from gradualdiff.reproduction.figures import ArmFigures, largest, mean_of, round_figures, traffic
from gradualdiff.reproduction.measuring import SETS, Measured, Measurements
from shared.errors import ConfigError, DivergedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from coordinator.history import History
    from gradualdiff.reproduction.running import Laboratory
    from participant.learner.quality import ReplyScores


WHOLE = ("federated", "recommended")  # every round of these can be recomputed afterwards


@dataclass
class Chosen:
    """A learning rate and how it was found: loss on dev, by rate, of seed 1; None: diverged."""

    rate: float
    tried: dict[float, float | None]
    at_edge: bool


@dataclass
class Findings:
    """All that came out. ``differences``: FedAvg's from GradualDiff-Fed's elements, by run.

    ``diverged``: what has no figures, since its training diverged under the rate of seed 1.
    """

    figures: list[ArmFigures] = field(default_factory=list)
    rates: dict[str, Chosen] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    diverged: list[str] = field(default_factory=list)


class Experiment:
    """One partition of the text. ``data_of(seed)``: folder with SITE.jsonl and the three texts."""

    def __init__(
        self, laboratory: Laboratory, data_of: Callable[[int], Path], partition: str = ""
    ) -> None:
        self._laboratory = laboratory
        self._data_of = data_of
        self._partition = partition
        self._measurements = Measurements(laboratory, data_of(1))
        self.findings = Findings()

    def run(
        self,
        arms: Sequence[str],
        seeds: Sequence[int],
        batch_size: int,
        rates: dict[str, Chosen] | None = None,
    ) -> None:
        """Every arm under every seed; ``rates``: those of another partition, not sought again.

        An arm that diverges under one seed is left out there. Raises DivergedError if all are.
        """
        for arm in arms:
            if arm not in UNTRAINED:
                key = f"b{batch_size} {arm}"
                chosen = (rates or {}).get(key) or self._choose(arm, batch_size)
                self.findings.rates[key] = chosen
        for seed in seeds:
            for arm in arms:
                self._laboratory.display.say(
                    f"seed {seed}, batch {batch_size}{self._partition}: {ARMS[arm]}"
                )
                try:
                    self.findings.figures.append(self._figures(arm, seed, batch_size))
                except DivergedError as error:
                    self.findings.diverged.append(f"{ARMS[arm]}: {error}")
        if not self.findings.figures:
            raise DivergedError("; ".join(self.findings.diverged))

    def _choose(self, arm: str, batch_size: int) -> Chosen:
        """Climb the grid from its middle for as long as the loss on dev of seed 1 falls.

        Of participants alone the first one's loss stands for all: five would take five times as
        long. A rate under which the arm diverges is worse than any other. Raises ConfigError where
        all that were tried are such.
        """
        grid = self._laboratory.preset.reproduce.learning_rates
        tried: dict[int, float] = {}

        def dev(at: int) -> float:
            if at not in tried:
                self._laboratory.display.say(f"{ARMS[arm]}: learning rate {grid[at]:g}")
                setting = Setting(1, batch_size, grid[at], self._partition)
                try:
                    plan, history = self._runs(arm, setting, at_most=1)[0]
                    tried[at] = self._adapter(plan, history, history.last_closed).loss("dev").nll
                except DivergedError:
                    tried[at] = math.inf
            return tried[at]

        best = climb(len(grid), dev)
        for at in tried.keys() - {best}:
            setting = Setting(1, batch_size, grid[at], self._partition)
            self._forget(plans(self._laboratory.preset, arm, setting))
        if len(grid) == 1:
            return Chosen(grid[0], {}, at_edge=False)
        if dev(best) == math.inf:
            raise ConfigError(
                f"reproduce.learning_rates: expected one under which the arm {arm} does not "
                f"diverge, got {', '.join(f'{grid[at]:g}' for at in sorted(tried))}; name lower "
                "ones, and another --dir"
            )
        return Chosen(
            grid[best],
            {grid[at]: loss if loss < math.inf else None for at, loss in sorted(tried.items())},
            at_edge=best in (0, len(grid) - 1),
        )

    def _forget(self, measured: Sequence[RunPlan]) -> None:
        """Make room: what was measured is on file."""
        for plan in measured:
            if self._laboratory.is_finished(plan.name):
                self._laboratory.make_room(plan)

    def _rate(self, arm: str, batch_size: int) -> float:
        return self.findings.rates[f"b{batch_size} {arm}"].rate

    def _runs(
        self, arm: str, setting: Setting, at_most: int | None = None
    ) -> list[tuple[RunPlan, History]]:
        laboratory = self._laboratory
        data = self._data_of(setting.seed)
        chosen = plans(laboratory.preset, arm, setting)[:at_most]
        return [(plan, laboratory.run(plan, data)) for plan in chosen]

    def _adapter(self, plan: RunPlan, history: History, number: int) -> Measured:
        closed = history.round(number).closed
        assert closed is not None  # a finished run has every round
        config = self._laboratory.config(plan)
        return self._measurements.of_run(plan.name, closed.adapter_sha, config)

    def _figures(self, arm: str, seed: int, batch_size: int) -> ArmFigures:
        if arm == "base":
            return self._base(seed, batch_size)
        source = "federated" if arm == "fedavg" else arm
        rate = self._rate(source, batch_size)
        runs = self._runs(source, Setting(seed, batch_size, rate, self._partition))
        if arm == "fedavg":
            return self._averaged(runs[0], seed, batch_size, rate)
        return self._trained(arm, runs, seed, batch_size, rate)

    def _base(self, seed: int, batch_size: int) -> ArmFigures:
        setting = Setting(1, batch_size, 1.0)  # whichever is drawn, it changes nothing
        plan = plans(self._laboratory.preset, "federated", setting)[0]
        measured = self._measurements.of_base(self._laboratory.config(plan))
        losses, replies = worth_of([measured])
        return ArmFigures("base", seed, batch_size, None, (), losses, replies)

    def _averaged(
        self, run: tuple[RunPlan, History], seed: int, batch_size: int, rate: float
    ) -> ArmFigures:
        """FedAvg on the weights, from the very trainings of the federated arm."""
        plan, history = run
        folder = self._laboratory.folder / "fedavg"
        folder.mkdir(exist_ok=True)
        path = folder / f"{plan.name}.safetensors"
        difference = average_weights(history, self._laboratory.store, path, folder)
        self.findings.differences[plan.name] = difference
        averaged = self._measurements.of_file(path, self._laboratory.config(plan))
        losses, replies = worth_of([averaged])
        return ArmFigures("fedavg", seed, batch_size, rate, (), losses, replies)

    def _trained(
        self,
        arm: str,
        runs: list[tuple[RunPlan, History]],
        seed: int,
        batch_size: int,
        rate: float,
    ) -> ArmFigures:
        laboratory = self._laboratory
        histories = [history for _, history in runs]
        meters = [laboratory.traffic(plan) for plan, _ in runs]
        rounds = []
        for number in range(1, laboratory.preset.reproduce.rounds + 1):
            drawn = len(runs) == 1 and not self._partition  # as a curve of Figure 1
            test = self._adapter(*runs[0], number).loss("test").nll if drawn else None
            rounds.append(round_figures(histories, meters, number, test))
        adapters = [self._adapter(plan, h, h.last_closed) for plan, h in runs]
        losses, replies = worth_of(adapters, held_out_only=bool(self._partition))
        if arm not in WHOLE or self._partition:
            self._forget([plan for plan, _ in runs])
        up, down = (
            traffic(histories, meters) if arm in ("federated", "recommended") else (None,) * 2
        )
        return ArmFigures(
            arm,
            seed,
            batch_size,
            rate,
            tuple(rounds),
            losses,
            replies,
            up,
            down,
            largest([laboratory.peak(plan) for plan, _ in runs]),
            tuple(one.sha for one in adapters),
        )


def climb(count: int, loss: Callable[[int], float]) -> int:
    """The index at which the loss is least, sought from the middle in both directions.

    On for as long as the loss falls, and downwards past all at which it is infinite: a lower
    learning rate may do where a higher one diverges.
    """
    best = count // 2
    while best + 1 < count and loss(best + 1) < loss(best):
        best += 1
    while best > 0 and (loss(best - 1) < loss(best) or loss(best) == math.inf):
        best -= 1
    return best


def worth_of(
    adapters: Sequence[Measured], *, held_out_only: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Losses and reply scores of the adapters, their means where there are several.

    ``held_out_only``: the loss on held-out text and nothing else.
    """
    losses: dict[str, Any] = {}
    for name in ("test",) if held_out_only else SETS:
        losses[name] = mean_of([one.loss(name).model_dump(mode="json") for one in adapters])
    replies = {
        name: _mean_scores([one.replies(name) for one in adapters])
        for name in (() if held_out_only else ("test", "train"))
    }
    return losses, replies


def _mean_scores(scores: Sequence[ReplyScores]) -> dict[str, Any]:
    """Flat: what was copied is under ``copied_...``, signatures are the first one's.

    Means, but of the longest copies the longest.
    """
    flat = [
        {
            **score.model_dump(mode="json", exclude={"copied"}),
            **{f"copied_{k}": v for k, v in score.copied.model_dump(mode="json").items()},
        }
        for score in scores
    ]
    texts = {name: value for name, value in flat[0].items() if isinstance(value, str)}
    longest = {name: max(one[name] for one in flat) for name in flat[0] if "_max_" in name}
    return {**mean_of(flat), **longest, **texts}
