"""Kill either role at every point by name, start it again: the same adapter, nothing twice.

Every row is over a real broker and a real store. ``benchmarks/recovery_seconds.py`` carries out
the same rows and says how long a restart takes.
"""

from __future__ import annotations

import pytest

from tests.crash.drill import SITES, Ground, carry_out, check
from tests.crash.table import EXEMPT, ROWS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ground(tmp_path_factory, rabbit_server, s3_server):
    """Accounts and kits for all rows."""
    made = Ground(tmp_path_factory.mktemp("crash"), rabbit_server, s3_server)
    yield made
    made.close()


def test_every_point_of_an_undisturbed_run_is_a_row(ground):
    """Both roles traced from start to end: whatever they pass, the table kills at."""
    with ground.drill() as drill:
        coordinator = drill.start("coordinator")
        for site in SITES:
            drill.start(site)
        drill.wait("the end", lambda: coordinator.code() is not None)
        assert coordinator.code() == 0, drill.tails()
        check(drill)
        reached = {("coordinator", point) for point in drill.points("coordinator")}
        reached |= {("participant", point) for site in SITES for point in drill.points(site)}
    killed = {(row.role, row.point) for row in ROWS}
    assert sorted(reached - killed - set(EXEMPT)) == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_killed_at(ground, row):
    """The kill fired there, and the run ended as if it had not."""
    with ground.drill(row) as drill:
        carry_out(drill)
        check(drill)


def test_the_launcher_as_a_program(ground, monkeypatch):
    """``python -m tests.crash.armed`` does what its forks do."""
    monkeypatch.setattr(ground, "forked", False)
    row = next(row for row in ROWS if row.point == "record.after:closing")
    with ground.drill(row) as drill:
        carry_out(drill)
        check(drill)
