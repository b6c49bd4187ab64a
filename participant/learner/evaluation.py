"""Held-out loss of the adapter in a model, and its replies to prompts.

Loss is the sum of nats over all answer tokens divided by their number, never a mean of batch
means; batches are fixed, so that the same adapter gives the same number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from participant.learner.port import Progress
from participant.model.batches import by_length, scored_tokens
from shared.errors import DataError, DivergedError, InterruptedRunError
from shared.protocol.bounds import LEAST_NLL, MOST_NLL
from shared.protocol.manifest import HeldOut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from participant.data import TokenisedExample
    from participant.model import LocalModel


def evaluate_held_out(
    model: LocalModel,
    examples: Sequence[TokenisedExample],
    should_stop: Callable[[], bool],
    report: Callable[[Progress], None],
) -> HeldOut:
    """Loss of the adapter in ``model``, without dropout and without gradients.

    Raises DataError without examples, DivergedError for an insane loss, InterruptedRunError
    when ``should_stop()`` turns true, checked between batches.
    """
    tokens = sum(scored_tokens(example) for example in examples)
    if not tokens:
        raise DataError("evaluation: expected at least one held-out answer token, found none")
    nll: list[float] = []
    done = 0
    model.clear()
    with torch.inference_mode():
        for batch in by_length(examples):
            if should_stop():
                raise InterruptedRunError("evaluation was stopped; it begins again")
            nll.append(float(model.answer_nll(batch)))
            done += len(batch)
            report(Progress("evaluate", done, len(examples)))
    mean = math.fsum(nll) / tokens
    if not LEAST_NLL <= mean <= MOST_NLL:  # NaN is not either
        raise DivergedError(
            f"evaluation: expected a loss of at most {MOST_NLL:g} nats per token, got {mean:g}; "
            "the adapter is unusable"
        )
    return HeldOut(nll=mean, tokens=tokens, examples=len(examples))
