"""What a round is: who trains, when it closes, and how deltas travel and become one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StringConstraints

from shared.config.section import Section
from shared.config.values import AveragingName, Positive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class SelectionSection(Section):
    """Who trains in a round: all members (the paper), or a random part by the run's seed."""

    method: Literal["all", "random"] = "all"
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """A fraction needs a draw."""
        return (self._fraction_needs_random,)

    def _fraction_needs_random(self) -> Iterator[str]:
        if self.method == "all" and self.fraction != 1.0:
            yield 'fraction needs method = "random"'


class PolicySection(Section):
    """When a round closes, and what becomes of a delta that comes after it.

    ``all``: every selected participant's delta is in, or it is excluded. ``quorum``: likewise, but
    once deadline and grace are over ``quorum`` deltas are enough. ``buffered``: as soon as
    ``buffer`` deltas are in, of whatever round (FedBuff, arXiv:2106.06639).
    """

    kind: Literal["all", "quorum", "buffered"] = "all"
    on_failure: Literal["wait", "exclude"] = "wait"
    max_attempts: Positive = 3
    quorum: Positive | None = None
    deadline_seconds: Annotated[float, Field(gt=0)] | None = None
    deadline: Literal["fixed", "adaptive"] = "fixed"
    deadline_spread: Annotated[float, Field(gt=0)] = 3.0
    grace_seconds: Annotated[float, Field(ge=0)] = 0.0
    late: Literal["drop", "carry"] = "drop"
    max_staleness: Positive = 10
    buffer: Positive | None = None

    @property
    def carries(self) -> bool:
        """Whether a delta that comes after its round closed counts in a later one."""
        return self.kind == "buffered" or (self.kind == "quorum" and self.late == "carry")

    @property
    def late_rounds(self) -> int:
        """For how many rounds after its own a delta is still taken."""
        return self.max_staleness if self.carries else 0

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """Each kind has settings of its own."""
        return (self._has_what_the_kind_needs, self._has_nothing_else, self._waits_as_a_quorum)

    def _has_what_the_kind_needs(self) -> Iterator[str]:
        needed = {"all": (), "quorum": ("quorum", "deadline_seconds"), "buffered": ("buffer",)}
        for name in needed[self.kind]:
            if getattr(self, name) is None:
                yield f'kind = "{self.kind}" needs {name}; add it'

    def _has_nothing_else(self) -> Iterator[str]:
        for name, kind in (
            ("quorum", "quorum"),
            ("deadline_seconds", "quorum"),
            ("buffer", "buffered"),
        ):
            if self.kind != kind and getattr(self, name) is not None:
                yield (
                    f'{name} goes with kind = "{kind}", got kind = "{self.kind}"; '
                    "remove it or change the kind"
                )

    def _waits_as_a_quorum(self) -> Iterator[str]:
        if self.kind != "quorum" and (
            self.late != "drop" or self.deadline != "fixed" or self.grace_seconds
        ):
            yield (
                f'late, deadline and grace_seconds go with kind = "quorum", got kind = '
                f'"{self.kind}"; remove them or change the kind'
            )


class AggregationSection(Section):
    """How a round's deltas become one. ``equal``, ``mean``, ``fedavg``: Algorithm 2 of the paper.

    ``averaging``: which factors of a LoRA adapter are trained and how they are joined. ``rule``:
    what is taken of all deltas for each value; ``assumed_bad``: how many bad ones ``multi-krum``
    and ``trimmed-mean`` withstand. ``clip_to_median``: a delta is scaled down to at most this many
    times the median norm of the round.
    """

    weights: Literal["equal", "examples", "tokens"] = "equal"
    max_delta_norm: Annotated[float, Field(gt=0)] | None = None
    averaging: AveragingName = "fedavg"
    rule: Literal["mean", "trimmed-mean", "median", "multi-krum"] = "mean"
    assumed_bad: Positive = 1
    clip_to_median: Annotated[float, Field(ge=1)] | Literal["off"] = 3.0

    @property
    def least_deltas(self) -> int:
        """With fewer deltas than this the rule withstands nothing, and a round does not close."""
        bad = self.assumed_bad
        return {"median": 3, "trimmed-mean": 2 * bad + 1, "multi-krum": 2 * bad + 3}.get(
            self.rule, 1
        )


class ServerSection(Section):
    """The coordinator's optimiser: the mean delta is its step. ``plain``: it is added as it is.

    ``fedavgm`` (arXiv:1909.06335), ``nesterov`` (DiLoCo, arXiv:2311.08105), ``fedadam``,
    ``fedyogi``, ``fedadagrad`` (arXiv:2003.00295; their letters beta_1, beta_2, tau).
    """

    optimizer: Literal["plain", "fedavgm", "nesterov", "fedadam", "fedyogi", "fedadagrad"] = "plain"
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    second_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


class CodecSection(Section):
    """How a delta travels."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,20}$")] = "fp32"


class ConvergenceSection(Section):
    """Stop early: held-out loss not better by ``min_delta`` nats for ``patience`` rounds."""

    patience: Positive | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0
