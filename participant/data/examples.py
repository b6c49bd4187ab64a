"""Rows to examples: who said what, and which part is to be learnt.

Three shapes, one result. A row that cannot be learnt from is counted by reason, never raised: one
blank cell among thousands is no reason to stay out of a run.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from shared.config import canonical_json
from shared.errors import DataError

if TYPE_CHECKING:
    from participant.data.reading import Row, Table
    from shared.config import DataSection


class Unusable(StrEnum):
    """Why a row is dropped."""

    NOT_TEXT = "a cell that is not text"
    BLANK = "a blank prompt or answer"
    NO_ANSWER = "no assistant message after a prompt"
    NO_GROUP = "no value in the group column"
    REFUSED = "roles the chat template refuses"
    NO_TOKENS = "an answer without tokens"
    HELD_OUT = "a copy of a held-out example"


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """What is given (``prompt``) and what is to be learnt (``answer``).

    ``prompt`` is empty for plain text. ``digest`` is the same for two examples that differ only
    in case, width or white space. ``group`` is the digest where no group column is named.
    """

    prompt: tuple[Message, ...]
    answer: str
    group: str
    digest: str


def map_rows(table: Table, config: DataSection) -> tuple[list[Example], list[Unusable]]:
    """Every row as an example, or the reason why it is none.

    Raises DataError where a column that the config names is not there, and for chat messages in
    CSV, where a cell holds no list.
    """
    if config.messages is not None and table.kind == "csv":
        raise DataError(
            f"{table.path}: data.messages: expected jsonl, parquet or datasets, got csv, whose "
            "cells hold no lists; give prompt and answer columns or another format"
        )
    wanted = columns_of(config)
    table.require({f"data.{setting}": column for setting, column in wanted.items()})
    examples: list[Example] = []
    dropped: list[Unusable] = []
    for row in table.rows:
        mapped = _map_row(row, wanted)
        if isinstance(mapped, Example):
            examples.append(mapped)
        else:
            dropped.append(mapped)
    return examples, dropped


def columns_of(config: DataSection) -> dict[str, str]:
    """The columns that the config names: setting -> column."""
    settings = ("messages", "prompt", "answer", "text", "group")
    named = {setting: getattr(config, setting) for setting in settings}
    return {setting: column for setting, column in named.items() if column is not None}


def _map_row(row: Row, wanted: dict[str, str]) -> Example | Unusable:
    cells = {setting: row.get(column) for setting, column in wanted.items()}
    if "messages" in wanted:
        said = _from_messages(cells["messages"])
    elif "prompt" in wanted:
        said = _from_pair(cells["prompt"], cells["answer"])
    else:
        said = _from_text(cells["text"])
    if isinstance(said, Unusable):
        return said
    prompt, answer = said
    digest = _digest(prompt, answer)
    if "group" not in wanted:
        return Example(prompt, answer, digest, digest)
    value = cells["group"]
    # 1 and "1" are one group: the same table may reach a site as CSV or as Parquet.
    group = str(value) if isinstance(value, int) else _text(value)
    if group is None or not group.strip():
        return Unusable.NO_GROUP
    return Example(prompt, answer, group, digest)


def _from_messages(cell: object) -> tuple[tuple[Message, ...], str] | Unusable:
    if not isinstance(cell, list):
        return Unusable.NOT_TEXT
    messages: list[Message] = []
    for item in cell:
        if not isinstance(item, dict):
            return Unusable.NOT_TEXT
        role, content = _text(item.get("role")), _text(item.get("content"))
        if role is None or content is None:
            return Unusable.NOT_TEXT
        messages.append(Message(role, content.strip()))
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answers or answers[-1] == 0:
        return Unusable.NO_ANSWER
    prompt, answer = tuple(messages[: answers[-1]]), messages[answers[-1]].content
    if not answer or not any(message.content for message in prompt):
        return Unusable.BLANK
    return prompt, answer


def _from_pair(asked: object, said: object) -> tuple[tuple[Message, ...], str] | Unusable:
    pair = text_pair(asked, said)
    return pair if isinstance(pair, Unusable) else ((Message("user", pair[0]),), pair[1])


def text_pair(asked: object, said: object) -> tuple[str, str] | Unusable:
    """Two cells as prompt and answer, or the reason why they are none."""
    prompt, answer = _text(asked), _text(said)
    if prompt is None or answer is None:
        return Unusable.NOT_TEXT
    # Outer white space goes: templates trim it anyway, and a stray line break would be learnt.
    prompt, answer = prompt.strip(), answer.strip()
    return (prompt, answer) if prompt and answer else Unusable.BLANK


def _from_text(cell: object) -> tuple[tuple[Message, ...], str] | Unusable:
    text = _text(cell)
    if text is None:
        return Unusable.NOT_TEXT
    return ((), text) if text.strip() else Unusable.BLANK


def _text(cell: object) -> str | None:
    # JSON can spell half a surrogate pair, which no tokenizer takes and no UTF-8 file can hold.
    if not isinstance(cell, str) or any("\ud800" <= character <= "\udfff" for character in cell):
        return None
    return cell


def _digest(prompt: tuple[Message, ...], answer: str) -> str:
    parts = [part for message in prompt for part in message]
    return hashlib.sha256(
        canonical_json([normalised(part) for part in (*parts, answer)])
    ).hexdigest()


def normalised(text: str) -> str:
    """``text`` without what does not tell two texts apart: letter case, width, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
