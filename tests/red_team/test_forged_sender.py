"""A message of one site that claims to be another's, against a RabbitMQ before 3.13.

Its property flags announce more flags: the broker reads its account from one place, pika a victim's
name from another, or falls over what is there. Quorum queues write the properties anew; the others
pass them on as they came, so a dispatcher reads the mirror of events here, which is such a one.
"""

from __future__ import annotations

import struct
import time
from dataclasses import replace
from types import SimpleNamespace

import pika
import pytest

from coordinator.bootstrap import build_coordinator
from gradualdiff.cli.redrive import redrive
from gradualdiff.doctor.federation import _version
from shared import topology
from shared.brokers.port import Message
from shared.protocol import wire
from shared.protocol.events import MessageRefused, RunDeclined
from shared.protocol.records import DeclinedRecord
from tests import federations
from tests.contracts.test_rabbitmq import RabbitBus
from tests.steering import records, store_of

RUN, MALLORY, VICTIM = "test", "mallory", "victim"
MORE_FLAGS = 1
MISREAD = b"\0\0" + bytes([len(VICTIM)]) + VICTIM.encode()  # pika: more flags, no type, a sender
FATAL = b"\0\xff"  # pika: more flags, a type of 255 bytes, and then nothing


class Forged(pika.BasicProperties):
    """The broker reads a content type, and the account that it checks."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def encode(self):
        flags = self.FLAG_CONTENT_TYPE | self.FLAG_USER_ID | MORE_FLAGS
        mine = MALLORY.encode()
        return [
            struct.pack(">H", flags),
            bytes([len(self.inside)]) + self.inside,
            bytes([len(mine)]) + mine,
        ]


@pytest.fixture
def federation(rabbit_server, vhost, tmp_path):
    """A coordinator over the real broker, a dispatcher at its mirror, and mallory's connection."""
    bus = RabbitBus(rabbit_server, vhost)
    office = bus.connect(topology.COORDINATOR, topology.coordinator_rights())
    config = federations.config(sites=(MALLORY, VICTIM))
    role = build_coordinator(config, store_of(tmp_path), office, tmp_path / "spool", time.time)
    mirror = replace(role.dispatcher, consumer=office.consume(topology.mirror_queue(RUN)))
    bus.connect(MALLORY, topology.site_rights(MALLORY))
    login = pika.PlainCredentials(MALLORY, bus.accounts[MALLORY])
    parameters = pika.ConnectionParameters("127.0.0.1", rabbit_server.port, vhost, login)
    connection = pika.BlockingConnection(parameters)
    channel = connection.channel()
    channel.confirm_delivery()

    def say(inside, count=1, *, mirrored=True):
        """Publish a decline in the victim's name, confirmed by the broker; handle it."""
        body = wire.encode(RunDeclined(run=RUN, reason="not I"), time.time())
        key = topology.event_key(RUN, MALLORY, RunDeclined.word)
        for _ in range(count):
            channel.basic_publish(topology.EVENTS_EXCHANGE, key, body, Forged(inside))
        for dispatcher in (role.dispatcher, mirror) if mirrored else (role.dispatcher,):
            left = count
            while left > 0:
                left -= dispatcher.handle_next(5.0)

    yield SimpleNamespace(
        office=office, folder=tmp_path, say=say, mirror=mirror, server=rabbit_server
    )
    connection.close()
    bus.close()


def letters(federation):
    """Every dead letter."""
    found = federation.office.peek(topology.REFUSED_QUEUE, 1_000)
    return [wire.decode(body).event for _, _, body in found]


def test_the_attack_is_real():
    """Pika alone reads the victim's name."""
    from shared.brokers.rabbitmq import decoding

    properties = pika.BasicProperties()
    decoding._decode_properties(properties, b"".join(Forged(MISREAD).encode()))
    assert properties.user_id == VICTIM
    with pytest.raises(struct.error):
        decoding._decode_properties(pika.BasicProperties(), b"".join(Forged(FATAL).encode()))


def test_a_message_that_reads_in_two_ways_has_no_sender(federation):
    """It is refused, and the refusal names the key alone; of the victim nothing is on record.

    By the coordinator's own queue it comes as mallory's word, which it is.
    """
    federation.say(MISREAD)
    assert [record.site for record in records(federation.folder, DeclinedRecord)] == [MALLORY]
    (letter,) = letters(federation)
    assert (letter.sender, letter.routing_key) == (None, "test.mallory.declined")
    assert letter.reason == "sender: expected the account 'mallory' of the routing key, got none"


def test_who_only_looks_sees_no_victim_either(federation):
    """Looking at the mirror of events, or taking from a queue."""
    federation.mirror.consumer.close()
    federation.say(MISREAD, mirrored=False)
    ((key, sender, _),) = federation.office.peek(topology.mirror_queue(RUN), 10)
    assert (key, sender) == ("test.mallory.declined", None)
    with federation.office.take_from(topology.mirror_queue(RUN)) as taker:
        taken = taker.take()
    assert taken is not None
    assert taken.sender is None


def test_two_hundred_that_cannot_be_read_cost_no_connection(federation):
    """Each is refused, over the one connection that there was."""
    federation.say(FATAL, 200)
    assert len(letters(federation)) == 200
    assert federation.office.depth(topology.coordinator_queue(RUN)) == 0


def test_redrive_speaks_in_the_name_of_nobody_who_is_not_proven(federation):
    """A letter with two names on it stays, and so does one of a release that kept no key."""
    body = wire.encode(RunDeclined(run=RUN, reason="not I"), time.time())
    queue = topology.coordinator_queue(RUN)
    for key in ("test.mallory.declined", None, "nonsense"):
        event = MessageRefused(
            run=RUN, queue=queue, routing_key=key, sender=VICTIM, reason="x", data=body
        )
        letter = wire.encode(event, time.time())
        federation.office.publish(
            [Message(topology.REFUSED_EXCHANGE, topology.REFUSED_KEY, letter)]
        )
    done = redrive(federation.office)
    assert done.sent == 0
    mallorys, without, nobodys = (kept.why for kept in done.kept)
    assert mallorys.startswith("its routing key is that of mallory and its sender victim")
    assert without.startswith("an earlier release did not note its routing key")
    assert nobodys.startswith("its routing key is that of nobody")
    assert federation.office.depth(queue) == 0


def test_doctor_warns_of_such_a_broker(federation):
    """By the version that the broker gives itself."""
    version = federation.office.version
    assert version == federation.server.api("GET", "overview")["rabbitmq_version"]
    expected = "OK" if [int(n) for n in version.split(".")[:2]] >= [3, 13] else "WARN"
    assert _version(version).verdict == expected
    for known, verdict in (("3.12.14", "WARN"), ("3.13.0", "OK"), ("4.0.5", "OK"), ("?", "WARN")):
        assert _version(known).verdict == verdict
