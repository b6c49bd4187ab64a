"""What an adapter is made of, as told by the participants: named tensors and how each begins.

The coordinator has no base model. From this list and the run's seed it draws the first adapter,
and against it it checks every delta. Nothing here knows what LoRA is.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from shared.config import canonical_json
from shared.protocol.bounds import Amount, Count, Figure, Most, Nll, Word

Shape = Annotated[tuple[Count, ...], Strict(False), Field(min_length=1), Most(8)]


class Schema(BaseModel):
    """Base of what travels or is stored: frozen, strict types, unknown fields ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class TensorSpec(Schema):
    """One trainable tensor. ``init``: how round 1 begins (PEFT's choice for LoRA)."""

    name: Annotated[str, Field(min_length=1, max_length=300), Most(300)]
    shape: Shape
    dtype: Literal["float32"] = "float32"
    init: Literal["kaiming_uniform", "zeros"]

    @property
    def elements(self) -> int:
        """Number of values."""
        count = 1
        for length in self.shape:
            count *= length
        return count


class Manifest(Schema):
    """All trainable tensors in name order, and the modules they belong to (for PEFT's config)."""

    tensors: Annotated[tuple[TensorSpec, ...], Strict(False), Field(min_length=1), Most(20_000)]
    target_modules: Annotated[tuple[Word, ...], Strict(False), Most(20_000)]

    @model_validator(mode="after")
    def _names_sorted(self) -> Self:
        names = [spec.name for spec in self.tensors]
        if names != sorted(set(names)):
            raise ValueError("tensors must be sorted by name, each name once")
        return self

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


class Numerics(Schema):
    """What the bytes of a local training depend on in addition to config and data."""

    versions: Annotated[dict[Word, Word], Most(100)]
    device: Word
    cpu_capability: Word
    cpu_threads: Amount
    compute_dtype: Word


class HeldOut(Schema):
    """Loss on text that no participant trained on: nats per answer token, weighted by token."""

    nll: Nll
    tokens: Count
    examples: Count


class LocalMetrics(Schema):
    """What a site reports of its local training. No text, no per-example values.

    A site that sends no metrics leaves all out but steps and seconds.
    """

    steps: Count
    train_nll: Nll | None = None
    first_step_nll: Nll | None = None
    last_step_nll: Nll | None = None
    mean_grad_norm: Figure | None = None
    truncated_examples: Amount = 0
    dropped_examples: Amount = 0
    held_out: HeldOut | None = None
    seconds: Annotated[dict[Word, Figure], Most(100)] = Field(default_factory=dict)
