"""Fixed seeds of the long script: out of every door comes a value or an error that is meant."""

from __future__ import annotations

import contextlib

import pytest

from coordinator.handlers import Coordinator
from shared.errors import LedgerDamagedError
from tests.fuzz import records, stores
from tests.fuzz.__main__ import first_failure, shorter
from tests.fuzz.corpus import KEPT
from tests.fuzz.targets import Target, targets

NAMES = [
    "wire",
    "tensors",
    "headers",
    "deltas",
    "federation",
    "site",
    "codecs",
    "federations",
    "stores",
    "management",
    "accounts",
    "keys",
    "records",
]


@pytest.mark.parametrize("name", NAMES)
def test_damaged_input_is_refused_by_an_error_of_the_tree(tmp_path, name):
    """Its share of inputs for each, from one seed."""
    target = targets(tmp_path)[name]
    for data in target.examples:
        assert target.holds(data)
    assert first_failure(target, "suite", target.share) is None


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_is_refused_by_an_error_of_the_tree(tmp_path, name):
    """Each door takes them or says what is wrong with them."""
    target = targets(tmp_path)[name]
    assert [data[:20] for data in KEPT[name] if not target.holds(data)] == []


@pytest.mark.parametrize(
    ("question", "answers"),
    [(question, answers) for question, known in stores.QUESTIONS.items() for answers in known],
)
def test_a_whole_answer_of_a_store_is_taken(tmp_path, question, answers):
    """So that what is damaged is whole without the damage."""
    stores.feed(stores.script(question, answers), tmp_path / "input")


def test_a_failing_input_is_found_and_made_short():
    """A door that breaks at one byte: the byte is what is left."""

    def feed(data):
        assert b"\xff" not in data

    target = Target([b"whole" * 10], feed, ValueError)
    found = first_failure(target, "suite", 1000)
    assert found is not None
    assert shorter(target, found) == b"\xff"


def test_a_mistake_in_a_handler_is_found(tmp_path, monkeypatch):
    """Although the message is refused for it and the run goes on."""

    def mistaken(self, event, sender):
        raise TypeError("no such thing")

    target = targets(tmp_path)["federations"]
    assert target.holds(b"")
    monkeypatch.setattr(Coordinator, "on_message_refused", mistaken)
    assert first_failure(target, "suite", 100) is not None


def test_every_target_is_in_the_suite(tmp_path):
    """None is for the long script alone."""
    assert list(targets(tmp_path)) == NAMES


def test_there_is_an_example_of_every_record():
    """Whole: each is read in its own place, and as the kind that it is."""
    assert {type(record) for record in records.EXAMPLES} == records.KINDS
    for record, data in zip(records.EXAMPLES, records.whole(), strict=True):
        reader = records.Reader()
        with contextlib.suppress(LedgerDamagedError):
            reader.read(data)
        assert type(record) in reader.taken
