"""The proxy's faults happen, are counted, and end."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from tests.servers.faults import ToldServer, reply
from tests.servers.proxy import FaultProxy


@pytest.fixture
def proxy():
    """In front of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def echo(one):
        with one, contextlib.suppress(OSError):
            while data := one.recv(65536):
                one.sendall(data)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                one, _ = listener.accept()
                threading.Thread(target=echo, args=(one,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with FaultProxy(listener.getsockname()) as made:
        yield made
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.fixture
def client(proxy):
    """A connection through it that has answered once."""
    with socket.create_connection((proxy.host, proxy.port), 10) as one:
        assert echoed(one, b"hello") == b"hello"
        yield one


def echoed(one: socket.socket, data: bytes) -> bytes:
    """What comes back of ``data``."""
    one.sendall(data)
    got = b""
    while len(got) < len(data) and (more := one.recv(65536)):
        got += more
    return got


def test_a_cut_resets_what_there_is_and_heals_by_itself(proxy, client):
    assert proxy.cut() == 1
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with socket.create_connection((proxy.host, proxy.port), 10) as again:
        assert echoed(again, b"x") == b"x"
    assert proxy.fired == {"cut": 1}


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_after_n_bytes_counts_them(proxy, direction):
    proxy.cut_after(1000, direction=direction)
    with (
        socket.create_connection((proxy.host, proxy.port), 10) as one,
        contextlib.suppress(ConnectionError),
    ):
        assert len(echoed(one, b"x" * 5000)) <= 1000
    proxy.wait_fired("cut_after")
    assert proxy.passed[direction] == 1000
    with socket.create_connection((proxy.host, proxy.port), 10) as one:
        assert echoed(one, b"y" * 5000) == b"y" * 5000
    assert proxy.fired == {"cut_after": 1}


def test_a_black_hole_holds_back_what_then_goes_on(proxy, client):
    proxy.black_hole()
    client.sendall(b"held")
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.recv(1)
    with socket.create_connection((proxy.host, proxy.port), 10) as new:
        proxy.wait_fired("black_hole", 2)
        proxy.heal()
        client.settimeout(10)
        assert client.recv(10) == b"held"
        assert echoed(new, b"x") == b"x"


def test_delay_and_throttle_take_time(proxy, client):
    proxy.delay(0.3)
    began = time.monotonic()
    assert echoed(client, b"x") == b"x"
    assert time.monotonic() - began >= 0.6
    proxy.heal()
    proxy.throttle(10_000)
    began = time.monotonic()
    assert echoed(client, b"x" * 5000) == b"x" * 5000
    assert time.monotonic() - began >= 0.5
    proxy.heal()
    assert proxy.fired["delay"] == 2
    assert proxy.fired["throttle"] >= 2


def test_half_open_tells_one_side_only(proxy, client):
    assert proxy.half_open("server") == 1
    client.sendall(b"into the void")
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.recv(1)
    assert proxy.fired == {"half_open": 1}
    with socket.create_connection((proxy.host, proxy.port), 10) as one:
        echoed(one, b"x")
        assert proxy.half_open("client") >= 1
        assert one.recv(1) == b""


def test_refuse_and_heal(proxy, client):
    assert proxy.refuse() == 1
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, proxy.port), 10)
    proxy.heal()
    with socket.create_connection((proxy.host, proxy.port), 10) as one:
        assert echoed(one, b"x") == b"x"


def test_every_request_is_answered_503():
    import urllib3

    with (
        ToldServer(lambda handler: reply(handler, 200, b"fine")) as told,
        FaultProxy(("127.0.0.1", int(told.url.rpartition(":")[2]))) as proxy,
        urllib3.PoolManager(retries=False) as http,
    ):
        assert http.request("GET", proxy.url + "/k").status == 200
        proxy.unavailable()
        for _ in range(2):
            with contextlib.suppress(urllib3.exceptions.ProtocolError):
                http.request("GET", proxy.url + "/k")
        assert http.request("PUT", proxy.url + "/k", body=b"x" * 300_000).status == 503
        assert proxy.fired["unavailable"] >= 2
        proxy.heal()
        assert http.request("GET", proxy.url + "/k").data == b"fine"
        assert len(told.seen) == 2
