"""Policies as values: deadlines, quorum, carried deltas and their weights by hand."""

from __future__ import annotations

import math
from itertools import product

import pytest

from coordinator.round.weighting import clips, shares
from shared.config import AggregationSection, PolicySection
from shared.errors import ConfigError
from shared.methods.policies import Trouble, get_policy
from shared.protocol.records import OpenedRecord
from tests import federations
from tests.coordinator.test_rounds_machine import accepted

QUORUM = {"kind": "quorum", "quorum": 2, "deadline_seconds": 100.0}


def opened(number: int = 5, **fields) -> OpenedRecord:
    values = {"deadline_seconds": 100.0, "grace_seconds": 10.0, "time": 1000.0, **fields}
    return OpenedRecord(
        round=number,
        selected=("a", "b", "c"),
        source_sha="0" * 64,
        seed=1,
        progress_from=0.0,
        progress_to=1.0,
        **values,
    )


def decide(policy: dict, uncounted: list[tuple[str, int]], now: float, troubles=None):
    section = PolicySection.model_validate(policy)
    records = {(site, number): accepted(site, number, "x") for site, number in uncounted}
    return get_policy(section.kind).decide(section, opened(), records, troubles or {}, now)


def counted(decision) -> list[tuple[str, int]]:
    return [(record.site, record.round) for record in decision.counted]


def test_a_quorum_waits_for_everybody_until_deadline_and_grace_are_over():
    two = [("a", 5), ("b", 5)]
    assert decide(QUORUM, two, 1109.9) is None
    decision = decide(QUORUM, two, 1110.0)
    assert counted(decision) == two
    assert decision.excluded == {"c": "no delta within 110 s"}


def test_all_in_before_the_deadline_closes_at_once():
    assert counted(decide(QUORUM, [("c", 5), ("a", 5), ("b", 5)], 1000.0)) == [
        ("a", 5),
        ("b", 5),
        ("c", 5),
    ]


def test_below_the_quorum_a_round_stays_open_however_late():
    assert decide(QUORUM, [("a", 5)], 1e9) is None


def test_who_failed_is_left_out_with_its_own_reason():
    trouble = {"c": Trouble(3, final=False, reason="out of memory")}
    decision = decide(QUORUM, [("a", 5), ("b", 5)], 2000.0, trouble)
    assert decision.excluded == {"c": "out of memory"}


def test_late_deltas_count_only_with_carry_and_not_for_the_quorum():
    there = [("a", 5), ("b", 4), ("c", 4)]
    assert decide(QUORUM | {"late": "carry"}, there, 2000.0) is None
    there.append(("b", 5))
    assert counted(decide(QUORUM, there, 2000.0)) == [("a", 5), ("b", 5)]
    assert counted(decide(QUORUM | {"late": "carry"}, there, 2000.0)) == [
        ("a", 5),
        ("b", 4),
        ("b", 5),
        ("c", 4),
    ]


def test_what_is_too_old_is_not_carried():
    policy = QUORUM | {"late": "carry", "max_staleness": 2}
    there = [("a", 5), ("b", 5), ("c", 2), ("c", 3)]
    assert ("c", 2) not in counted(decide(policy, there, 2000.0))
    assert ("c", 3) in counted(decide(policy, there, 2000.0))


def test_a_buffer_closes_when_it_is_full_with_deltas_of_any_round():
    policy = {"kind": "buffered", "buffer": 3}
    assert decide(policy, [("a", 5), ("b", 4)], 1e9) is None
    decision = decide(policy, [("a", 5), ("b", 4), ("c", 3)], 0.0)
    assert counted(decision) == [("a", 5), ("b", 4), ("c", 3)]
    assert decision.excluded == {}


def test_weights_by_hand():
    """Two fresh deltas and one that is three rounds old: 1, 1 and 1/2, that is 0.4, 0.4, 0.2."""
    records = [accepted("a", 5, "x"), accepted("b", 5, "x"), accepted("b", 2, "x")]
    assert shares("equal", records, 5) == pytest.approx({"a": 0.4, "b": 0.4, "b@2": 0.2})


def test_weights_by_examples_are_discounted_likewise():
    old = accepted("b", 2, "x").model_copy(update={"examples": 6})
    records = [accepted("a", 5, "x").model_copy(update={"examples": 7}), old]
    assert shares("examples", records, 5) == pytest.approx({"a": 0.7, "b@2": 0.3})


def test_fresh_deltas_weigh_exactly_what_they_did():
    records = [accepted(site, 5, "x") for site in "abc"]
    assert shares("equal", records, 5) == dict.fromkeys("abc", 1 / 3)


def test_a_carried_delta_is_clipped_by_its_own_label():
    """Sites' norms 1, 1 and 2 (of 1 and 3): the bound is 1.5, so c's old one counts 1.5 / 3."""
    old = accepted("c", 2, "x").model_copy(update={"norm": 3.0})
    records = [*(accepted(site, 5, "x") for site in "abc"), old]
    section = AggregationSection(clip_to_median=1.5)
    assert clips(section, records, 5) == {"a": 1.0, "b": 1.0, "c": 1.0, "c@2": 0.5}
    off = AggregationSection(clip_to_median="off")
    assert set(clips(off, records, 5).values()) == {1.0}


def test_a_site_with_many_late_deltas_does_not_say_which_norm_is_usual():
    """Site c hands in five at once, each 1000 times too long: every one is clipped to 3."""
    late = [accepted("c", n, "x").model_copy(update={"norm": 1000.0}) for n in range(1, 6)]
    records = [accepted("a", 5, "x"), accepted("b", 5, "x"), *late]
    found = clips(AggregationSection(), records, 5)
    assert (found.pop("a"), found.pop("b")) == (1.0, 1.0)
    assert set(found.values()) == {0.003}
    # of two sites nobody can say which is unusual, however many deltas they have
    assert set(clips(AggregationSection(), records[1:], 5).values()) == {1.0}


def test_an_adaptive_deadline_by_hand():
    """Times 10, 12, 14, 20, 100: median 14, deviations 4, 2, 0, 6, 86: MAD 4."""
    section = PolicySection.model_validate(QUORUM | {"deadline": "adaptive"})
    deadline = get_policy("quorum").deadline
    expected = 14 + 3 * 1.4826 * 4
    assert deadline(section, [10, 12, 14, 20, 100]) == pytest.approx(expected, abs=1e-3)
    assert deadline(section, [0.0] * 5) == 1.0
    assert deadline(section, [10, 12]) == 100.0
    assert deadline(section, [1000.0] * 5) == 100.0
    # Equal times leave room all the same: a tenth of the median, three times.
    assert math.isclose(deadline(section, [10.0] * 9), 13.0)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "quorum", "deadline_seconds": 5}, "needs quorum"),
        ({"kind": "quorum", "quorum": 2}, "needs deadline_seconds"),
        ({"kind": "buffered"}, "needs buffer"),
        ({"kind": "all", "quorum": 2}, 'quorum goes with kind = "quorum"'),
        ({"kind": "buffered", "buffer": 2, "late": "carry"}, 'late goes with kind = "quorum"'),
        ({"kind": "quorum", "quorum": 4, "deadline_seconds": 5}, "policy.quorum is 4"),
        ({"kind": "buffered", "buffer": 4}, "policy.buffer is 4"),
        ({"kind": "quorums"}, "policy.kind"),
    ],
)
def test_settings_that_cannot_work_are_refused(policy, message):
    with pytest.raises(ConfigError, match=message):
        federations.config(policy=policy)


@pytest.mark.parametrize("now", [1000.0, 2000.0])
@pytest.mark.parametrize(
    "policy",
    [
        {"kind": "all"},
        {"kind": "all", "on_failure": "exclude"},
        QUORUM,
        {**QUORUM, "late": "carry"},
        {"kind": "buffered", "buffer": 2},
    ],
)
def test_below_the_least_that_a_policy_names_it_decides_nothing(policy, now):
    """So nobody has to ask it: every choice of deltas and troubles of three sites."""
    section, below = PolicySection.model_validate(policy), 0
    for found in product((None, "delta", "trouble"), repeat=3):
        by_site = dict(zip("abc", found, strict=True))
        there = [(site, 5) for site, what in by_site.items() if what == "delta"]
        trouble = Trouble(3, final=True, reason="no")
        troubles = {site: trouble for site, what in by_site.items() if what == "trouble"}
        least = get_policy(section.kind).least(section, opened(), now)
        if len(there) + len(troubles) < least:
            below += 1
            assert decide(policy, there, now, troubles) is None
    assert below
