"""RabbitMQ under the contract, and what only a real server has: restarts, cuts, wrong passwords."""

from __future__ import annotations

import pytest

from shared.credentials import BrokerAddress
from shared.rabbitmq import connect
from tests.contracts.broker_contract import BrokerContract
from tests.servers.rabbitmq import rabbit_server, vhost  # noqa: F401


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
                "read": rights.read.pattern,
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
def bus(rabbit_server, vhost):  # noqa: F811
    bus = RabbitBus(rabbit_server, vhost)
    yield bus
    bus.close()


class TestRabbitMQ(BrokerContract):
    """The suite, unchanged."""

    quiet_seconds = 0.3

    @pytest.fixture
    def bus(self, bus):
        return bus
