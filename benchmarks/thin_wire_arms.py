"""The arms that ``thin_wire.py`` compares, in the order in which it runs them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from gradualdiff.tuning.arms import CORE, IA3, Arm

THIN: dict[str, Any] = {"up": "int4", "down": "int4", "feedback": True}
KEEP = "training.optimizer_state=keep"
MLP = 'lora.target_modules=["gate_proj","up_proj","down_proj"]'


@dataclass(frozen=True)
class Case:
    """An arm and where its search for a rate begins. ``gradient``: bases of the mean gradient."""

    arm: Arm
    rate: float
    gradient: bool = False


def lora(name: str, says: str, **ways: Any) -> Case:
    """The demo's adapter, r = 64, through codecs."""
    return Case(Arm(name, says, **ways), 3e-3)


def core(rank: int, bases: str, rate: float, named: str = "", more: str = "", *sets: str) -> Case:
    """R's of this rank, 4 bits and feedback both ways. ``more``: what ``sets`` are, in words."""
    says = f"core, r = {rank}, bases of the {bases}, 4 bits both ways{more}"
    own = (*CORE, f"lora.rank={rank}", *sets)
    arm = Arm(f"core-{rank}-{bases}{named}", says, sets=own, **THIN)
    return Case(arm, rate, gradient=bases == "gradient")


# In the order in which they are run: what the table asks for, then the frontier, then what to try.
CASES = [
    lora("fp32", "LoRA, r = 64, fp32 both ways"),
    lora("int4", "LoRA, int4 with feedback both ways", **THIN),
    core(15, "gradient", 6e-3),
    lora("sign", "LoRA, sign with feedback up, int4 down", up="sign", down="int4", feedback=True),
    lora("int8", "LoRA, int8 both ways", up="int8", down="int8"),
    lora("topk", "LoRA, topk with feedback up, int4 down", up="topk", down="int4", feedback=True),
    Case(Arm("ia3-int8", "(IA)3, int8 both ways", "int8", "int8", sets=IA3), 1e-2),
    core(64, "gradient", 3e-3),
    core(32, "gradient", 3e-3),
    Case(Arm("ia3-int4", "(IA)3, int4 with feedback both ways", sets=IA3, **THIN), 1e-2),
    core(64, "weights", 1e-2),
    core(32, "weights", 1e-2),
    core(15, "weights", 1e-2),
    core(23, "gradient", 6e-3, "-mlp", ", MLP layers alone", MLP),
    core(15, "gradient", 3e-3, "-keep", ", optimiser state kept", KEEP),
    core(16, "gradient", 6e-3),
    core(16, "weights", 1e-2),
]
ARMS = {case.arm.name: case for case in CASES}
