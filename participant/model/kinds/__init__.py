"""How each kind of adapter is put on a network: a file per kind, which sets ``wrap``.

``wrap(network, settings, bases)`` gives the network as PEFT wraps it, with all that the adapter
trains, and nothing else, requiring gradients, and what its bases are (None: it has none).
``bases``: a file of them; None: they are to be found in the weights. A parameter's name without
``.default`` is its name in the ledger. Raises ValueError for a target module that does not exist,
ModelError for bases that do not fit.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from participant.model.libraries import adapting, peft, transformers
from shared.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from participant.model.bases import Bases
    from shared.config import LoraSection


def wrap(
    network: transformers.PreTrainedModel, settings: LoraSection, bases: Path | None
) -> tuple[Any, Bases | None]:
    """By the kind that the settings name. Raises ModelError."""
    put = importlib.import_module(f"{__name__}.{settings.kind}").wrap
    targets = settings.target_modules
    with adapting():
        try:
            wrapped, found = put(network, settings, bases)
        except ValueError as error:
            raise ModelError(
                f"lora.target_modules: {targets!r} does not fit {type(network).__name__}: {error}; "
                'name its linear layers or use "all-linear"'
            ) from error
    return wrapped, found


def with_lora(network: transformers.PreTrainedModel, settings: LoraSection) -> Any:
    """PEFT's LoRA on the target modules. Raises ValueError if one does not exist."""
    targets = settings.target_modules
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # it only divides by the rank
        use_rslora=settings.scaling == "rslora",
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    return peft.get_peft_model(network, config)
