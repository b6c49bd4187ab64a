"""Random records of which a coin puts each into the training text: a lower bound of epsilon.

Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run" (NeurIPS 2023), in its
simplest form: a guess for every canary. Tokens are drawn from the whole vocabulary, so that a
canary is no text and nobody's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from participant.audit.binomial import lower_bound
from participant.data import TokenisedExample
from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPT_TOKENS = 8
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Canaries:
    """``inside``: those that were put into the training text; ``outside``: the others."""

    inside: tuple[TokenisedExample, ...] = ()
    outside: tuple[TokenisedExample, ...] = ()


def make_canaries(
    count: int, tokens: Sequence[int], seed: int, most_prompt: int, most_answer: int
) -> Canaries:
    """``count`` of them over ``tokens``; the same for the same arguments.

    ``most_prompt`` and ``most_answer``: the run's limits, in tokens.
    """
    draw = np.random.Generator(np.random.Philox(key=derive_seed(seed, "canaries")))
    prompt, answer = min(PROMPT_TOKENS, most_prompt), min(ANSWER_TOKENS, most_answer)
    made: tuple[list[TokenisedExample], list[TokenisedExample]] = ([], [])
    for _ in range(count):
        ids = draw.choice(tokens, prompt + answer).tolist()
        made[int(draw.integers(2))].append(TokenisedExample(tuple(ids), prompt))
    return Canaries(tuple(made[1]), tuple(made[0]))


def guessed_rightly(inside: list[float], outside: list[float]) -> int:
    """How many guesses hold if the upper half of all scores is taken for those inside."""
    marked = [*((score, True) for score in inside), *((score, False) for score in outside)]
    marked.sort(key=lambda item: item[0], reverse=True)
    half = len(marked) // 2
    return sum(is_in == (place < half) for place, (_, is_in) in enumerate(marked))


def epsilon_lower(right: int, count: int) -> float:
    """The eps at which P[Bin(count, e^eps / (1 + e^eps)) >= right] = 0.05; at least 0.

    Under (eps, 0)-DP a guess holds with probability e^eps / (1 + e^eps) at most.
    """
    probability = lower_bound(right, count)
    return 0.0 if probability <= 0.5 else math.log(probability / (1 - probability))
