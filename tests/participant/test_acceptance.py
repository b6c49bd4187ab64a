"""What a site takes part in: each limit by itself, and what it says."""

from __future__ import annotations

import pytest

from participant.acceptance import objection_to_round, objections
from shared.config import AcceptSection
from shared.events import RunAnnounced, WireBase, WireLora, WireTraining


def run(**training) -> RunAnnounced:
    return RunAnnounced(
        run="r1",
        config_digest="a" * 64,
        base=WireBase(model="m"),
        lora=WireLora(rank=8),
        training=WireTraining(**(training or {"local_steps": 10})),
        rounds=5,
        participants=3,
    )


@pytest.mark.parametrize(
    ("fits", "not_so"),
    [
        ({"models": ("m", "n")}, {"models": ("n",)}),
        ({"runs": ("r1",)}, {"runs": ("r2",)}),
        ({"max_rank": 8}, {"max_rank": 7}),
        ({"max_steps": 10}, {"max_steps": 9}),
        ({"max_rounds": 5}, {"max_rounds": 4}),
        ({"min_participants": 3}, {"min_participants": 4}),
    ],
)
def test_a_limit_is_met_or_named(fits, not_so):
    """At the limit it takes part; beyond it the setting, the limit and the value are said."""
    assert objections(run(), AcceptSection(**fits)) == ""
    said = objections(run(), AcceptSection(**not_so))
    assert f"accept.{next(iter(not_so))}: expected" in said
    assert "got" in said


def test_without_limits_it_takes_part_in_anything():
    """The default."""
    assert objections(run(), AcceptSection()) == ""


def test_own_factors_go_to_other_sites_only_where_the_site_says_so():
    """Stacking shows them; every other averaging gives out a mean."""
    stacked = run().model_copy(update={"averaging": "flora"})
    assert 'accept.flora: expected true for a run with aggregation.averaging = "flora"' in (
        objections(stacked, AcceptSection())
    )
    assert objections(stacked, AcceptSection(flora=True)) == ""


def test_epochs_are_counted_once_the_examples_are_known():
    """21 examples in batches of 4, twice: 12 steps."""
    epochs = run(local_epochs=2, batch_size=4)
    accept = AcceptSection(max_steps=11)
    assert objections(epochs, accept) == ""
    assert "accept.max_steps: expected at most 11, got 12" in objections(epochs, accept, 21)


def test_all_objections_are_said_at_once():
    """One round trip for the two engineers."""
    said = objections(run(), AcceptSection(max_rank=1, max_rounds=1))
    assert "max_rank" in said
    assert "max_rounds" in said


def test_a_run_that_is_extended_beyond_the_limit_is_left():
    """The limit holds for what is asked, not only for what was announced."""
    assert objection_to_round(5, AcceptSection(max_rounds=5)) == ""
    assert objection_to_round(6, AcceptSection()) == ""
    said = objection_to_round(6, AcceptSection(max_rounds=5))
    assert "accept.max_rounds: expected at most 5, got 6" in said
