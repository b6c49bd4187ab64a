"""Real servers and processes whose deltas are masked and who sign: killed on the way to a sum."""

from __future__ import annotations

import shutil

import pytest

from shared.protocol.records import OpenedRecord
from tests.federation.test_signed_live import TRUST, enrol

pytestmark = pytest.mark.slow

SECURE = (
    TRUST + "[aggregation]\nsecure = true\nsecure_reach = 1.0\n"
    '[codec]\nname = "int8"\ndown = "int4"\n'
)
SITES = "abcd"


def test_a_sum_outlives_those_who_ask_and_answer(deploy):
    """The coordinator dies once its decision is on record and once the sum is open.

    One site dies with its answer on disk and not sent, another before it masked. The adapter is
    the one of the same run in one process, and what each said is proven.
    """
    deployment = deploy(rounds=2, sites=SITES, extra=SECURE)
    prints = {site: enrol(deployment, site) for site in SITES}
    deployment.start_coordinator(armed="record.after:closing=SIGKILL")
    for site in SITES:
        points = {"a": "answer.kept=SIGKILL", "b": "bond.before=SIGKILL"}.get(site, "")
        start_site(deployment, site, points)
    deployment.processes["b"].wait(60)
    assert deployment.fired("b") == ["bond.before SIGKILL"]
    deployment.start_participant("b")
    deployment.processes["coordinator"].wait(60)
    assert deployment.fired("coordinator") == ["record.after:closing SIGKILL"]
    deployment.start_coordinator("coordinator", armed="sum.opened=SIGKILL")
    deployment.processes["coordinator"].wait(60)
    deployment.start_coordinator()
    deployment.processes["a"].wait(60)
    assert deployment.fired("a") == ["answer.kept SIGKILL"]
    deployment.start_participant("a")
    assert deployment.finish() == deployment.wanted()
    assert deployment.fired("coordinator")[1:] == ["sum.opened SIGKILL"]
    place = ("--federation", str(deployment.federation))
    told = deployment.command("runs", "verify", "tiny", *place).stdout
    for site, fingerprint in prints.items():
        assert f"signed by {site} ({fingerprint})" in told


def test_a_round_is_attempted_again_whoever_dies(deploy):
    """Two of five are gone for good, and their operator says so; then one loses its key, too.

    The coordinator dies once the second attempt is on record and before its decision, site a once
    it masked again. The adapter is that of the three alone, in one process.
    """
    deployment = deploy(rounds=2, sites="abcde", extra=SECURE)
    for site in "abcde":
        enrol(deployment, site)
    place = ("--federation", str(deployment.federation))
    deployment.start_coordinator()
    again = "delta.masked=SIGCONT delta.masked=SIGKILL"
    points = {"a": again, "d": "learn.before=SIGKILL", "e": "learn.before=SIGKILL"}
    for site in "abcde":
        start_site(deployment, site, points.get(site, "bond.before=SIGCONT bond.before=SIGKILL"))
    for site in "de":
        deployment.processes[site].wait(60)
    deployment.wait_for("delta.accepted", "coordinator", count=3)
    for site in "bc":  # the second time each masks it dies, but for c
        assert deployment.fired(site) == ["bond.before SIGCONT"]
    deployment.kill("coordinator")
    deployment.kill("c")
    start_site(deployment, "c")
    for site in "de":
        deployment.command("runs", "exclude", "tiny", site, "--reason", "its disk is gone", *place)
    deployment.start_coordinator(armed="record.after:opened=SIGKILL")
    deployment.processes["coordinator"].wait(60)
    deployment.start_coordinator(armed="record.before:closing=SIGKILL")
    for site in "ab":
        deployment.processes[site].wait(60)
    shutil.rmtree(deployment.site_toml("b").parent / "workspace")
    for site in "ab":
        start_site(deployment, site)
    deployment.processes["coordinator"].wait(60)
    deployment.start_coordinator()
    assert deployment.finish() == deployment.wanted("abc")
    assert deployment.fired("a") == ["delta.masked SIGCONT", "delta.masked SIGKILL"]
    assert deployment.fired("b") == ["bond.before SIGCONT", "bond.before SIGKILL"]
    fired = ["record.after:opened SIGKILL", "record.before:closing SIGKILL"]
    assert deployment.fired("coordinator") == fired
    opened = [r for r in deployment.ledger().history() if isinstance(r, OpenedRecord)]
    assert [(r.round, r.number) for r in opened] == [(1, 1), (1, 2), (1, 3), (2, 1)]
    deployment.command("runs", "verify", "tiny", *place)


def start_site(deployment, site, armed=""):
    program = ("tests.servers.numpy_site", str(deployment.site_toml(site)))
    deployment.start(site, *program, armed=armed)
