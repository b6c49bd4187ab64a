"""One site tries to end a run, or to fill its ledger, before the run has begun."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from coordinator.bootstrap import build_coordinator
from coordinator.handlers import MOST_WORDS
from gradualdiff.cli.main import app
from shared import topology
from shared.brokers.embedded import EmbeddedBroker
from shared.brokers.port import Message
from shared.errors import RunStuckError
from shared.protocol import wire
from shared.protocol.events import ParticipantReady
from shared.protocol.records import FinishedRecord, RejoinedRecord
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.numpy_learner import MANIFEST, NUMERICS
from tests.steering import records, verify

LIES = {
    "base": {"fingerprint": "e" * 64},
    "tensors": {"manifest": MANIFEST.model_copy(update={"tensors": MANIFEST.tensors[:1]})},
    "versions": {"numerics": NUMERICS.model_copy(update={"versions": {"numpy": "0"}})},
}


@pytest.mark.parametrize("lie", LIES)
def test_one_lie_about_a_site_ends_no_run_before_or_after_a_restart(tmp_path, lie):
    """The liar is named and waited for; mended, the run ends in the undisturbed adapter."""
    config = federations.config()
    wanted = federations.run(config, tmp_path / "undisturbed").adapter_sha
    for _ in range(2):
        sites = federations.learners(config)
        for name, value in LIES[lie].items():
            setattr(sites["b"], name, value)
        with pytest.raises(RunStuckError, match=r"waits for b \(b [a-z]+ .*start it again"):
            federations.run(config, tmp_path, sites)
    assert records(tmp_path, FinishedRecord) == []
    store = ["--store", str(tmp_path / "store")]
    shown = CliRunner().invoke(app, ["runs", "show", "test", *store], terminal_width=200)
    assert "waits for b" in shown.output
    assert "start it again" in " ".join(shown.output.split())
    assert federations.run(config, tmp_path).adapter_sha == wanted
    assert verify(tmp_path).findings == []


def test_a_site_that_says_another_thing_again_and_again_fills_no_ledger(tmp_path):
    """So many words of one site are recorded; the others are refused, also after a restart."""
    config, store = federations.config(), DirectoryStore(tmp_path / "store")
    for _ in range(2):
        server = EmbeddedBroker()
        role = build_coordinator(
            config,
            store,
            server.connect(topology.COORDINATOR, topology.coordinator_rights()),
            tmp_path / "spool",
            lambda: 1.0,
        )
        role.coordinator.start()
        site = server.connect("c", topology.site_rights("c"))
        for number in range(2 * MOST_WORDS):
            ready = ParticipantReady(
                run="test",
                config_digest=config.digest,
                manifest=MANIFEST,
                fingerprint=f"{number:064x}",
                numerics=NUMERICS,
                examples=1,
            )
            key = topology.event_key("test", "c", ready.word)
            site.publish([Message(topology.EVENTS_EXCHANGE, key, wire.encode(ready, 1.0))])
            role.dispatcher.drain()
    assert len(records(tmp_path, RejoinedRecord)) == MOST_WORDS - 1
    assert federations.run(config, tmp_path / "other").finished is not None
