"""A delta that two coordinators take in at once, as after one of them was frozen."""

import numpy as np
import pytest

from coordinator.intake import Intake, Upload
from shared import topology
from shared.disk.files import digest_file
from shared.errors import DeltaRefusedError
from shared.stores.directory import DirectoryStore
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
        return super().spool(keys, path)

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
