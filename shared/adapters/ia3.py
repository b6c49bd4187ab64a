"""(IA)3 (arXiv:2205.05638): an adapter multiplies a layer's outputs, or its inputs, by a vector.

Under PEFT's names and shapes: (outputs, 1), or (1, inputs) for a feed-forward layer. The vectors
begin as ones. The model is linear in each of them, so the mean of the sites' is exact by layer.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from shared.adapters import AdapterKind

if TYPE_CHECKING:
    from shared.config import BaseSection, LoraSection
    from shared.protocol.manifest import Init, Manifest

ENDING = ".ia3_l"


class Ia3(AdapterKind):
    """One vector for each layer."""

    name = "ia3"
    factors: ClassVar = {}
    no_lora = "multiplies whole rows or columns of a weight, which no low rank can say"

    def init(self, tensor: str) -> Init | None:
        """One: the first adapter changes nothing."""
        return "ones" if tensor.endswith(ENDING) else None

    def layer_of(self, tensor: str) -> str:
        """The layer whose outputs or inputs it multiplies."""
        if not tensor.endswith(ENDING):
            raise ValueError(f"{tensor}: expected a name that ends in {ENDING}")
        return tensor.removesuffix(ENDING)

    def rank(self, _settings: LoraSection, _site: str = "") -> int:
        """It has none; a vector is the least that there is of a layer."""
        return 1

    def at_rank(self, settings: LoraSection, _rank: int) -> LoraSection:
        """It has none."""
        return settings.model_copy(update={"ranks": {}})

    def scale(self, _settings: LoraSection) -> dict[str, Any]:
        """It has none."""
        return {"lora_alpha": 1.0, "lora_scaling": "classic"}

    def describe(self, _settings: LoraSection) -> str:
        """By its name."""
        return "(IA)3 adapter"

    def peft_config(self, base: BaseSection, _settings: LoraSection, manifest: Manifest) -> bytes:
        """What PEFT 0.21's IA3Config reads. Which layers are feed-forward is told by the shapes."""
        forward = {
            self.layer_of(spec.name).rsplit(".", 1)[-1]
            for spec in manifest.tensors
            if spec.shape[0] == 1
        }
        config = {
            "base_model_name_or_path": base.model,
            "fan_in_fan_out": False,
            "feedforward_modules": sorted(forward),
            "inference_mode": True,
            "init_ia3_weights": True,
            "modules_to_save": None,
            "peft_type": "IA3",
            "target_modules": sorted(manifest.target_modules),
            "task_type": "CAUSAL_LM",
        }
        return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


KIND = Ia3()
