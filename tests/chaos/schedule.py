"""What goes wrong and when, drawn from a seed: the same seed, the same faults in the same order.

Faults and runs come from two streams of their own, so that how long a run takes changes neither.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.chaos.stand import Stand

PAUSE_SECONDS = (0.3, 4.5)


@dataclass(frozen=True)
class Kind:
    """One kind of fault. ``seconds``: from and to, how long it lasts before it is mended.

    ``act(stand, fault)`` does it, waits, mends it, and returns what shows that it happened; None
    when there was nothing to hit. ``evidence``: what that is, for people.
    """

    name: str
    weight: float
    seconds: tuple[float, float]
    act: Callable[[Stand, Fault], str | None]
    evidence: str


@dataclass(frozen=True)
class Fault:
    """One fault to come. ``pause``: seconds since the one before; ``seconds``: how long it lasts.

    ``draw``: a number of its own for whatever else the kind has to choose (which site, how many
    bytes).
    """

    number: int
    pause: float
    kind: Kind
    seconds: float
    draw: int

    def choice(self, options: Sequence[str]) -> str:
        """One of these, by this fault's own number."""
        return options[self.draw % len(options)]


@dataclass(frozen=True)
class RunShape:
    """One run to come. ``kind``: of its adapters. ``policy``: all, or carry (see ``carries``)."""

    number: int
    sites: tuple[str, ...]
    rounds: int
    codec: str
    down: str
    kind: str
    policy: str

    @property
    def carries(self) -> bool:
        """Whether a round waits for one delta only; what comes later counts in a later round."""
        return self.policy == "carry"

    @property
    def name(self) -> str:
        """The run's name."""
        return f"chaos-{self.number}"


def faults(seed: int, kinds: Sequence[Kind]) -> Iterator[Fault]:
    """Without end."""
    draw = random.Random(f"{seed} faults")
    weights = [kind.weight for kind in kinds]
    number = 0
    while True:
        number += 1
        (kind,) = draw.choices(kinds, weights)
        yield Fault(
            number,
            pause=draw.uniform(*PAUSE_SECONDS),
            kind=kind,
            seconds=draw.uniform(*kind.seconds),
            draw=draw.randrange(1 << 30),
        )


def runs(seed: int) -> Iterator[RunShape]:
    """Without end. Few shapes, since each one's undisturbed digest is computed once."""
    draw = random.Random(f"{seed} runs")
    number = 0
    while True:
        number += 1
        yield RunShape(
            number,
            sites=draw.choice((("a", "b"), ("a", "b", "c"))),
            rounds=draw.choice((4, 5, 6)),
            codec=draw.choice(("fp32", "int8", "int4", "sign", "topk", "uniform4")),
            down=draw.choice(("whole", "int4")),
            kind=draw.choice(("lora", "core")),
            policy=draw.choice(("all", "all", "carry")),
        )
