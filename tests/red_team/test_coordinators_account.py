"""What whoever has the coordinator's password cannot do at the broker.

The account is the one that ``gradualdiff setup`` makes where somebody else is the administrator.
Every test that runs a whole federation over RabbitMQ runs it with such an account.
"""

from __future__ import annotations

import pika
import pytest
import urllib3
from pika.exceptions import ChannelClosedByBroker

from shared.topology import SITES_EXCHANGE, site_queue
from tests.servers.deployment import COORDINATOR_PASSWORD, Deployment
from tests.servers.rabbitmq import ADMIN

FOREIGN = "orders"  # of another application in the same virtual host


@pytest.fixture(scope="module")
def channel_of(rabbit_server, s3_server, tmp_path_factory):
    """Opens a channel of an account's; a federation was set up beside another application."""
    vhost = rabbit_server.new_vhost()
    folder = tmp_path_factory.mktemp("federation")
    deployment = Deployment(folder, None, rabbit_server, vhost, s3_server)
    opened = []

    def open_channel(account, password):
        credentials = pika.PlainCredentials(account, password)
        opened.append(
            pika.BlockingConnection(
                pika.ConnectionParameters(
                    "127.0.0.1", rabbit_server.port, vhost, credentials, heartbeat=0
                )
            )
        )
        channel = opened[-1].channel()
        channel.confirm_delivery()
        return channel

    office = open_channel(ADMIN, rabbit_server.password)
    office.queue_declare(FOREIGN, durable=True)
    office.basic_publish("", FOREIGN, b"bait")
    # Again: what is there keeps its password, and gets back the rights that were widened since.
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    rabbit_server.api("PUT", f"permissions/{vhost}/coordinator", everything)
    before = rabbit_server.api("GET", "users/coordinator")["password_hash"]
    deployment.command("setup", str(deployment.federation), "--kits", str(folder / "kits"))
    assert rabbit_server.api("GET", "users/coordinator")["password_hash"] == before
    yield open_channel
    for connection in opened:
        connection.close()
    deployment.close()
    rabbit_server.delete_vhost(vhost)


ATTEMPTS = {
    "get from": lambda channel: channel.basic_get(FOREIGN, auto_ack=True),
    "consume": lambda channel: channel.basic_consume(FOREIGN, lambda *_: None),
    "purge": lambda channel: channel.queue_purge(FOREIGN),
    "delete": lambda channel: channel.queue_delete(FOREIGN),
    "declare": lambda channel: channel.queue_declare("mine"),
    "declare an exchange": lambda channel: channel.exchange_declare("mine"),
    "publish into": lambda channel: channel.basic_publish("", FOREIGN, b"x", mandatory=True),
    "publish by amq.topic": lambda channel: channel.basic_publish("amq.topic", "x", b"x"),
    "bind": lambda channel: channel.queue_bind(FOREIGN, SITES_EXCHANGE, "a"),
    "bind its own to amq.topic": lambda channel: channel.queue_bind(
        site_queue("a"), "amq.topic", "#"
    ),
}


@pytest.mark.parametrize("what", ATTEMPTS)
def test_the_coordinators_account_cannot(channel_of, what, rabbit_server):
    """403, and what belongs to another application stays as it is."""
    with pytest.raises(ChannelClosedByBroker) as caught:
        ATTEMPTS[what](channel_of("coordinator", COORDINATOR_PASSWORD))
    assert caught.value.reply_code == 403
    office = channel_of(ADMIN, rabbit_server.password)
    assert office.queue_declare(FOREIGN, passive=True).method.message_count == 1


@pytest.mark.usefixtures("channel_of")
@pytest.mark.parametrize("path", ["whoami", "users", "definitions", "queues"])
def test_the_coordinators_account_administers_nothing(rabbit_server, path):
    """It has no tag: who has it cannot make accounts, a site's password included."""
    with urllib3.PoolManager(retries=False) as http:
        answer = http.request(
            "GET",
            f"{rabbit_server.management_url}/api/{path}",
            headers=urllib3.make_headers(basic_auth=f"coordinator:{COORDINATOR_PASSWORD}"),
        )
    assert answer.status == 401
