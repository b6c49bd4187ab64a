"""What is set beside each other: ways to send an adapter, and kinds of adapters to send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shared.config import load_federation
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shared.config import FederationConfig


@dataclass(frozen=True)
class Arm:
    """One way to run a federation.

    ``up``: the codec of the sites' deltas. ``feedback``: whether a site sends what it left out of
    one with the next. ``down``: the codec of the coordinator's updates; None for the whole adapter
    in fp32. ``sets``: settings of its own, ``section.key=value``. ``rate``: its learning rate, as a
    multiple of the run's. ``says``: what it is.
    """

    name: str
    says: str
    up: str = "fp32"
    down: str | None = None
    feedback: bool = False
    sets: tuple[str, ...] = ()
    rate: float = 1.0

    def settings(self, file: Path, rate: float, more: Sequence[str] = ()) -> FederationConfig:
        """A federation.toml with what is this arm's own and ``more``, at that learning rate.

        Raises ConfigError.
        """
        return load_federation(file, [*self.sets, f"training.learning_rate={rate!r}", *more])


REFERENCE: Final = "fp32"
# Bases of the weights: they need no run of their own. A core's rate is some three times LoRA's
# (benchmarks/thin_wire.py), and weight decay has no meaning for what multiplies a weight.
CORE: Final = ("lora.kind=core", "lora.dropout=0", "training.weight_decay=0")
IA3: Final = ("lora.kind=ia3", "training.weight_decay=0")
ARMS: Final = {
    arm.name: arm
    for arm in (
        Arm(REFERENCE, "the run's adapter, 32 bits both ways"),
        Arm("int8", "8 bits both ways", "int8", "int8"),
        Arm("int4", "4 bits and feedback both ways", "int4", "int4", feedback=True),
        Arm("sign", "1 bit and feedback up, 4 bits down", "sign", "int4", feedback=True),
        Arm("topk", "1 of 64 values and feedback up, 4 bits down", "topk", "int4", feedback=True),
        Arm(
            "core",
            "core of the weights' bases at the run's rank, as int4",
            "int4",
            "int4",
            feedback=True,
            sets=(*CORE, "lora.bases=weights"),
            rate=3.0,
        ),
        Arm("ia3", "(IA)3, as int8", "int8", "int8", sets=IA3, rate=3.0),
    )
}


def chosen(names: Sequence[str]) -> list[Arm]:
    """These arms, the reference first. Raises ConfigError for one that there is not."""
    unknown = sorted(set(names) - ARMS.keys())
    if unknown:
        raise ConfigError(
            f"--arms: expected some of {', '.join(ARMS)}, got {', '.join(unknown)}; correct it"
        )
    wanted = {REFERENCE, *(names or ARMS)}
    return [arm for name, arm in ARMS.items() if name in wanted]
