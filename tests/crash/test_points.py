"""The crash table has every point that the code has."""

from __future__ import annotations

from pathlib import Path

from tests.crash.points import calls, calls_in, subjects
from tests.crash.table import EXEMPT, ROWS

KILLED = {(row.role, row.point) for row in ROWS}


def test_every_stage_in_the_code_is_a_row_for_each_role_that_reaches_it():
    """Who adds a failpoint() adds a row."""
    stages = {(role, point.partition(":")[0]) for role, point in KILLED}
    missing = [
        (call.place, role, call.stage)
        for call in calls()
        for role in sorted(call.roles)
        if call.stage is None or (role, call.stage) not in stages
    ]
    assert missing == []


def test_every_stage_of_the_table_is_in_the_code():
    """A point that was renamed or removed leaves no row behind."""
    stages = {(role, call.stage) for call in calls() for role in call.roles}
    stale = {
        (row.role, row.point)
        for row in ROWS
        if (row.role, row.point.partition(":")[0]) not in stages
    }
    assert sorted(stale) == []


def test_every_record_and_every_event_is_a_row():
    """A new kind of record or event needs rows, or a reason why not."""
    assert sorted(subjects() - KILLED - set(EXEMPT)) == []


def test_no_exemption_is_stale():
    """What is killed at after all needs no reason."""
    assert sorted(set(EXEMPT) & KILLED) == []


def test_no_two_rows_are_the_same():
    """Each has its own name in the report."""
    names = [row.name for row in ROWS]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_the_scan_sees_what_is_no_literal():
    """A computed stage would hide from the table: it counts as missing."""
    source = "failpoint(stage)\nfailpoints.failpoint('a.before', word)\nother('b')\n"
    found = calls_in(source, Path("coordinator/new.py"))
    assert [call.stage for call in found] == [None, "a.before"]
    assert found[0].roles == {"coordinator"}
