"""The text of a reproduction as files."""

import json

import pytest

from gradualdiff.reproduction.data import Source
from gradualdiff.reproduction.presets import ReproduceSection
from shared.errors import ConfigError, DataError


def section(**values):
    return ReproduceSection(learning_rates=(1e-3,), batch_sizes=(2,), **values)


def text(folder, count=40, labels=3):
    file = folder / "mine.jsonl"
    rows = (
        {"prompt": f"What is {n}?", "answer": f"{n}", "label": f"l{n % labels}"}
        for n in range(count)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_files_of_a_source(tmp_path):
    """Each training question is with one participant, and none of dev or test with any."""
    source = Source.prepare(section(participants=3), text(tmp_path), tmp_path / "data")
    folder = source.folder(1)
    lines = {path.stem: path.read_text().splitlines() for path in folder.iterdir()}
    parts = [line for name, side in lines.items() if name.startswith("site-") for line in side]
    assert sorted(parts) == sorted(lines["train"]) == sorted(lines["central"])
    assert not set(lines["train"]) & set(lines["test"] + lines["dev"])
    assert [len(lines[name]) for name in ("train", "dev", "test")] == [28, 4, 8]
    assert source.folder(2) != folder
    assert source.folder(1, 0.1) == tmp_path / "data" / "seed-1-alpha-0.1"


def test_the_table_says_sizes_and_distances(tmp_path):
    source = Source.prepare(section(participants=2), text(tmp_path), tmp_path / "data")
    (table,) = source.tables([1, 2])
    assert [row[1] for row in table.rows] == ["1", "2", "distance"] * 2
    assert "train 28, dev 4, test 8" in table.note


def test_wordnet_is_drawn_by_field(tmp_path):
    """From Debian's files, which `make test-servers` installs."""
    chosen = section(
        examples=60, fields=("noun.animal", "noun.food"), partition="by-label", participants=2
    )
    source = Source.prepare(chosen, None, tmp_path)
    labels = {q.label for part in source.dealt(1).parts for q in part}
    assert labels == {"noun.animal", "noun.food"}
    assert source.distance(1) > 0.5


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"examples": 50}, "a subset of 50 questions"),
        ({"participants": 20}, "at least 2 questions"),
        ({"partition": "by-group"}, "expected a group with every question"),
    ],
)
def test_text_that_does_not_do(tmp_path, values, says):
    with pytest.raises(DataError, match=says):
        Source.prepare(section(**values), text(tmp_path), tmp_path / "data")


def test_labels_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="expected labels of these questions, got x"):
        Source.prepare(section(examples=9, fields=("x",)), text(tmp_path), tmp_path / "data")
