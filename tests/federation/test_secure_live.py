"""Real servers and processes whose deltas are masked and who sign: killed on the way to a sum."""

from __future__ import annotations

import pytest

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
        program = ("tests.servers.numpy_site", str(deployment.site_toml(site)))
        deployment.start(site, *program, armed=points)
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
