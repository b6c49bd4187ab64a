"""LoRA (arXiv:2106.09685): an adapter adds B A to a layer's weight, under PEFT's names.

A is (rank, inputs) and B is (outputs, rank). B begins as zero, so the first adapter changes
nothing. The product is scaled by alpha / rank (``classic``) or alpha / sqrt(rank) (``rslora``).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, ClassVar

from shared.adapters import AdapterKind, Factor

if TYPE_CHECKING:
    from shared.config import BaseSection, LoraSection
    from shared.protocol.manifest import Manifest


class Lora(AdapterKind):
    """Two factors of one rank, which a site may have of its own."""

    name = "lora"
    factors: ClassVar = {
        "left": Factor(".lora_B.weight", "zeros"),
        "right": Factor(".lora_A.weight", "kaiming_uniform"),
    }

    def rank(self, settings: LoraSection, site: str = "") -> int:
        """The largest one is the run's."""
        return settings.ranks.get(site, settings.rank)

    def at_rank(self, settings: LoraSection, rank: int) -> LoraSection:
        """With the alpha that keeps the product's scale: sites' products add up to one adapter."""
        part = rank / settings.rank
        alpha = settings.alpha * (part if settings.scaling == "classic" else math.sqrt(part))
        return settings.model_copy(update={"rank": rank, "alpha": alpha, "ranks": {}})

    def scale(self, settings: LoraSection) -> dict[str, Any]:
        """Alpha, and what it is divided by."""
        return {"lora_alpha": settings.alpha, "lora_scaling": settings.scaling}

    def describe(self, settings: LoraSection) -> str:
        """Rank and scale."""
        scale = f"alpha={settings.alpha:g}, scaling {settings.scaling}"
        return f"LoRA adapter (r={settings.rank}, {scale})"

    def peft_config(self, base: BaseSection, settings: LoraSection, manifest: Manifest) -> bytes:
        """What PEFT 0.21's LoraConfig reads."""
        alpha = int(settings.alpha) if settings.alpha.is_integer() else settings.alpha
        config = {
            "base_model_name_or_path": base.model,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": alpha,
            "lora_dropout": settings.dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": settings.rank,
            "target_modules": sorted(manifest.target_modules),
            "task_type": "CAUSAL_LM",
            "use_rslora": settings.scaling == "rslora",
        }
        return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


KIND = Lora()
