"""What a round is: who trains, when it closes, and how deltas travel and become one."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shared import modes
from shared.config.section import Section
from shared.config.values import (
    AveragingName,
    CodecName,
    DownName,
    PolicyName,
    Positive,
    RuleName,
    ServerOptimizerName,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class SelectionSection(Section):
    """Who trains in a round: all members (the paper), or a random part by the run's seed."""

    method: Literal["all", "random"] = "all"
    """Who trains in a round: every member, or some drawn by the seed."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With ``"random"``: this part of the members, rounded up."""

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """A fraction needs a draw."""
        return (self._fraction_needs_random,)

    def _fraction_needs_random(self) -> Iterator[str]:
        if self.method != "random" and self.fraction != 1.0:
            yield 'fraction needs method = "random"'


# Settings of [policy] that not every kind has a use for.
OF_SOME_KINDS = ("quorum", "deadline_seconds", "deadline", "grace_seconds", "late", "buffer")


class PolicySection(Section):
    """When a round closes, and what becomes of a delta that comes after it.

    ``all``: every selected participant's delta is in, or it is excluded. ``quorum``: likewise, but
    once deadline and grace are over ``quorum`` deltas are enough. ``buffered``: as soon as
    ``buffer`` deltas are in, of whatever round (FedBuff, arXiv:2106.06639).
    """

    kind: PolicyName = "all"
    """{policies}. When a round closes: when all selected sites are in or excluded; likewise, but
    from the deadline on with a quorum; or as soon as a buffer is full.
    """
    on_failure: Literal["wait", "exclude"] = "wait"
    """Whether the round waits for a site that is given up, or goes without it."""
    max_attempts: Positive = 3
    """After this many failed trainings in a round a site is given up."""
    quorum: Positive | None = None
    """With ``quorum``: this many of a round's own deltas are enough once deadline and grace are
    over. Below it the round stays open.
    """
    deadline_seconds: Annotated[float, Field(gt=0)] | None = None
    """With ``quorum``: how long a round waits for all sites."""
    deadline: Literal["fixed", "adaptive"] = "fixed"
    """``adaptive``: median + ``deadline_spread`` x MAD of the seconds that the deltas of the last
    five rounds took, at most ``deadline_seconds``.
    """
    deadline_spread: Annotated[float, Field(gt=0)] = 3.0
    """With ``adaptive``: how many deviations (1.4826 x MAD, at least a tenth of the median) beyond
    the median.
    """
    grace_seconds: Annotated[float, Field(ge=0)] = 0.0
    """How long it still waits for all sites after the deadline."""
    late: Literal["drop", "carry"] = "drop"
    """With ``quorum``: a delta that comes after its round closed is dropped, or counts in a later
    round with 1 / sqrt(1 + rounds since) of its weight.
    """
    max_staleness: Positive = 10
    """A delta that is more rounds old than this is not taken."""
    buffer: Positive | None = None
    """With ``buffered``: a round closes with this many deltas, of any round."""

    @property
    def carries(self) -> bool:
        """Whether a delta that comes after its round closed counts in a later one."""
        return bool(modes.get("policies", self.kind).carried_by(self))

    @property
    def late_rounds(self) -> int:
        """For how many rounds after its own a delta is still taken."""
        return self.max_staleness if self.carries else 0

    def rules(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """Each kind has settings of its own."""
        return tuple(partial(self._goes_with_the_kind, name) for name in OF_SOME_KINDS)

    def _goes_with_the_kind(self, name: str) -> Iterator[str]:
        policy = modes.get("policies", self.kind)
        given = getattr(self, name) != type(self).model_fields[name].default
        if name in policy.needs and not given:
            yield f'kind = "{self.kind}" needs {name}; add it'
        elif given and name not in policy.needs + policy.takes:
            all_kinds = {kind: modes.get("policies", kind) for kind in modes.names("policies")}
            kinds = [json.dumps(k) for k, p in all_kinds.items() if name in p.needs + p.takes]
            yield (
                f"{name} goes with kind = {' or '.join(kinds)}, got kind = "
                f'"{self.kind}"; remove it or change the kind'
            )


class AggregationSection(Section):
    """How deltas become one. ``equal``, ``mean``, ``fedavg``: Algorithm 2 of the paper."""

    weights: Literal["equal", "examples", "tokens"] = "equal"
    """1/K each, or in proportion to the site's examples or tokens."""
    max_delta_norm: Annotated[float, Field(gt=0)] | None = None
    """A delta with a larger norm is refused."""
    averaging: AveragingName = "fedavg"
    """Which factors are trained, and how they are joined: {averaging}. See
    explanation/averaging.md.
    """
    rule: RuleName = "mean"
    """{rules}. What is taken of all deltas for each value: the mean, or what withstands a bad
    site.
    """
    assumed_bad: Positive = 1
    """f: how many bad deltas ``trimmed-mean`` and ``multi-krum`` withstand."""
    clip_to_median: Annotated[float, Field(ge=1)] | Literal["off"] = 3.0
    """A delta is scaled down to at most this many times the median norm of the round; ``"off"``,
    and nothing else, with ``secure``.
    """
    secure: bool = False
    """Whether sites mask their deltas, so that the coordinator learns the sum of all and nothing of
    one. See explanation/secure-sum.md for what it goes with.
    """
    secure_reach: Annotated[float, Field(gt=0, le=1e6)] = 0.01
    """With ``secure``: the largest value of a delta that passes uncut in the first round. Later
    ones follow from the sums; what is cut off travels later.
    """


class ServerSection(Section):
    """The coordinator's optimiser: the mean delta is its step. ``plain``: it is added as it is.

    ``fedavgm`` (arXiv:1909.06335), ``nesterov`` (DiLoCo, arXiv:2311.08105), ``fedadam``,
    ``fedyogi``, ``fedadagrad`` (arXiv:2003.00295; their letters beta_1, beta_2, tau).
    """

    optimizer: ServerOptimizerName = "plain"
    """{server_optimizers}. What is done with the mean delta; ``plain``: it is added."""
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    """The server's step size."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum; beta_1 of the adaptive ones."""
    second_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """beta_2 of ``fedadam`` and ``fedyogi``."""
    tau: Annotated[float, Field(gt=0)] = 1e-3
    """Keeps the adaptive ones from dividing by zero."""


class CodecSection(Section):
    """How a delta travels."""

    name: CodecName = "int4"
    """How a delta travels: ``"fp32"``, ``"bf16"``, ``"int8"``, ``"int4"``; only with feedback
    ``"sign"`` (one bit a value) and ``"topk"`` (64 values of 4,096); or rounded at random to 256,
    16 or 4 levels in each block: ``"uniform256"``, ``"uniform16"``, ``"uniform4"``. By default
    ``"int8"`` with ``svd``, ``flora`` and ``range-finder``.
    """
    feedback: bool = True
    """A site keeps what the codec left out of a delta and adds it to its next one. Without effect
    with ``fp32``, which leaves nothing out, and with ``svd``, ``flora`` and ``range-finder``, which
    make the factors anew in every round.
    """
    down: DownName = "int4"
    """How an adapter travels to the sites: ``"whole"``, or the codec of the update that a site adds
    to the one that it holds. What that leaves out travels in a later round. ``"whole"``, and
    nothing else, with ``svd``, ``flora`` and ``range-finder``.
    """
    packed: bool = True
    """Names and shapes of a delta's tensors take a few bytes each. ``false``: a delta is a
    safetensors file; sites of older releases can read no other, and fetch each adapter whole.
    """


class ConvergenceSection(Section):
    """Stop early: held-out loss not better by ``min_delta`` nats for ``patience`` rounds."""

    patience: Positive | None = None
    """Stop after this many rounds without a better loss. Without it: never."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A loss is better if it fell by this many nats."""
