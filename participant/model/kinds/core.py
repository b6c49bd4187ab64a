"""Core: PEFT's LoRA layer with A and B frozen and R, (rank, rank), trained between them.

The layer computes ``lora_B(lora_A(x)) * scaling``. A stays in ``lora_A``; ``lora_B`` becomes a
module that computes B(R h). R is a layer's own ``lora_R``, so that its name is like the others'.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from participant.model.bases import Bases, Given, Maker
from participant.model.kinds import with_lora
from shared.adapters.core import KIND
from shared.errors import ModelError
from shared.log import get_logger

if TYPE_CHECKING:
    from pathlib import Path

    from participant.model.libraries import transformers
    from shared.config import LoraSection

_ADAPTER = "default"


class Frozen(torch.nn.Module):
    """B(R h): ``core`` is registered in the layer, and here only used. ``weight``: B."""

    def __init__(self, core: torch.nn.Linear, weight: torch.Tensor) -> None:
        super().__init__()
        self._core = (core,)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, inner: torch.Tensor) -> torch.Tensor:
        """``inner``: (..., rank), what A made of the inputs."""
        (core,) = self._core
        outer: torch.Tensor = core(inner)
        return torch.nn.functional.linear(outer, self.get_buffer("weight"))


def wrap(
    network: transformers.PreTrainedModel, settings: LoraSection, bases: Path | None
) -> tuple[Any, Bases]:
    """R in every layer, zeros. Raises ModelError for bases that are missing or do not fit."""
    if bases is None and settings.bases != "weights":
        raise ModelError(
            f"lora.bases: expected the file that {settings.bases!r} names, got none; the "
            "coordinator hands it out with the run"
        )
    wrapped = with_lora(network, KIND.as_lora(settings))
    rank = settings.rank
    with Given(bases, rank) if bases is not None else nullcontext(Maker(rank)) as source:
        for name, layer in sorted(wrapped.named_modules()):
            if hasattr(layer, "lora_B") and _ADAPTER in layer.lora_B:
                _make_core(layer, *source.of(name, layer))
        found = source.result()
    get_logger().info("bases.ready", layers=found.layers, sha256=found.sha, **found.figures())
    return wrapped, found


def frozen_in(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A wrapped layer's bases: B (outputs, rank), A (rank, inputs)."""
    return layer.lora_B[_ADAPTER].weight, layer.lora_A[_ADAPTER].weight


def _make_core(layer: Any, b: torch.Tensor, a: torch.Tensor) -> None:
    old = layer.lora_A[_ADAPTER].weight
    rank = old.shape[0]
    with torch.no_grad():
        old.copy_(a)
    old.requires_grad_(requires_grad=False)
    core = torch.nn.Linear(rank, rank, bias=False, device=old.device, dtype=torch.float32)
    torch.nn.init.zeros_(core.weight)
    layer.lora_R = torch.nn.ModuleDict({_ADAPTER: core})
    layer.lora_B[_ADAPTER] = Frozen(core, b.to(old.device))
