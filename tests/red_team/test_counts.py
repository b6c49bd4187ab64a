"""Counts in tampered records that somebody would count up to."""

from __future__ import annotations

import json

import pytest

from shared import topology
from shared.config import canonical_json
from tests import federations
from tests.steering import ask, store_of, verify

CONTROLS = topology.control_key("test", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with one order of an operator."""
    folder = tmp_path_factory.mktemp("whole")
    config = federations.config(rounds=2)
    sites = federations.learners(config)
    asked = []

    def take_note(_task):
        if not asked:
            asked.append(ask(folder, "exclude", "broken", site="c"))

    sites["a"].fault = take_note
    federations.run(config, folder, sites)
    assert verify(folder).findings == []
    return folder


@pytest.mark.parametrize("count", [2**70, 10**9, 10**6, 500])
@pytest.mark.parametrize(
    ("key", "field"),
    [
        (topology.round_key("test", 1, "opened"), "controls"),
        (topology.round_key("test", 2, "closing"), "controls"),
        (topology.finished_key("test"), "controls"),
        (topology.finished_key("test"), "round"),
        (topology.round_key("test", 1, "opened"), "round"),
        (topology.round_key("test", 1, "opened"), "rounds"),
        (topology.accepted_key("test", 1, "a"), "tokens"),
        (CONTROLS, "number"),
    ],
)
def test_verify_ends_and_names_the_record(whole, key, field, count):
    """``controls: 2**70`` was counted up to, and each number kept."""
    store = store_of(whole)
    before = store.get(key)
    store.put(key, canonical_json(json.loads(before) | {field: count}))
    try:
        found = verify(whole).findings
    finally:
        store.put(key, before)
    assert found or field == "tokens"  # how much a site says it trained on nobody can recompute
    assert len(found) <= 320
    assert field == "tokens" or any(
        key in (finding.key, finding.problem.split(" ")[0]) or key in finding.problem
        for finding in found
    )


@pytest.mark.parametrize("number", [700, 10**5, 10**9, 10**30])
def test_a_record_of_a_made_up_round_is_found(whole, number):
    """It lies far beyond the last round: one finding, and not one for each round between."""
    store = store_of(whole)
    key = topology.round_key("test", number, "opened")
    record = json.loads(store.get(topology.round_key("test", 1, "opened")))
    store.create(key, canonical_json(record | {"round": number}))
    try:
        found = verify(whole).findings
    finally:
        store.delete(key)
    assert [finding.key for finding in found] == [key]


def test_a_record_of_a_made_up_order_is_found(whole):
    """The first hundred of those that are missing are enough."""
    store = store_of(whole)
    key = topology.control_key("test", 999_999)
    record = json.loads(store.get(CONTROLS))
    store.create(key, canonical_json(record | {"number": 999_999}))
    try:
        found = verify(whole).findings
    finally:
        store.delete(key)
    assert 1 <= len(found) <= 110
