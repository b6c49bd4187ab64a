"""Words as a weapon: texts, maps and numbers that a site or a coordinator makes as large as it can.

The messages are packed by hand: our own code would not send them.
"""

from __future__ import annotations

import io
import json
import time
from types import SimpleNamespace

import msgpack
import pytest
import structlog

from coordinator.bootstrap import build_coordinator
from coordinator.history import read_history
from participant.bootstrap import subscribe
from participant.handlers import Participant
from participant.site import Site
from participant.workspace import Workspace
from shared import topology
from shared.brokers.embedded import EmbeddedBroker
from shared.brokers.port import MAX_MESSAGE_BYTES, Message
from shared.config import canonical_json
from shared.errors import RunFailedError
from shared.log import configure
from shared.protocol import wire
from shared.protocol.events import MessageRefused, RunFinished, SiteOnline
from shared.protocol.records import DeclinedRecord, FederationRecord, FinishedRecord, MemberRecord
from tests import federations
from tests.numpy_learner import MANIFEST, NUMERICS, NumpyLearner
from tests.steering import records, store_of

RUN = "test"


@pytest.fixture
def lines():
    """The log of this process, line by line, once the test asks for it."""
    stream = io.StringIO()
    configure(stream, level="debug")
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    structlog.reset_defaults()


@pytest.fixture
def federation(tmp_path):
    """A coordinator of three sites, not begun, with its dispatcher and what sites hear."""
    server = EmbeddedBroker()
    office = server.connect(topology.COORDINATOR, topology.coordinator_rights())
    config = federations.config()
    role = build_coordinator(config, store_of(tmp_path), office, tmp_path / "spool", time.time)
    role.coordinator.start()

    def say(site, word, name, **body):
        """Publish a message packed by hand, and let the dispatcher handle what is there."""
        data = msgpack.packb({"v": 1, "type": name, "id": "1", "time": 1.0, "body": body})
        connection = server.connect(site, topology.site_rights(site))
        key = topology.event_key(RUN, site, word)
        connection.publish([Message(topology.EVENTS_EXCHANGE, key, data)])
        return role.dispatcher.drain()

    return SimpleNamespace(
        server=server, office=office, role=role, say=say, folder=tmp_path, config=config
    )


def refusals(federation):
    """Every dead letter so far."""
    consumer = federation.office.consume(topology.REFUSED_QUEUE)
    found = []
    while (delivery := consumer.receive()) is not None:
        found.append(wire.decode(delivery.body).event)
        delivery.acknowledge()
    consumer.close()
    return found


@pytest.mark.parametrize(
    "reason",
    ["A" * 300_000, "X-Amz-Signature" * 20_000, "signature=" * 90_000, "=" * 900_000],
    ids=["letters", "names", "marks", "signs"],
)
def test_a_long_word_stops_no_coordinator(federation, lines, reason):
    """One message that took the log hours: it is handled, kept short and logged short."""
    assert federation.say("a", "declined", "RunDeclined", run=RUN, reason=reason) == 1
    (declined,) = records(federation.folder, DeclinedRecord)
    assert declined.reason.endswith(" … (cut)")
    assert len(declined.reason) == 2_000
    assert all(len(str(line.get("reason", ""))) <= 2_000 for line in lines())
    assert federation.role.coordinator.state.declined.keys() == {"a"}


def test_a_long_word_stops_no_site(federation, lines):
    """The same from a coordinator that means harm, in the site's own dispatcher."""
    line = federation.server.connect("a", topology.site_rights("a"))
    workspace = Workspace(federation.folder / "a")
    participant = Participant(
        Site("a", line, SimpleNamespace(), workspace, NumpyLearner("a"), time.time)
    )
    dispatcher = subscribe("a", line, participant.handlers, time.time)
    body = {"run": RUN, "round": 1, "sha": "a" * 64, "verdict": "refused", "reason": "A" * 900_000}
    data = msgpack.packb({"v": 1, "type": "DeltaAnswered", "id": "1", "time": 1.0, "body": body})
    federation.office.publish([Message(topology.SITES_EXCHANGE, "a", data)])
    assert dispatcher.drain() == 2
    told = lines()
    assert {one["outcome"] for one in told if one["event"] == "message.handled"} == {"done"}
    (answered,) = (one for one in told if one["event"] == "delta.answered")
    assert len(answered["reason"]) == 2_000


def test_a_log_line_of_megabytes_is_cut_and_still_redacted(lines):
    """Whatever reaches the log without a message's bounds, as a library's error may."""
    url = "https://store/k?X-Amz-Credential=AKIA&X-Amz-Signature=feedbeef"
    structlog.get_logger().warning("a.b", reason="A" * 3_000_000, other=f"{url} " * 50_000)
    (line,) = lines()
    assert len(line["reason"]) == 20_000
    assert len(line["other"]) <= 20_000
    assert "feedbeef" not in line["other"]


def test_a_megabyte_of_versions_is_refused_at_the_door(federation):
    """No record is made of it, and the refusal says which field it was."""
    versions = {f"package-{number}": "1" * 30 for number in range(22_000)}
    numerics = {**NUMERICS.model_dump(), "versions": versions}
    ready = {
        "run": RUN,
        "config_digest": federation.config.digest,
        "manifest": MANIFEST.model_dump(),
        "fingerprint": "f" * 64,
        "numerics": numerics,
        "examples": 1,
    }
    assert len(msgpack.packb(ready)) > 970_000
    assert federation.say("a", "ready", "ParticipantReady", **ready) == 1
    assert records(federation.folder, MemberRecord) == []
    (refused,) = refusals(federation)
    assert refused.reason == (
        "ParticipantReady.numerics.versions: expected at most 100 of them, got 22000"
    )


def old_run_with_a_megabyte_of_versions(folder, *, finished):
    """A ledger of an earlier release, which took what no release takes now."""
    config = federations.config(sites=("a", "b"))
    store = store_of(folder)
    versions = {f"package-{number}": "1" * 30 for number in range(20_000)}

    def write(record):
        store.create(record.key(RUN), canonical_json(record.model_dump(mode="json")))

    write(FederationRecord(config=config.recorded(), digest=config.digest, writer="old", time=1.0))
    for site in config.run.participants:
        numerics = NUMERICS.model_copy(update={"versions": {**versions, site: "1"}})
        write(
            MemberRecord(
                site=site,
                manifest=MANIFEST,
                fingerprint="f" * 64,
                numerics=numerics,
                examples=1,
                writer="old",
                time=2.0,
            )
        )
    if finished:
        reason = f"the sites run different versions: {versions}; {versions}"
        write(FinishedRecord(round=0, sha=None, reason=reason, failed=True, writer="old", time=3.0))
    return config


def test_a_run_that_was_attacked_before_is_gone_on_with(tmp_path):
    """A coordinator that finds a megabyte of versions on record becomes active; mended sites join.

    What it says of the sites until then is short.
    """
    config = old_run_with_a_megabyte_of_versions(tmp_path, finished=False)
    (waits_for,) = {*read_history(store_of(tmp_path), RUN).waits_for.values()}
    assert "the sites run different versions" in waits_for
    assert waits_for.endswith("(results are then no longer the same on every site)")
    assert len(waits_for) < 2_000
    assert federations.run(config, tmp_path).last_round == 3


def test_a_run_that_was_ended_that_way_says_so(tmp_path):
    """Its coordinator becomes active, tells the sites and ends with the reason."""
    config = old_run_with_a_megabyte_of_versions(tmp_path, finished=True)
    with pytest.raises(RunFailedError, match="different versions"):
        federations.run(config, tmp_path)


def test_whatever_is_on_record_the_end_is_said_to_the_sites(tmp_path):
    """The message fits, however long the reason on record is."""
    config = old_run_with_a_megabyte_of_versions(tmp_path, finished=True)
    server = EmbeddedBroker()
    office = server.connect(topology.COORDINATOR, topology.coordinator_rights())
    role = build_coordinator(config, store_of(tmp_path), office, tmp_path / "spool", time.time)
    site = server.connect("a", topology.site_rights("a"))
    online = wire.encode(SiteOnline(run=RUN), 1.0)
    key = topology.event_key(topology.ANY_RUN, "a", SiteOnline.word)
    site.publish([Message(topology.EVENTS_EXCHANGE, key, online)])
    role.dispatcher.drain()
    assert role.coordinator.active
    delivery = site.consume(topology.site_queue("a")).receive()
    assert delivery is not None
    assert len(delivery.body) < MAX_MESSAGE_BYTES
    event = wire.decode(delivery.body).event
    assert isinstance(event, RunFinished)
    assert event.reason.startswith("the sites run different versions")


def test_a_refusal_of_a_megabyte_is_a_message_too(federation):
    """The bytes are kept, the reason is cut, and both together fit."""
    assert federation.say("a", "declined", "RunDeclined", run=RUN, reason="x" * 1_048_000) == 1
    assert federation.say("a", "declined", "Nonsense" + "y" * 500_000, reason="z" * 500_000) == 1
    (refused,) = refusals(federation)
    assert isinstance(refused, MessageRefused)
    assert len(refused.data) == topology.REFUSED_BYTES
