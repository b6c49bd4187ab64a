"""The arms that are compared, as runs of the product: who holds which text, trained how.

Every arm begins with the same adapter (it is drawn from the run's seed) and trains on as many
batches of the same size: K participants times their steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from shared.config import FederationConfig, parse
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradualdiff.reproduction.presets import Preset

# name -> what a table calls it
ARMS = {
    "base": "base model",
    "local": "local only",
    "central-steps": "central, K times the steps",
    "central-batch": "central, K times the batch",
    "fedavg": "FedAvg on the weights",
    "federated": "GradualDiff-Fed",
    "recommended": "recommended mode",
}
UNTRAINED = ("base", "fedavg")  # the one has no run, the other is computed from federated's
ALL_TEXT = "central"  # the participant that holds every participant's text

_CONTINUOUS = {"optimizer_state": "keep"}  # one training, not one for each round
_NO_DEFENCE = {"clip_to_median": "off"}  # the paper has none
_EXACT = {"name": "fp32", "down": "whole"}  # the paper's; figures that are on file were made so


@dataclass(frozen=True)
class Setting:
    """What an arm is run with. ``partition``: a word for names, empty for the preset's own."""

    seed: int
    batch_size: int
    learning_rate: float
    partition: str = ""

    @property
    def prefix(self) -> str:
        """How the names of its runs begin."""
        return f"s{self.seed}{self.partition}-b{self.batch_size}"


@dataclass(frozen=True)
class RunPlan:
    """One run. ``tables``: laid over the preset's."""

    name: str
    arm: str
    sites: tuple[str, ...]
    setting: Setting
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)


def check_arms(names: tuple[str, ...]) -> tuple[str, ...]:
    """The arms in the order of the tables. Raises ConfigError for one that is not known."""
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ConfigError(f"--arms: expected some of {', '.join(ARMS)}, got {unknown[0]!r}")
    wanted = set(names) | ({"federated"} if "fedavg" in names else set())
    return tuple(arm for arm in ARMS if arm in wanted)


def check_plans(preset: Preset, arms: Sequence[str]) -> None:
    """Say what is wrong with an arm's settings before any arm is trained. Raises ConfigError."""
    sizes = preset.reproduce
    trained = [arm for arm in arms if arm not in UNTRAINED]
    for arm, size, rate in product(trained, sizes.batch_sizes, sizes.learning_rates):
        for plan in plans(preset, arm, Setting(1, size, rate)):
            config_of(preset, plan, f"the preset, for the arm {arm}")


def config_of(preset: Preset, plan: RunPlan, source: str = "") -> FederationConfig:
    """The run's settings. Raises ConfigError, which names ``source``, or the run."""
    tables: dict[str, dict[str, Any]] = preset.tables()
    tables["run"] = {
        "name": plan.name,
        "seed": plan.setting.seed,
        "rounds": preset.reproduce.rounds,
        "participants": list(plan.sites),
    }
    for table, values in plan.tables.items():
        tables[table] = tables.get(table, {}) | values
    return parse(FederationConfig, tables, source or f"run {plan.name}")


def plans(preset: Preset, arm: str, setting: Setting) -> list[RunPlan]:
    """The runs of one arm: one for each participant where it is alone, else one."""
    sizes = preset.reproduce
    sites = site_names(sizes.participants)
    name = f"{setting.prefix}-{arm}-{number_word(setting.learning_rate)}"
    training: dict[str, Any] = {
        "local_steps": sizes.local_steps,
        "batch_size": setting.batch_size,
        "learning_rate": setting.learning_rate,
    }
    tables = {"training": training, "aggregation": _NO_DEFENCE, "codec": _EXACT}
    match arm:
        case "local":
            training |= _CONTINUOUS
            return [RunPlan(f"{name}-{s}", arm, (s,), setting, tables) for s in sites]
        case "central-steps":
            training |= _CONTINUOUS | {"local_steps": sizes.local_steps * len(sites)}
            return [RunPlan(name, arm, (ALL_TEXT,), setting, tables)]
        case "central-batch":
            training |= _CONTINUOUS | {"gradient_accumulation": len(sites)}
            return [RunPlan(name, arm, (ALL_TEXT,), setting, tables)]
        case "federated":
            return [RunPlan(name, arm, sites, setting, tables)]
        case "recommended":
            tables = {"training": training, "codec": _EXACT}
            for table, values in preset.recommended.items():
                tables[table] = tables.get(table, {}) | values
            return [RunPlan(name, arm, sites, setting, tables)]
        case _:
            raise ValueError(f"arm {arm} has no run of its own")


def number_word(value: float) -> str:
    """A number as part of a run's name: short, and no other number's."""
    short = f"{value:g}"
    return (short if float(short) == value else repr(value)).replace(".", "p").replace("+", "")


def site_names(participants: int) -> tuple[str, ...]:
    """The participants of every arm."""
    return tuple(f"site-{number}" for number in range(1, participants + 1))
