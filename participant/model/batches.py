"""Tokenised examples of several lengths as one rectangle, with the places that are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from participant.data import TokenisedExample

# Any token would do: nothing that is scored sees the padding.
_FILLER = 0
# Tokens of one rectangle: enough to spread the cost of unpacking 4-bit weights, and logits that
# fit into any memory that holds the model.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Batch:
    """``input_ids``: int64 [batch, longest], padded on the right.

    ``rows``: int64 [n], places in the flattened rectangle whose output predicts an answer token.
    ``targets``: int64 [n], those tokens.
    """

    input_ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor


def first_scored(example: TokenisedExample) -> int:
    """Where scored tokens begin: the answer, but never the first token, which nothing predicts."""
    return max(example.answer_start, 1)


def scored_tokens(example: TokenisedExample) -> int:
    """How many tokens of the example are scored."""
    return max(len(example.input_ids) - first_scored(example), 0)


def pad(examples: Sequence[TokenisedExample], device: torch.device) -> Batch:
    """One rectangle of ``examples`` on ``device``.

    Scored places follow from each example's length, never from the padding token's id: in many
    chat models that is also the token that ends an answer, which has to be learnt.
    """
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), _FILLER, dtype=torch.int64)
    rows: list[int] = []
    targets: list[int] = []
    for index, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[index, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        first = first_scored(example)
        # The output at one place predicts the token at the next.
        rows.extend(range(index * longest + first - 1, index * longest + length - 1))
        targets.extend(example.input_ids[first:])
    return Batch(
        input_ids.to(device),
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(targets, dtype=torch.int64, device=device),
    )


def by_length(examples: Sequence[TokenisedExample]) -> Iterator[list[TokenisedExample]]:
    """Neighbours in length together, so that little of a rectangle is padding."""
    batch: list[TokenisedExample] = []
    for example in sorted(examples, key=lambda one: len(one.input_ids)):
        if batch and (len(batch) + 1) * len(example.input_ids) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
