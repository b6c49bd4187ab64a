"""A kit fills the coordinator's queue on a real RabbitMQ, or opens more than it needs."""

from __future__ import annotations

import contextlib
import threading
import time

import pika
import pytest

from coordinator.accounts.broker_administration import ManagementAdmin
from coordinator.accounts.site_accounts import MOST_CONNECTIONS, Accounts
from participant.outbox import Outbox
from shared import topology
from shared.brokers.port import Message
from shared.brokers.rabbitmq import connect
from shared.config import load_site
from shared.credentials import BrokerAddress, broker_address
from shared.errors import BrokerError, BrokerUnavailableError, MessageRejectedError
from shared.protocol.records import MemberRecord, OpenedRecord
from shared.stores.directory import DirectoryStore
from shared.topology import coordinator_queue, run_topology
from tests.federation.conftest import deploy  # noqa: F401 - a fixture
from tests.patience import wait_until
from tests.servers.rabbitmq import ADMIN

ROOM = 40
JUNK = 2_000  # of one go; another one follows


@pytest.fixture
def address(rabbit_server, vhost):
    """Addresses of the administrator or, by name, of sites with the product's own accounts."""
    store_passwords = {}

    def make(account=ADMIN):
        password = rabbit_server.password
        if account != ADMIN:
            password = store_passwords[account]
        return BrokerAddress("127.0.0.1", rabbit_server.port, vhost, account, password, tls=False)

    make.passwords = store_passwords
    return make


@pytest.fixture
def site(rabbit_server, vhost, address, tmp_path):
    """A site's account, as gradualdiff sites add makes it."""
    admin = ManagementAdmin(rabbit_server.management_url, ADMIN, rabbit_server.password, None)
    accounts = Accounts(DirectoryStore(tmp_path / "accounts"), admin, vhost, time.time)
    address.passwords["kit"] = accounts.add("kit")
    yield "kit"
    accounts.remove("kit")


def flood(address, count, run="r1"):
    """Publish without waiting for any confirm, as fast as the outbox takes it."""
    credentials = pika.PlainCredentials(address.account, address.password)
    parameters = pika.ConnectionParameters(
        address.host, address.port, address.vhost, credentials, heartbeat=0
    )
    connection = pika.BlockingConnection(parameters)
    channel = connection.channel()
    for _ in range(count):
        channel.basic_publish(topology.EVENTS_EXCHANGE, f"{run}.{address.account}.ready", b"junk")
    connection.close()


def test_an_older_releases_queue_is_made_anew_with_the_limits(address, vhost):
    """A running federation is upgraded: its queue without limits is in nobody's way."""
    run = run_topology("r1", ("kit",))
    with connect(address()) as broker:
        broker.declare(run)
        for queue in (coordinator_queue("r1"), topology.mirror_queue("r1")):
            broker.delete(queue)
        broker.declare(
            topology.Topology(
                exchanges=(),
                queues=(
                    topology.Queue(coordinator_queue("r1"), single_active_consumer=True),
                    topology.Queue(
                        topology.mirror_queue("r1"), max_length=1_000, delivery_limit=None
                    ),
                ),
                bindings=(),
            )
        )
        broker.declare(run)
        broker.declare(run)
        consumer = broker.consume(coordinator_queue("r1"))
        key = topology.event_key("r1", "coordinator", "tick")
        broker.publish([Message(topology.EVENTS_EXCHANGE, key, b"now")])
        assert consumer.receive(10.0).body == b"now"


def test_a_full_queue_refuses_the_publisher_who_waits_and_gets_through(monkeypatch, address, site):
    """The queue stops growing; a site's word waits at the site, and arrives once there is room."""
    monkeypatch.setattr(topology, "COORDINATOR_QUEUE_LENGTH", ROOM)
    queue = coordinator_queue("r1")
    key = topology.event_key("r1", site, "ready")
    with connect(address()) as broker, connect(address(site)) as kit:
        broker.declare(run_topology("r1", (site,)))
        flood(address(site), 50 * ROOM)
        junk = [Message(topology.EVENTS_EXCHANGE, key, b"junk")] * ROOM
        with pytest.raises(MessageRejectedError):
            kit.publish(junk)
        full = broker.depth(queue)  # RabbitMQ notices a little late that it is
        with pytest.raises(MessageRejectedError):
            kit.publish(junk)
        assert broker.depth(queue) == full
        outbox = Outbox(threading.Event())
        outbox.connected(kit)
        word = threading.Thread(
            target=outbox.publish, args=([Message(topology.EVENTS_EXCHANGE, key, b"mine")],)
        )
        word.start()
        consumer, bodies = broker.consume(queue), []
        while b"mine" not in bodies:
            delivery = consumer.receive(60.0)
            assert delivery is not None
            bodies.append(delivery.body)
            delivery.acknowledge()
        word.join(10.0)
        assert not word.is_alive()


def test_a_site_may_not_open_connections_without_end(address, site):
    """The account that the kit is made for has so many, and the broker refuses more."""
    with contextlib.ExitStack() as opened:
        for _ in range(MOST_CONNECTIONS):
            opened.enter_context(connect(address(site)))
        with pytest.raises((BrokerError, BrokerUnavailableError)):
            connect(address(site))


def on_record(deployment, kind):
    """The ledger's first record of a kind; None until there is one."""
    return next((one for one in deployment.ledger().history() if isinstance(one, kind)), None)


@pytest.mark.slow
def test_junk_that_never_ends_keeps_no_round_from_closing_and_no_operator_unheard(
    deploy,  # noqa: F811
):
    """Its sender is out while the junk still comes; the run ends as if it was never in it."""
    deployment = deploy()
    deployment.start_coordinator()
    deployment.wait_for("coordinator.active", "coordinator")
    deployment.start_participant("a")
    wait_until(lambda: on_record(deployment, MemberRecord), "a in the run, which waits for b now")
    site = load_site(deployment.site_toml("b"))
    kit = broker_address(site.broker, deployment.site_toml("b").parent)
    enough, rounds = threading.Event(), []

    def keep_flooding():
        while not enough.is_set():
            with contextlib.suppress(
                pika.exceptions.AMQPConnectionError
            ):  # whoever floods just comes back
                flood(kit, JUNK, "tiny")
                rounds.append(JUNK)

    flooding = threading.Thread(target=keep_flooding, daemon=True)
    flooding.start()
    wait_until(lambda: rounds, "the first of it")
    exclude = ("runs", "exclude", "tiny", "b", "--reason", "it floods")
    deployment.command(*exclude, "--federation", str(deployment.federation))
    wait_until(lambda: on_record(deployment, OpenedRecord), "the first round open without b")
    before = len(rounds)
    wait_until(lambda: len(rounds) > before, "more of it, after that")
    enough.set()
    flooding.join()
    opened = on_record(deployment, OpenedRecord)
    assert (opened.controls, opened.selected) == (1, ("a",))
    assert deployment.finish() == deployment.wanted("a")
