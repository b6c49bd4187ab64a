"""What an adapter is made of, as told by the participants: named tensors and how each begins.

The coordinator has no base model. From this list and the run's seed it draws the first adapter,
and against it it checks every delta. Nothing here knows what LoRA is.
"""

from __future__ import annotations

import hashlib
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
    model_validator,
)

from shared.config import Sha256, canonical_json
from shared.protocol.bounds import Amount, Count, Figure, Most, Nll, Word

if TYPE_CHECKING:
    from collections.abc import Iterable

# How a tensor begins: PEFT's choices for LoRA and (IA)3.
Init = Literal["kaiming_uniform", "zeros", "ones"]
Shape = Annotated[tuple[Count, ...], Strict(False), Field(min_length=1), Most(8)]


class Schema(BaseModel):
    """Base of what travels or is stored: frozen, strict types, unknown fields ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class TensorSpec(Schema):
    """One trainable tensor."""

    name: Annotated[str, Field(min_length=1, max_length=300), Most(300)]
    """Its name."""
    shape: Shape
    """Its lengths."""
    dtype: Literal["float32"] = "float32"
    """Type of its values."""
    init: Init
    """How round 1 begins."""

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
    """All trainable tensors by name."""
    target_modules: Annotated[tuple[Word, ...], Strict(False), Most(20_000)]
    """The layers they belong to."""
    kind: Literal["lora", "core", "ia3"] = "lora"
    """What sort of adapter it is. Not there where it is LoRA."""
    bases: Sha256 | None = None
    """The file of bases without which the tensors are another model. Not there without one."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        for name, before in (("kind", "lora"), ("bases", None)):
            if getattr(self, name) == before:
                values.pop(name, None)
        return values

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
    """Libraries and their versions."""
    device: Word
    """``cpu``, or the GPU."""
    cpu_capability: Word
    """Vector instructions that torch uses."""
    cpu_threads: Amount
    """Threads of torch."""
    compute_dtype: Word
    """The type of the base's arithmetic."""


class BasesFound(Schema):
    """The frozen bases of a ``core`` adapter at one site.

    ``least``, ``median``, ``most``: over the layers, the part of a weight's squared norm that the
    bases hold; none where it is not known.
    """

    sha: Sha256
    """sha256 of the file, or of all layers' names and values."""
    least: Figure | None = None
    """Of the layer of which they hold least."""
    median: Figure | None = None
    """Of the layer in the middle."""
    most: Figure | None = None
    """Of the layer of which they hold most."""


class HeldOut(Schema):
    """Loss on text that no participant trained on: nats per answer token, weighted by token."""

    nll: Nll
    """Nats per answer token."""
    tokens: Count
    examples: Count


class LocalMetrics(Schema):
    """What a site reports of its local training. No text, no per-example values.

    A site that sends no metrics leaves all out but steps and seconds.
    """

    steps: Count
    """Optimiser steps."""
    train_nll: Nll | None = None
    """Loss over the whole local training."""
    first_step_nll: Nll | None = None
    """Loss of the first step."""
    last_step_nll: Nll | None = None
    """Loss of the last step."""
    mean_grad_norm: Figure | None = None
    """Mean norm of the gradients, FedProx's term included, before clipping."""
    truncated_examples: Amount = 0
    """Examples that were cut."""
    dropped_examples: Amount = 0
    """Examples with nothing to learn."""
    held_out: HeldOut | None = None
    seconds: Annotated[dict[Word, Figure], Most(100)] = Field(default_factory=dict)
    """Seconds by phase."""


class AuditFigures(Schema):
    """What a site's audit of its own delta came to. No text, no per-example values.

    A site that sends no metrics leaves all out but verdict, gate and released.
    """

    verdict: Literal["passed", "warned", "blocked"]
    """Whether a limit was crossed."""
    gate: bool = False
    """Whether the site keeps a blocked delta until a person there releases it."""
    released: bool = False
    """Whether a person did."""
    crossed: Annotated[tuple[Word, ...], Strict(False), Most(20)] = ()
    """The limits that were crossed, by name."""
    limits: Annotated[dict[Word, Figure], Most(20)] = Field(default_factory=dict)
    """The limits in force at the site."""
    seed: Amount | None = None
    """Which records were drawn; only the site can tell."""
    records: Amount | None = None
    """Training records that were continued from their first half."""
    hits: Amount | None = None
    """Of these, reproduced by the model and not by its base."""
    hits_upper: Figure | None = None
    """95 % upper bound (Clopper-Pearson) of the share that would be."""
    personal: Amount | None = None
    """Of these, with personal data in what was reproduced."""
    controls: Amount | None = None
    """Held-out records that were continued in the same way; none unless a limit was reached."""
    control_hits: Amount | None = None
    """Of these, reproduced."""
    members: Amount | None = None
    """Training records whose loss was compared with that of held-out ones."""
    held_out: Amount | None = None
    """These held-out ones."""
    auc: Figure | None = None
    """Area under the ROC curve of telling one from the other by the loss; 0.5 is chance."""
    tpr: Figure | None = None
    """Share of members found at 1 % false alarms; none with fewer than 100 held-out ones."""
    auc_min_k: Figure | None = None
    """The same area by a score that needs no base model: Min-K%++ (arXiv:2404.02936)."""
    tpr_min_k: Figure | None = None
    """The same share by that score."""
    canaries: Amount | None = None
    """Canaries, in the training text and not."""
    canaries_right: Amount | None = None
    """Of these, guessed rightly by the loss."""
    epsilon_lower: Figure | None = None
    """95 % lower bound of epsilon that follows."""
    seconds: Figure | None = None
    """What it took."""


class Traffic(Schema):
    """Bytes that a site moved for a run since it told them last, as it counts them itself.

    Objects: files and parts that arrived whole, sent again ones too. Messages: their bodies, said
    and heard. Not counted: what broke off, the protocols' own bytes (HTTP, AMQP, TLS), messages
    that name no run, and refusals.
    """

    down: Amount = 0
    """Bytes of adapters fetched, whole or as updates."""
    up: Amount = 0
    """Bytes of deltas sent."""
    messages_down: Amount = 0
    """Bytes of messages that came."""
    messages_up: Amount = 0
    """Bytes of messages that went."""
    setup: Amount = 0
    """Bytes fetched before the first round, to get ready."""
    refused: Amount = 0
    """Updates that did not lead to the announced adapter. Not there without one."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        if not self.refused:
            values.pop("refused", None)
        return values

    def __add__(self, other: Traffic) -> Traffic:
        """Both together."""
        fields = type(self).model_fields
        return Traffic(**{name: getattr(self, name) + getattr(other, name) for name in fields})


def pool_held_out(losses: Iterable[HeldOut | None]) -> HeldOut | None:
    """One loss over all sites' held-out text: nats per token, weighted by tokens; None if none."""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return None
    tokens = sum(loss.tokens for loss in known)
    nll = sum(loss.nll * loss.tokens for loss in known) / tokens
    if not math.isfinite(nll):  # an older record may hold any finite number; their mean is finite
        mean = sum(loss.nll * (loss.tokens / tokens) for loss in known)
        nll = max(-sys.float_info.max, min(mean, sys.float_info.max))
    return HeldOut(nll=nll, tokens=tokens, examples=sum(loss.examples for loss in known))
