"""What a reproduction runs: a TOML file of its own beside the federation's tables."""

from __future__ import annotations

import hashlib
import tomllib
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from gradualdiff.reproduction.partition import parse_policy
from shared import modes
from shared.config import (
    BaseSection,
    LoraSection,
    Positive,
    Section,
    TrainingSection,
    canonical_json,
    parse,
)
from shared.errors import ConfigError
from shared.methods.averaging import get_averaging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PRESETS = ("cpu", "paper")
# What may differ between the recommended mode and the paper's rule over the same text and base.
_RECOMMENDABLE = {"aggregation", "codec", "lora", "server", "training"}
_VARIED = {"local_steps", "batch_size", "gradient_accumulation", "learning_rate"}
Rate = Annotated[float, Field(gt=0)]


class ReproduceSection(Section):
    """Sizes of the evaluation. ``fields`` and ``examples``: which questions are drawn, all if none.

    ``fields`` are labels: WordNet's lexical fields, or those of a text of one's own.
    ``learning_rates``: ascending. ``prompts``: how many replies are scored, of ``reply_tokens``.
    """

    participants: Annotated[int, Field(ge=2)] = 5
    rounds: Positive = 15
    local_steps: Positive = 10
    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (4, 8)
    learning_rates: Annotated[tuple[Rate, ...], Field(min_length=1)]
    examples: Positive | None = None
    fields: tuple[str, ...] | None = None
    partition: str = "iid"
    alphas: tuple[Rate, ...] = (0.1, 1.0, 100.0)
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    prompts: Positive = 64
    reply_tokens: Positive = 32

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """What no type says."""
        return (self._rates_ascend, self._partition_is_known)

    def _rates_ascend(self) -> Iterator[str]:
        if list(self.learning_rates) != sorted(set(self.learning_rates)):
            yield "learning_rates: expected them ascending, each once"

    def _partition_is_known(self) -> Iterator[str]:
        try:
            parse_policy(self.partition)
        except ConfigError as error:
            yield str(error)


class Preset(Section):
    """A whole reproduction. ``recommended``: tables that its arm changes."""

    reproduce: ReproduceSection
    base: BaseSection
    lora: LoraSection = LoraSection()
    training: TrainingSection = Field(default_factory=TrainingSection)
    recommended: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """What the arms vary is theirs."""
        return (self._training_is_shared, self._recommended_is_comparable)

    def _training_is_shared(self) -> Iterator[str]:
        for name in sorted(self.training.model_fields_set & _VARIED):
            yield (
                f"training.{name}: expected it under [reproduce], where every arm takes it from; "
                "remove it"
            )

    def _recommended_is_comparable(self) -> Iterator[str]:
        # Another limit of tokens would be another text, and another loss.
        owned = _VARIED | {"max_prompt_tokens", "max_answer_tokens"}
        for name in sorted(self.recommended.get("training", {}).keys() & owned):
            yield f"recommended.training.{name}: expected what every arm has; remove it"
        for name in sorted(self.recommended.keys() - _RECOMMENDABLE):
            yield (
                f"recommended.{name}: expected one of the tables "
                f"{', '.join(sorted(_RECOMMENDABLE))}; remove it"
            )
        averaging = self.recommended.get("aggregation", {}).get("averaging")
        if averaging in modes.names("averaging") and get_averaging(averaging).merges:
            yield (
                "recommended.aggregation.averaging: expected one whose adapter keeps its rank, "
                f"got {averaging}, whose sites merge it into their base: the adapter's own loss "
                "would not be the run's; compare such runs by the loss that their sites report"
            )

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of all settings."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    def tables(self) -> dict[str, dict[str, Any]]:
        """The federation's tables that every arm shares."""
        training = self.training.model_dump(mode="json", exclude_none=True)
        training.pop("local_epochs", None)
        return {
            "base": self.base.model_dump(mode="json", exclude_none=True),
            "lora": self.lora.model_dump(mode="json", exclude_defaults=True),
            "training": training,
        }


def load_preset(name: str) -> Preset:
    """A preset by its name, or from a file of the user's. Raises ConfigError."""
    from pathlib import Path

    if name in PRESETS:
        text = resources.files(__package__).joinpath("presets", f"{name}.toml").read_text("utf-8")
        return _parse(text, f"preset {name}")
    path = Path(name)
    if path.suffix != ".toml":
        raise ConfigError(
            f"--preset: expected {', '.join(PRESETS)} or the path of a .toml file, got {name!r}"
        )
    return _parse(_read(path), name)


def changed(preset: Preset, base: str | None, **reproduce: Any) -> Preset:
    """The preset with another base model and sizes; None leaves as it is. Raises ConfigError."""
    values = preset.model_dump(mode="json", exclude_unset=True)
    if base is not None:
        values["base"]["model"] = base
    values["reproduce"] |= {key: value for key, value in reproduce.items() if value is not None}
    return parse(Preset, values, "options")


def _parse(text: str, source: str) -> Preset:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: is not TOML: {error}; fix that line") from None
    training = values.get("training")
    if isinstance(training, dict) and "local_epochs" in training:
        # TrainingSection fills it in where it is not given: only here can one tell.
        raise ConfigError(
            f"{source}: training.local_epochs: expected reproduce.local_steps, which all arms "
            "share; remove it"
        )
    return parse(Preset, values, source)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error}; give the path of a TOML file"
        ) from None
