"""One gradient of a site's text in place of a training, for runs that make bases.

Of the mean loss over the answer tokens of all examples that a round would train on, at the base
itself, with respect to the adapter's trained tensors only: no gradient of a whole weight is ever
held, over a quantised base as over any other. No step is taken. What a kill interrupts begins
again: it is short, and half of a sum is worth no file.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from participant.learner.port import Progress
from participant.learner.training import (
    RoundPlace,
    StepsDone,
    TrainingResult,
    accumulate,
    check_running,
    check_sane,
    step_batches,
    summarise,
)
from participant.model.batches import scored_tokens
from shared.errors import DataError
from shared.seeds import derive_seed
from shared.tensors.arithmetic import squared_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from participant.data import TokenisedExample
    from participant.model import LocalModel
    from shared.config import TrainingSection


def sample_place(place: RoundPlace, config_digest: str) -> RoundPlace:
    """Where every round of a run draws its examples: they are passes over one gradient."""
    return replace(place, number=1, seed=derive_seed("gradient", config_digest))


def gradient_pass(
    model: LocalModel,
    examples: Sequence[TokenisedExample],
    settings: TrainingSection,
    place: RoundPlace,
    sample: RoundPlace,
    only: Collection[str],
    should_stop: Callable[[], bool],
    report: Callable[[Progress], None],
) -> TrainingResult:
    """Put the gradient of each tensor in ``only`` in its place in ``model``.

    Of the examples that a round's steps at ``sample`` see, which count as one step. Taken at zeros
    in place of the tensors in ``only``: the model's answers are then the base's. Raises DataError
    without examples, DivergedError for an insane loss or gradient, InterruptedRunError when
    ``should_stop()`` turns true, checked between micro-batches.
    """
    if not examples:
        raise DataError("gradient: expected at least one example, found none")
    drawn = step_batches(len(examples), settings, sample)
    batches = [[examples[index] for index in indices] for indices in drawn]
    counts = [sum(scored_tokens(example) for example in batch) for batch in batches]
    trained = [parameter for name, parameter in model.parameters.items() if name in only]
    done = StepsDone()
    with torch.no_grad():
        for parameter in trained:
            parameter.zero_()
    with model.training(gradient_checkpointing=settings.gradient_checkpointing, only=only):
        for step, (batch, own) in enumerate(zip(batches, counts, strict=True)):
            check = partial(check_running, place, step, should_stop)
            nll = accumulate(model, batch, sum(counts), settings.batch_size, place, step, check)
            done.losses.append((nll, own))
            report(Progress("train", step + 1, len(batches), nll / own, sum(counts[: step + 1])))
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:  # a layer that no example went through has none
                    parameter.copy_(parameter.grad)
    norm = math.sqrt(math.fsum(squared_norm(p.detach().cpu().numpy()) for p in trained))
    nll = math.fsum(nll for nll, _ in done.losses) / sum(counts)
    check_sane(nll, norm, len(batches) - 1, place)
    done.norms.append(norm)
    return summarise(done)
