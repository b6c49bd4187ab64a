"""What sites sent: granted piece by piece, found again without memory, swept unless on record."""

import hashlib
import time
from types import SimpleNamespace

import pytest

from coordinator.arrivals import CHUNK_BYTES, Arrivals, Upload
from shared import topology
from shared.errors import GrantError
from shared.protocol.ledger import Ledger
from shared.protocol.manifest import LocalMetrics
from shared.protocol.records import AcceptedRecord
from shared.stores.directory import DirectoryStore, DirectoryTransfer
from shared.stores.transfer import HttpTransfer

REST = 1000
DATA = bytes(range(256)) * (2 * CHUNK_BYTES // 256) + b"x" * REST
OTHER = "e" * 64


@pytest.fixture(params=["directory", "s3"])
def place(request, tmp_path):
    """Either store, empty, and how a site sends to it."""
    if request.param == "directory":
        store = DirectoryStore(tmp_path / "store")
        return SimpleNamespace(store=store, transfer=DirectoryTransfer(store))
    server = request.getfixturevalue("s3_server")
    return SimpleNamespace(store=server.store(server.new_bucket()), transfer=HttpTransfer())


@pytest.fixture
def s3(s3_server):
    """A bucket."""
    return SimpleNamespace(store=s3_server.store(s3_server.new_bucket()), transfer=HttpTransfer())


@pytest.fixture
def sent(tmp_path):
    """The bytes that a site holds, and what it says of them: two full pieces and a rest."""
    (tmp_path / "delta").write_bytes(DATA)
    upload = Upload("test", 1, "a", hashlib.sha256(DATA).hexdigest(), len(DATA))
    return tmp_path / "delta", upload


def soon():
    return time.time() + 60


def send(place, path, upload, grant, numbers=None):
    """Send these pieces of a grant, all if none are named."""
    for number in grant.urls if numbers is None else numbers:
        start = number * grant.piece_bytes
        length = min(grant.piece_bytes, upload.size - start)
        place.transfer.upload(grant.urls[number], path, start, length)


def accept(store, upload):
    """Put a delta on record."""
    Ledger(store, "test", "coordinator", lambda: 1.0).write(
        AcceptedRecord(
            round=upload.round,
            site=upload.site,
            sha=upload.sha,
            size=upload.size,
            examples=1,
            tokens=1,
            norm=1.0,
            metrics=LocalMetrics(steps=1),
            state="fresh",
        )
    )


def keys(store):
    """What is at the store but for records."""
    return [info.key for info in store.list("") if "/rounds/" not in info.key]


def test_a_delta_goes_straight_to_its_key(place, sent):
    """In as many pieces as the store takes; then nothing is missing, and nothing else is there."""
    path, upload = sent
    arrivals = Arrivals(place.store)
    grant = arrivals.grant(upload, soon(), direct=True)
    assert len(grant.urls) == (1 if place.store.parts is None else 3)
    send(place, path, upload, grant)
    arrivals.complete(upload)
    assert place.store.sha256(upload.key) == upload.sha
    assert keys(place.store) == [upload.key]
    assert arrivals.grant(upload, soon(), direct=True).urls == {}
    assert arrivals.shas(upload, direct=True) == {upload.sha}


def test_a_restarted_coordinator_asks_for_the_missing_parts_only(s3, sent):
    """It finds the upload by the delta's key; a torn one makes no object and loses no part."""
    path, upload = sent
    send(s3, path, upload, Arrivals(s3.store).grant(upload, soon(), direct=True), [1])
    for _ in range(2):
        arrivals = Arrivals(s3.store)
        assert arrivals.shas(upload, direct=True) == {upload.sha}
        grant = arrivals.grant(upload, soon(), direct=True)
        assert sorted(grant.urls) == [0, 2]
        arrivals.complete(upload)
        assert keys(s3.store) == []
    send(s3, path, upload, grant)
    Arrivals(s3.store).complete(upload)
    assert s3.store.sha256(upload.key) == upload.sha
    assert s3.store.parts.under_way("") == []


def test_a_part_of_the_wrong_size_is_not_taken_and_asked_for_again(s3, sent, tmp_path):
    """The store refuses it by the URL; one that got there by other means is missing still."""
    path, upload = sent
    arrivals = Arrivals(s3.store)
    grant = arrivals.grant(upload, soon(), direct=True)
    with pytest.raises(GrantError):
        s3.transfer.upload(grant.urls[2], path, 0, REST - 1)
    send(s3, path, upload, grant, [0, 1])
    (begun,) = s3.store.parts.under_way(upload.key)
    s3.transfer.upload(s3.store.parts.sign(begun, 3, soon(), 5), path, 0, 5)
    arrivals.complete(upload)
    assert keys(s3.store) == []
    again = arrivals.grant(upload, soon(), direct=True)
    assert sorted(again.urls) == [2]
    send(s3, path, upload, again)
    arrivals.complete(upload)
    assert s3.store.sha256(upload.key) == upload.sha


def test_of_two_coordinators_uploads_the_whole_one_is_completed(s3, sent):
    """Each began one for the same delta; the other is swept with the round."""
    path, upload = sent
    first = Arrivals(s3.store)
    grants = [first.grant(upload, soon(), direct=True, seen=False)]
    s3.store.parts.begin(upload.key)
    send(s3, path, upload, grants[0])
    Arrivals(s3.store).complete(upload)
    assert s3.store.sha256(upload.key) == upload.sha
    accept(s3.store, upload)
    first.sweep_closed("test", 1, 0.0)
    assert s3.store.parts.under_way("") == []
    assert keys(s3.store) == [upload.key]


@pytest.mark.parametrize("sweep", ["closed", "site", "run"])
def test_what_no_record_names_is_swept_and_what_one_names_stays(place, sent, sweep):
    """Of other sites and later rounds nothing goes before the run's end."""
    path, upload = sent
    arrivals = Arrivals(place.store)
    send(place, path, upload, arrivals.grant(upload, soon(), direct=True))
    arrivals.complete(upload)
    accept(place.store, upload)
    vain = topology.delta_key("test", 1, "a", OTHER)
    neighbour = topology.delta_key("test", 1, "a-b", OTHER)
    later = topology.delta_key("test", 2, "a", OTHER)
    foreign = topology.delta_key("tests", 1, "a", OTHER)
    for key in (vain, neighbour, later, foreign):
        place.store.put(key, b"never accepted")
    if place.store.parts is not None:
        place.store.parts.begin(vain)
    if sweep == "closed":
        arrivals.sweep_closed("test", 1, time.time())
        left = [upload.key, later, foreign]
    elif sweep == "site":
        arrivals.sweep_sites("test", [1, 2], {"a"}, [])
        left = [neighbour, upload.key, foreign]
    else:
        arrivals.sweep_run("test")
        left = [upload.key, foreign]
    assert keys(place.store) == sorted(left)
    if place.store.parts is not None:
        assert place.store.parts.under_way("") == []


def test_a_url_that_outlives_its_round_leaves_nothing_for_long(place, sent):
    """The round is swept once more when its last URL is over."""
    path, upload = sent
    arrivals = Arrivals(place.store)
    until = soon()
    url = place.store.sign_create(upload.key, until, 10)
    arrivals.grant(upload, until, direct=True)
    arrivals.sweep_closed("test", 1, until - 1)
    place.transfer.upload(url, path, 0, 10)
    arrivals.sweep_closed("test", 2, until - 1)
    assert keys(place.store) == [upload.key]
    arrivals.sweep_closed("test", 3, until + 1)
    assert keys(place.store) == []


def test_a_store_that_cannot_takes_chunks_by_the_inbox(s3, sent, monkeypatch):
    """So does a site of an older release, which says nothing of what it can."""
    path, upload = sent
    monkeypatch.setattr(type(s3.store), "indirect", "as if")
    for direct in (True, False):
        grant = Arrivals(s3.store).grant(upload, soon(), direct=direct)
        assert sorted(grant.urls) == [0, 1, 2]
        assert all("/inbox/test/" in url for url in grant.urls.values())
    send(s3, path, upload, grant)
    assert keys(s3.store) == [upload.chunk_key(number) for number in range(3)]
    monkeypatch.undo()
    assert Arrivals(s3.store).grant(upload, soon(), direct=False).urls == {}
