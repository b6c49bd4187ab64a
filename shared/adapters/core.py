"""Core (LoRA-XS, arXiv:2405.17604; LoRA-SB, arXiv:2411.19557): an adapter adds B R A to a weight.

A (rank, inputs) and B (outputs, rank) are the bases: frozen, orthonormal and the same at every
site. Only R is trained, sent and kept in the ledger: (rank, rank), its rows being B's columns. It
begins as zero. B R A is linear in R, so the mean of the sites' R is exact, and ||B R A|| is ||R||.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from shared.adapters import AdapterKind
from shared.adapters.lora import KIND as LORA

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shared.config import BaseSection, LoraSection
    from shared.protocol.manifest import Init, Manifest

ENDING = ".lora_R.weight"


class Core(AdapterKind):
    """One square tensor for each layer."""

    name = "core"
    factors: ClassVar = {}
    has_bases = True

    def init(self, tensor: str) -> Init | None:
        """Zero: the first adapter changes nothing."""
        return "zeros" if tensor.endswith(ENDING) else None

    def layer_of(self, tensor: str) -> str:
        """The layer whose weight it is added to."""
        if not tensor.endswith(ENDING):
            raise ValueError(f"{tensor}: expected a name that ends in {ENDING}")
        return tensor.removesuffix(ENDING)

    def rank(self, settings: LoraSection, _site: str = "") -> int:
        """One for all."""
        return settings.rank

    def at_rank(self, settings: LoraSection, rank: int) -> LoraSection:
        """The product's scale is 1 at every rank."""
        return settings.model_copy(update={"rank": rank, "ranks": {}})

    def scale(self, settings: LoraSection) -> dict[str, Any]:
        """As of the LoRA adapter that it can be written as: 1."""
        return {"lora_alpha": float(settings.rank), "lora_scaling": "classic"}

    def describe(self, settings: LoraSection) -> str:
        """As what it is exported."""
        return f"LoRA adapter (r={settings.rank}, scale 1, from r x r cores between frozen bases)"

    def peft_config(self, base: BaseSection, settings: LoraSection, manifest: Manifest) -> bytes:
        """What beside the R's makes PEFT refuse to load them: they are no adapter of PEFT's."""
        config = {
            "base_model_name_or_path": base.model,
            "note": "gradualdiff runs export writes a LoRA adapter that PEFT loads",
            "peft_type": "GRADUALDIFF_CORE",
            "r": settings.rank,
            "target_modules": sorted(manifest.target_modules),
        }
        return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    def lora_names(self, tensor: str) -> tuple[str, str]:
        """The tensors of a LoRA adapter, and of bases, of the same layer: B's and A's."""
        layer = self.layer_of(tensor)
        return layer + LORA.factors["left"].ending, layer + LORA.factors["right"].ending

    def first_directions(self, tensor: str, base: NDArray[Any], rank: int) -> NDArray[Any]:
        """The first ``rank`` of a base's directions, which is named as ``lora_names`` says."""
        return LORA.leading(tensor, base, rank)

    def as_lora(self, settings: LoraSection) -> LoraSection:
        """The settings of the LoRA adapter (B R, A)."""
        update = {"kind": "lora", "alpha": float(settings.rank), "scaling": "classic"}
        return settings.model_copy(update=update)


KIND = Core()
