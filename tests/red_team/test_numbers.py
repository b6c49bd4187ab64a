"""Numbers as a weapon: finite, and yet so large that a sum of them is not."""

from __future__ import annotations

import json
import math
import sys
import time

import msgpack
import pytest
from typer.testing import CliRunner

from coordinator import effects
from coordinator.bootstrap import build_coordinator
from coordinator.liveness import read_status
from coordinator.runs import following
from coordinator.runs.newest_round import Follower
from gradualdiff.cli.main import app
from shared import topology
from shared.brokers.embedded import EmbeddedBroker
from shared.brokers.port import Message
from shared.config import canonical_json
from shared.errors import (
    DecodeError,
    DeltaRefusedError,
    DivergedError,
    LedgerDamagedError,
    LedgerError,
)
from shared.protocol import wire
from shared.protocol.events import DeltaSubmitted
from shared.protocol.manifest import LocalMetrics
from shared.protocol.records import AcceptedRecord, ClosedRecord
from tests import federations
from tests.steering import forget_links, records, store_of, verify

LARGEST = sys.float_info.max


@pytest.fixture
def opened(monkeypatch):
    """The newest connection of each identity, as the federation under test makes them."""
    connections = {}
    connect = EmbeddedBroker.connect

    def spy(self, identity, rights):
        connections[identity] = connect(self, identity, rights)
        return connections[identity]

    monkeypatch.setattr(EmbeddedBroker, "connect", spy)
    return connections


@pytest.mark.parametrize("nll", [-LARGEST, LARGEST, 1e10, -2.0])
def test_an_insane_loss_does_not_pass_the_door(tmp_path, opened, nll):
    """A kit claims it with its delta: refused by name, not on record, and the run is as it was."""
    config = federations.config()
    honest = federations.run(config, tmp_path / "honest").adapter_sha
    sent = []

    def claim(state):
        if state.opened is None or state.opened.round in sent:
            return
        sent.append(state.opened.round)
        event = DeltaSubmitted(
            run="test",
            round=state.opened.round,
            source_sha=state.opened.source_sha,
            sha="a" * 64,
            size=9,
            examples=1,
            tokens=1,
            metrics=LocalMetrics(steps=1),
        )
        message = msgpack.unpackb(wire.encode(event, 1.0))
        message["body"]["metrics"]["held_out"] = {"nll": nll, "tokens": 2**40, "examples": 1}
        for site in "abc":
            key = topology.event_key("test", site, event.word)
            data = msgpack.packb(message)
            opened[site].publish([Message(topology.EVENTS_EXCHANGE, key, data)])

    state = federations.run(config, tmp_path / "loud", moved=claim)
    assert state.adapter_sha == honest
    assert len(sent) == 3
    assert opened["coordinator"].depth(topology.REFUSED_QUEUE) == 9
    assert {record.sha for record in records(tmp_path / "loud", AcceptedRecord)}.isdisjoint(
        {"a" * 64}
    )
    assert all(loss is None or 0 <= loss < 10 for loss in state.held_out)


@pytest.mark.parametrize("nll", [-LARGEST, LARGEST])
def test_a_round_that_holds_such_numbers_from_before_is_closed(tmp_path, nll):
    """Three of them, taken by an earlier release, and a decision without a result."""
    config = federations.config()
    wanted = federations.run(config, tmp_path).adapter_sha
    store = store_of(tmp_path)
    for site, tokens in zip("abc", (1, 2, 2), strict=True):  # with these even the mean overflows
        key = topology.accepted_key("test", 3, site)
        record = json.loads(store.get(key))
        record["metrics"]["held_out"] = {"nll": nll, "tokens": tokens, "examples": 1}
        store.put(key, canonical_json(record))
    store.delete(topology.finished_key("test"))
    store.delete(topology.round_key("test", 3, "closed"))
    forget_links(store)
    assert federations.run(config, tmp_path).adapter_sha == wanted
    closed = records(tmp_path, ClosedRecord)[-1]
    assert closed.source_held_out is not None
    assert math.isfinite(closed.source_held_out.nll)
    assert verify(tmp_path).findings == []


@pytest.mark.model
def test_a_site_whose_model_diverged_says_so_itself():
    """An honest site claims no such number: it reports an error with the field and what to do."""
    import torch

    from participant.data import TokenisedExample
    from participant.learner.evaluation import evaluate_held_out

    class Diverged:
        def clear(self):
            """Nothing to clear."""

        def answer_nll(self, batch):
            return torch.tensor(1e30 * len(batch))

    example = TokenisedExample(input_ids=(1, 2, 3), answer_start=1)
    with pytest.raises(DivergedError, match=r"at most 1e\+09 nats per token, got"):
        evaluate_held_out(Diverged(), [example], lambda: False, lambda _: None)


# What goes wrong while a decision is carried out -------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ValueError("nobody foresaw this"),
        DecodeError("the source is torn"),
        DeltaRefusedError("norm: expected less"),
        LedgerDamagedError("deltas/x: does not have its sha256; restore it"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_round_that_cannot_be_closed_says_so_and_blames_no_message(tmp_path, monkeypatch, error):
    """Nothing is refused; error, status, rounds show and its view name round, cause and way on."""
    broken = [True]
    close_round = effects.close_round

    def fail(*arguments, **options):
        if broken:
            raise error
        return close_round(*arguments, **options)

    config = federations.config(rounds=1)
    honest = federations.run(config, tmp_path / "honest").adapter_sha
    monkeypatch.setattr(effects, "close_round", fail)
    for _ in "first", "and at each start":
        with pytest.raises(LedgerError) as caught:
            federations.run(config, tmp_path)
        assert str(error).rstrip("'") in str(caught.value)
    status = read_status(store_of(tmp_path), "test")
    assert status is not None
    assert status.problem.startswith("round 1 is decided and cannot be closed: ")
    if not isinstance(error, LedgerDamagedError):
        assert "runs branch test --at 0 --name NEW" in status.problem
        assert status.problem == str(caught.value)
    store = ["--store", str(tmp_path / "store")]
    told = CliRunner().invoke(app, ["rounds", "show", "test", "1", *store])
    assert status.problem in told.output
    now = Follower(store_of(tmp_path), "test").look(1)
    assert following.look(now, status, 0.0).reason == status.problem
    broken.clear()
    assert federations.run(config, tmp_path).adapter_sha == honest
    told = CliRunner().invoke(app, ["rounds", "show", "test", "1", *store])
    assert "cannot be closed" not in told.output


def test_the_message_at_hand_is_kept_when_a_step_fails(tmp_path, monkeypatch):
    """The dispatcher refused it, and the next one, and so on, each time the round did not close."""
    monkeypatch.setattr(effects, "close_round", lambda *_, **__: 1 / 0)
    server = EmbeddedBroker()
    office = server.connect(topology.COORDINATOR, topology.coordinator_rights())
    config = federations.config(rounds=1)
    with pytest.raises(LedgerError, match="ZeroDivisionError"):
        federations.run(config, tmp_path)
    role = build_coordinator(config, store_of(tmp_path), office, tmp_path / "spool", time.time)
    role.tick()
    with pytest.raises(LedgerError, match="round 1 is decided and cannot be closed"):
        role.dispatcher.drain()
    assert office.depth(topology.REFUSED_QUEUE) == 0
    assert office.depth(topology.coordinator_queue("test")) == 1
