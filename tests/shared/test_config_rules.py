"""Settings of LoRA averaging that cannot work together: refused, with the rule and what to do."""

from __future__ import annotations

import pytest

from shared.errors import ConfigError
from tests.federations import config

PLAIN = {"base": {"quantisation": "none"}}
NOISE = {"clip": 1.0, "noise_multiplier": 2.0}
QUORUM = {"kind": "quorum", "quorum": 2, "deadline_seconds": 60}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"mode": "flora"}, r'flora.*base.quantisation is "nf4".*use svd'),
        ({"mode": "flora", "base": {"quantisation": "int8"}}, r'flora.*"int8".*use svd'),
        ({"mode": "flora", **PLAIN, "aggregation": {"rule": "median"}}, r'"median".*"flora" joins'),
        ({"mode": "flora", **PLAIN, "server": {"optimizer": "fedavgm"}}, r"expected plain.*flora"),
        (
            {"mode": "flora", **PLAIN, "training": {"optimizer_state": "keep"}},
            r"optimizer_state.*flora.*into the base.*reset",
        ),
        ({"mode": "flora", **PLAIN, "policy": {**QUORUM, "late": "carry"}}, r"policy.*flora.*drop"),
        (
            {"mode": "flora", **PLAIN, "policy": {"kind": "buffered", "buffer": 2}},
            r"policy.*flora",
        ),
        (
            {"mode": "flora", **PLAIN, "run": {"rounds": 43}, "lora": {"ranks": {"c": 62}}},
            r"run.rounds x the sum.*64 \+ 43 x 190 = 8234: lower lora.rank.*svd",
        ),
        *(
            (
                {"mode": mode, **PLAIN, "lora": {"kind": kind}},
                rf"{mode}.*two factors.*{kind}.*fedavg",
            )
            for mode in ("ffa", "rolora", "svd", "flora", "range-finder")
            for kind in ("core", "ia3")
        ),
        ({"lora": {"ranks": {"a": 8}}}, r"lora.ranks.*fedavg.*no mean; use svd"),
        ({"mode": "ffa", "lora": {"ranks": {"a": 8}}}, r"lora.ranks.*ffa.*no mean; use svd"),
        ({"mode": "svd", "lora": {"ranks": {"a": 65}}}, r"ranks.a: expected at most.*64, got 65"),
        ({"mode": "svd", "lora": {"ranks": {"z": 8}}}, r"lora.ranks: expected sites of.*got z"),
        ({"mode": "svd", "aggregation": {"rule": "median"}}, r'aggregation.rule = "median".*svd'),
        (
            {"mode": "svd", "training": {"local_steps": 1, "optimizer_state": "keep"}},
            r"optimizer_state.*svd.*directions.*reset",
        ),
        (
            {"mode": "rolora", "training": {"local_steps": 1, "optimizer_state": "keep"}},
            r"optimizer_state.*rolora.*the other factor in the next round.*reset",
        ),
        ({"mode": "rolora", "policy": {**QUORUM, "late": "carry"}}, r"policy.*rolora.*drop"),
        ({"mode": "svd", "policy": {"kind": "buffered", "buffer": 2}}, r"policy.*svd"),
        ({"privacy": {"clip": 1.0}}, r"exactly one of noise_multiplier and target_epsilon"),
        (
            {"privacy": {**NOISE, "target_epsilon": 8.0}},
            r"exactly one of noise_multiplier and target_epsilon",
        ),
        (
            {"privacy": {**NOISE, "unit": "site"}},
            r"privacy.unit: expected 100 sites.*allow 3: .*more than 2 numbers.*667 for a million",
        ),
        ({"privacy": NOISE, "aggregation": {"weights": "examples"}}, r'weights.*"equal".*no noise'),
        ({"privacy": NOISE, "aggregation": {"weights": "tokens"}}, r'weights.*"equal".*no noise'),
        ({"privacy": NOISE, "mode": "range-finder"}, r"range-finder.*gradients without noise"),
        (
            {"privacy": NOISE, "lora": {"kind": "core", "bases": "other@2"}},
            r'lora.bases: expected "weights" or a file.*"other@2".*gradients without noise',
        ),
    ],
)
def test_a_combination_that_cannot_work_is_refused(sections, says):
    """Each error names the settings, the reason and a way out."""
    with pytest.raises(ConfigError, match=says):
        built(sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"mode": "svd", "lora": {"ranks": {"a": 64, "b": 1}}},
        {"mode": "svd", "policy": QUORUM},
        {"mode": "flora", **PLAIN, "policy": QUORUM},
        {"mode": "flora", **PLAIN, "lora": {"ranks": {"a": 64, "b": 1}}},
        {"mode": "flora", **PLAIN, "run": {"rounds": 42}},
        {"mode": "flora", **PLAIN, "codec": {"name": "int8"}},
        {"mode": "rolora", "policy": QUORUM},
        {"mode": "ffa", "policy": {"kind": "buffered", "buffer": 2}},
        {"mode": "ffa", "training": {"local_steps": 1, "optimizer_state": "keep"}},
        {"mode": "rolora", "aggregation": {"rule": "median"}},
    ],
)
def test_what_works_is_not_refused(sections):
    """The neighbours of what is refused."""
    assert built(sections).aggregation.averaging == sections["mode"]


def built(sections):
    given = dict(sections)
    aggregation = {"averaging": given.pop("mode", "fedavg"), **given.pop("aggregation", {})}
    base = {"model": "none", **given.pop("base", {})}
    return config(aggregation=aggregation, base=base, **given)
