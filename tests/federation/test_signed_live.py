"""Real servers and processes that sign: set up as people do it, killed, verified, made anew."""

from __future__ import annotations

import json

import pytest

from shared.protocol.records import DeclinedRecord

pytestmark = pytest.mark.slow

TRUST = '[trust]\nkey_file = "coordinator.key"\n'


def enrol(deployment, site):
    """What both sides do for a site's key, but for the phone; its fingerprint."""
    made = deployment.command(
        "site", "init", "--site", str(deployment.site_toml(site)), "--json"
    ).stdout
    key = json.loads(made)
    place = ("--federation", str(deployment.federation))
    deployment.command("sites", "key", site, "--key", key["key"], *place)
    return key["fingerprint"]


def test_any_process_of_a_signed_run_may_be_killed(deploy):
    """The same adapter as undisturbed and in one process; each site's records are proven."""
    deployment = deploy(extra=TRUST)
    prints = {site: enrol(deployment, site) for site in "ab"}
    deployment.start_coordinator()
    for site in "ab":
        deployment.start_participant(site, slow=1.0)
    deployment.kill_in_turn("coordinator", "a", "b", slow=1.0)
    assert deployment.finish() == deployment.wanted()
    place = ("--federation", str(deployment.federation))
    told = deployment.command("runs", "verify", "tiny", *place).stdout
    for site, fingerprint in prints.items():
        assert f"signed by {site} ({fingerprint}): 5 records" in told
    assert "message.refused" not in deployment.log("coordinator")


def test_a_site_without_an_enrolled_key_is_waited_for_until_it_has_one(deploy):
    """It says who it is in vain; once the operator enrols its key, nothing is started again."""
    deployment = deploy(extra=TRUST)
    enrol(deployment, "a")
    deployment.command("site", "init", "--site", str(deployment.site_toml("b")))
    deployment.start_coordinator()
    for site in "ab":
        deployment.start_participant(site)
    deployment.wait_for("expected one by the key enrolled for b", "coordinator")
    enrol(deployment, "b")
    assert deployment.finish() == deployment.wanted()
    assert not [r for r in deployment.ledger().history() if isinstance(r, DeclinedRecord)]
