"""Sites whose clocks are years wrong, over real servers: nothing is counted, or missed, by it."""

from __future__ import annotations

import pytest

from shared.protocol.records import AcceptedRecord
from tests.federation.conftest import deploy  # noqa: F401 - a fixture
from tests.federation.test_signed_live import TRUST, enrol

pytestmark = pytest.mark.slow

YEARS = 10 * 365 * 86_400.0


def test_sites_that_lie_about_the_time_change_nothing(deploy):  # noqa: F811
    """One lives in ten years, one lived ten years ago; the run ends in the very same bytes.

    The first takes every link for one that is over, says so, and trains once its clock is right.
    What is on record has the coordinator's time, whatever a message says; links end by the store's.
    """
    deployment = deploy(extra=TRUST)
    for site in "ab":
        enrol(deployment, site)
    deployment.start_participant("a", clock=YEARS)
    deployment.start_participant("b", clock=-YEARS)
    deployment.start_coordinator()
    deployment.wait_for("is this clock right?", "a")
    deployment.kill("a")
    deployment.start_participant("a")
    assert deployment.finish() == deployment.wanted()
    records = list(deployment.ledger().history())
    times = [record.time for record in records if isinstance(record, AcceptedRecord)]
    assert len(times) == 6
    assert max(times) - min(times) < YEARS / 10
    place = ("--federation", str(deployment.federation))
    deployment.command("runs", "verify", "tiny", *place)
