"""A conversation with the base model, with or without an adapter on it: sampled, by a seed.

For people who want to hear what a run has learnt. Nothing that trains or measures comes here.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from participant.data import prompt_ids
from participant.model.fingerprint import fingerprint_of
from participant.model.libraries import offline, transformers
from participant.model.loading import end_tokens, load_base, quantisation_facts
from participant.model.numerics import pick_compute_dtype
from shared.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from participant.data import Message
    from shared.config import BaseSection


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    ``temperature`` divides the logits; 0 takes the most probable token. ``top_p``: of the fewest
    tokens that have this probability together (Holtzman et al. 2020, arXiv 1904.09751).
    ``repetition_penalty``: what the logits of tokens that were there are divided by (Keskar et al.
    2019, arXiv 1909.05858). Raises ConfigError.
    """

    temperature: float = 0.5
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    max_new_tokens: int = 120
    seed: int = 0

    def __post_init__(self) -> None:
        for name, expected, holds in (
            ("temperature", "0 or more", self.temperature >= 0),
            ("top_p", "above 0, at most 1", 0 < self.top_p <= 1),
            ("repetition_penalty", "1 or more", self.repetition_penalty >= 1),
            ("max_new_tokens", "1 or more", self.max_new_tokens >= 1),
            ("seed", "0 to 2**63 - 1", 0 <= self.seed < 2**63),
        ):
            if not holds:
                given = getattr(self, name)
                raise ConfigError(f"{name}: expected {expected}, got {given}; give another")


class Talker:
    """A base model on a device. ``network`` takes adapters: see ``attach_adapter``.

    ``fingerprint``: as sites name the base that they train over. Raises ModelError.
    """

    def __init__(self, base: BaseSection, device: torch.device) -> None:
        self._device = device
        loaded = load_base(base, device, pick_compute_dtype(base.compute_dtype, device))
        self.fingerprint: str = fingerprint_of(loaded.folder, quantisation_facts(base))
        self.network: Any = loaded.network
        self._tokenizer: Any = loaded.tokenizer
        context = getattr(loaded.network.config, "max_position_embeddings", None)
        self._most_tokens: int | None = context

    def reply(
        self,
        messages: Sequence[Message],
        adapter: str | None,
        sampling: Sampling,
        hear: Callable[[str], None] = lambda _: None,
    ) -> str:
        """What the model says next; ``hear`` is told it as it comes.

        ``messages``: the conversation, the last one a user's. What does not fit in front of the
        reply is left out, oldest first. ``adapter``: the name of one that is attached; None is the
        base alone. The same seed gives the same words on the same machine.
        """
        streamer = _Streamer(self._tokenizer, hear)
        asked = torch.tensor([self._fitting(messages, sampling)], device=self._device)
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        settings = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=sampling.temperature > 0,
            repetition_penalty=sampling.repetition_penalty,
            max_new_tokens=sampling.max_new_tokens,
            use_cache=True,
            eos_token_id=sorted(end_tokens(self.network, self._tokenizer)),
            pad_token_id=self._tokenizer.eos_token_id,  # of one row, so that nothing is padded
            **(drawn if sampling.temperature > 0 else {}),
        )
        torch.manual_seed(sampling.seed)
        with offline(), torch.inference_mode(), self._using(adapter):
            self.network.generate(
                input_ids=asked,
                attention_mask=torch.ones_like(asked),
                generation_config=settings,
                streamer=streamer,
            )
        return "".join(streamer.heard).strip()

    def _fitting(self, messages: Sequence[Message], sampling: Sampling) -> list[int]:
        """Token ids of as much of the end of a conversation as leaves room for the reply."""
        for first in range(len(messages)):
            ids = prompt_ids(messages[first:], self._tokenizer)
            if self._most_tokens is None:
                return ids
            room = max(self._most_tokens - sampling.max_new_tokens, 1)
            if len(ids) <= room:
                return ids
        return ids[-room:]

    def _using(self, adapter: str | None) -> contextlib.AbstractContextManager[None]:
        if adapter is not None:
            self.network.set_adapter(adapter)
            return contextlib.nullcontext()
        without = getattr(self.network, "disable_adapter", None)
        return without() if without is not None else contextlib.nullcontext()


class _Streamer(transformers.TextStreamer):
    """Whole words as they are decoded, for whoever listens instead of for standard output."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._hear = hear
        self.heard: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """The library's own way to redirect it."""
        del stream_end
        self.heard.append(text)
        self._hear(text)
