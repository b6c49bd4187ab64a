"""What the records and measurements of an arm come to: plain numbers, nothing is run here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from coordinator.runs.comparison import closing_seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.history import History
    from gradualdiff.embedded.metering import Meter
    from shared.protocol.records import AcceptedRecord

PHASES = ("load", "train", "encode", "transfer", "aggregate", "evaluate")


@dataclass(frozen=True)
class RoundFigures:
    """One round of an arm.

    ``client_nll``: nats per token of the round's training batches, each before its own step, over
    all participants' own shards; ``tokens``: how many those are. ``parallel``: seconds by phase of
    the participant that took longest; ``in_turn``: all participants' together. ``cosine``: mean
    over participants of their delta's with the mean delta.
    """

    round: int
    client_nll: float | None
    tokens: int
    parallel: dict[str, float]
    in_turn: dict[str, float]
    cosine: float | None = None
    test_nll: float | None = None


@dataclass(frozen=True)
class ArmFigures:
    """One arm under one seed and batch size; means over participants where they train alone.

    ``losses`` and ``replies``: of the last adapter, by text. ``bytes_up``, ``bytes_down``: of one
    participant in one round, objects and messages; None where nothing travels.
    """

    arm: str
    seed: int
    batch_size: int
    learning_rate: float | None
    rounds: tuple[RoundFigures, ...] = ()
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    replies: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes_up: float | None = None
    bytes_down: float | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def tokens(self) -> int:
        """Answer tokens trained on, all rounds and participants."""
        return sum(one.tokens for one in self.rounds)


def round_figures(
    histories: Sequence[History], meters: Sequence[Meter], number: int, test_nll: float | None
) -> RoundFigures:
    """Round ``number`` of an arm's runs: the participants of all of them together."""
    accepted: list[AcceptedRecord] = []
    seconds: list[dict[str, float]] = []
    cosines: list[float] = []
    for history, meter in zip(histories, meters, strict=True):
        there = history.round(number)
        for site, record in there.accepted.items():
            accepted.append(record)
            moving = meter.of(site).transfer_seconds / history.last_closed
            seconds.append({**record.metrics.seconds, "transfer": moving})
        if there.closed is not None:
            cosines += there.closed.cosines.values()
    closing = [closing_seconds(history, number) or 0.0 for history in histories]
    parallel, in_turn = slowest_and_sum(seconds, closing)
    known = [(r.metrics.train_nll, r.tokens) for r in accepted if r.metrics.train_nll is not None]
    weight = sum(count for _, count in known)
    return RoundFigures(
        round=number,
        client_nll=math.fsum(nll * n for nll, n in known) / weight if weight else None,
        tokens=sum(record.tokens for record in accepted),
        parallel=parallel,
        in_turn=in_turn,
        cosine=math.fsum(cosines) / len(cosines) if cosines else None,
        test_nll=test_nll,
    )


def slowest_and_sum(
    participants: Sequence[Mapping[str, float]], closing: Sequence[float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by phase of a round: the slowest participant's, and all of them together.

    ``closing``: the aggregation's, one that all wait for, or one for each who trains alone.
    """
    each = closing if len(closing) > 1 else [*closing] * len(participants)
    whole = [
        {**{name: one.get(name, 0.0) for name in PHASES}, "aggregate": end}
        for one, end in zip(participants, each, strict=True)
    ]
    slowest = max(whole, key=lambda one: math.fsum(one.values()))
    in_turn = {name: math.fsum(one[name] for one in whole) for name in PHASES}
    return slowest, {**in_turn, "aggregate": math.fsum(closing)}


def traffic(histories: Sequence[History], meters: Sequence[Meter]) -> tuple[float, float]:
    """Bytes up and down of one participant in one round: all of the run, shared out evenly."""
    up = down = shares = 0
    for history, meter in zip(histories, meters, strict=True):
        for one in meter.sites.values():
            up += one.objects_up + one.messages_up
            down += one.objects_down + one.messages_down
            shares += history.last_closed
    return up / shares, down / shares


def mean_of(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number that all of ``values`` have."""
    names = [name for name in values[0] if all(_is_number(one.get(name)) for one in values)]
    return {name: math.fsum(one[name] for one in values) / len(values) for name in names}


def largest(values: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The largest of each number that any of ``values`` has."""
    names = {name for one in values for name in one}
    return {name: max(one.get(name, 0) for one in values) for name in sorted(names)}


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
