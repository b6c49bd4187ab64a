"""LoRA, as PEFT puts it on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from participant.model.kinds import with_lora

if TYPE_CHECKING:
    from pathlib import Path

    from participant.model.libraries import transformers
    from shared.config import LoraSection


def wrap(
    network: transformers.PreTrainedModel, settings: LoraSection, _bases: Path | None
) -> tuple[Any, None]:
    """Two factors, both trained."""
    return with_lora(network, settings), None
