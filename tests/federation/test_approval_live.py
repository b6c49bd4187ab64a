"""Real servers and processes: a site whose person is to approve each run."""

from __future__ import annotations

import json
import time

import pytest

from tests.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.slow


def until(look, seconds=PATIENCE_SECONDS):
    """Look until there is something."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def test_a_run_waits_for_a_person_at_a_site_and_ends_as_any_other(deploy):
    """Killed while it waits, and approved while it is down; the coordinator says whom it awaits."""
    deployment = deploy(rounds=2)
    toml = deployment.site_toml("a")
    text = toml.read_text()
    assert "# approval = true" in text
    toml.write_text(text.replace("# approval = true", "approval = true"))
    deployment.start_coordinator()

    def once():
        """Whether a participant that leaves when there is nothing to do says what it waits for."""
        assert deployment.start_participant("a", "--once").wait(PATIENCE_SECONDS) == 3
        return "waiting for approval (gradualdiff site status): tiny" in deployment.log("a")

    assert until(once)
    for site in "ab":
        deployment.start_participant(site)
    deployment.wait_for("run.awaits_approval", "a")

    def reason():
        place = ("--store", str(deployment.federation), "--json")
        shown = deployment.command("runs", "show", "tiny", *place).stdout
        return "approval" in (why := json.loads(shown)["summary"]["waits_for"].get("a", "")) and why

    assert until(reason) == "it awaits approval at the site"
    place = ("--federation", str(deployment.federation), "--json")
    listed = json.loads(deployment.command("queues", "list", *place).stdout)["queues"]
    (waits,) = [row["waits_for"] for row in listed if row["site"] == "a"]
    assert waits.endswith("; it awaits approval at the site")
    shown = deployment.command("site", "status", "--site", str(toml)).stdout
    assert "waits for approval since" in shown
    assert deployment.begun("a") == []
    deployment.kill("a")
    deployment.command("site", "approve", "tiny", "--site", str(toml), "--yes")
    deployment.start_participant("a")
    assert deployment.finish() == deployment.wanted()
    assert "approved by" in deployment.command("site", "status", "--site", str(toml)).stdout
    place = ("--store", str(deployment.federation))
    deployment.command("runs", "verify", "tiny", *place)
