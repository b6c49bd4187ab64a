"""Named points cost nothing and do nothing, unless a test armed them."""

from __future__ import annotations

import pytest

from shared.failpoints import arm, failpoint


@pytest.fixture
def reached():
    """The names of the points reached while armed."""
    names = []
    arm(names.append)
    yield names
    arm(None)


def test_a_point_says_stage_and_subject(reached):
    """Joined by a colon; a subject may be a function."""
    failpoint("record.before", "opened")
    failpoint("publish.sent", lambda: "RoundStarted")
    failpoint("round.swept")
    assert reached == ["record.before:opened", "publish.sent:RoundStarted", "round.swept"]


def test_unarmed_nothing_is_called():
    """The function that would find the subject out least of all."""
    failpoint("publish.sent", pytest.fail)
