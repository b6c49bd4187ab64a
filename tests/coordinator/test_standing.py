"""A site whose account has ended: nothing that it says is taken, and nothing it sent stays."""

from __future__ import annotations

import hashlib
import random

import pytest

from coordinator.accounts.site_accounts import SiteAccount
from coordinator.accounts.standing import LOOK_SECONDS, Standing
from shared import topology
from shared.config import canonical_json
from shared.errors import StoreUnavailableError
from shared.protocol import wire
from shared.protocol.events import RoundStarted, UploadGranted, UploadRequested
from shared.protocol.records import AcceptedRecord
from shared.stores.directory import DirectoryStore, DirectoryTransfer
from tests.coordinator.test_batches import SITES, Script, Stand, delta
from tests.steering import records

DAY = 86_400.0


def account(store, site, **fields):
    """Put a site's account on record as it is then."""
    made = {
        "site": site, "version": 1, "state": "active", "password_hash": "x", "created": 0.0,
        "changed": 0.0,
    }  # fmt: skip
    data = canonical_json(SiteAccount(**{**made, **fields}).model_dump(mode="json"))
    store.put(topology.account_key(site), data)


class Watched(DirectoryStore):
    """Counts what is read, and is away when told so."""

    def __init__(self, root):
        super().__init__(root)
        self.read, self.away = [], False

    def get(self, key):
        self.read.append(key)
        return super().get(key)

    def list(self, prefix):
        if self.away:
            raise StoreUnavailableError("away")
        return super().list(prefix)


def test_only_what_changed_is_read_and_not_too_often(tmp_path):
    """A store that is away, or a torn record, is no word against a site."""
    store, now = Watched(tmp_path / "store"), [100.0]
    standing = Standing(store, ("a", "b"), lambda: now[0])
    for site in ("a", "b", "other"):
        account(store, site, expires_at=200.0)
    standing.look()
    assert store.read == [topology.account_key("a"), topology.account_key("b")]
    assert standing.all_ended() == {}
    account(store, "a", state="removed", version=2, password_hash=None)
    standing.look()
    assert standing.ended("a") == ""
    now[0] += LOOK_SECONDS
    standing.look()
    assert standing.ended("a") == "the account of a was removed"
    assert len(store.read) == 3
    now[0], store.away = 200.0, True
    standing.look()
    assert standing.all_ended() == {
        "a": "the account of a was removed",
        "b": "the account of b ended on 1970-01-01",
    }
    store.away = False
    store.put(topology.account_key("b"), b"torn")
    standing.look(now=True)
    assert standing.ended("b") == ""
    assert standing.ended("nobody") == ""


def test_the_log_is_told_once_two_weeks_ahead_and_once_at_the_end(tmp_path, monkeypatch):
    """And again once the account was renewed."""
    told = []

    class Log:
        def warning(self, word, **facts):
            told.append((word, facts["site"]))

        def debug(self, *words, **facts):
            pass

    monkeypatch.setattr("coordinator.accounts.standing.get_logger", Log)
    store, now = DirectoryStore(tmp_path / "store"), [0.0]
    standing = Standing(store, SITES, lambda: now[0])
    account(store, "a", expires_at=20 * DAY)
    account(store, "b")
    for day in range(22):
        now[0] = day * DAY
        standing.look()
        assert told == [("account.expires", "a")] * (day >= 6) + [("account.ended", "a")] * (
            day >= 20
        )
    account(store, "a", expires_at=30 * DAY, version=2)
    standing.look(now=True)
    assert told[2:] == [("account.expires", "a")]


@pytest.fixture
def stand(tmp_path):
    """A run whose first round is open."""
    stand = Stand(tmp_path, {"kind": "quorum", "quorum": 2, "deadline_seconds": 1000.0})
    script = Script(tmp_path, stand, random.Random(1))
    for site in SITES:
        script.ready(site)
    assert stand.state.open_round is not None
    return stand


def events(stand, site):
    """What a site was told since it was asked last."""
    consumer = stand.broker.consume(topology.site_queue(site))
    told = []
    while (delivery := consumer.receive()) is not None:
        told.append(wire.decode(delivery.body).event)
        delivery.acknowledge()
    return told


def say(stand, site, event):
    key = topology.event_key("test", site, event.word)
    stand.publish(site, key, wire.encode(event, 1.0))
    stand.handle(1)


def asked(stand, site, data):
    sha = hashlib.sha256(data).hexdigest()
    return UploadRequested(run="test", round=1, sha=sha, size=len(data), creates=True)


@pytest.mark.parametrize("how", [{"state": "removed"}, {"state": "removing"}, {"expires_at": 0.5}])
def test_a_url_that_outlives_the_account_makes_nothing_that_counts(stand, tmp_path, how):
    """What it creates is swept, no further URL is given, no delta is accepted."""
    account(stand.store, "a")
    (opened,) = records(tmp_path, type(stand.state.open_round))
    data = delta(tmp_path, stand, "a", 1, opened.source_sha, 1)
    events(stand, "a")
    say(stand, "a", asked(stand, "a", data))
    (granted,) = events(stand, "a")
    assert isinstance(granted, UploadGranted)
    account(stand.store, "a", version=2, **how)
    coordinator = stand.role.coordinator
    coordinator.standing.look(now=True)
    path = tmp_path / "sent"
    path.write_bytes(data)
    DirectoryTransfer(stand.store).upload(granted.urls[0], path, 0, len(data))
    script = Script(tmp_path, stand, random.Random(1))
    script.submit("a", "newest")
    say(stand, "a", asked(stand, "a", b"more"))
    assert events(stand, "a") == []
    assert [r.site for r in records(tmp_path, AcceptedRecord)] == []
    assert coordinator.limits.over["a"] == {"account": 2}
    coordinator._clear_excluded()
    assert list(stand.store.list(topology.deltas_prefix("test"))) == []
    script.submit("b", "newest")
    assert [r.site for r in records(tmp_path, AcceptedRecord)] == ["b"]


def test_an_account_that_was_renewed_is_in_again(stand, tmp_path):
    """Its delta of the open round counts."""
    account(stand.store, "a", expires_at=0.5)
    coordinator = stand.role.coordinator
    coordinator.standing.look(now=True)
    account(stand.store, "a", version=2, expires_at=DAY)
    coordinator.standing.look(now=True)
    coordinator.notice_accounts()
    Script(tmp_path, stand, random.Random(1)).submit("a", "newest")
    assert [r.site for r in records(tmp_path, AcceptedRecord)] == ["a"]


def test_no_round_is_announced_to_a_site_that_is_out(stand):
    """It would get URLs with it."""
    account(stand.store, "a", state="removed")
    coordinator = stand.role.coordinator
    coordinator.standing.look(now=True)
    for site in SITES:
        events(stand, site)
    coordinator.start()
    assert events(stand, "a") == []
    assert any(isinstance(event, RoundStarted) for event in events(stand, "b"))
