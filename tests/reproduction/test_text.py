"""Questions, sides and shards: by hand, and as properties."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.reproduction.data import Source
from cli.reproduction.partition import deal, distance, draw, split
from cli.reproduction.presets import ReproduceSection
from cli.reproduction.questions import DEBIAN, Question, read_questions
from shared.errors import ConfigError, DataError

# Two synsets and a proper name in the format of wndb(5WN), made up.
NOUNS = """  1 a licence stands here
00000001 05 n 02 marsh_cat 0 bog_cat 0 001 @ 00000009 n 0000 | a cat that lives in marshes; "mew"
00000002 13 n 01 oat_pie 0 000 | a pie of oats and apples, eaten cold
00000003 18 n 01 Ada_Example 0 001 @i 00000009 n 0000 | a person who was made up for this file
00000004 06 n 01 ink 0 000 | too short
"""


def questions(count, labels=3):
    return [
        Question(f"What is thing {n}?", f"a thing of number {n}", f"l{n % labels}", f"g{n % 4}")
        for n in range(count)
    ]


def section(**values):
    return ReproduceSection(learning_rates=(1e-3,), batch_sizes=(2,), **values)


def test_wordnet_becomes_questions(tmp_path):
    (tmp_path / "data.noun").write_text(NOUNS)
    assert read_questions(tmp_path) == [
        Question("What is a marsh cat?", "a cat that lives in marshes", "noun.animal"),
        Question("What is an oat pie?", "a pie of oats and apples, eaten cold", "noun.food"),
    ]


def test_debians_wordnet_has_thousands():
    found = read_questions(None)
    assert len(found) > 30_000, f"install wordnet-base: {DEBIAN}"
    assert {"noun.animal", "noun.food", "noun.plant"} <= {one.label for one in found}
    assert len({one.key for one in found}) == len(found)


def test_without_wordnet_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("cli.reproduction.questions.DEBIAN", tmp_path / "none")
    with pytest.raises(DataError, match="apt-get install wordnet-base, or name the folder"):
        read_questions(None)


def test_a_file_that_is_no_wordnet(tmp_path):
    (tmp_path / "data.noun").write_text("00000001 zz n\n")
    with pytest.raises(DataError, match="line 1: expected a synset"):
        read_questions(tmp_path)


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("prompt,answer,label\nWho?,me,a\nwho?,again,a\nWhy?,because,b\n,nothing,b\n")
    assert read_questions(file) == [
        Question("Who?", "me", "a"),
        Question("Why?", "because", "b"),
    ]


def test_text_without_answers_is_refused(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Who?", "text": "me"}\n')
    with pytest.raises(DataError, match="found no answer: replies are scored against reference"):
        read_questions(file)


def test_too_few_questions_name_the_rule():
    with pytest.raises(DataError, match="expected at least 15 questions, got 12: 70 % are trained"):
        split(questions(12), 1, 10)
    with pytest.raises(DataError, match="at least 50 questions, got 20"):
        draw(questions(20), section(examples=50))
    with pytest.raises(DataError, match=r"reproduce\.fields: expected some of l0, l1, l2, got 'x'"):
        draw(questions(20), section(fields=("x",)))


def test_policies_need_their_column():
    bare = [Question(f"{n}?", "a") for n in range(10)]
    for policy in ("by-label", "by-group"):
        with pytest.raises(ConfigError, match="or use partition = "):
            deal(bare, section(partition=policy), 1)


@given(st.integers(0, 2**63 - 1), st.permutations(range(40)))
def test_sides_are_disjoint_and_go_by_seed_alone(seed, order):
    text = questions(40)
    sides = split(text, seed, 5)
    assert [len(side) for side in sides] == [28, 4, 8]
    assert sorted(one.key for side in sides for one in side) == sorted(one.key for one in text)
    assert split([text[n] for n in order], seed, 5) == sides


@pytest.mark.parametrize(
    "settings",
    [
        {"partition": "iid"},
        {"partition": "dirichlet", "alpha": 0.05},
        {"partition": "dirichlet", "alpha": 100.0},
        {"partition": "by-label"},
        {"partition": "by-group"},
    ],
)
@given(seed=st.integers(0, 2**63 - 1))
def test_every_question_has_one_participant(settings, seed):
    text = questions(60)
    shards = deal(text, section(participants=4, **settings), seed)
    assert sorted(one.key for shard in shards for one in shard) == sorted(one.key for one in text)
    assert min(len(shard) for shard in shards) >= 2  # a batch
    assert deal(text, section(participants=4, **settings), seed) == shards


def test_by_label_keeps_labels_whole():
    shards = deal(questions(60), section(participants=3, partition="by-label"), 1)
    assert sorted(len({one.label for one in shard}) for shard in shards) == [1, 1, 1]


def test_distances_by_hand():
    assert distance(["ab", "ab"]) == 0.0
    assert distance(["ab", "cd"]) == 1.0
    assert distance(["a", "b", "c"]) == pytest.approx(1.0)
    # P = (1, 0), Q = (1/2, 1/2), M = (3/4, 1/4): H(M) - H(Q) / 2
    middle = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert distance(["aa", "ab"]) == pytest.approx(math.sqrt(middle - 0.5))
    assert distance(["aabb", "ab"]) == 0.0


def test_smaller_alpha_is_farther_from_iid():
    text = questions(300, labels=5)
    found = []
    for alpha in (0.1, 1.0, 100.0):
        shards = deal(text, section(participants=5), 1, alpha)
        found.append(distance([[one.label for one in shard] for shard in shards]))
    assert found == sorted(found, reverse=True)


def test_files_of_a_source(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        "".join(
            f'{{"prompt": "What is {n}?", "answer": "number {n}", "label": "l"}}\n'
            for n in range(40)
        )
    )
    source = Source.prepare(section(participants=3), file, tmp_path / "data")
    folder = source.folder(1)
    lines = {path.stem: path.read_text().splitlines() for path in folder.iterdir()}
    shards = [line for name, side in lines.items() if name.startswith("site-") for line in side]
    assert sorted(shards) == sorted(lines["train"]) == sorted(lines["central"])
    assert not set(lines["train"]) & set(lines["test"] + lines["dev"])
    assert source.folder(2) != folder
    assert source.folder(1, 0.1) == Path(tmp_path / "data" / "seed-1-alpha-0.1")
    assert source.tables([1, 2])[0].rows[0][:2] == ("train", "28")
