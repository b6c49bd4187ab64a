"""How long the coordinator's process waits before it connects anew."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from coordinator import daemon
from shared.backoff import FIRST_SECONDS, Backoff


@pytest.mark.parametrize("steady", [False, True])
def test_a_standby_whose_line_held_connects_at_once_after_its_loss(monkeypatch, steady):
    """However often it lost its line before: it may be the one to take over. Flapping counts."""
    held = daemon.STEADY_SECONDS + 1 if steady else daemon.STEADY_SECONDS / 2
    times = iter((100.0, 100.0, 100.0 + held))
    monkeypatch.setattr(daemon.time, "monotonic", lambda: next(times))
    stopping = threading.Event()
    turns = []

    def handle_next(timeout):
        turns.append(timeout)
        if len(turns) == 2:
            stopping.set()

    role = SimpleNamespace(
        coordinator=SimpleNamespace(active=False),
        tick=lambda: None,
        dispatcher=SimpleNamespace(handle_next=handle_next),
    )
    pauses = Backoff()
    for _ in range(6):
        pauses.next()
    assert daemon._attend(SimpleNamespace(stopping=stopping), role, pauses) is None
    assert (pauses.next() <= FIRST_SECONDS * 1.5) == steady
