"""An adapter put on a model that is somebody's own, by PEFT."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from participant.model.libraries import adapting, offline, peft
from shared.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


def attach_adapter(model: Any, adapter: Path, name: str) -> Any:
    """Load the PEFT directory ``adapter`` under ``name`` and use it; the PEFT model.

    A model that is none yet is wrapped and changed in place. Raises ModelError where the adapter
    was made for another model.
    """
    with offline(), adapting():
        # Otherwise a layer that got no weights would compute as the base does, and say no more.
        warnings.filterwarnings("error", message=".*adapter keys")
        try:
            if isinstance(model, peft.PeftModel):
                model.load_adapter(str(adapter), name)
                model.set_adapter(name)
                return model
            return peft.PeftModel.from_pretrained(model, str(adapter), name)
        except (RuntimeError, ValueError, UserWarning) as error:
            raise ModelError(
                f"adapter {name}: does not fit this {type(model).__name__}: {error}; load it into "
                "the run's base model"
            ) from error
