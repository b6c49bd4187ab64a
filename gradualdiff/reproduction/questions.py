"""Questions with a reference answer: what every arm of a comparison is trained and measured on.

From the user's own file here, from WordNet in ``gradualdiff.reproduction.wordnet``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradualdiff.demo.data import write_rows
from participant.data.examples import Unusable, normalised, text_pair
from participant.data.reading import read_table, shown_columns
from shared.config import canonical_json
from shared.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from participant.data.reading import Row, Table

# The paper's data set holds both sides of a talk in one column, behind these marks.
_MARKED = re.compile(r"\s*<HUMAN>:\s*(.*?)\s*<ASSISTANT>:\s*(.*)", re.DOTALL)
_MARKED_COLUMN = "text"


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its reference answer; ``label`` and ``group`` are None where unknown."""

    prompt: str
    answer: str
    label: str | None = None
    group: str | None = None

    @property
    def key(self) -> str:
        """The question normalised: two with one key are one question.

        Letter case, width, white space and punctuation at the ends do not count.
        """
        plain = normalised(self.prompt)
        return plain.strip(" ?!.,:;\"'()[]") or plain


@dataclass(frozen=True)
class QuestionSet:
    """All questions of one source. ``dropped`` rows held no question or no answer."""

    name: str
    questions: tuple[Question, ...]
    dropped: int = 0

    @property
    def digest(self) -> str:
        """sha256 of all questions in their order: two runs with one digest had the same data."""
        return digest_of(self.questions)


def digest_of(questions: Iterable[Question]) -> str:
    """sha256 of the questions' canonical JSON, a line each."""
    whole = hashlib.sha256()
    for q in questions:
        whole.update(canonical_json([q.prompt, q.answer, q.label, q.group]) + b"\n")
    return whole.hexdigest()


def read_examples(
    path: Path,
    prompt: str = "prompt",
    answer: str = "answer",
    label: str | None = None,
    group: str | None = None,
) -> QuestionSet:
    """A user's own questions: JSONL, CSV, Parquet or a ``datasets`` folder.

    ``prompt``, ``answer``, ``label`` and ``group`` are columns' names; columns called ``label`` and
    ``group`` are taken without being named. A ``text`` column with ``<HUMAN>:`` and
    ``<ASSISTANT>:`` in it (the paper's data set) is read as such where there is no prompt column.
    Raises DataError for a file that cannot be read, a column that is not there, and where no row
    has both a question and a reference answer; MissingPackageError where the format needs one.
    """
    table = read_table(path, "auto")
    rows: Iterable[Row] = table.rows
    if prompt not in table.columns and _MARKED_COLUMN in table.columns:
        rows = [_unmarked(row, prompt, answer) for row in table.rows]
    else:
        _require_columns(table, prompt, answer)
    named = {name: column for name, column in (("label", label), ("group", group)) if column}
    table.require(named)
    label, group = (
        named.get(name, name if name in table.columns else None) for name in ("label", "group")
    )
    questions: list[Question] = []
    for row in rows:
        said = text_pair(row.get(prompt), row.get(answer))
        if not isinstance(said, Unusable):
            questions.append(Question(*said, _value(row, label), _value(row, group)))
    if not questions:
        raise DataError(
            f"{path}: expected rows with a question and a reference answer, got none of "
            f"{len(table.rows)}; perplexity and BLEU need an answer to compare with: fill the "
            f"columns {prompt!r} and {answer!r}"
        )
    return QuestionSet(path.name, tuple(questions), len(table.rows) - len(questions))


def write_examples(path: Path, questions: Sequence[Question]) -> None:
    """One JSON object a line, with the columns ``prompt`` and ``answer``; whole or not at all."""
    write_rows(path, ({"prompt": q.prompt, "answer": q.answer} for q in questions))


def _require_columns(table: Table, prompt: str, answer: str) -> None:
    if prompt in table.columns and answer not in table.columns:
        raise DataError(
            f"{table.path}: expected a column {answer!r} of reference answers, got "
            f"{shown_columns(table.columns)}; perplexity and BLEU need an answer to compare with: "
            f"add the column, or rename the one that holds it to {answer!r}"
        )
    if prompt not in table.columns:
        raise DataError(
            f"{table.path}: expected the columns {prompt!r} and {answer!r}, got "
            f"{shown_columns(table.columns)}; rename those of questions and answers"
        )


def _unmarked(row: Row, prompt: str, answer: str) -> Row:
    cell = row.get(_MARKED_COLUMN)
    found = _MARKED.fullmatch(cell) if isinstance(cell, str) else None
    return {**row, prompt: found[1], answer: found[2]} if found else row


def _value(row: Row, column: str | None) -> str | None:
    """A label as text: 1 and "1" are one, as the same table may come as CSV or Parquet."""
    value = row.get(column) if column else None
    if value is None or isinstance(value, list | dict):
        return None
    return str(value).strip() or None
