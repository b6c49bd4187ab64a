"""How long the coordinator's process waits before it connects anew."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest

from coordinator import daemon
from shared.backoff import FIRST_SECONDS, Backoff
from shared.errors import BrokerUnavailableError, InterruptedRunError


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


@pytest.mark.parametrize("where", ["connect", "build"])
def test_a_line_lost_over_a_question_leads_to_a_look_at_the_queues(monkeypatch, where):
    """A damaged queue answers nobody, and the line may be cut before that is noticed."""
    stopping, steps = threading.Event(), []

    def step(name, result):
        steps.append(name)
        if name == where and steps.count(name) == 1:
            raise BrokerUnavailableError("broker: cut; check the network")
        if name == "build":
            stopping.set()
        return result

    monkeypatch.setattr(daemon, "_build", lambda *_: step("build", None))
    monkeypatch.setattr(daemon, "_attend", lambda *_: None)
    monkeypatch.setattr(daemon, "_revive", lambda _: steps.append("revive"))
    monkeypatch.setattr(daemon, "Backoff", lambda: SimpleNamespace(next=lambda: 0.0))
    context = SimpleNamespace(
        config=SimpleNamespace(run=SimpleNamespace(name="r")),
        stopping=stopping,
        connect=lambda: contextlib.nullcontext(step("connect", None)),
    )
    with pytest.raises(InterruptedRunError):
        daemon.serve(context)
    wanted = {"connect": ["connect", "connect", "build"]}
    wanted["build"] = ["connect", "build", "revive", "connect", "build"]
    assert steps == wanted[where]
