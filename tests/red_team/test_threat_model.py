"""The table of attackers in SECURITY.md: what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_attacker_has_a_test_that_is_there_or_is_open():
    """A row that names no test says that the attack is not stopped."""
    table = (ROOT / "SECURITY.md").read_text().partition("## Who may attack")[2]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 12
    for attacker, _, stopped, shown in rows:
        named = re.findall(r"`(tests/[^`]+)`", shown)
        assert named or "Open" in stopped, attacker
        assert [name for name in named if not (ROOT / name).is_file()] == []
