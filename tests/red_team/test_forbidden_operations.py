"""All that a site's account may not do on the broker, tried by pika and urllib3 alone.

The account and the kit are those that ``gradualdiff setup`` made. Each row says what must come of
it, and afterwards the broker is as it was. For the store see test_forbidden_urls.
"""

from __future__ import annotations

import contextlib
import json
import time
from types import SimpleNamespace
from urllib.parse import quote

import pika
import pytest
import urllib3
from pika.exceptions import (
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from coordinator.bootstrap import build_coordinator
from shared.brokers.rabbitmq import connect
from shared.config import load_federation, load_site
from shared.credentials import broker_address
from shared.protocol import wire
from shared.protocol.events import CoordinatorTick, RunDeclined, RunFinished
from shared.protocol.ledger import Ledger
from shared.protocol.records import DeclinedRecord
from shared.stores.opening import open_s3
from shared.topology import (
    EVENTS_EXCHANGE,
    REFUSED_EXCHANGE,
    REFUSED_KEY,
    REFUSED_QUEUE,
    SITES_EXCHANGE,
    coordinator_queue,
    event_key,
    mirror_queue,
    site_queue,
)
from tests.servers.deployment import Deployment
from tests.servers.rabbitmq import ADMIN

RUN, MINE, OTHER = "tiny", "a", "b"
OWN = site_queue(MINE)
FOREIGN = {
    "another site's": site_queue(OTHER),
    "the coordinator's": coordinator_queue(RUN),
    "the refused": REFUSED_QUEUE,
    "the mirror": mirror_queue(RUN),
}


@pytest.fixture(scope="module")
def world(rabbit_server, s3_server, tmp_path_factory):
    """A federation that was set up, and a message in every queue."""
    vhost = rabbit_server.new_vhost()
    deployment = Deployment(
        tmp_path_factory.mktemp("federation"), None, rabbit_server, vhost, s3_server
    )
    config = load_federation(deployment.federation)
    store = open_s3(config.store, deployment.folder)
    file = deployment.site_toml(MINE)
    with _channel(rabbit_server, vhost, ADMIN, rabbit_server.password) as office:
        for queue in (OWN, *FOREIGN.values()):
            office.basic_publish("", queue, b"bait")
        yield SimpleNamespace(
            server=rabbit_server,
            vhost=vhost,
            password=broker_address(load_site(file).broker, file.parent).password,
            deployment=deployment,
            config=config,
            store=store,
            office=office,
        )
    deployment.close()
    rabbit_server.delete_vhost(vhost)


@pytest.fixture
def unchanged(world):
    """Accounts, rights, exchanges, queues, bindings and messages are afterwards as before."""

    def everything():
        definitions = world.server.api("GET", "definitions")
        depths = {}
        for queue in (OWN, *FOREIGN.values()):
            there = world.office.queue_declare(queue, passive=True).method
            depths[queue] = (there.message_count, there.consumer_count)
        return definitions, depths

    before = everything()
    assert set(before[1].values()) == {(1, 0)}
    yield
    assert everything() == before


@contextlib.contextmanager
def _channel(server, vhost, account, password):
    parameters = pika.ConnectionParameters(
        "127.0.0.1", server.port, vhost, pika.PlainCredentials(account, password), heartbeat=0
    )
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


# The broker ----------


def publish(exchange, key, user_id=MINE):
    """To try a message; unroutable or not, the broker has to refuse it."""
    properties = pika.BasicProperties(user_id=user_id)
    return lambda channel: channel.basic_publish(exchange, key, b"x", properties, mandatory=True)


def consume(queue):
    return lambda channel: channel.basic_consume(queue, lambda *_: None)


READS = {
    f"{verb} {whose} queue": (403, attempt(queue))
    for whose, queue in FOREIGN.items()
    for verb, attempt in {
        "get from": lambda queue: lambda channel: channel.basic_get(queue, auto_ack=True),
        "consume": consume,
        "purge": lambda queue: lambda channel: channel.queue_purge(queue),
        "delete": lambda queue: lambda channel: channel.queue_delete(queue),
        "publish by the default exchange into": lambda queue: publish("", queue),
        "bind to all events": lambda queue: (
            lambda channel: channel.queue_bind(queue, EVENTS_EXCHANGE, "#")
        ),
    }.items()
}
DECLARATIONS = {
    "declare a queue": lambda channel: channel.queue_declare("mine"),
    "declare a queue named by the broker": lambda channel: channel.queue_declare(""),
    "declare its own queue anew": lambda channel: channel.queue_declare(OWN, durable=True),
    "delete its own queue": lambda channel: channel.queue_delete(OWN),
    "bind its own queue to all events": lambda channel: channel.queue_bind(
        OWN, EVENTS_EXCHANGE, "#"
    ),
    "bind its own queue to another's": lambda channel: channel.queue_bind(
        OWN, SITES_EXCHANGE, OTHER
    ),
    "unbind another's queue": lambda channel: channel.queue_unbind(
        site_queue(OTHER), SITES_EXCHANGE, OTHER
    ),
    "unbind the coordinator's queue": lambda channel: channel.queue_unbind(
        coordinator_queue(RUN), EVENTS_EXCHANGE, f"{RUN}.*.*"
    ),
    "declare an exchange": lambda channel: channel.exchange_declare("mine"),
    "declare an exchange that is there": lambda channel: channel.exchange_declare(
        EVENTS_EXCHANGE, "topic", durable=True
    ),
    "delete an exchange": lambda channel: channel.exchange_delete(EVENTS_EXCHANGE),
    "bind exchanges": lambda channel: channel.exchange_bind(SITES_EXCHANGE, EVENTS_EXCHANGE, "#"),
}
MESSAGES = {
    "ring another site": publish(SITES_EXCHANGE, OTHER),
    "ring itself": publish(SITES_EXCHANGE, MINE),
    "forge a refusal": publish(REFUSED_EXCHANGE, REFUSED_KEY),
    "publish by the default exchange into its own queue": publish("", OWN),
    **{
        f"publish by amq.{kind}": publish(f"amq.{kind}", OWN)
        for kind in ("direct", "fanout", "topic", "headers", "match", "rabbitmq.trace")
    },
    "speak under another site's key": publish(EVENTS_EXCHANGE, event_key(RUN, OTHER, "declined")),
    "tick in the coordinator's name": publish(
        EVENTS_EXCHANGE, event_key(RUN, "coordinator", CoordinatorTick.word)
    ),
    "hide in a longer key": publish(EVENTS_EXCHANGE, f"{RUN}.{MINE}.{OTHER}.declined"),
    "hide behind a line's end": publish(EVENTS_EXCHANGE, f"x.{OTHER}.y\n{RUN}.{MINE}.z"),
}
BROKER = {
    **READS,
    **{what: (403, attempt) for what, attempt in (DECLARATIONS | MESSAGES).items()},
    "speak as another account": (406, publish(EVENTS_EXCHANGE, f"{RUN}.{MINE}.declined", OTHER)),
}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("what", BROKER)
def test_the_broker_refuses_to(world, what):
    """The channel is closed with 403, or with 406 where the sender is forged."""
    code, attempt = BROKER[what]
    with _channel(world.server, world.vhost, MINE, world.password) as channel:
        with pytest.raises(ChannelClosedByBroker) as caught:
            attempt(channel)
        assert caught.value.reply_code == code


@pytest.mark.usefixtures("unchanged")
def test_the_password_opens_no_other_door(world):
    """Not another virtual host, and not another account."""
    denied = (ProbableAccessDeniedError, ConnectionClosedByBroker)
    with pytest.raises(denied), _channel(world.server, "/", MINE, world.password):
        pass
    for account in (OTHER, "coordinator", ADMIN):
        with (
            pytest.raises(ProbableAuthenticationError),
            _channel(world.server, world.vhost, account, world.password),
        ):
            pass


MANAGEMENT = {
    "see who it is": ("GET", "whoami", None),
    "list queues": ("GET", "queues", None),
    "list users": ("GET", "users", None),
    "list connections": ("GET", "connections", None),
    "read the definitions": ("GET", "definitions", None),
    "write definitions": ("POST", "definitions", {"users": []}),
    "delete a queue": ("DELETE", "queues/{vhost}/" + site_queue(OTHER), None),
    "give itself every right": (
        "PUT",
        f"permissions/{{vhost}}/{MINE}",
        {"configure": ".*", "write": ".*", "read": ".*"},
    ),
    "take its limits away": ("DELETE", f"user-limits/{MINE}/max-connections", None),
    "make itself an administrator": (
        "PUT",
        f"users/{MINE}",
        {"password": "x", "tags": "administrator"},
    ),
    "publish": (
        "POST",
        f"exchanges/{{vhost}}/{SITES_EXCHANGE}/publish",
        {"routing_key": OTHER, "payload": "x", "payload_encoding": "string", "properties": {}},
    ),
    "get messages": (
        "POST",
        "queues/{vhost}/" + site_queue(OTHER) + "/get",
        {"count": 1, "ackmode": "ack_requeue_false", "encoding": "auto"},
    ),
}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("what", MANAGEMENT)
def test_the_management_api_does_not_let_it(world, what):
    """A site's account has no tag, so that the API knows it not at all."""
    method, path, body = MANAGEMENT[what]
    with urllib3.PoolManager(retries=False) as http:
        answer = http.request(
            method,
            f"{world.server.management_url}/api/{path.format(vhost=quote(world.vhost))}",
            body=None if body is None else json.dumps(body),
            headers=urllib3.make_headers(basic_auth=f"{MINE}:{world.password}"),
        )
    assert answer.status == 401, answer.data[:200]


# The coordinator ----------


def test_the_coordinator_refuses_what_the_broker_lets_pass(world, tmp_path):
    """No sender, a tick, a coordinator's word, another run: refused by name, nothing on record.

    The broker checks a sender that is given, and the key's form; the rest is for admission.
    """
    now = time.time()
    rows = [
        (RunDeclined(run=RUN, reason="x"), None, "got none"),
        (CoordinatorTick(run=RUN, writer="x", now=now), MINE, "a may not send a CoordinatorTick"),
        (RunFinished(run=RUN, round=1, sha=None, reason="x"), MINE, "RunFinished"),
        (RunDeclined(run="other", reason="x"), MINE, "run: expected tiny, got other from a"),
    ]
    with _channel(world.server, world.vhost, MINE, world.password) as channel:
        for event, user_id, _ in rows:
            key = event_key(RUN, MINE, event.word)
            properties = pika.BasicProperties(user_id=user_id)
            channel.basic_publish(EVENTS_EXCHANGE, key, wire.encode(event, now), properties)
    with connect(broker_address(world.config.broker, world.deployment.folder)) as office:
        role = build_coordinator(world.config, world.store, office, tmp_path / "spool", time.time)
        letters = []
        while len(letters) < len(rows):
            role.dispatcher.handle_next(5.0)
            bodies = [body for _, _, body in office.peek(REFUSED_QUEUE, 100) if body != b"bait"]
            told = [wire.decode(body).event for body in bodies]
            letters = [letter for letter in told if letter.data != b"bait"]
    for letter, (_, _, reason) in zip(letters, rows, strict=True):
        assert reason in letter.reason
    ledger = Ledger(world.store, RUN, "reader", time.time)
    assert not [record for record in ledger.history() if isinstance(record, DeclinedRecord)]
