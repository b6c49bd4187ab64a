"""Broker and store are killed in the middle of what they do, refuse, or run out of room.

Every run ends in the undisturbed digest with each round trained once.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from shared.brokers.rabbitmq import connect
from shared.credentials import BrokerAddress
from shared.topology import coordinator_queue, run_topology, site_queue
from tests.patience import wait_until
from tests.servers.deployment import COORDINATOR_PASSWORD, EXACT, Deployment
from tests.servers.proxy import FaultProxy
from tests.servers.rabbitmq import RabbitServer
from tests.servers.seaweedfs import SeaweedFS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

LONG = bool(os.environ.get("GRADUALDIFF_TEST_LONG"))


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A broker and a store of these tests' own, which they may kill."""
    rabbit = RabbitServer(tmp_path_factory.mktemp("rabbit"))
    with SeaweedFS(tmp_path_factory.mktemp("weed")) as weed:
        rabbit.start()
        yield rabbit, weed
        rabbit.stop()


@pytest.fixture
def deploy(tmp_path, servers):
    """Makes a deployment over the servers; ended at the end."""
    rabbit, weed = servers
    with ExitStack() as stack:
        stack.callback(revived, rabbit, weed)

        def make(**settings) -> Deployment:
            proxies = settings.pop("store_proxies", ())
            made = {
                name: stack.enter_context(FaultProxy(("127.0.0.1", port_of(weed))))
                for name in proxies
            }
            deployment = Deployment(
                tmp_path / "run",
                None,
                rabbit,
                rabbit.new_vhost(),
                weed.server,
                proxies=made,
                **settings,
            )
            stack.callback(deployment.close)
            return deployment

        yield make


def revived(rabbit, weed) -> None:
    """Start what a failed test left dead."""
    if not weed.is_running:
        weed.start()
    if rabbit.process.poll() is not None:
        rabbit.start()


def port_of(weed) -> int:
    """Where the store listens."""
    return int(weed.server.url.rpartition(":")[2])


def assert_same_result(deployment, rounds):
    """Ended in the undisturbed digest, each round trained once."""
    assert deployment.finish() == deployment.wanted()
    for site in "ab":
        assert deployment.trained(site) == [f"tiny {n + 1}" for n in range(rounds)]


def stopped_at(deployment, name, point):
    """Wait until a process stopped itself there."""
    wait_until(lambda: f"{point} SIGSTOP" in deployment.fired(name), f"{name} at {point}")


def test_servers_are_killed_while_they_are_spoken_to(deploy, servers):
    """Before a notification, with a delivery out, and in a training; then both servers."""
    rabbit, weed = servers
    deployment = deploy(rounds=4)
    points = ("publish.before:RoundStarted", "acknowledge.before:DeltaSubmitted")
    coordinator = deployment.start_coordinator(armed=" ".join(f"{p}=SIGSTOP" for p in points))
    for site in "ab":
        deployment.start_participant(site, slow=2.0)
    for number, point in enumerate(points, start=1):
        stopped_at(deployment, "coordinator", point)
        rabbit.kill()
        os.kill(coordinator.pid, signal.SIGCONT)
        deployment.wait_for("coordinator.waits", "coordinator", count=number)
        rabbit.start()
    deployment.wait_for("opened.recorded", "coordinator", count=2)
    time.sleep(0.5)
    lost = deployment.log("a").count("broker.lost")
    rabbit.kill()
    deployment.wait_for("broker.lost", "a", count=lost + 1)
    rabbit.start()
    deployment.wait_for("opened.recorded", "coordinator", count=3)
    time.sleep(0.5)
    rabbit.kill()
    weed.kill()
    time.sleep(2)
    weed.start()
    rabbit.start()
    assert_same_result(deployment, 4)


def test_the_store_is_killed_in_the_middle_of_a_transfer(deploy, servers):
    """Half of a delta is up, then half of an adapter is down, when it dies."""
    _, weed = servers
    width = 1_000_000  # more than the kernel's buffers hold, which outlive who filled them
    size = 16 * width
    deployment = deploy(rounds=2, width=width, extra=EXACT, store_proxies=["sites store"])
    line = deployment.proxies["sites store"]
    deployment.start_coordinator()
    line.throttle(size / 8)
    for site in "ab":
        deployment.start_participant(site)
    for direction in ("up", "down"):
        wait_until(lambda d=direction: line.passed[d] > size / 4, f"{direction} began")
        waits = {site: deployment.log(site).count("work.waits") for site in "ab"}
        weed.kill()
        assert line.passed[direction] < size, "one was over already"
        for site in "ab":
            deployment.wait_for("work.waits", site, count=waits[site] + 1)
        weed.start()
    line.heal()
    assert_same_result(deployment, 2)


def test_a_store_that_answers_503_for_long(deploy):
    """Every request is refused, from everybody, for 20 seconds (two minutes in the long tests)."""
    deployment = deploy(rounds=2, store_proxies=["sites store", "coordinator store"])
    sites, office = (deployment.proxies[line] for line in ("sites store", "coordinator store"))
    sites.unavailable()
    for site in "ab":
        deployment.start_participant(site)
    deployment.start_coordinator()
    for site in "ab":
        deployment.wait_for("work.waits", site)
    office.unavailable()
    time.sleep(120 if LONG else 20)
    for line in (sites, office):
        assert line.fired["unavailable"] >= 5
        line.heal()
    assert_same_result(deployment, 2)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of few MB over a folder; taken off at the end."""
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a small file system, to fill it")
    mounted = []

    def mount(folder: Path, megabytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        options = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        done = subprocess.run(options, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this system does not let root mount a tmpfs: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("side", ["coordinator", "a"])
def test_a_full_disk_is_named_and_given_room(deploy, small_disk, side):
    """Somebody else's file fills the disk in the middle of the run, and is removed later."""
    width = 100_000  # 1.6 MB for a delta and for an adapter
    deployment = deploy(rounds=2, width=width)
    folder = deployment.folder / "spool"
    if side == "a":
        folder = deployment.site_toml("a").with_name("workspace")
    small_disk(folder, 16)
    for site in "ab":
        deployment.start_participant(site, slow=1.0)
    deployment.start_coordinator()
    deployment.wait_for("opened.recorded", "coordinator")
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        while True:
            try:
                file.write(b"x" * 65536)
                file.flush()
            except OSError:
                break
    deployment.wait_for("the disk is full; free space there", side)
    time.sleep(1)
    ballast.unlink()
    assert_same_result(deployment, 2)


def damage(rabbit, vhost, queue, how) -> None:
    """Leave a declared queue without a leader, as a kill just after its declaration may.

    "silent": its process is there and answers nobody. "gone": there is none, and whoever consumes
    from it has the whole connection closed with INTERNAL_ERROR.
    """
    server = f"'{vhost}_{queue}'"
    say = f"sys:suspend({server})."
    if how == "gone":
        say = f"ra:stop_server(quorum_queues, {{{server}, node()}})."
    done = subprocess.run([*rabbit.rabbitmqctl, "eval", say], capture_output=True, check=False)
    assert done.stdout.strip() == b"ok", done


@pytest.mark.parametrize("how", ["silent", "gone"])
@pytest.mark.parametrize("queue", [coordinator_queue("tiny"), site_queue("b")])
def test_a_queue_without_a_leader_is_made_anew(deploy, servers, queue, how):
    """Whoever owns it: seen with RabbitMQ 3.10.8 killed just after a queue was declared."""
    rabbit, _ = servers
    short = (
        "shared.brokers.rabbitmq.io_thread:ANSWER_SECONDS=6 "
        "shared.brokers.rabbitmq.reviving:PROBE_SECONDS=4"
    )
    deployment = deploy(rounds=2, settings=short)
    address = BrokerAddress(
        "127.0.0.1", rabbit.port, deployment.vhost, "coordinator", COORDINATOR_PASSWORD, tls=False
    )
    with connect(address) as broker:
        broker.declare(run_topology("tiny", ("a", "b")))
    damage(rabbit, deployment.vhost, queue, how)
    deployment.start_coordinator()
    for site in "ab":
        deployment.start_participant(site)
    assert_same_result(deployment, 2)
    revived_queues = [
        line for line in deployment.log("coordinator").splitlines() if "queue.revived" in line
    ]
    assert queue in str(revived_queues)
    gc.collect()  # a socket that was left open is named here, and not in another test


def test_a_site_waits_for_a_queue_that_is_not_there_yet(deploy, servers):
    """Its coordinator makes it when it starts, and makes it anew when it was damaged."""
    rabbit, _ = servers
    deployment = deploy(rounds=2)
    rabbit.api("DELETE", f"queues/{deployment.vhost}/{site_queue('b')}")
    for site in "ab":
        deployment.start_participant(site)
    deployment.wait_for("does not exist", "b")
    deployment.start_coordinator()
    assert_same_result(deployment, 2)
