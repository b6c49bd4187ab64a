"""What is trained: the run, its base model, the adapter, and training at each site."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from shared.config.section import Section
from shared.config.values import Module, Name, Positive, Sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class RunSection(Section):
    """Which run, how long, who takes part."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    rounds: Positive = 15
    participants: Annotated[tuple[Name, ...], Field(min_length=1)]
    min_participants: Positive | None = None
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 3600.0
    versions: Literal["equal", "any"] = "equal"


class BaseSection(Section):
    """The frozen base model. The coordinator never opens it; participants do."""

    model: Annotated[str, Field(min_length=1, max_length=4_096)]
    quantisation: Literal["nf4", "int8", "none"] = "nf4"
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    fingerprint: Sha256 | None = None


class LoraSection(Section):
    """The adapter. Defaults are the paper's: r=64, alpha=16, dropout 0.1, all linear layers.

    ``scaling``: of the product BA, alpha / r (``classic``) or alpha / sqrt(r) (``rslora``,
    arXiv:2312.03732). ``ranks``: of sites that have another one than ``rank``, the largest.
    """

    rank: Annotated[int, Field(ge=1, le=8192)] = 64
    alpha: Annotated[float, Field(gt=0)] = 16.0
    scaling: Literal["classic", "rslora"] = "classic"
    ranks: Annotated[dict[Name, Positive], Field(max_length=10_000)] = Field(default_factory=dict)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    target_modules: (
        Literal["all-linear"] | Annotated[tuple[Module, ...], Field(min_length=1, max_length=1_000)]
    ) = "all-linear"


class TrainingSection(Section):
    """Local training in each round: AdamW and one learning-rate schedule over the whole run."""

    local_steps: Positive | None = None
    local_epochs: Positive | None = None
    batch_size: Positive = 4
    gradient_accumulation: Positive = 1
    gradient_checkpointing: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.001
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    optimizer_state: Literal["reset", "keep"] = "reset"
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    max_prompt_tokens: Positive = 512
    max_answer_tokens: Positive = 512
    cpu_threads: Positive = 2

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_unless_said(cls, values: Any) -> Any:
        if isinstance(values, dict) and all(
            values.get(name) is None for name in ("local_steps", "local_epochs")
        ):
            return {**values, "local_epochs": 1}
        return values

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """Steps or epochs."""
        return (self._steps_or_epochs,)

    def _steps_or_epochs(self) -> Iterator[str]:
        if self.local_steps is not None and self.local_epochs is not None:
            yield "local_steps and local_epochs are both given; give exactly one"
