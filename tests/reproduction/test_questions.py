"""Questions with a reference answer, from WordNet and from the user's own file."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from gradualdiff.reproduction.questions import Question, read_examples, write_examples
from gradualdiff.reproduction.wordnet import (
    FIELDS,
    definition,
    load_questions,
    read_synsets,
    read_wordnet,
)
from shared.errors import DataError

FIXTURE = Path(__file__).parent / "wordnet"


def test_nouns_become_questions():
    """First word of the synset, most common sense, names and odd lengths left out."""
    found = read_wordnet(FIXTURE)
    assert found.questions == (
        Question(
            "What is lynx?",
            "short-tailed wildcats with usually tufted ears; valued for their fur",
            "noun.animal",
        ),
        Question("What is apple pie?", "pie made of apples under a crust", "noun.food"),
        Question("What is bank?", "sloping land beside a body of water", "noun.object"),
        Question("What is u-turn?", "a turn in the shape of the letter", "noun.shape"),
        Question(
            "What is thing?",
            'a separate and self-contained entity; that "one" knows',
            "noun.Tops",
        ),
    )
    assert (found.name, found.dropped) == ("WordNet", 6)


def test_a_synset_is_read_field_by_field():
    """Hexadecimal word counts, pointers, the instance mark among them."""
    synsets = {s.offset: s for s in read_synsets(FIXTURE / "data.noun")}
    assert synsets["00000200"].words == ("apple_pie", "pie")
    assert len(synsets["00000600"].words) == 10
    assert [s.offset for s in synsets.values() if s.instance] == ["00000500", "00001100"]


def test_the_fields_are_those_of_lexnames():
    """26 files of nouns, 03 noun.Tops to 28 noun.time."""
    assert (FIELDS[3], FIELDS[5], FIELDS[13], FIELDS[28]) == (
        "noun.Tops",
        "noun.animal",
        "noun.food",
        "noun.time",
    )
    assert sorted(FIELDS) == list(range(3, 29))


@pytest.mark.parametrize(
    ("gloss", "told"),
    [
        ("a thing", "a thing"),
        ('a thing; "see a thing"', "a thing"),
        ('one; two; "three; four"; "five"', "one; two"),
        ('"only an example"', ""),
        ('a thing;  "with two spaces"- Shakespeare', "a thing"),
    ],
)
def test_examples_are_no_part_of_a_definition(gloss, told):
    """Quoted sentences go, however many definitions stand before them."""
    assert definition(gloss) == told


def test_debians_files_are_read():
    """The real database: `make test-servers` installs it, so that nothing is skipped here."""
    found = load_questions()
    assert len(found.questions) > 40_000
    assert found == load_questions(Path("/usr/share/wordnet"))
    labels = Counter(q.label for q in found.questions)
    assert len(labels) == 26
    assert labels["noun.artifact"] > labels["noun.food"] > 1000
    said = {q.prompt: q for q in found.questions}
    assert said["What is cat?"].label == "noun.animal"
    assert "sloping land" in said["What is bank?"].answer
    assert "What is paris?" not in said
    assert len({q.key for q in found.questions}) == len(found.questions)
    assert len({q.answer for q in found.questions}) == len(found.questions)
    assert not [q for q in found.questions if '; "' in q.answer or "_" in q.prompt]
    version = "69bd18e0f7a7ec98424209f3cc911db5ccdd14a31152d1715e3935ceac8b53dd"  # 3.0
    assert found.digest == version


def test_the_folder_of_version_3_1_is_found(tmp_path):
    """Its archive holds dict/."""
    shutil.copytree(FIXTURE, tmp_path / "dict")
    assert load_questions(tmp_path) == read_wordnet(FIXTURE)


def test_missing_files_say_where_they_come_from(tmp_path):
    """Of either file: the package, and what to do without it."""
    (tmp_path / "data.noun").write_text("")
    with pytest.raises(DataError, match=r"index\.noun: .*apt-get install wordnet-base.*--data"):
        load_questions(tmp_path)
    with pytest.raises(DataError, match="apt-get install wordnet-base"):
        read_wordnet(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "line",
    [
        "00000100 05 n 01 lynx 0 001 @ 00000900 n 0000",  # no gloss
        "00000100 05 n 02 lynx 0 001 @ 00000900 n 0000 | a cat",  # a word short
        "00000100 05 n 01 lynx 0 003 @ 00000900 n 0000 | a cat",  # pointers short
        "00000100 29 v 01 run 0 000 | a verb's file",
        "nonsense",
    ],
)
def test_another_file_is_named_by_its_line(tmp_path, line):
    """A torn or foreign line is never half a synset."""
    shutil.copytree(FIXTURE, tmp_path / "wn")
    with (tmp_path / "wn" / "data.noun").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="line 14: expected a noun"):
        read_wordnet(tmp_path / "wn")


def test_an_index_of_another_kind_is_named(tmp_path):
    """The senses are not guessed."""
    shutil.copytree(FIXTURE, tmp_path / "wn")
    (tmp_path / "wn" / "index.noun").write_text("word n x\n")
    with pytest.raises(DataError, match=r"index\.noun: line 1"):
        read_wordnet(tmp_path / "wn")


def write(path: Path, rows: list[dict]) -> Path:
    """JSONL, or CSV by its suffix."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_an_own_file_brings_labels_and_groups(tmp_path, suffix):
    """Columns of those names need no option; numbers are labels too."""
    rows = [
        {"prompt": "who?", "answer": " me ", "label": 1, "group": "g"},
        {"prompt": "why?", "answer": "", "label": 2, "group": "g"},
    ]
    found = read_examples(write(tmp_path / f"own.{suffix}", rows))
    assert found.questions == (Question("who?", "me", "1", "g"),)
    assert found.dropped == 1


def test_own_columns_may_be_named(tmp_path):
    """Parquet goes by the same code as a site's text."""
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "own.parquet"
    parquet.write_table(pa.table({"q": ["who?"], "a": ["me"], "topic": ["x"]}), path)
    found = read_examples(path, prompt="q", answer="a", label="topic")
    assert found.questions == (Question("who?", "me", "x"),)
    with pytest.raises(DataError, match="label = 'nothing'"):
        read_examples(path, prompt="q", answer="a", label="nothing")


def test_the_papers_data_set_is_read_as_it_comes(tmp_path):
    """One text column with both sides in it; a row of another form has no answer."""
    rows = [
        {"text": "<HUMAN>: What is a panic attack?\n<ASSISTANT>: A sudden fear.\nIt passes."},
        {"text": "no marks"},
    ]
    found = read_examples(write(tmp_path / "paper.jsonl", rows))
    assert found.questions == (Question("What is a panic attack?", "A sudden fear.\nIt passes."),)
    assert found.dropped == 1


@pytest.mark.parametrize(
    "row", [{"prompt": "who?"}, {"prompt": "who?", "answer": " "}, {"text": "no marks"}]
)
def test_a_data_set_without_answers_is_refused(tmp_path, row):
    """The rule is named: there would be nothing to compare with."""
    with pytest.raises(DataError, match="perplexity and BLEU need an answer"):
        read_examples(write(tmp_path / "own.jsonl", [row]))


def test_a_file_with_neither_column_is_refused(tmp_path):
    """Not as a data set without answers, which would be another mistake."""
    with pytest.raises(DataError, match="expected the columns 'prompt' and 'answer', got said"):
        read_examples(write(tmp_path / "own.jsonl", [{"said": "x"}]))


def test_what_is_written_is_what_a_site_reads(tmp_path):
    """Back through the same reader, byte for byte the same digest."""
    questions = read_wordnet(FIXTURE).questions
    write_examples(tmp_path / "sites" / "a.jsonl", questions)
    back = read_examples(tmp_path / "sites" / "a.jsonl").questions
    assert [(q.prompt, q.answer) for q in back] == [(q.prompt, q.answer) for q in questions]


@pytest.mark.parametrize("other", ["what is  a CAT?", "What is a cat", " “What is a cat”!"])
def test_one_question_in_other_letters_is_one_question(other):
    """Case, space and final punctuation do not count; other characters do."""
    assert (Question(other, "x").key == Question("What is a cat?", "y").key) is ("“" not in other)
