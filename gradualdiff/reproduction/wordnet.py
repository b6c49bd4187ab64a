"""WordNet's nouns as questions: "What is lynx?" and its gloss, labelled by lexical field.

The files are those of wndb(5WN), WordNet 3.0 or 3.1: ``data.noun`` has the synsets, ``index.noun``
each word's senses, most common first. Debian's package ``wordnet-base`` brings them; they are a few
dictionaries' worth of short definitions, each a real reference answer, in 26 fields (noun.animal,
noun.food, ...) that make a natural non-IID partition.
"""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gradualdiff.reproduction.questions import Question, QuestionSet, read_examples
from shared.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

DEBIAN = Path("/usr/share/wordnet")
INSTALL = (
    "apt-get install wordnet-base; on other systems unpack the database files of WordNet 3.0 or "
    "3.1 and give --data FOLDER"
)
# Characters of a definition. Shorter ones are near synonyms, longer ones encyclopaedic.
SHORTEST, LONGEST = 20, 120
# lexnames(5WN): the lexicographer files of nouns, numbered from 3. Debian ships no such file.
_NOUNS = """
    Tops act animal artifact attribute body cognition communication event feeling food group
    location motive object person phenomenon plant possession process quantity relation shape state
    substance time
"""
FIELDS = {number: f"noun.{name}" for number, name in enumerate(_NOUNS.split(), start=3)}
_WORD = re.compile(r"[a-z][a-z '-]*")
_INSTANCE = "@i"  # pointer to what a named thing is one of: Paris, Plato


class Synset(NamedTuple):
    """One line of data.noun. ``offset`` names it; ``instance``: one named thing, not a kind."""

    offset: str
    field: str
    words: tuple[str, ...]
    instance: bool
    gloss: str


def load_questions(data: Path | None = None) -> QuestionSet:
    """The questions of ``data``: a folder of WordNet's files or a user's own file; None: Debian's.

    Raises DataError as :func:`read_wordnet` and
    :func:`gradualdiff.reproduction.questions.read_examples` do.
    """
    if data is None:
        return read_wordnet(DEBIAN)
    for folder in (data, data / "dict"):
        if (folder / "data.noun").exists():
            return read_wordnet(folder)
    return read_examples(data)


def read_wordnet(folder: Path = DEBIAN) -> QuestionSet:
    """One question for each noun whose most common sense is a synset that it comes first in.

    In the order of data.noun, so the same files give the same questions. Left out: named things
    (instances, and words with a capital letter, which are names and Latin taxa), words with digits
    or dots, definitions outside of 20 to 120 characters, and a definition that an earlier word
    has: no answer belongs to two questions. Raises DataError for files that are missing,
    unreadable or not of the format.
    """
    common = _most_common_senses(folder / "index.noun")
    questions: list[Question] = []
    answers: set[str] = set()
    total = 0
    for synset in read_synsets(folder / "data.noun"):
        total += 1
        word = synset.words[0].replace("_", " ")
        answer = definition(synset.gloss)
        if (
            not synset.instance
            and _WORD.fullmatch(word)
            and common.get(synset.words[0]) == synset.offset
            and SHORTEST <= len(answer) <= LONGEST
            and answer not in answers
        ):
            answers.add(answer)
            questions.append(Question(f"What is {word}?", answer, synset.field))
    if not questions:
        raise DataError(
            f"{folder / 'data.noun'}: expected nouns with a definition of {SHORTEST} to {LONGEST} "
            f"characters, got none in {total} synsets; {INSTALL}"
        )
    return QuestionSet("WordNet", tuple(questions), total - len(questions))


def read_synsets(path: Path) -> Iterator[Synset]:
    """Every synset of a data.noun. Raises DataError, which names the line."""
    for number, line in _lines(path):
        try:
            yield _synset(line)
        except (ValueError, IndexError, KeyError):
            raise _not_wndb(path, number) from None


def definition(gloss: str) -> str:
    """The gloss without its examples: all definitions before the first quoted sentence."""
    parts = re.split(r""";\s+|:\s+(?=")""", gloss.strip())
    return "; ".join(takewhile(lambda part: not part.startswith('"'), parts)).strip(" ;:")


def _synset(line: str) -> Synset:
    """``offset lex_filenum ss_type w_cnt word lex_id ... p_cnt ptr ... | gloss``."""
    head, bar, gloss = line.partition("|")
    cells = head.split()
    count = int(cells[3], 16)
    pointers = 4 + 2 * count
    length = int(cells[pointers])
    if not bar or count < 1 or len(cells) != pointers + 1 + 4 * length:
        raise ValueError
    return Synset(
        offset=cells[0],
        field=FIELDS[int(cells[1])],
        words=tuple(cells[4:pointers:2]),
        instance=_INSTANCE in cells[pointers + 1 :: 4],
        gloss=gloss.strip(),
    )


def _most_common_senses(path: Path) -> dict[str, str]:
    """Word -> offset of its first sense, from ``lemma pos n p_cnt ptr ... n tagged offset ...``."""
    found: dict[str, str] = {}
    for number, line in _lines(path):
        cells = line.split()
        try:
            found[cells[0]] = cells[6 + int(cells[3])]
        except (ValueError, IndexError):
            raise _not_wndb(path, number) from None
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without the licence, whose lines begin with two spaces."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.startswith("  ") and line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(
            f"{path}: expected WordNet's database, got nothing there; {INSTALL}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected WordNet's database, got {type(error).__name__}; {INSTALL}"
        ) from None


def _not_wndb(path: Path, number: int) -> DataError:
    return DataError(
        f"{path}: line {number}: expected a noun as wndb(5WN) has it, got another line; {INSTALL}"
    )
