"""What is trained: the run, its base model, the adapter, and training at each site."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from shared.config.section import Section
from shared.config.values import Module, Name, Positive, Sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


_NAMED_BASES = re.compile(r"(.+)#([0-9a-f]{64})", re.DOTALL)


class RunSection(Section):
    """Which run, how long, who takes part."""

    name: Name
    """The run's name in the store."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Every random number of the run is derived from it."""
    rounds: Positive = 15
    """T: the run ends after this many rounds."""
    participants: Annotated[tuple[Name, ...], Field(min_length=1)]
    """The sites that may take part, each name once."""
    min_participants: Positive | None = None
    """This many sites are enough to begin once ``start_timeout_seconds`` are over. Without it all
    must be ready.
    """
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """How long the start waits for the sites that are missing."""
    versions: Literal["equal", "any"] = "equal"
    """``"equal"``: the run fails if sites have different library versions or compute types.
    ``"any"`` allows it.
    """


class BaseSection(Section):
    """The frozen base model. The coordinator never opens it; participants do."""

    model: Annotated[str, Field(min_length=1, max_length=4_096)]
    """Path of a model folder, relative to this file, or a hub id. At a site that runs apart a
    relative path is relative to its ``site.toml``.
    """
    quantisation: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen base is kept in memory: 4 bit, 8 bit, or as it is."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """The type of its arithmetic."""
    fingerprint: Sha256 | None = None
    """The base model every site must hold. Without it they must agree."""


class LoraSection(Section):
    """The adapter. Defaults are the paper's: r=64, alpha=16, dropout 0.1, all linear layers."""

    kind: Literal["lora", "core", "ia3"] = "lora"
    """``"lora"``: two factors of each layer. ``"core"``: r x r numbers between two frozen bases;
    ``alpha`` and ``scaling`` are without effect. ``"ia3"``: a factor for each output or input;
    ``rank``, ``alpha``, ``scaling`` and ``dropout`` are without effect.
    """
    bases: Annotated[str, Field(min_length=1, max_length=4_096)] = "weights"
    """With ``core``. ``"weights"``: each site finds them in its base model, with no bytes sent.
    ``"RUN@ROUND"``: those that a ``range-finder`` run of the same store made, ``"RUN"``: in its
    last round. Or a file of a LoRA adapter's tensors, relative to this file (``"./NAME"`` where it
    could be a run). The coordinator hands both out; on record with ``#`` and their sha256.
    """
    rank: Annotated[int, Field(ge=1, le=8192)] = 64
    """r of the adapter."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Its scale: alpha / r."""
    scaling: Literal["classic", "rslora"] = "classic"
    """Of the adapter's product BA: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    ranks: Annotated[dict[Name, Positive], Field(max_length=10_000)] = Field(default_factory=dict)
    """Sites that have a lower rank than ``rank``: ``svd`` and ``flora`` only."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout before the adapter's first matrix, in training."""
    target_modules: (
        Literal["all-linear"] | Annotated[tuple[Module, ...], Field(min_length=1, max_length=1_000)]
    ) = "all-linear"
    """Which layers get an adapter: all linear ones, or a list of names."""

    @property
    def bases_sha(self) -> str | None:
        """sha256 of the file of bases; None where there is none, or it is not known yet."""
        found = _NAMED_BASES.fullmatch(self.bases) if self.kind == "core" else None
        return found[2] if found else None

    def with_bases(self, sha: str) -> LoraSection:
        """The settings as they go on record: what the bases came from, and what they are."""
        return self.model_copy(update={"bases": f"{self.bases}#{sha}"})


class TrainingSection(Section):
    """Local training in each round: AdamW and one learning-rate schedule over the whole run."""

    local_steps: Positive | None = None
    """Optimiser steps in a round. Not together with ``local_epochs``."""
    local_epochs: Positive | None = None
    """Passes over the site's text in a round; 1 if neither is given."""
    batch_size: Positive = 4
    """Examples in one forward pass."""
    gradient_accumulation: Positive = 1
    """Batches in one optimiser step."""
    gradient_checkpointing: bool = False
    """Less memory for more time."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """AdamW's rate, after the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate changes over the whole run, not over a round."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Part of the run in which the rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.001
    """AdamW's weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    """Gradients are scaled down to this norm."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether AdamW starts fresh in each round or keeps its state."""
    proximal_mu: Annotated[float, Field(ge=0)] = 0.0
    """FedProx: mu / 2 x the squared distance from the round's adapter is added to the loss, before
    gradients are clipped.
    """
    max_prompt_tokens: Positive = 512
    """A longer prompt keeps its end."""
    max_answer_tokens: Positive = 512
    """A longer answer keeps its beginning."""
    cpu_threads: Positive = 2
    """Threads of torch on the CPU. The bytes of a delta depend on it."""

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
