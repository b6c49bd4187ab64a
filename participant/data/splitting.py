"""Train and held-out, by group and by a recorded seed. Pure: no file, no clock, no generator.

Invariants: no group is on both sides; no held-out example has a copy in train; the same examples
in another order give the same sides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.config import canonical_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from participant.data.examples import Example


@dataclass(frozen=True)
class Split:
    """``train`` in the order it came, ``held_out`` in the seed's; ``copies`` were left out."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    copies: int


def split_examples(
    examples: Sequence[Example], fraction: float, limit: int | None, seed: int
) -> Split:
    """Hold out whole groups until ``fraction`` of the examples is reached.

    With a fraction above 0 and two groups or more, each side gets at least one group. A large
    group may overshoot the fraction. ``limit`` keeps that many held-out examples, drawn over all
    held-out groups; the rest stays unused and is never trained on. Examples in train of which
    held-out (used or not) has a copy are left out and counted.
    """
    held_groups = _held_groups(Counter(e.group for e in examples), fraction, seed)
    held = sorted(
        (e for e in examples if e.group in held_groups),
        key=lambda e: (seeded_order(seed, e.digest), e.group, e.answer),
    )
    known = {e.digest for e in held}
    rest = [e for e in examples if e.group not in held_groups]
    train = tuple(e for e in rest if e.digest not in known)
    return Split(train, tuple(held[:limit]), len(rest) - len(train))


def seeded_order(seed: int, value: str) -> bytes:
    """A sort key that shuffles: sha256 of seed and value, alike on every machine."""
    return hashlib.sha256(canonical_json([seed, value])).digest()


def _held_groups(sizes: Counter[str], fraction: float, seed: int) -> frozenset[str]:
    order = sorted(sizes, key=lambda group: seeded_order(seed, group))
    target = fraction * sizes.total()
    held: list[str] = []
    taken = 0
    for group in order[:-1]:  # the last one always stays for training
        if taken >= target:
            break
        held.append(group)
        taken += sizes[group]
    return frozenset(held)
