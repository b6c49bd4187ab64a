"""RabbitMQ under the contract, and what only a real server has: restarts, alarms, TLS, accounts."""

from __future__ import annotations

import contextlib
import gc
import re
import socket
import struct
import subprocess
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pika
import pytest

from shared.brokers.port import Message
from shared.brokers.rabbitmq import connect
from shared.brokers.rabbitmq.io_thread import IoThread
from shared.credentials import BrokerAddress
from shared.errors import AccessRefusedError, BrokerError, BrokerUnavailableError, UnroutableError
from shared.topology import (
    COORDINATOR,
    EVENTS_EXCHANGE,
    SITES_EXCHANGE,
    coordinator_queue,
    mirror_queue,
    run_topology,
    site_queue,
)
from tests.contracts.broker_contract import EVERYTHING, BrokerContract, event
from tests.patience import PATIENCE_SECONDS
from tests.servers.faults import make_certificate
from tests.servers.proxy import FaultProxy
from tests.servers.rabbitmq import ADMIN, RabbitServer


def _binds(rights):
    """Whether it declares queues, and so binds them: the broker asks for the key's read right."""
    return rights.configure.pattern != "^$"


class RabbitBus:
    """Accounts made as asked; connections closed at the end."""

    def __init__(self, server, vhost):
        self.server, self.vhost = server, vhost
        self.accounts, self.connections = {}, []

    def connect(self, identity, rights):
        if identity not in self.accounts:
            self.accounts[identity] = self._account(identity, rights)
        address = BrokerAddress(
            "127.0.0.1", self.server.port, self.vhost, identity, self.accounts[identity], tls=False
        )
        self.connections.append(connect(address))
        return self.connections[-1]

    def _account(self, name, rights):
        self.server.api("PUT", f"users/{name}", {"password": "secret", "tags": ""})
        self.server.api(
            "PUT",
            f"permissions/{self.vhost}/{name}",
            {
                "configure": rights.configure.pattern,
                "write": rights.write.pattern,
                "read": rights.read.pattern,
            },
        )
        self.server.api(
            "PUT",
            f"topic-permissions/{self.vhost}/{name}",
            {
                "exchange": "gradualdiff.events",
                "write": rights.topic_write.pattern,
                "read": "^.*$" if _binds(rights) else "^$",
            },
        )
        return "secret"

    def cut(self, identity):
        assert self.server.cut(identity, self.vhost), "nothing was cut"

    def close(self):
        for connection in self.connections:
            connection.close()
        for name in self.accounts:
            self.server.api("DELETE", f"users/{name}")


@pytest.fixture
def bus(rabbit_server, vhost):
    bus = RabbitBus(rabbit_server, vhost)
    yield bus
    bus.close()


class TestRabbitMQ(BrokerContract):
    def test_many_queues_are_declared_and_counted_in_parts(self, coordinator, monkeypatch):
        """A few in each question, with their bindings; asked for their consumers likewise."""
        monkeypatch.setattr("shared.brokers.rabbitmq.declaring.MOST_AT_ONCE", 3)
        sites = tuple(f"site-{number}" for number in range(8))
        asked, ask = [], IoThread.on_own_channel
        monkeypatch.setattr(
            IoThread, "on_own_channel", lambda io, start: (asked.append(start), ask(io, start))[1]
        )
        coordinator.declare(run_topology("r2", sites))
        assert len(asked) == 1 + 4  # exchanges, 11 queues
        coordinator.publish([Message(SITES_EXCHANGE, site, b"x") for site in sites])
        coordinator.publish([event("r2.site-0.ready")])
        assert coordinator.depth(coordinator_queue("r2")) == 1
        asked.clear()
        queues = [site_queue(site) for site in sites]
        assert coordinator.consumers(queues) == dict.fromkeys(queues, 0)
        assert len(asked) == 3

    """The suite, unchanged."""

    quiet_seconds = 0.3

    @pytest.fixture
    def bus(self, bus):
        return bus


@pytest.fixture
def address(rabbit_server, vhost):
    """The administrator's."""
    return BrokerAddress(
        "127.0.0.1", rabbit_server.port, vhost, ADMIN, rabbit_server.password, tls=False
    )


@pytest.fixture
def coordinator(bus):
    broker = bus.connect(COORDINATOR, EVERYTHING)
    broker.declare(run_topology("r1", ("site-a",)))
    return broker


# Whom it lets in ----------


def test_a_wrong_password_names_its_setting(address):
    """And not the password."""
    with pytest.raises(AccessRefusedError, match=r"broker\.password_file") as caught:
        connect(replace(address, password="not-it"))
    assert "not-it" not in str(caught.value)
    assert "not-it" not in repr(replace(address, password="not-it"))


def test_an_unknown_virtual_host_is_named(address):
    """By its name and the setting it stands in."""
    with pytest.raises(AccessRefusedError, match=r"nowhere.*broker\.url"):
        connect(replace(address, vhost="nowhere"))


def test_nobody_there_is_retryable(address):
    """The port is closed: unavailable, at once."""
    with pytest.raises(BrokerUnavailableError, match=r"refused.*broker\.url"):
        connect(replace(address, port=1))


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_login_that_is_cut_anywhere_is_retryable(address, direction):
    """A broker that starts, or a link that breaks, is no wrong password: nobody may give up."""
    with FaultProxy((address.host, address.port)) as proxy:
        there = replace(address, port=proxy.port)
        with connect(there):
            pass
        whole = proxy.passed[direction]
        cuts = range(1, whole, max(1, whole // 25))
        opened = 0
        for count in cuts:
            proxy.cut_after(count, 1, direction)
            # A cut after the login, in the goodbye at the earliest: open for a moment.
            with contextlib.suppress(BrokerUnavailableError), connect(there):
                opened += 1
            proxy.heal()
        assert opened < len(cuts) / 2
        assert proxy.fired["cut_after"] >= len(cuts) / 2


def test_a_message_without_user_id_has_no_sender(address, coordinator):
    """It passes the broker; that it speaks for nobody is for the reader to see."""
    parameters = pika.ConnectionParameters(
        "127.0.0.1",
        address.port,
        address.vhost,
        pika.PlainCredentials(address.account, address.password),
    )
    with pika.BlockingConnection(parameters) as raw:
        raw.channel().basic_publish(EVENTS_EXCHANGE, "r1.site-a.ready", b"forged")
    delivery = coordinator.consume(coordinator_queue("r1")).receive(PATIENCE_SECONDS)
    assert (delivery.body, delivery.sender) == (b"forged", None)
    delivery.acknowledge()


@pytest.mark.parametrize(
    "headers",
    [
        {"x-acquired-count": "abc", "x-delivery-count": -1},
        {"x-acquired-count": 2**62},
        {"x-delivery-count": [1], "other": {"deep": {"deeper": b"\xff"}}},
        {"undecodable": True},
    ],
)
def test_headers_of_any_kind_harm_nobody(address, coordinator, headers, monkeypatch):
    """A site may send any; the reader takes the message, and lives to read the next."""

    def poisoned(pieces, table):  # a date that Python has none for
        raw = b"\x04whenT" + struct.pack(">Q", 2**60)
        pieces += [struct.pack(">I", len(raw)), raw]
        return len(raw) + 4

    parameters = pika.ConnectionParameters(
        "127.0.0.1",
        address.port,
        address.vhost,
        pika.PlainCredentials(address.account, address.password),
    )
    consumer = coordinator.consume(coordinator_queue("r1"))
    with pika.BlockingConnection(parameters) as raw:
        channel = raw.channel()
        properties = pika.BasicProperties(headers=headers, user_id=address.account)
        with monkeypatch.context() as patched:
            if "undecodable" in headers:
                patched.setattr("pika.data.encode_table", poisoned)
            channel.basic_publish(EVENTS_EXCHANGE, "r1.site-a.ready", b"poison", properties)
    coordinator.publish([event("r1.site-a.ready", b"next")])
    for body in (b"poison", b"next"):
        delivery = consumer.receive(PATIENCE_SECONDS)
        assert (delivery.body, delivery.attempt) == (body, 1)
        delivery.acknowledge()


# What it endures ----------


def test_heartbeats_go_on_while_the_caller_is_busy(address, coordinator):
    """Two seconds of silence end a connection with a heartbeat of one; five of work do not."""
    with connect(address, 1) as broker:
        consumer = broker.consume(coordinator_queue("r1"))
        broker.publish([event("r1.site-a.ready")])
        delivery = consumer.receive(PATIENCE_SECONDS)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            sum(range(1000))
        delivery.acknowledge()
        broker.publish([event("r1.site-a.ready")])


def test_threads_share_a_connection(coordinator):
    """Eight publish at once, one of them to nowhere: each gets its own answer."""

    def publish(number: int) -> bool:
        key = "nobody" if number == 3 else "site-a"
        try:
            coordinator.publish([Message(SITES_EXCHANGE, key, b"%d" % number)] * 50)
        except UnroutableError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(publish, range(8))) == [number != 3 for number in range(8)]
    assert coordinator.depth(site_queue("site-a")) == 350


def test_people_may_look_and_look_again(coordinator):
    """The mirror's messages stay, in order, however often somebody looks at them."""
    coordinator.publish([event("r1.site-a.ready", b"%d" % number) for number in range(3)])
    for _ in range(25):  # more often than a delivery limit would allow
        seen = coordinator.peek(mirror_queue("r1"), 10)
        assert [body for _, _, body in seen] == [b"0", b"1", b"2"]
    assert {sender for _, sender, _ in seen} == {COORDINATOR}
    assert coordinator.purge(mirror_queue("r1")) == 3
    assert coordinator.peek(mirror_queue("r1"), 10) == []


# Whole servers ----------


@pytest.fixture
def own_server(tmp_path):
    """A server of its own, with TLS too, to be killed and frightened."""
    certificate, key = make_certificate(tmp_path, 1)
    (tmp_path / "node").mkdir()
    server = RabbitServer(tmp_path / "node", tls=(certificate, key, certificate))
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
def test_a_server_that_is_killed_keeps_what_it_confirmed(own_server):
    """Waiting readers are told; what was confirmed is there after the restart."""
    address = BrokerAddress(
        "127.0.0.1", own_server.port, "/", ADMIN, own_server.password, tls=False
    )
    broker = connect(address)
    broker.declare(run_topology("r1", ("site-a",)))
    consumer = broker.consume(coordinator_queue("r1"))
    broker.publish([Message(SITES_EXCHANGE, "site-a", b"kept")] * 100)
    # 3.10 may leave a quorum queue without a leader when it dies within a second of its making.
    thread = threading.Timer(3.0, own_server.kill)
    thread.start()
    with pytest.raises(BrokerUnavailableError):
        consumer.receive(PATIENCE_SECONDS)
    thread.join()
    with pytest.raises(BrokerUnavailableError):
        broker.publish([Message(SITES_EXCHANGE, "site-a", b"x")])
    broker.close()
    with pytest.raises(BrokerUnavailableError):
        connect(address)
    own_server.start()
    with connect(address) as again:
        again.declare(run_topology("r1", ("site-a",)))
        reader = again.consume(site_queue("site-a"))
        for _ in range(100):  # a count may lag behind after a restart; the messages do not
            delivery = reader.receive(PATIENCE_SECONDS)
            assert delivery.body == b"kept"
            delivery.acknowledge()


@pytest.mark.slow
def test_an_alarm_is_named_and_over_when_it_is_over(own_server, monkeypatch):
    """A server out of memory takes no messages: an error that says so, and no hanging."""
    monkeypatch.setattr("shared.brokers.rabbitmq.io_thread.ANSWER_SECONDS", 3.0)
    address = BrokerAddress(
        "127.0.0.1", own_server.port, "/", ADMIN, own_server.password, tls=False
    )

    def watermark(part: str) -> None:
        command = [*own_server.rabbitmqctl, "set_vm_memory_high_watermark", part]
        subprocess.run(command, check=True, capture_output=True)

    with connect(address) as broker:
        broker.declare(run_topology("r1", ("site-a",)))
        watermark("0.0000001")
        time.sleep(2)  # it looks at its memory once a second
        with pytest.raises(BrokerUnavailableError, match="memory or disk alarm"):
            broker.publish([Message(SITES_EXCHANGE, "site-a", b"x")])
    gc.collect()  # a socket that was left open is named here, and not in another test
    watermark("0.4")
    with connect(address) as broker:
        broker.publish([Message(SITES_EXCHANGE, "site-a", b"x")])


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_connection_that_is_given_up_leaves_no_socket(monkeypatch, tls):
    """Nobody answers the greeting: the socket is closed with the attempt, not by the collector."""
    monkeypatch.setattr("shared.brokers.rabbitmq.io_thread.CONNECT_SECONDS", 0.5)
    before = set(threading.enumerate())
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        warnings.catch_warnings(record=True) as w,
    ):
        warnings.simplefilter("always", ResourceWarning)
        address = BrokerAddress("127.0.0.1", silent.getsockname()[1], "/", "a", "secret", tls=tls)
        with pytest.raises(BrokerUnavailableError):
            connect(address)
        for thread in set(threading.enumerate()) - before:
            thread.join()
        gc.collect()
    assert [str(warning.message) for warning in w] == []


@pytest.mark.slow
def test_tls_is_checked(own_server, tmp_path):
    """The right authority: all well. None, an expired one, the wrong port: named, with the fix."""
    authority = own_server.tls[2]
    address = BrokerAddress(
        "127.0.0.1", own_server.tls_port, "/", ADMIN, own_server.password, True, authority
    )
    with connect(address) as broker:
        broker.declare(run_topology("r1", ("site-a",)))
        broker.publish([Message(SITES_EXCHANGE, "site-a", b"x")])
    with pytest.raises(BrokerError, match=r"certificate.*self.signed.*broker\.ca_file"):
        connect(replace(address, ca_file=None))
    with pytest.raises(BrokerError, match=r"no TLS there.*port"):
        connect(replace(address, port=own_server.port))
    own_server.kill()
    expired, key = make_certificate(tmp_path, -1)
    own_server.tls = (expired, key, expired)
    own_server.start()
    with pytest.raises(BrokerError, match=re.compile("certificate.*expired.*check the clock")):
        connect(replace(address, ca_file=expired))
    gc.collect()  # a socket that was left open is named here, and not in another test
