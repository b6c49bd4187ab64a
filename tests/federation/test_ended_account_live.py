"""Real servers and processes: a site whose account ends in the middle of a run."""

from __future__ import annotations

import json
import time

import pytest

from coordinator.accounts.site_accounts import find_account
from shared.config import canonical_json
from shared.protocol.records import AcceptedRecord
from shared.topology import account_key

pytestmark = pytest.mark.slow


def test_a_site_whose_account_ends_is_out_and_in_again_once_it_is_renewed(deploy):
    """Its process still reaches the broker, and nobody takes its delta; then the run goes on.

    In the end the adapter is the undisturbed one's.
    """
    deployment = deploy(rounds=2, settings="coordinator.accounts.standing:LOOK_SECONDS=0.1")
    store = deployment.ledger().store
    found = find_account(store, "b")
    over = found.model_copy(update={"expires_at": time.time() - 1, "version": 2})
    deployment.start_coordinator()
    for site in "ab":
        deployment.start_participant(site, slow=2.0)
    deployment.wait_for("opened.recorded", "coordinator")
    store.put(account_key("b"), canonical_json(over.model_dump(mode="json")))
    deployment.wait_for("account.ended", "coordinator")
    deployment.wait_for("delta.accepted", "coordinator")
    accepted = [r for r in deployment.ledger().history() if isinstance(r, AcceptedRecord)]
    assert {record.site for record in accepted} == {"a"}
    place = ("--federation", str(deployment.federation))
    (listed,) = [
        site
        for site in json.loads(deployment.command("sites", "list", *place, "--json").stdout)
        if site["site"] == "b"
    ]
    assert listed["state"] == "expired"
    said = deployment.command("sites", "expire", *place, "--json").stdout
    assert json.loads(said) == {"expired": ["b"]}
    deployment.wait_for("broker.lost", "b")
    reason = ("--reason", "the study goes on")
    deployment.command("sites", "renew", "b", "--valid-days", "10", *reason, *place)
    assert deployment.finish() == deployment.wanted()
    words = deployment.command("audit", "list", *place, "--json").stdout
    deeds = [(entry["what"], entry["about"]) for entry in json.loads(words)]
    assert deeds[-2:] == [("account.expire", "all sites"), ("account.renew", "b 10")]
    deployment.command("audit", "verify", *place)
