"""Fixed seeds of the long script: out of every door comes a value or an error that is meant."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import first_failure, shorter
from tests.fuzz.targets import Target, targets


@pytest.mark.parametrize("name", ["wire", "tensors", "deltas", "federation", "site", "records"])
def test_damaged_input_is_refused_by_an_error_of_the_tree(tmp_path, name):
    """A thousand inputs for each."""
    target = targets(tmp_path)[name]
    for data in target.examples:
        assert target.holds(data)
    assert first_failure(target, "suite", 1000) is None


def test_a_failing_input_is_found_and_made_short():
    """A door that breaks at one byte: the byte is what is left."""

    def feed(data):
        assert b"\xff" not in data

    target = Target([b"whole" * 10], feed, ValueError)
    found = first_failure(target, "suite", 1000)
    assert found is not None
    assert shorter(target, found) == b"\xff"
