"""Where questions and answers come from: WordNet's glosses, or a file of one's own.

WordNet's database files are documented in wndb(5WN). A line of ``data.noun`` begins with offset,
lexicographer file number, part of speech, number of words (two hex digits) and words with their
lexical ids; pointers follow; the gloss stands behind `` | ``: definitions, then examples in quotes.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DEBIAN = Path("/usr/share/wordnet")
# Definitions of other lengths are fragments, or would be cut.
SHORTEST, LONGEST = 20, 120
_INSTANCE = "@i"  # pointer of a proper name to what it is an instance of
# lexnames(5WN): the lexicographer files of nouns.
FIELDS = {
    3: "noun.Tops",
    4: "noun.act",
    5: "noun.animal",
    6: "noun.artifact",
    7: "noun.attribute",
    8: "noun.body",
    9: "noun.cognition",
    10: "noun.communication",
    11: "noun.event",
    12: "noun.feeling",
    13: "noun.food",
    14: "noun.group",
    15: "noun.location",
    16: "noun.motive",
    17: "noun.object",
    18: "noun.person",
    19: "noun.phenomenon",
    20: "noun.plant",
    21: "noun.possession",
    22: "noun.process",
    23: "noun.quantity",
    24: "noun.relation",
    25: "noun.shape",
    26: "noun.state",
    27: "noun.substance",
    28: "noun.time",
}


@dataclass(frozen=True)
class Question:
    """A prompt with its reference answer. ``label``: what ``by-label`` and ``dirichlet`` go by.

    ``group``: what ``by-group`` goes by; empty where the text has none.
    """

    prompt: str
    answer: str
    label: str = ""
    group: str = ""

    @property
    def key(self) -> str:
        """The prompt without case, width and extra white space: one question, one side."""
        return " ".join(unicodedata.normalize("NFKC", self.prompt).casefold().split())


def read_questions(source: Path | None) -> list[Question]:
    """WordNet's glosses from Debian's or the named folder, or a file; each question once.

    Raises DataError where there is nothing to read or no answers.
    """
    found: dict[str, Question] = {}
    folder = source or DEBIAN
    everything = _wordnet(folder) if source is None or _is_wordnet(folder) else _own(folder)
    for question in everything:
        found.setdefault(question.key, question)
    return list(found.values())


def _is_wordnet(folder: Path) -> bool:
    return folder.is_dir() and (folder / "data.noun").exists()


def _wordnet(folder: Path) -> Iterator[Question]:
    path = folder / "data.noun"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected WordNet's nouns, cannot read them ({error}); run: apt-get install "
            "wordnet-base, or name the folder of WordNet's database files, or a file, with --data"
        ) from None
    for number, line in enumerate(lines, start=1):
        if line.startswith("  "):  # the licence
            continue
        try:
            question = _gloss(line)
        except (ValueError, IndexError, KeyError):
            raise DataError(
                f"{path}: line {number}: expected a synset as wndb(5WN) has it; "
                "name the folder of an unchanged WordNet 3.0 or 3.1"
            ) from None
        if question is not None:
            yield question


def _gloss(line: str) -> Question | None:
    head, _, gloss = line.partition(" | ")
    parts = head.split()
    label, words = FIELDS[int(parts[1])], int(parts[3], 16)
    pointers = parts[4 + 2 * words :]
    lemma = parts[4].replace("_", " ")
    definition = gloss.split(";")[0].strip()
    fits = SHORTEST <= len(definition) <= LONGEST and not definition.startswith('"')
    if _INSTANCE in pointers or not lemma[0].islower() or not fits:
        return None
    return Question(f"What is {_article(lemma)}{lemma}?", definition, label)


def _article(lemma: str) -> str:
    return "an " if lemma[0] in "aeiou" else "a "


def _own(path: Path) -> Iterator[Question]:
    from participant.data.reading import read_table

    table = read_table(path, "auto")
    missing = sorted({"prompt", "answer"} - set(table.columns))
    if missing:
        raise DataError(
            f"{path}: expected the columns prompt and answer, found no {missing[0]}: replies are "
            "scored against reference answers, so a text without them cannot be used"
        )
    for row in table.rows:
        texts = {name: _cell(row.get(name)) for name in ("prompt", "answer", "label", "group")}
        if texts["prompt"] and texts["answer"]:
            yield Question(**texts)


def _cell(value: object) -> str:
    return str(value).strip() if isinstance(value, str | int) else ""


def labels_of(questions: Iterable[Question]) -> list[str]:
    """Every label, sorted."""
    return sorted({question.label for question in questions})
