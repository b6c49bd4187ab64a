"""One file a participant: no conversation at two, the same bytes again, no text in an error."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradualdiff.demo.data import SiteFile, prepare_chitchat, split_own_data
from gradualdiff.demo.packages import CHITCHAT, find_packaged
from shared.config import DataSection
from shared.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Stands for text that may appear in no message.
PRIVATE = "zanzibar"


def turn(sender: str, *texts: str) -> list[dict[str, str]]:
    return [{"sender": sender, "text": text, "timestamp": "0"} for text in texts]


def line(sender: str, n: int) -> list[dict[str, str]]:
    return turn(sender, f"a line by {sender}", f"number {n:04}")


def talk(first: str, second: str, replies: int) -> dict[str, Any]:
    """A conversation in which ``second`` replies that often, and ``first`` once less."""
    turns = [t for n in range(replies) for t in (line(first, n), line(second, n))]
    return {"messages": turns, "start": "0"}


def write_chitchat(path: Path, conversations: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({f"talk-{i}": c for i, c in enumerate(conversations)}))
    return path


def rows_of(file: SiteFile) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.path.read_text().splitlines()]


# Conversations by person


def test_a_pair_is_anothers_turn_and_the_persons_reply(tmp_path: Path) -> None:
    """Messages sent in a row are one turn; nobody answers himself; lengths are 15 to 200."""
    said = [
        turn("ann", "this is a long", "enough turn"),
        turn("bob", "and this is its reply"),
        turn("ann", "too short"),
        turn("bob", "a reply to what was too short"),
        turn("bob", "a reply to my own words here"),
        turn("ann", "l" * 201),
        turn("bob", "a reply to what was too long"),
    ]
    again = {"messages": [line("ann", 1), line("bob", 1)]}
    source = write_chitchat(tmp_path / "d.json", [{"messages": said}, again])
    (site,) = prepare_chitchat(source, tmp_path / "out", 1, None)
    assert rows_of(site)[0] == {
        "prompt": "this is a long enough turn",
        "answer": "and this is its reply",
        "conversation": "talk-0",
    }
    assert (site.name, site.pairs, site.conversations) == ("site-1", 2, 2)
    DataSection.model_validate({"path": site.path.name, **site.columns})


def test_two_chosen_people_share_no_conversation(tmp_path: Path) -> None:
    """It goes, whole, to the one with fewer pairs: one's prompts are the other's replies."""
    alone = [talk("x", "ann", 3), talk("x", "ann", 3), talk("y", "bob", 2), talk("y", "bob", 2)]
    source = write_chitchat(tmp_path / "d.json", [*alone, talk("ann", "bob", 2)])
    first, second = prepare_chitchat(source, tmp_path / "out", 2, None)
    assert {row["conversation"] for row in rows_of(first)} == {"talk-0", "talk-1"}
    assert {row["conversation"] for row in rows_of(second)} == {"talk-2", "talk-3", "talk-4"}


def test_a_person_who_talks_alone_has_no_pairs(tmp_path: Path) -> None:
    alone = {"messages": [line("ann", 1), line("ann", 2)]}
    source = write_chitchat(tmp_path / "d.json", [alone, alone])
    with pytest.raises(DataError, match="expected as many people with 2 conversations, got 0"):
        prepare_chitchat(source, tmp_path / "out", 1, None)


def test_a_limit_draws_over_all_conversations(tmp_path: Path) -> None:
    source = write_chitchat(tmp_path / "d.json", [talk("x", "ann", 30) for _ in range(10)])
    (site,) = prepare_chitchat(source, tmp_path / "out", 1, 40)
    assert site.pairs == 40
    assert site.conversations >= 8


def test_preparing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_chitchat(
        tmp_path / "d.json", [talk("x", name, 9) for name in ("ann", "bob", "ann", "bob")]
    )
    once = prepare_chitchat(source, tmp_path / "a", 2, 5)
    before = [site.path.read_bytes() for site in once]
    assert prepare_chitchat(source, tmp_path / "a", 2, 5) == once
    assert [site.path.read_bytes() for site in once] == before
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["site-1.jsonl", "site-2.jsonl"]


@pytest.mark.parametrize("content", ["", "[]", '{"a": {}}', f'{{"{PRIVATE}": {{"messages": 1}}}}'])
def test_a_file_of_another_kind_is_refused_without_its_text(tmp_path: Path, content: str) -> None:
    source = tmp_path / "d.json"
    source.write_text(content)
    with pytest.raises(DataError, match=r"d\.json: expected chitchat conversations") as caught:
        prepare_chitchat(source, tmp_path / "out", 1, None)
    assert PRIVATE not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d\.json: .* No such file"):
        prepare_chitchat(tmp_path / "d.json", tmp_path / "out", 1, None)


@pytest.mark.parametrize(("participants", "pairs"), [(0, None), (-1, None), (1, 0)])
def test_counts_below_one_are_refused(tmp_path: Path, participants: int, pairs: int | None) -> None:
    source = write_chitchat(tmp_path / "d.json", [talk("x", "ann", 3)] * 2)
    with pytest.raises(ConfigError, match="expected 1 or more"):
        prepare_chitchat(source, tmp_path / "out", participants, pairs)


def test_the_real_conversations_give_the_known_counts(tmp_path: Path) -> None:
    """Golden counts of chitchat-dataset 0.9.0; on failure they show numbers, never text."""
    sites = prepare_chitchat(find_packaged(CHITCHAT), tmp_path, 5, None)
    assert [(s.pairs, s.conversations) for s in sites] == [
        (6581, 461),
        (5135, 429),
        (4871, 236),
        (2823, 63),
        (1770, 98),
    ]
    at = [{row["conversation"] for row in rows_of(site)} for site in sites]
    assert len(set.union(*at)) == sum(map(len, at))


# The user's own file


def own(tmp_path: Path, rows: list[dict[str, Any]], name: str = "own.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(n: int, clinic: str | None = None) -> dict[str, Any]:
    return {"prompt": f"question {n}", "answer": f"answer {n}", "clinic": clinic or "north"}


def questions(file: SiteFile) -> set[str]:
    return {row["messages"][0]["content"] for row in rows_of(file)}


def test_own_rows_are_dealt_evenly_and_none_is_lost(tmp_path: Path) -> None:
    source = own(tmp_path, [ask(n) for n in range(10)])
    data = split_own_data(source, tmp_path / "out", 3)
    assert [site.pairs for site in data.sites] == [4, 3, 3]
    assert set.union(*map(questions, data.sites)) == {f"question {n}" for n in range(10)}
    assert [site.name for site in data.sites] == ["site-1", "site-2", "site-3"]
    for site in data.sites:
        DataSection.model_validate({"path": site.path.name, **site.columns})


def test_copies_of_an_own_row_stay_at_one_participant(tmp_path: Path) -> None:
    source = own(tmp_path, [ask(n % 4) for n in range(20)])
    one, two = split_own_data(source, tmp_path / "out", 2).sites
    assert questions(one).isdisjoint(questions(two))
    assert (one.pairs, two.pairs) == (10, 10)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), st.integers(1, 4))
def test_own_groups_are_dealt_whole(
    tmp_path_factory: pytest.TempPathFactory, of: list[str], participants: int
) -> None:
    folder = tmp_path_factory.mktemp("own")
    source = own(folder, [ask(n, clinic) for n, clinic in enumerate(of)])
    if len(set(of)) < participants:
        with pytest.raises(DataError, match=f"as many groups or more, got {len(set(of))}"):
            split_own_data(source, folder / "out", participants, group="clinic")
        return
    sites = split_own_data(source, folder / "out", participants, group="clinic").sites
    clinic = {f"question {n}": name for n, name in enumerate(of)}
    at = [{clinic[question] for question in questions(site)} for site in sites]
    assert sum(map(len, at)) == len(set(of))
    assert all(at)
    # The inner split is by group too, unless the site is one group.
    assert [("group" in site.columns) for site in sites] == [len(groups) > 1 for groups in at]


def test_own_data_is_the_same_again_and_changes_with_the_seed(tmp_path: Path) -> None:
    source = own(tmp_path, [ask(n) for n in range(30)])
    contents = [
        [s.path.read_bytes() for s in split_own_data(source, tmp_path / "out", 2, seed=seed).sites]
        for seed in (1, 1, 2)
    ]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_own_columns_may_be_chats_plain_text_or_named(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]
        for n in range(2)
    ]
    source = own(tmp_path, [{"messages": chat} for chat in chats])
    site = split_own_data(source, tmp_path / "out", 1).sites[0]
    assert site.columns == {"messages": "messages"}
    assert sorted(row["messages"][1]["content"] for row in rows_of(site)) == ["a0", "a1"]

    source = own(tmp_path, [{"text": "one"}, {"text": " "}, {"text": "two"}])
    data = split_own_data(source, tmp_path / "out", 1)
    assert (data.sites[0].columns, data.sites[0].pairs, data.dropped) == ({"text": "text"}, 2, 1)

    path = tmp_path / "own.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["Context", "Response"], ["q", "a"]])
    columns = {"prompt": "Context", "answer": "Response"}
    site = split_own_data(path, tmp_path / "out", 1, columns).sites[0]
    assert questions(site) == {"q"}


def test_own_data_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    source = own(tmp_path, [ask(1), ask(1), {"prompt": PRIVATE, "answer": " "}])
    out = tmp_path / "out"
    with pytest.raises(DataError, match="expected as many different examples or more, got 1"):
        split_own_data(source, out, 2)
    with pytest.raises(ConfigError, match="participants: expected 1 or more, got 0"):
        split_own_data(source, out, 0)
    with pytest.raises(ConfigError, match=r"expected one mapping .* got answer; name"):
        split_own_data(source, out, 1, {"answer": "answer"})
    with pytest.raises(DataError, match=r"data\.group = 'ward': .* got prompt, answer, clinic"):
        split_own_data(source, out, 1, group="ward")
    other = own(tmp_path, [{"question": PRIVATE, "reply": PRIVATE}], "other.jsonl")
    with pytest.raises(DataError, match="got question, reply; rename them") as caught:
        split_own_data(other, out, 1)
    assert PRIVATE not in str(caught.value)
    assert not out.exists()
