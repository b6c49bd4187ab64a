"""The lines to broker and store go wrong; each round is trained once, the digest is the same."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack

import pytest

from tests.servers.proxy import FaultProxy

pytestmark = pytest.mark.slow

MIB = 2**20
THREE_CHUNKS = 2_600_000  # wide: 16 MiB, 16 MiB and a rest
DELTA_BYTES = 16 * THREE_CHUNKS
QUICK = (
    "cli.serve:SITE_HEARTBEAT=2 cli.serve:COORDINATOR_HEARTBEAT=2 shared.transfer:READ_SECONDS=4"
)


@pytest.fixture
def proxy_to():
    """Makes proxies in front of ``HOST:PORT``; closed at the end."""
    with ExitStack() as stack:

        def make(address: str, host: str = "127.0.0.1") -> FaultProxy:
            server, _, port = address.rpartition("/")[2].partition(":")
            return stack.enter_context(FaultProxy((server, int(port)), host))

        yield make


def assert_same_result(deployment, rounds):
    """Ended in the undisturbed digest, each round trained once."""
    assert deployment.finish() == deployment.wanted()
    for site in "ab":
        assert deployment.trained(site) == [f"tiny {n + 1}" for n in range(rounds)]


def puts(proxy) -> Counter[str]:
    """How often each object was sent through it."""
    return Counter(
        head.split(" ")[1].partition("?")[0] for head in proxy.heads if head.startswith("PUT ")
    )


def test_a_cut_costs_one_chunk_up_and_nothing_down(deploy, proxy_to, s3_server):
    """One connection is cut in the middle of a chunk, one in the middle of an adapter."""
    line = proxy_to(s3_server.url)
    deployment = deploy(rounds=2, width=THREE_CHUNKS, proxies={"sites store": line})
    line.cut_after(4 * MIB, direction="up")
    line.cut_after(20 * MIB, direction="down")
    for site in "ab":
        deployment.start_participant(site)
    deployment.start_coordinator()
    assert_same_result(deployment, 2)
    assert line.fired == {"cut_after": 2}
    sent = puts(line)
    assert len(sent) == 2 * 2 * 3
    assert sorted(sent.values()) == [1] * 11 + [2]
    assert line.passed["up"] < 2 * 2 * DELTA_BYTES + 5 * MIB
    assert sum("Range: bytes=" in head for head in line.heads) == 1
    assert line.passed["down"] < 3 * 2 * DELTA_BYTES + MIB


def test_after_an_outage_only_the_missing_chunks_are_sent(deploy, proxy_to, s3_server, vhost):
    """The store is out of reach for longer than an upload tries by itself."""
    line = proxy_to(s3_server.url)
    deployment = deploy(rounds=1, width=THREE_CHUNKS, proxies={"sites store": line})
    for site in "ab":
        deployment.start_participant(site, slow=3.0)
    deployment.start_coordinator()
    deadline = time.monotonic() + 60
    while line.passed["down"] < 2 * DELTA_BYTES:
        assert time.monotonic() < deadline, "the sites never got the adapter"
        time.sleep(0.02)
    line.throttle(2 * MIB)  # before they have trained, so all of the upload goes slowly
    store = s3_server.store(vhost)
    deadline = time.monotonic() + 60
    while not (finished := [info.key for info in store.list("inbox/tiny/")]):
        assert time.monotonic() < deadline, "no chunk arrived"
    time.sleep(0.5)  # its sender has the answer
    assert line.refuse() >= 1
    for site in "ab":
        deployment.wait_for("work.waits", site)
    line.heal()
    assert_same_result(deployment, 1)
    sent = puts(line)
    assert len(sent) == 6
    assert max(sent.values()) > 1
    for key in finished:
        assert sent[f"/{vhost}/{key}"] == 1


def test_slow_lines_change_nothing(deploy, proxy_to, s3_server, rabbit_server):
    """Every block late, every connection slow, both ways."""
    bus, store = proxy_to(f"127.0.0.1:{rabbit_server.port}"), proxy_to(s3_server.url)
    lines = {"coordinator broker": bus, "a broker": bus, "b broker": bus}
    deployment = deploy(rounds=1, proxies={**lines, "coordinator store": store})
    bus.delay(0.05)
    store.delay(0.02)
    store.throttle(20_000)
    for site in "ab":
        deployment.start_participant(site)
    deployment.start_coordinator()
    assert_same_result(deployment, 1)
    assert bus.fired["delay"] > 50
    assert store.fired["throttle"] > 50


def test_lines_that_say_nothing_any_more(deploy, proxy_to, s3_server, rabbit_server):
    """Black holes for longer than the heartbeat, connections that only one side has closed."""
    office, site = (proxy_to(f"127.0.0.1:{rabbit_server.port}") for _ in range(2))
    store = proxy_to(s3_server.url)
    lines = {"coordinator broker": office, "a broker": site, "sites store": store}
    deployment = deploy(rounds=6, proxies=lines, settings=QUICK)
    for name in "ab":
        deployment.start_participant(name, slow=1.0)
    deployment.start_coordinator()

    def in_round(number):
        deployment.wait_for("opened.recorded", "coordinator", count=number)
        time.sleep(0.3)

    in_round(1)
    site.black_hole()
    deployment.wait_for("broker.lost", "a")
    site.heal()
    in_round(2)
    office.black_hole()
    deployment.wait_for("coordinator.waits", "coordinator")
    office.heal()
    in_round(3)
    store.black_hole()
    for name in "ab":
        deployment.wait_for("work.waits", name)
    store.heal()
    in_round(4)
    lost = deployment.log("a").count("broker.lost")
    assert site.half_open("server") >= 1
    deployment.wait_for("broker.lost", "a", count=lost + 1)
    in_round(5)
    waits = deployment.log("coordinator").count("coordinator.waits")
    assert office.half_open("client") >= 1
    deployment.wait_for("coordinator.waits", "coordinator", count=waits + 1)
    assert_same_result(deployment, 6)
    for line in (office, site, store):
        assert line.fired["black_hole"] >= 1
    assert site.fired["half_open"] + office.fired["half_open"] >= 2
