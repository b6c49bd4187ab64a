"""What is set beside each other: ways to send an adapter, and kinds of adapters to send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shared.config import load_federation

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shared.config import FederationConfig


@dataclass(frozen=True)
class Arm:
    """One way to run a federation.

    ``up``: the codec of the sites' deltas. ``feedback``: whether a site sends what it left out of
    one with the next. ``down``: the codec of the coordinator's updates; None for the whole adapter
    in fp32. ``sets``: settings of its own, ``section.key=value``. ``rate``: its learning rate as a
    multiple of the run's.
    """

    name: str
    up: str = "fp32"
    down: str | None = None
    feedback: bool = False
    sets: tuple[str, ...] = ()
    rate: float = 1.0

    def settings(self, file: Path, rate: float, more: Sequence[str] = ()) -> FederationConfig:
        """A federation.toml with what is this arm's own and ``more``, at that learning rate.

        Raises ConfigError.
        """
        own = [*self.sets, f"training.learning_rate={rate!r}"]
        return load_federation(file, [*own, *more])


REFERENCE: Final = "fp32"
_THIN: Final = {"up": "int4", "down": "int4", "feedback": True}
_CORE: Final = ("lora.kind=core", "lora.bases=weights", "lora.dropout=0")
_IA3: Final = ("lora.kind=ia3", "training.weight_decay=0")
