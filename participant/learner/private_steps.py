"""Optimiser steps with differential privacy for each record (DP-SGD, Abadi et al., 1607.00133).

    g = (sum over a Poisson sample of clip(g_i, C) + N(0, sigma^2 C^2)) / (q n)

g_i: gradient of the trained numbers only, of one example's mean loss over its answer tokens. One
backward pass an example: no hooks, and whatever the base is made of. Divided by the expected batch,
not by the one that was drawn, whose size is a secret too. What AdamW makes of g, weight decay,
FedProx's term and the codec's part come after the noise and cost nothing more.

Sample, dropout and noise come from the site's secret. Dropout too: a seed by place in the batch
would change what all other examples give when one record is there or not.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from participant.checkpoints import settings_digest
from participant.learner.port import steps_in_round
from participant.model.batches import scored_tokens
from participant.privacy import Secret, Spend, mechanism
from participant.privacy.noise import KEY_BYTES
from shared.config import canonical_json
from shared.errors import ProtocolError
from shared.protocol.manifest import LocalMetrics
from shared.protocol.privacy import PrivacySpent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from participant.data import SiteData, TokenisedExample
    from participant.learner.port import Learned
    from participant.model import LocalModel
    from participant.privacy import Budget, Mechanism
    from shared.protocol.events import RoundStarted, RunAnnounced

# Keeps a clipped norm at or below C whatever rounding does in single precision.
MARGIN = 1e-5


def planned(announced: RunAnnounced, data: SiteData) -> Mechanism:
    """The steps of a run with ``[privacy]`` over a site's text; equal examples are one.

    Raises ConfigError where no noise keeps the target, MissingPackageError.
    """
    assert announced.privacy is not None  # whoever calls has looked
    training, count = announced.training, len(set(data.train))
    batch = training.batch_size * training.gradient_accumulation
    in_round = steps_in_round(count, training)
    return mechanism(announced.privacy, batch, count, in_round, announced.rounds)


class PrivateSteps:
    """How a private round's gradients are made. ``spent``: what the site tells of it."""

    def __init__(
        self,
        examples: Sequence[TokenisedExample],
        steps: Mechanism,
        secret: Secret,
        spent: PrivacySpent | None = None,
    ) -> None:
        """``examples``: each different one once. ``secret``: of this training alone."""
        self.examples = examples
        self._steps = steps
        self._secret = secret
        self.spent = spent

    def sample(self, step: int) -> list[int]:
        """The indices of the examples of one step: each by itself with probability q."""
        stream = self._secret.derive("sample", step).stream()
        return stream.chosen(len(self.examples), self._steps.noise.rate)

    def gradient(
        self,
        model: LocalModel,
        factors: Mapping[str, torch.nn.Parameter],
        step: int,
        check: Callable[[], None],
    ) -> tuple[float, int]:
        """Put a step's noisy gradient in place; loss (summed nats) and tokens of its sample.

        ``check`` is called before each example and may raise. An example whose gradient is no
        finite number counts as nothing. Neither loss nor tokens may leave the site.
        """
        total = {name: torch.zeros_like(parameter) for name, parameter in factors.items()}
        nll, tokens = 0.0, 0
        for index in self.sample(step):
            check()
            example = self.examples[index]
            torch.manual_seed(self._secret.derive("dropout", step, index).seed)
            loss = model.answer_nll([example])
            (loss / scored_tokens(example)).backward()  # type: ignore[no-untyped-call]
            if add_clipped(total, factors, self._steps.clip):
                nll += float(loss.detach())
                tokens += scored_tokens(example)
        self._place(total, factors, step)
        return nll, tokens

    def veiled(self, learned: Learned) -> Learned:
        """What may be told of a training: nothing that depends on its records without noise."""
        told = learned.metrics
        metrics = LocalMetrics(steps=told.steps, held_out=told.held_out, seconds=told.seconds)
        return replace(learned, tokens=1, metrics=metrics, distinct=None, privacy=self.spent)

    @torch.no_grad()
    def _place(
        self,
        total: Mapping[str, torch.Tensor],
        factors: Mapping[str, torch.nn.Parameter],
        step: int,
    ) -> None:
        stream = self._secret.derive("noise", step).stream()
        deviation = self._steps.noise.multiplier * self._steps.clip
        expected = self._steps.noise.rate * len(self.examples)
        for name in sorted(factors):
            noise = torch.from_numpy(stream.normal(total[name].numel()) * deviation)
            noise = noise.to(torch.float32).view(total[name].shape).to(total[name].device)
            factors[name].grad = (total[name] + noise) / expected


@torch.no_grad()
def add_clipped(
    total: Mapping[str, torch.Tensor], factors: Mapping[str, torch.nn.Parameter], clip: float
) -> bool:
    """Add one example's gradient, of norm ``clip`` at most, to ``total``, and clear it.

    Whether it is finite; one that is not adds nothing. Norms in double precision, over all tensors.
    """
    grads: dict[str, Any] = {name: p.grad for name, p in factors.items() if p.grad is not None}
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in grads.values()]
    norm = math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0
    for parameter in factors.values():
        parameter.grad = None
    if not math.isfinite(norm):
        return False
    scale = min(1.0, clip / (norm * (1 + MARGIN))) if norm > 0 else 0.0
    for name, grad in grads.items():
        total[name].add_(grad, alpha=scale)
    return True


def begin_private(
    task: RoundStarted,
    announced: RunAnnounced,
    site: str,
    data: SiteData,
    ground: str,
    budget: Budget | None,
) -> PrivateSteps:
    """Pay for a round, and what its steps are made with.

    ``ground``: all that decides the training's bytes beside its task: two trainings that differ in
    anything never share noise. Raises what the budget raises, and ProtocolError without one.
    """
    if task.privacy is None or task.privacy != announced.privacy or budget is None:
        raise ProtocolError(
            f"privacy: expected for round {task.round} of run {task.run} what was announced, and "
            "a budget to spend of; got something else. Announce the run anew"
        )
    steps = planned(announced, data)
    place = [task.run, task.round, task.source_sha, task.seed, site]
    asked = [*place, settings_digest(task), ground, steps.in_round, steps.clip]
    asked += [steps.noise.rate, steps.noise.multiplier]
    spend = Spend(
        run=task.run,
        round=task.round,
        training=_digest(asked),
        text=_digest(sorted(data.records)),
        rate=steps.noise.rate,
        multiplier=steps.noise.multiplier,
        steps=steps.in_round,
    )
    secret, epsilons = budget.charge(
        spend,
        data.records,
        steps.delta,
        task.privacy.target_epsilon or math.inf,
        begun=task.last_counted is not None,
    )
    spent = PrivacySpent(
        epsilon=epsilons.run,
        total_epsilon=epsilons.total,
        delta=steps.delta,
        steps=epsilons.steps,
        rate=steps.noise.rate,
        clip=steps.clip,
        noise_multiplier=steps.noise.multiplier,
    )
    return PrivateSteps(_distinct(data), steps, secret, spent)


def rehearsed(announced: RunAnnounced, data: SiteData) -> PrivateSteps:
    """Steps that take as long as the run's and are paid for by nobody: nothing of them is kept."""
    secret = Secret(secrets.token_bytes(KEY_BYTES))
    return PrivateSteps(_distinct(data), planned(announced, data), secret)


def _distinct(data: SiteData) -> tuple[TokenisedExample, ...]:
    return tuple(dict.fromkeys(data.train))


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()
