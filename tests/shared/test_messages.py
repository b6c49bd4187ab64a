"""Where each event goes, and that one file says so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from shared import topology
from shared.protocol import messages, wire
from shared.protocol.events import (
    CoordinatorTick,
    MessageRefused,
    RunDeclined,
    SiteOnline,
    TrainingProgressed,
)
from shared.topology import ANY_RUN, COORDINATOR, EVENTS_EXCHANGE, REFUSED_EXCHANGE, SITES_EXCHANGE

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("shared", "coordinator", "participant", "gradualdiff")
BUILDER = ROOT / "shared" / "protocol" / "messages.py"
REFUSED = MessageRefused(queue="site.a", sender=None, reason="no", data=b"x")
PROGRESSED = TrainingProgressed(run="r1", round=1, activity="load", step=0, of=1, seconds=0.0)


@pytest.mark.parametrize(
    ("message", "exchange", "key", "event"),
    [
        (messages.to_site("a", PROGRESSED, 1.0), SITES_EXCHANGE, "a", PROGRESSED),
        (messages.to_refused(REFUSED, 1.0), REFUSED_EXCHANGE, topology.REFUSED_KEY, REFUSED),
    ],
)
def test_the_coordinator_speaks_to_one_site_or_to_people(message, exchange, key, event):
    """By the site's name, or into the refused queue; nothing of it expires."""
    assert (message.exchange, message.routing_key) == (exchange, key)
    assert message.expires_seconds is None
    assert wire.decode(message.body).event == event


@pytest.mark.parametrize(
    ("event", "run"),
    [
        (SiteOnline(), ANY_RUN),
        (SiteOnline(run="r1"), ANY_RUN),
        (REFUSED, ANY_RUN),
        (RunDeclined(run="r1", reason="no"), "r1"),
        (CoordinatorTick(run="r1", writer="w", now=1.0), "r1"),
    ],
    ids=str,
)
def test_a_site_speaks_to_its_run_or_to_every_run(event, run):
    """The key names the run, who speaks and the event's word."""
    message = messages.to_coordinator(COORDINATOR, event, 2.0, 5.0)
    assert message.exchange == EVENTS_EXCHANGE
    assert message.routing_key == topology.event_key(run, COORDINATOR, event.word)
    assert message.expires_seconds == 5.0
    told = wire.decode(message.body)
    assert (told.event, told.time) == (event, 2.0)


def packs(path: Path) -> bool:
    """Whether this file makes the bytes of an event."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    asked = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    imported = {
        f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return any(name.endswith("wire.encode") for name in asked | imported)


def test_one_file_packs_events():
    """Whoever publishes one asks it; raw bytes that came as a message are passed on as they are."""
    files = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]
    assert BUILDER in files
    assert [path for path in files if packs(path)] == [BUILDER]
