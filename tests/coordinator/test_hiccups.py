"""A store that is away for a moment between the decision and its result; nothing is dropped."""

from __future__ import annotations

import time

import pytest

from coordinator.bootstrap import build_coordinator
from participant.bootstrap import build_participant
from participant.site import Site
from participant.workspace import Workspace
from shared.brokers.embedded import EmbeddedBroker
from shared.errors import StoreUnavailableError
from shared.protocol.dispatch import Patience
from shared.protocol.records import ClosingRecord
from shared.stores.directory import DirectoryStore, DirectoryTransfer
from shared.topology import COORDINATOR, coordinator_rights, site_rights
from tests import federations
from tests.numpy_learner import ANYTHING, NumpyLearner
from tests.steering import records, verify


class Sick(DirectoryStore):
    """Fails the next ``left`` writes of an adapter."""

    left = 0
    failed = 0

    def put_file(self, key, path):
        if self.left and "/adapters/" in key:
            self.left -= 1
            self.failed += 1
            raise StoreUnavailableError("503; try again")
        return super().put_file(key, path)


class Stand:
    """A coordinator that holds a delivery while the store is away, and sites moved by hand."""

    def __init__(self, config, folder) -> None:
        self.store = Sick(folder / "store")
        self.sites = {}
        server = EmbeddedBroker()
        self.role = build_coordinator(
            config,
            self.store,
            server.connect(COORDINATOR, coordinator_rights()),
            folder / "spool",
            time.time,
            Patience(300.0, lambda _: None),
        )
        self.role.coordinator.start()
        for name in config.run.participants:
            broker = server.connect(name, site_rights(name))
            site = Site(
                name=name,
                outbox=broker,
                transfer=DirectoryTransfer(self.store),
                workspace=Workspace(folder / "sites" / name),
                learner=NumpyLearner(name),
                clock=time.time,
                accept=ANYTHING,
            )
            self.sites[name] = build_participant(site, broker)
            self.sites[name].participant.start(config.run.name)
        self.drain()

    def drain(self) -> None:
        roles = [self.role, *self.sites.values()]
        while sum(role.dispatcher.drain() for role in roles):
            pass

    def one(self, name: str) -> None:
        """One piece of work, and nobody hears of it yet."""
        self.sites[name].participant.work()

    def work(self, *names: str) -> None:
        for name in names:
            while self.sites[name].participant.has_work:
                self.one(name)
                self.drain()


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_delta_that_arrives_while_the_result_waits_for_the_store_is_carried(tmp_path, failures):
    """It lies in the queue behind the one that filled the buffer."""
    config = federations.config(rounds=4, policy={"kind": "buffered", "buffer": 2})
    stand = Stand(config, tmp_path)
    for name in "abc":
        stand.one(name)  # gets ready
    stand.drain()
    stand.work("a")
    stand.one("b")
    stand.drain()
    stand.one("b")  # its delta fills the buffer
    stand.one("c")  # its request lies behind that
    stand.store.left = failures
    stand.drain()
    for _ in range(6):
        stand.work("c", "a", "b")
        stand.role.tick()
        stand.drain()
    assert stand.store.failed == failures
    counted = [(i.site, i.from_round) for r in records(tmp_path, ClosingRecord) for i in r.inputs]
    assert ("c", 1) in counted
    assert len(counted) == len(set(counted))
    assert verify(tmp_path).findings == []
