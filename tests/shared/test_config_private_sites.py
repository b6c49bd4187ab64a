"""``[privacy] unit = "site"``: what it goes with, and how many deltas carry its noise."""

from __future__ import annotations

import pytest

from coordinator.announcing import announcement
from shared.config.privacy_rules import fewest_deltas, noise_ratio
from shared.errors import ConfigError
from tests.federations import config

SITES = [f"s{number:03d}" for number in range(150)]
PRIVACY = {"unit": "site", "clip": 1.0, "noise_multiplier": 4.0}
QUORUM = {"kind": "quorum", "deadline_seconds": 60}
SECURE = {"aggregation": {"secure": True}, "codec": {"name": "int8"}}


def private(sites=SITES, privacy=None, **sections):
    """The settings of a run that protects its sites."""
    return config(sites, privacy={**PRIVACY, **(privacy or {})}, **sections)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"sites": SITES[:99]},
            r"privacy.unit: expected 100 sites or more in every round.*allow 99",
        ),
        (
            {"run": {"min_participants": 60}},
            r"allow 60.*a mean of 60 deltas.*more than 225 numbers",
        ),
        ({"selection": {"method": "random", "fraction": 0.5}}, r"allow 75"),
        ({"privacy": {"delta": 0.01}}, r"privacy.delta: expected at most 1 / 150.*got 0.01"),
        *(
            ({"aggregation": {"averaging": mode}}, rf'"{mode}" does not go.*no noise on their sum')
            for mode in ("svd", "flora")
        ),
        ({"aggregation": {"averaging": "range-finder"}}, r"gradients without noise"),
        *(
            ({"aggregation": {"rule": rule}}, rf'"{rule}" does not go with privacy.unit')
            for rule in ("median", "trimmed-mean", "multi-krum")
        ),
        ({"aggregation": {"clip_to_median": 3.0}}, r'clip_to_median = 3 does not go.*use "off"'),
        ({"aggregation": {"max_delta_norm": 2.5}}, r"max_delta_norm = 2.5 does not go.*remove it"),
        ({"aggregation": {"weights": "tokens"}}, r'weights: expected "equal" with \[privacy\]'),
        ({"policy": {**QUORUM, "quorum": 120, "late": "carry"}}, r"policy.late.*weighs less"),
        ({"policy": {"kind": "buffered", "buffer": 120}}, r"policy.kind.*weighs less"),
        ({"codec": {"feedback": True}}, r"codec.feedback: expected false.*noise off again"),
        ({"codec": {"name": "sign"}}, r"codec.feedback is false"),
        ({"convergence": {"patience": 2}}, r"patience: expected none.*without noise"),
    ],
)
def test_what_would_break_the_noise_is_refused(sections, says):
    """Each error names the setting, the reason and a way out."""
    with pytest.raises(ConfigError, match=says):
        private(**sections)


@pytest.mark.parametrize(
    ("sections", "fewest"),
    [
        ({}, 150),
        ({"policy": {"kind": "all", "on_failure": "exclude"}}, 100),
        ({"policy": {**QUORUM, "quorum": 120}}, 120),
        ({"policy": {**QUORUM, "quorum": 120, "on_failure": "exclude"}}, 100),
        (SECURE, 100),
        ({"run": {"min_participants": 120}, **SECURE}, 80),
        ({"selection": {"method": "random", "fraction": 0.8}}, 120),
    ],
)
def test_the_noise_is_made_for_the_smallest_round(sections, fewest):
    """What a policy or a secure sum closes a round with; sites are told, for their own noise."""
    made = private(**sections)
    assert fewest_deltas(made) == fewest
    assert announcement(made, SITES[0]).privacy.fewest == fewest


def test_what_does_not_go_with_it_is_off_by_default():
    """And a run that protects records says nothing of all that."""
    made = private()
    assert (made.aggregation.clip_to_median, made.codec.feedback) == ("off", False)
    records = config(privacy={"clip": 1.0, "noise_multiplier": 1.0})
    assert records.aggregation.clip_to_median == 3.0
    assert "fewest" not in announcement(records, "a").privacy.model_dump()


@pytest.mark.parametrize(
    ("numbers", "sites", "ratio"), [(920_000, 5, 192), (920_000, 1_000, 0.96), (57_344, 100, 2.4)]
)
def test_the_ratio_is_that_of_the_notes(numbers, sites, ratio):
    """Noise on the mean over the largest update, sigma 1: core of rank 64, and of rank 16."""
    assert noise_ratio(1.0, numbers, sites) == pytest.approx(ratio, rel=0.01)
