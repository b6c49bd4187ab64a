r"""Examples to token ids, with the exact place where the answer starts.

Prompt and answer are tokenised apart, so that no token straddles the boundary and the model is
trained on what it will see: a prompt that ends where generation starts. With a chat template the
prompt is the template's text up to the generation prompt; the answer is what the template writes
after it, up to and with the end-of-turn token, without the line break that ChatML adds (the model
never has to produce it, it has stopped). Without one:

    <bos>System: ...\nUser: ...\nAssistant: ...<eos>

with a line for each message. Plain text, with or without a template: ``<bos>text<eos>``, where a
tokenizer without a bos token starts with its eos token, so that the first token is predicted too.

Text that spells out a special token is read as that token, as it is in generation.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from participant.data.examples import Unusable
from shared.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from participant.data.examples import Example, Message


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer; a transformers one has it."""

    @property
    def chat_template(self) -> object:
        """None where the tokenizer has no template."""

    @property
    def bos_token_id(self) -> int | None:
        """The id that starts a text, if there is one."""

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text or a turn, if there is one."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> object:
        """The conversation as text (``tokenize=False``). Raises jinja2's TemplateError."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""


@dataclass(frozen=True, slots=True)
class TokenisedExample:
    """Token ids; ``input_ids[answer_start:]`` is the answer, to its end-of-turn token if not cut.

    ``answer_start`` is at least 1.
    """

    input_ids: tuple[int, ...]
    answer_start: int


def tokenise(
    example: Example, tokenizer: ChatTokenizer, max_prompt_tokens: int, max_answer_tokens: int
) -> tuple[TokenisedExample, bool] | Unusable:
    """Token ids of an example, and whether anything was cut.

    A longer prompt keeps its last ``max_prompt_tokens`` tokens (the nearest to the answer; a
    system message goes first). A longer answer keeps its first ``max_answer_tokens`` and then has
    no end-of-turn token: it does not end there. Raises ModelError for a template or tokenizer
    that leaves no place to learn an answer from.
    """
    if not tokenizer.encode(example.answer, add_special_tokens=False):
        return Unusable.NO_TOKENS
    if not example.prompt:
        parts = _plain_text(example, tokenizer)
    elif tokenizer.chat_template is None:
        parts = _without_template(example, tokenizer)
    else:
        refused: type[Exception] = importlib.import_module("jinja2").TemplateError
        try:
            parts = _with_template(example, tokenizer)
        except refused:
            return Unusable.REFUSED
    prompt, answer = parts
    cut = len(prompt) > max_prompt_tokens or len(answer) > max_answer_tokens
    prompt, answer = prompt[-max_prompt_tokens:], answer[:max_answer_tokens]
    return TokenisedExample((*prompt, *answer), len(prompt)), cut


def prompt_ids(messages: Sequence[Message], tokenizer: ChatTokenizer) -> list[int]:
    """Token ids of a prompt, up to where the answer starts. Raises jinja2's TemplateError."""
    if tokenizer.chat_template is None:
        return _untemplated(messages, tokenizer)
    prompt = _render(tokenizer, _told(messages), generate=True)
    return tokenizer.encode(prompt, add_special_tokens=False)


def _told(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _with_template(example: Example, tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    messages = _told(example.prompt)
    whole = [*messages, {"role": "assistant", "content": example.answer}]
    prompt = _render(tokenizer, messages, generate=True)
    text = _render(tokenizer, whole, generate=False)
    if not text.startswith(prompt) or not prompt:
        raise ModelError(
            "base.model: expected a chat template that continues its generation prompt with the "
            "answer, got one that writes the two differently; name another model, or map the "
            "file as data.text"
        )
    answer = text[len(prompt) :].rstrip()
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if answer.endswith(example.answer):  # the template closes no turn
        ids = [*ids, *_end(tokenizer)]
    return tokenizer.encode(prompt, add_special_tokens=False), ids


def _render(tokenizer: ChatTokenizer, messages: list[dict[str, str]], *, generate: bool) -> str:
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    )


def _without_template(example: Example, tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    answer = tokenizer.encode(f" {example.answer}", add_special_tokens=False)
    return _untemplated(example.prompt, tokenizer), [*answer, *_end(tokenizer)]


def _untemplated(messages: Sequence[Message], tokenizer: ChatTokenizer) -> list[int]:
    lines = [f"{message.role.capitalize()}: {message.content}" for message in messages]
    prompt = tokenizer.encode("\n".join([*lines, "Assistant:"]), add_special_tokens=False)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*start, *prompt]


def _plain_text(example: Example, tokenizer: ChatTokenizer) -> tuple[list[int], list[int]]:
    end = _end(tokenizer)
    start = end if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start, [*tokenizer.encode(example.answer, add_special_tokens=False), *end]


def _end(tokenizer: ChatTokenizer) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "base.model: expected a tokenizer with an eos token, got one without, so that a "
            "model could not learn to stop; name another model"
        )
    return [tokenizer.eos_token_id]
