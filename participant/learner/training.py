"""One site's local training in one round: a plain loop whose every byte can be repeated.

Data order and dropout come from the run's seed, the site's name, the round and the step, never
from what ran before. The learning rate follows one schedule over the whole run, so a round only
knows which stretch of it is its own. Knows nothing of files but the optimiser's state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from participant.learner.optimizer_state import load_optimizer
from participant.learner.port import Progress, steps_in_round
from participant.learner.proximal import ProximalTerm
from participant.model.batches import scored_tokens
from shared.errors import DataError, DivergedError, InterruptedRunError
from shared.failpoints import failpoint
from shared.protocol.bounds import LEAST_NLL, MOST_NLL
from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from participant.data import TokenisedExample
    from participant.learner.private_steps import PrivateSteps
    from participant.model import LocalModel
    from shared.config import TrainingSection


@dataclass(frozen=True)
class RoundPlace:
    """Which round of which site this is, and its stretch of the run's schedule, both in [0, 1]."""

    site: str
    number: int
    seed: int
    progress_from: float
    progress_to: float

    def progress_at(self, done: int, steps: int) -> float:
        """On the run's schedule, once ``done`` of this round's steps are done."""
        return self.progress_from + (self.progress_to - self.progress_from) * (done / steps)


@dataclass
class StepsDone:
    """What the optimiser steps of a round came to, one entry for each.

    ``losses``: summed nats before the step's update, and answer tokens; ``norms``: gradient norms
    before clipping, FedProx's term included. ``seconds``: what earlier processes spent on these
    steps.
    """

    losses: list[tuple[float, int]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Number of steps."""
        return len(self.losses)


@dataclass(frozen=True)
class Beginning:
    """Where a training begins: an optimiser state (None: a new one), and steps done already.

    ``only``: the tensors that are trained, None for all; the others keep every bit.
    ``source(name)``: a tensor of the round's adapter, which differs from what the model holds once
    steps are done. None: what the model holds. ``private``: what makes the gradients of a run with
    differential privacy, in place of mean and clipping.
    """

    state: Path | None = None
    done: StepsDone = field(default_factory=StepsDone)
    only: Collection[str] | None = None
    source: Callable[[str], NDArray[Any]] | None = None
    private: PrivateSteps | None = None


def keep_nothing(done: StepsDone, optimizer: torch.optim.AdamW, stopped: bool) -> None:
    """The default for ``keep``: what is lost is trained again."""


@dataclass(frozen=True)
class TrainingResult:
    """What a round came to. Losses in nats per answer token; ``tokens``: answer tokens trained on.

    ``train_nll`` is weighted by token over all steps, each before its own update. ``optimizer``:
    None where no step was taken.
    """

    steps: int
    tokens: int
    train_nll: float
    first_step_nll: float
    last_step_nll: float
    mean_grad_norm: float
    optimizer: torch.optim.AdamW | None


def train_round(
    model: LocalModel,
    examples: Sequence[TokenisedExample],
    settings: TrainingSection,
    place: RoundPlace,
    *,
    begin: Beginning,
    should_stop: Callable[[], bool],
    report: Callable[[Progress], None],
    keep: Callable[[StepsDone, torch.optim.AdamW, bool], None] = keep_nothing,
) -> TrainingResult:
    """Train the adapter in ``model`` from where it stands, which is after the steps of ``begin``.

    ``keep(done, optimizer, stopped)`` is called after every step, and with ``stopped`` before this
    ends early with at least one step done: then the model holds what these steps made of it.
    With ``proximal_mu`` the gradient of FedProx's term is added before clipping, since it is part
    of the objective: gradient norms are of both, losses of the text alone.
    Raises DataError without examples, DivergedError if loss or gradient is insane, ModelError
    if the state does not fit, InterruptedRunError when ``should_stop()`` turns true.
    """
    if not examples:
        raise DataError("training: expected at least one example, found none")
    only = model.parameters.keys() if begin.only is None else begin.only
    factors = {name: p for name, p in model.parameters.items() if name in only}
    parameters = list(factors.values())
    optimizer = _optimizer(factors, settings, begin.state)
    proximal = _proximal(model, factors, settings, begin)
    if begin.private is None:
        max_norm, gradient = settings.max_grad_norm, _mean(model, examples, settings, place)
    else:
        max_norm, gradient = math.inf, partial(begin.private.gradient, model, factors)
    steps = steps_in_round(len(examples), settings)
    done = StepsDone([*begin.done.losses], [*begin.done.norms], begin.done.seconds)
    with model.training(gradient_checkpointing=settings.gradient_checkpointing, only=only):
        for step in range(done.count, steps):
            try:
                nll, tokens = gradient(step, partial(check_running, place, step, should_stop))
            except InterruptedRunError:
                if done.count:
                    keep(done, optimizer, True)
                raise
            if proximal is not None:
                proximal.add_gradient()
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
            loss = nll / max(tokens, 1)  # a private step may draw no example
            check_sane(loss, norm, step, place)
            progress = place.progress_at(step + 1, steps)
            optimizer.param_groups[0]["lr"] = learning_rate(settings, progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done.losses.append((nll, tokens))
            done.norms.append(norm)
            failpoint("training.stepped")
            trained = 0 if begin.private else sum(count for _, count in done.losses)
            report(Progress("train", step + 1, steps, loss, trained, done.seconds))
            keep(done, optimizer, False)
    return summarise(done, optimizer)


def _optimizer(
    factors: Mapping[str, torch.nn.Parameter], settings: TrainingSection, state: Path | None
) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(
        list(factors.values()),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    if state is not None:
        load_optimizer(optimizer, factors, state)
    return optimizer


def step_batches(count: int, settings: TrainingSection, place: RoundPlace) -> Iterator[list[int]]:
    """Indices of the examples of each optimiser step, in order.

    With ``local_epochs`` an epoch's last batch may be short; with ``local_steps`` every batch is
    full and runs on into the next epoch's permutation.
    """
    per_step = settings.batch_size * settings.gradient_accumulation
    if settings.local_steps is None:
        for epoch in range(settings.local_epochs or 1):
            order = permutation(count, place, epoch)
            yield from (order[start : start + per_step] for start in range(0, count, per_step))
        return
    waiting: list[int] = []
    epoch = 0
    for _ in range(settings.local_steps):
        while len(waiting) < per_step:
            waiting += permutation(count, place, epoch)
            epoch += 1
        yield waiting[:per_step]
        waiting = waiting[per_step:]


def permutation(count: int, place: RoundPlace, epoch: int) -> list[int]:
    """0 .. count-1 in the order of one epoch: Philox keyed by seed, site, round and epoch."""
    key = derive_seed(place.seed, place.site, place.number, epoch)
    order: list[int] = np.random.Generator(np.random.Philox(key=key)).permutation(count).tolist()
    return order


def learning_rate(settings: TrainingSection, progress: float) -> float:
    """The rate at ``progress`` in (0, 1] of the whole run.

    Linear from 0 up to ``warmup_ratio``; from there on constant, or down to 0 at progress 1 along a
    line or half a cosine, as in transformers' schedules of these names.
    """
    if progress < settings.warmup_ratio:
        return settings.learning_rate * progress / settings.warmup_ratio
    rest = min((progress - settings.warmup_ratio) / (1.0 - settings.warmup_ratio), 1.0)
    match settings.schedule:
        case "constant":
            return settings.learning_rate
        case "linear":
            return settings.learning_rate * (1.0 - rest)
        case "cosine":
            return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * rest))


def _mean(
    model: LocalModel,
    examples: Sequence[TokenisedExample],
    settings: TrainingSection,
    place: RoundPlace,
) -> Callable[[int, Callable[[], None]], tuple[float, int]]:
    """What puts the gradient of a step's mean loss in place: its summed nats, and tokens."""
    batches = list(step_batches(len(examples), settings, place))

    def gradient(step: int, check: Callable[[], None]) -> tuple[float, int]:
        batch = [examples[index] for index in batches[step]]
        tokens = sum(scored_tokens(example) for example in batch)
        nll = accumulate(model, batch, tokens, settings.batch_size, place, step, check)
        return nll, tokens

    return gradient


def check_running(place: RoundPlace, step: int, should_stop: Callable[[], bool]) -> None:
    """Raises InterruptedRunError when ``should_stop()`` turns true."""
    if should_stop():
        raise InterruptedRunError(
            f"round {place.number} of {place.site} was stopped in step {step + 1}; "
            "it continues from there at the next start"
        )


def accumulate(
    model: LocalModel,
    batch: Sequence[TokenisedExample],
    tokens: int,
    micro_size: int,
    place: RoundPlace,
    step: int,
    check: Callable[[], None],
) -> float:
    """Add ``batch``'s gradients of the mean loss over ``tokens`` answer tokens; its summed nats.

    Divided by the tokens of the whole step, not micro-batch by micro-batch: a mean of means would
    weigh a token by how short its neighbours' answers are. ``check`` is called before each
    micro-batch and may raise.
    """
    nll = 0.0
    for micro, start in enumerate(range(0, len(batch), micro_size)):
        check()
        torch.manual_seed(derive_seed(place.seed, place.site, place.number, step, micro))
        loss = model.answer_nll(batch[start : start + micro_size])
        (loss / tokens).backward()  # type: ignore[no-untyped-call]
        nll += float(loss.detach())
    return nll


def _proximal(
    model: LocalModel,
    factors: Mapping[str, torch.nn.Parameter],
    settings: TrainingSection,
    begin: Beginning,
) -> ProximalTerm | None:
    if not settings.proximal_mu:
        return None
    return ProximalTerm(factors, begin.source or model.read, settings.proximal_mu)


def check_sane(nll: float, norm: float, step: int, place: RoundPlace) -> None:
    """Raises DivergedError for a loss or a gradient norm that no training could go on from."""
    if LEAST_NLL <= nll <= MOST_NLL and math.isfinite(norm):  # NaN is not either
        return
    raise DivergedError(
        f"training diverged in step {step + 1} of round {place.number}: loss {nll:g} nats per "
        f"token, gradient norm {norm:g}; expected at most {MOST_NLL:g} and a finite norm; lower "
        "training.learning_rate or look at the data"
    )


def summarise(done: StepsDone, optimizer: torch.optim.AdamW | None = None) -> TrainingResult:
    """What the steps that were done came to."""
    losses = done.losses
    tokens = max(sum(count for _, count in losses), 1)
    return TrainingResult(
        steps=len(losses),
        tokens=tokens,
        train_nll=math.fsum(nll for nll, _ in losses) / tokens,
        first_step_nll=losses[0][0] / max(losses[0][1], 1),
        last_step_nll=losses[-1][0] / max(losses[-1][1], 1),
        mean_grad_norm=math.fsum(done.norms) / len(done.norms),
        optimizer=optimizer,
    )
