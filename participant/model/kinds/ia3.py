"""(IA)3, as PEFT puts it on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from participant.model.libraries import peft

if TYPE_CHECKING:
    from pathlib import Path

    from participant.model.libraries import transformers
    from shared.config import LoraSection

# How the second layer of an MLP is called where PEFT does not know the architecture.
FEEDFORWARD = ("down_proj", "fc2", "dense_4h_to_h", "w2", "wo", "mlp.c_proj")


def wrap(
    network: transformers.PreTrainedModel, settings: LoraSection, _bases: Path | None
) -> tuple[Any, None]:
    """A vector for each target module: of the inputs where the MLP ends, else of the outputs.

    With ``all-linear`` all linear layers but the head have one; the paper's own choice is keys,
    values and the MLP's last layer (``target_modules`` names them).
    """
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    forward = known.get(network.config.model_type, FEEDFORWARD)
    targets = settings.target_modules
    if isinstance(targets, str):
        names = [name for name, _ in network.named_modules()]
        ends = [end for end in forward if any(name.endswith(f".{end}") for name in names)]
        return _wrapped(network, targets, ends), None
    ends = [name for name in targets if any(name.endswith(end) for end in forward)]
    return _wrapped(network, list(targets), ends), None


def _wrapped(
    network: transformers.PreTrainedModel, targets: str | list[str], forward: list[str]
) -> Any:
    config = peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=forward
    )
    return peft.get_peft_model(network, config)
