"""What a run cost on the wire, as its sites counted it, and beside what else they might send.

A run from before sites counted says nothing of it, and is not guessed at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.history import History, RoundHistory
    from shared.protocol.manifest import Traffic

FP16, FP32 = 2, 4  # bytes of a number


@dataclass(frozen=True)
class Wire:
    """A run's bytes. ``total``: of all sites and rounds, and after them. ``turns``: deltas told.

    ``down``, ``up``: of one site in one round on average, messages included and what was fetched
    to get ready left out. ``base``: bytes of the base model in fp16, ``adapter`` of the adapter in
    fp32; None where that is not on record. ``to_base``, ``to_adapter``: how many times those bytes
    are a turn's, down and up.
    """

    total: Traffic
    turns: int
    down: float
    up: float
    base: int | None
    adapter: int | None
    to_base: tuple[float, float] | None
    to_adapter: tuple[float, float] | None


def in_round(there: RoundHistory) -> Traffic | None:
    """What the sites told with their valid deltas of one round; None where none did."""
    return _sum(record.traffic for record in there.accepted.values())


def of_run(history: History) -> Wire | None:
    """What the whole run cost; None where no site told."""
    deltas = [record.traffic for record in history.accepted.values() if record.traffic]
    told = _sum(deltas)
    if told is None:
        return None
    after = (record for there in history.rounds.values() for record in there.evaluated.values())
    sizes = [member.base_parameters for member in history.members.values()]
    base = next((FP16 * size for size in sizes if size is not None), None)
    genesis = history.genesis
    adapter = FP32 * sum(spec.elements for spec in genesis.manifest.tensors) if genesis else None
    down, up = (bytes_down(told) / len(deltas), bytes_up(told) / len(deltas))
    return Wire(
        total=_sum([told, *(record.traffic for record in after)]) or told,
        turns=len(deltas),
        down=down,
        up=up,
        base=base,
        adapter=adapter,
        to_base=_times(base, down, up),
        to_adapter=_times(adapter, down, up),
    )


def bytes_down(traffic: Traffic) -> int:
    """Fetched and heard, but for what was fetched to get ready."""
    return traffic.down + traffic.messages_down


def bytes_up(traffic: Traffic) -> int:
    """Sent and said."""
    return traffic.up + traffic.messages_up


def _sum(told: Iterable[Traffic | None]) -> Traffic | None:
    known = [one for one in told if one is not None]
    return sum(known[1:], start=known[0]) if known else None


def _times(whole: int | None, down: float, up: float) -> tuple[float, float] | None:
    if whole is None or not (down and up):
        return None
    return whole / down, whole / up
