"""``[aggregation] secure = true``: what it goes with, and why other settings are refused."""

from __future__ import annotations

import pytest

from shared.config.secure import fewest_survivors
from shared.errors import ConfigError
from tests.federations import config

QUORUM = {"kind": "quorum", "deadline_seconds": 60}


def secure(sites="abcde", **sections):
    """A secure run's settings."""
    aggregation = {"secure": True, **sections.pop("aggregation", {})}
    codec = {"name": "int8", "feedback": True, **sections.pop("codec", {})}
    return config(sites, aggregation=aggregation, codec=codec, **sections)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"sites": "ab"}, r"expected 3 sites or more in every round.*allow 2.*other's part"),
        ({"run": {"min_participants": 2}}, r"allow 2"),
        (
            {"selection": {"method": "random", "fraction": 0.4}},
            r"selection.fraction allow 2",
        ),
        ({"policy": {**QUORUM, "quorum": 3}}, r"policy.quorum: expected 4 or more of 5.*two third"),
        (
            {"policy": {**QUORUM, "quorum": 4, "late": "carry"}},
            r"policy.late.*cancel within one round.*drop",
        ),
        ({"policy": {"kind": "buffered", "buffer": 4}}, r"policy.kind.*cancel within one round"),
        *(
            ({"aggregation": {"averaging": mode}}, rf'"{mode}".*own factors.*use fedavg')
            for mode in ("svd", "flora", "range-finder")
        ),
        *(
            ({"aggregation": {"rule": rule}}, rf'"{rule}" does not go.*nobody sees; use "mean"')
            for rule in ("median", "trimmed-mean", "multi-krum")
        ),
        ({"aggregation": {"clip_to_median": 3.0}}, r'clip_to_median = 3.*norm.*use "off"'),
        ({"aggregation": {"max_delta_norm": 2.5}}, r"max_delta_norm = 2.5.*norm.*remove it"),
        ({"aggregation": {"weights": "tokens"}}, r'weights = "tokens".*claim the most.*"equal"'),
        *(
            ({"codec": {"name": name}}, rf'"{name}".*whole numbers.*use "int4" or "int8"')
            for name in ("fp32", "bf16", "sign", "topk")
        ),
        ({"codec": {"feedback": False}}, r"codec.feedback is false.*must travel later"),
    ],
)
def test_what_needs_a_single_delta_is_refused(sections, says):
    """Each error names the setting, the reason and a way out."""
    with pytest.raises(ConfigError, match=says):
        secure(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"sites": "abc"},
        {"aggregation": {"averaging": "ffa"}},
        {"aggregation": {"averaging": "rolora"}},
        {"codec": {"name": "int4", "down": "int4"}},
        {"lora": {"kind": "core"}},
        {"policy": {**QUORUM, "quorum": 4}},
        {"server": {"optimizer": "fedadam", "learning_rate": 0.01}},
        {"selection": {"method": "random", "fraction": 0.6}},
        {"aggregation": {"secure_reach": 0.5}},
    ],
)
def test_what_sums_values_goes_with_it(sections):
    """And the norm check that is on by default is off."""
    made = secure(**sections)
    assert made.aggregation.secure
    assert made.aggregation.clip_to_median == "off"


def test_a_run_without_it_has_the_digest_that_it_had():
    """The settings are on record where they are used, and nowhere else."""
    assert "secure" not in config().recorded().get("aggregation", {})
    assert secure().recorded()["aggregation"]["secure"] is True
    assert secure().from_record(secure().recorded(), "test") == secure()


@pytest.mark.parametrize(("cohort", "fewest"), [(3, 3), (4, 3), (5, 4), (6, 4), (7, 5), (100, 67)])
def test_two_thirds_must_be_there_at_the_end(cohort, fewest):
    """Rounded up, and three at least."""
    assert fewest_survivors(cohort) == fewest
