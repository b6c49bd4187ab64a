"""The lines to broker and store go wrong; each round is trained once, the digest is the same."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.patience import wait_until
from tests.servers.deployment import EXACT
from tests.servers.proxy import FaultProxy

pytestmark = pytest.mark.slow

MIB = 2**20
THREE_CHUNKS = 2_600_000  # wide: 16 MiB, 16 MiB and a rest
DELTA_BYTES = 16 * THREE_CHUNKS
QUICK = (
    "gradualdiff.cli.serve:SITE_HEARTBEAT=2 gradualdiff.cli.serve:COORDINATOR_HEARTBEAT=2 "
    "shared.stores.http:READ_SECONDS=2"
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


def puts(proxy) -> Counter[tuple[str, int]]:
    """How often each part of each delta was sent through it."""
    urls = [urlsplit(head.split(" ")[1]) for head in proxy.heads if head.startswith("PUT ")]
    return Counter((url.path, int(parse_qs(url.query)["partNumber"][0])) for url in urls)


def test_a_cut_costs_one_chunk_up_and_nothing_down(deploy, proxy_to, s3_server):
    """One connection is cut in the middle of a chunk, others in the middle of an adapter."""
    line = proxy_to(s3_server.url)
    deployment = deploy(rounds=2, width=THREE_CHUNKS, extra=EXACT, proxies={"sites store": line})
    line.cut_after(4 * MIB, direction="up")
    line.cut_after(28 * MIB, connections=50, direction="down")  # the rest is less than that
    for site in "ab":
        deployment.start_participant(site)
    deployment.start_coordinator()
    assert_same_result(deployment, 2)
    assert line.fired["cut_after"] > 1
    sent = puts(line)
    assert len(sent) == 4 * 3
    assert sorted(sent.values()) == [1] * 11 + [2]
    assert line.passed["up"] < 4 * DELTA_BYTES + 5 * MIB
    assert sum("Range: bytes=" in head for head in line.heads) == line.fired["cut_after"] - 1
    assert line.passed["down"] < 2 * 2 * DELTA_BYTES + MIB  # of round 2, and the result


def test_after_an_outage_only_the_missing_chunks_are_sent(deploy, proxy_to, s3_server, vhost):
    """The store is out of reach for longer than an upload tries by itself."""
    line = proxy_to(s3_server.url)
    deployment = deploy(rounds=1, width=THREE_CHUNKS, extra=EXACT, proxies={"sites store": line})
    for site in "ab":
        deployment.start_participant(site, slow=3.0)
    deployment.start_coordinator()
    for site in "ab":
        deployment.wait_for("genesis.drawn", site)
    line.throttle(2 * MIB)  # before they have trained, so all of the upload goes slowly
    store = s3_server.store(vhost)

    def finished():
        under_way = store.parts.under_way("runs/tiny/deltas/")
        return [(one.key, number) for one in under_way for number in store.parts.arrived(one)]

    wait_until(finished, "a part arrived")
    there = finished()
    time.sleep(0.5)  # its sender has the answer
    assert line.refuse() >= 1
    for site in "ab":
        deployment.wait_for("work.waits", site)
    line.heal()
    assert_same_result(deployment, 1)
    sent = puts(line)
    assert len(sent) == 6
    assert max(sent.values()) > 1
    for key, number in there:
        assert sent[f"/{vhost}/{key}", number] == 1
    assert store.parts.under_way("") == []


def test_slow_lines_change_nothing(deploy, proxy_to, s3_server, rabbit_server):
    """Every block late, every connection slow, both ways."""
    bus, store = proxy_to(f"127.0.0.1:{rabbit_server.port}"), proxy_to(s3_server.url)
    lines = {"coordinator broker": bus, "a broker": bus, "b broker": bus}
    deployment = deploy(rounds=1, proxies={**lines, "coordinator store": store})
    bus.delay(0.03)
    store.delay(0.01)
    store.throttle(50_000)
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


@pytest.fixture
def island():
    """A network namespace with one line to here: its name, and our address on that line."""
    if os.geteuid() != 0:
        pytest.skip("needs root: makes a network namespace, to drop its packets")
    name, net = f"gd{secrets.token_hex(3)}", f"10.213.{secrets.randbelow(250)}"
    inside = f"ip netns exec {name}"
    try:
        for command in (
            f"ip netns add {name}",
            f"ip link add {name}a type veth peer name {name}b netns {name}",
            f"ip addr add {net}.1/24 dev {name}a",
            f"ip link set {name}a up",
            f"{inside} ip addr add {net}.2/24 dev {name}b",
            f"{inside} ip link set {name}b up",
            f"{inside} ip link set lo up",
            f"{inside} iptables -L -n",
        ):
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no namespace with iptables here: {command}: {done.stderr.strip()}")
        yield name, f"{net}.1"
    finally:
        subprocess.run(["ip", "link", "del", f"{name}a"], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def iptables(name: str, words: str) -> str:
    """Run it in the namespace."""
    command = ["ip", "netns", "exec", name, "iptables", *words.split()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hits(name: str) -> int:
    """How many packets the rules took; then the rules are gone."""
    rows = [line.split() for line in iptables(name, "-L -v -x -n").splitlines()]
    taken = sum(int(row[0]) for row in rows if len(row) > 2 and row[2] in ("DROP", "REJECT"))
    iptables(name, "-F")
    return taken


def test_a_site_whose_packets_are_dropped_then_refused(
    deploy, proxy_to, island, s3_server, rabbit_server
):
    """In a network of its own: all packets vanish for a while, then each is answered by a reset."""
    name, here = island
    bus = proxy_to(f"127.0.0.1:{rabbit_server.port}", here)
    store = proxy_to(s3_server.url, here)
    lines = {"b broker": bus, "sites store": store}
    deployment = deploy(rounds=4, proxies=lines, settings=QUICK)
    inside = ("ip", "netns", "exec", name)
    deployment.start_participant("a", slow=1.0)
    deployment.start_participant("b", slow=1.0, inside=inside)
    deployment.start_coordinator()
    for number, rules in enumerate(
        (
            ("-A INPUT -j DROP", "-A OUTPUT -j DROP"),
            ("-A OUTPUT -p tcp -j REJECT --reject-with tcp-reset",),
        ),
        start=1,
    ):
        deployment.wait_for("opened.recorded", "coordinator", count=2 * number - 1)
        lost = deployment.log("b").count("broker.lost")
        for rule in rules:
            iptables(name, rule)
        deployment.wait_for("broker.lost", "b", count=lost + 1)
        assert hits(name) > 0
    assert_same_result(deployment, 4)
