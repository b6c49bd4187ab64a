"""Real servers and processes that protect sites as a whole: killed with noise made and not sent."""

from __future__ import annotations

import hashlib
import json

import pytest

from participant.learner.port import DELTA_FILE
from shared.protocol.records import AcceptedRecord

pytestmark = pytest.mark.slow

PRIVATE = """[privacy]
unit = "site"
clip = 1.0
noise_multiplier = 0.2
"""
FEW = "shared.config.privacy_rules:LEAST_SITES=3"  # what is tested is not how many


def accepted(deployment):
    """The sha256 of each delta on record, by round and site."""
    records = deployment.ledger().history()
    return {(one.round, one.site): one.sha for one in records if isinstance(one, AcceptedRecord)}


def test_a_site_that_is_killed_before_it_sends_says_the_same_delta(deploy, monkeypatch):
    """In round 1 with noise on a delta that nothing names yet, in round 2 with one it committed.

    The file that lay there when it died has the sha256 that is on record in the end; each round is
    paid for once, and the run verifies.
    """
    monkeypatch.setattr("shared.config.privacy_rules.LEAST_SITES", 3)
    deployment = deploy(rounds=2, sites="abc", extra=PRIVATE, settings=FEW)
    deployment.start_coordinator()
    for site in "ab":
        deployment.start_participant(site)
    program = ("tests.servers.numpy_site", str(deployment.site_toml("c")))
    work = deployment.site_toml("c").parent
    deployment.start("c", *program, armed="commit.before=SIGKILL")
    deployment.processes["c"].wait(60)
    first = {hashlib.sha256(path.read_bytes()).hexdigest() for path in work.rglob(DELTA_FILE)}
    deployment.start("c", *program, armed="commit.renamed=SIGKILL")
    deployment.processes["c"].wait(60)
    deployment.start("c", *program, armed="commit.renamed=SIGKILL")
    deployment.processes["c"].wait(60)
    deployment.start_participant("c")
    deployment.finish()
    assert deployment.fired("c") == ["commit.before SIGKILL", *["commit.renamed SIGKILL"] * 2]
    shas = accepted(deployment)
    assert len(first) == 1
    assert first == {shas[1, "c"]}
    assert deployment.trained("c") == ["tiny 1", "tiny 1", "tiny 2"]
    account = next(work.rglob("spent.json"))
    assert [one["round"] for one in json.loads(account.read_text())["spends"]] == [1, 2]
    place = ("--federation", str(deployment.federation))
    told = deployment.command("runs", "verify", "tiny", *place).stdout
    assert "tiny" in told
    shown = json.loads(deployment.command("runs", "show", "tiny", *place, "--json").stdout)
    assert {spent["unit"] for spent in shown["privacy"].values()} == {"site"}
    assert {spent["steps"] for spent in shown["privacy"].values()} == {2}
