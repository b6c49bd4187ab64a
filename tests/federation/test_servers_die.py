"""The servers die, over TLS: broker and store killed in a round, the broker wiped; same digest."""

from __future__ import annotations

import time

import pytest

from tests.servers.deployment import Deployment
from tests.servers.faults import make_certificate
from tests.servers.rabbitmq import RabbitServer
from tests.servers.seaweedfs import SeaweedFS

pytestmark = pytest.mark.slow


@pytest.fixture
def servers(tmp_path):
    """A broker and a store of its own, with one certificate that is its own authority."""
    certificate, key = make_certificate(tmp_path, 1)
    (tmp_path / "rabbit").mkdir()
    (tmp_path / "weed").mkdir()
    rabbit = RabbitServer(tmp_path / "rabbit", tls=(certificate, key, certificate))
    with SeaweedFS(tmp_path / "weed", certificate, key) as weed:
        rabbit.start()
        yield rabbit, weed, certificate
        rabbit.stop()


def test_servers_may_be_killed_and_wiped(servers, tmp_path):
    """Round 1: the broker. Round 2: the store. Round 3: the broker loses all that it had."""
    rabbit, weed, authority = servers
    vhost = rabbit.new_vhost()
    deployment = Deployment(
        tmp_path / "run", None, rabbit, vhost, weed.server, authority=authority, rounds=4
    )
    try:
        for site in "ab":
            deployment.start_participant(site, slow=2.0)
        deployment.start_coordinator()
        deployment.wait_for("opened.recorded", "coordinator")
        time.sleep(1)
        rabbit.kill()
        deployment.wait_for("coordinator.waits", "coordinator")
        deployment.wait_for("broker.lost", "a")
        rabbit.start()

        deployment.wait_for("opened.recorded", "coordinator", count=2)
        time.sleep(1)
        weed.kill()
        time.sleep(3)
        weed.start()

        deployment.wait_for("opened.recorded", "coordinator", count=3)
        rabbit.delete_vhost(vhost)
        rabbit.api("DELETE", "users/a")
        rabbit.api("DELETE", "users/b")
        deployment.wait_for("coordinator.waits", "coordinator", count=2)
        rabbit.api("PUT", f"vhosts/{vhost}")
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        rabbit.api("PUT", f"permissions/{vhost}/coordinator", everything)
        restored = deployment.command(
            "sites", "restore", "--federation", str(deployment.federation)
        )
        assert "restored 2 accounts" in restored.stdout

        assert deployment.finish() == deployment.wanted()
        for site in "ab":
            assert deployment.trained(site) == [f"tiny {number}" for number in (1, 2, 3, 4)]
    finally:
        deployment.close()
