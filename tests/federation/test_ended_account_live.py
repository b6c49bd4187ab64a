"""Real servers and processes: a site whose account ends in the middle of a run."""

from __future__ import annotations

import json
import time

import pytest

from coordinator.accounts.site_accounts import find_account
from shared.config import canonical_json
from shared.protocol.records import AcceptedRecord
from shared.topology import account_key
from tests.federation.test_approval_live import until

pytestmark = pytest.mark.slow

QUICK = (
    "coordinator.accounts.standing:LOOK_SECONDS=0.1 participant.uploads:REQUEST_SECONDS=1 "
    "participant.daemon:ONLINE_SECONDS=2"
)


def test_a_site_whose_account_ends_is_out_and_in_again_once_it_is_renewed(deploy):
    """Its process still reaches the broker, and nobody takes its delta; then the run goes on.

    In the end the adapter is the undisturbed one's.
    """
    deployment = deploy(rounds=2, settings=QUICK)
    place = ("--federation", str(deployment.federation))
    store = deployment.ledger().store
    found = find_account(store, "b")
    over = found.model_copy(update={"expires_at": time.time() - 1, "version": 2})
    deployment.start_coordinator()
    deployment.start_participant("a")
    deployment.start_participant("b", slow=15.0)
    deployment.wait_for("opened.recorded", "coordinator")
    store.put(account_key("b"), canonical_json(over.model_dump(mode="json")))
    deployment.wait_for("account.ended", "coordinator")

    def listed():
        told = json.loads(deployment.command("sites", "list", *place, "--json").stdout)
        return next(site for site in told if site["site"] == "b")

    until(lambda: deployment.trained("b") and listed()["over"].get("account"))
    assert listed()["state"] == "expired"
    accepted = [r for r in deployment.ledger().history() if isinstance(r, AcceptedRecord)]
    assert {record.site for record in accepted} == {"a"}
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
