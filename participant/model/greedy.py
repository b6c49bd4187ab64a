"""Greedy decoding of many prompts at once, each as if it were alone.

Own loop: transformers' ``generate`` would bring a model's own settings (sampling, penalties) along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shared.errors import InterruptedRunError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

# Any token would do: the mask keeps everything from seeing it.
_FILLER = 0


def greedy_tokens(
    network: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    ends: AbstractSet[int],
    max_new_tokens: int,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """The most probable continuation of each prompt's token ids, up to one of ``ends``.

    The end token is left out. Padding is on the left, masked, and positions count from each
    prompt's first token; a batch without padding is passed without mask and positions, exactly as
    one prompt is. In float32 the result is that of one prompt after the other up to rounding (a
    near tie may fall otherwise); in bfloat16 and with quantised activations it may differ more.
    Raises InterruptedRunError when ``should_stop()`` turns true, which is asked before each token.
    """
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    ids, mask = _pad_left(prompts, device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    is_padded = not bool(mask.all())
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    cache = None
    for _ in range(max_new_tokens):
        if should_stop():
            raise InterruptedRunError("stopped while replies were decoded")
        places = {"attention_mask": mask, "position_ids": positions} if is_padded else {}
        out = network(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **places
        )
        cache = out.past_key_values
        ids = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        for row, token in enumerate(ids[:, 0].tolist()):
            if row in running and token in ends:
                running.remove(row)
            elif row in running:
                answers[row].append(token)
        if not running:
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def _pad_left(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (1: a real token), both int64 [batch, longest]."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), _FILLER, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
