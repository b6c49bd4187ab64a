"""A delta that two coordinators take in at once, as after one of them was frozen."""

import time
from dataclasses import replace

import numpy as np
import pytest

from coordinator.arrivals import Arrivals, Upload
from coordinator.intake import Intake
from shared import topology
from shared.disk.files import digest_file
from shared.errors import DeltaRefusedError
from shared.stores.directory import DirectoryStore, DirectoryTransfer
from shared.tensors.delta_file import DeltaHeader, write_delta
from tests.numpy_learner import MANIFEST

HEADER = DeltaHeader(
    run="test", round=1, site="a", source_sha="0" * 64, codec="fp32", codec_version=1
)


class Meddled(DirectoryStore):
    """Something happens just before a call; once."""

    def __init__(self, root, moment, meddle):
        super().__init__(root)
        self._moment = moment
        self._meddle = meddle
        self.meddled = False

    def _now(self, moment):
        if moment == self._moment and not self.meddled:
            self.meddled = True
            self._meddle()

    def spool(self, keys, path):
        if "inbox/" in keys[0]:
            self._now("read")
        spooled = super().spool(keys, path)
        if "deltas/" in keys[0]:
            self._now("spooled")
        return spooled

    def put_file(self, key, path):
        self._now("store")
        return super().put_file(key, path)


@pytest.fixture
def uploaded(tmp_path):
    """A store with one uploaded delta, and what its site says of it."""
    path = tmp_path / "delta"
    write_delta(path, MANIFEST, "fp32", HEADER, lambda s: np.ones(s.shape, np.float32), 1)
    sha, size = digest_file(path)[:2]
    upload = Upload("test", 1, "a", sha, size)
    store = DirectoryStore(tmp_path / "store")
    store.put(upload.chunk_key(0), path.read_bytes())
    return store, upload


@pytest.mark.parametrize("moment", ["read", "store"])
def test_what_another_coordinator_took_meanwhile_is_taken_from_there(tmp_path, uploaded, moment):
    """Its inbox is empty then; both come to the same delta."""
    store, upload = uploaded
    other = Intake(store, tmp_path / "other")
    meddled = Meddled(
        tmp_path / "store", moment, lambda: other.take(upload, MANIFEST, HEADER, None)
    )
    mine = Intake(meddled, tmp_path / "mine")
    assert mine.take(upload, MANIFEST, HEADER, None) == other.take(upload, MANIFEST, HEADER, None)
    assert meddled.meddled
    key = topology.delta_key("test", 1, "a", upload.sha)
    assert store.sha256(key) == upload.sha
    assert not list(store.list("inbox/"))
    assert digest_file(mine.local_delta("test", 1, "a", upload.sha))[0] == upload.sha


def test_chunks_that_nobody_took_are_asked_for_again(tmp_path, uploaded):
    """They are gone and no delta is there: the site is told to send them once more."""
    store, upload = uploaded
    meddled = Meddled(tmp_path / "store", "read", lambda: store.delete(upload.chunk_key(0)))
    with pytest.raises(DeltaRefusedError, match="the upload changed while it was read"):
        Intake(meddled, tmp_path / "mine").take(upload, MANIFEST, HEADER, None)
    assert meddled.meddled


@pytest.fixture
def straight(tmp_path, uploaded):
    """The same delta, sent straight to its key."""
    store, upload = uploaded
    url = Arrivals(store).grant(upload, time.time() + 60, direct=True).urls[0]
    DirectoryTransfer(store).upload(url, tmp_path / "delta", 0, upload.size)
    store.delete(upload.chunk_key(0))
    return store, upload


def test_a_delta_at_its_key_is_read_once_and_not_written_again(tmp_path, straight):
    """No other object is made, none removed; a second coordinator comes to the same."""
    store, upload = straight
    before = list(store.list(""))
    other = Intake(store, tmp_path / "other")
    meddled = Meddled(
        tmp_path / "store", "spooled", lambda: other.take(upload, MANIFEST, HEADER, None)
    )
    mine = Intake(meddled, tmp_path / "mine")
    assert mine.take(upload, MANIFEST, HEADER, None) == other.take(upload, MANIFEST, HEADER, None)
    assert meddled.meddled
    assert list(store.list("")) == before
    assert [info.key for info in before] == [upload.key]


@pytest.mark.parametrize("wrong", ["sha", "size", "values"])
def test_a_wrong_delta_is_removed_so_that_the_right_one_can_be_made(tmp_path, straight, wrong):
    """Refused with what was expected and came; the key is free for a URL to create."""
    store, upload = straight
    limit = None
    if wrong == "sha":
        data = store.get(upload.key)
        store.put(upload.key, bytes([data[0] ^ 1]) + data[1:])
    elif wrong == "size":
        upload = replace(upload, size=upload.size + 1)
    else:
        limit = 0.001
    says = {
        "sha": f"sha256: expected {upload.sha[:12]}",
        "size": "size: expected",
        "values": "norm",
    }
    with pytest.raises(DeltaRefusedError, match=says[wrong]):
        Intake(store, tmp_path / "mine").take(upload, MANIFEST, HEADER, limit)
    assert list(store.list("")) == []


def test_what_is_not_there_yet_is_refused_and_nothing_is_removed(tmp_path, straight):
    """Another coordinator may have taken it by the time that this one, frozen, goes on."""
    store, upload = straight
    data = store.get(upload.key)
    store.delete(upload.key)
    intake = Intake(store, tmp_path / "mine")
    with pytest.raises(DeltaRefusedError, match="not all at the store"):
        intake.take(upload, MANIFEST, HEADER, None)
    store.put(upload.key, data)
    intake.take(upload, MANIFEST, HEADER, None)


def test_a_counted_delta_is_replaced_and_never_removed(tmp_path, straight):
    """The store damaged it: what its site sends again comes by the inbox."""
    store, upload = straight
    data = store.get(upload.key)
    store.put(upload.key, b"damaged")
    intake = Intake(store, tmp_path / "mine")
    with pytest.raises(DeltaRefusedError, match="the stored object is damaged"):
        intake.restore(upload)
    assert store.get(upload.key) == b"damaged"
    store.put(upload.chunk_key(0), data)
    intake.restore(upload)
    assert [info.key for info in store.list("")] == [upload.key]
    assert store.get(upload.key) == data
