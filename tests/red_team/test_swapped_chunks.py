"""A chunk is sent again after the coordinator read it: what was checked is what is stored."""

import hashlib
import time

import numpy as np
import pytest

from coordinator.arrivals import CHUNK_BYTES, Arrivals, Upload
from coordinator.intake import Intake
from shared import topology
from shared.disk.files import digest_file
from shared.errors import GrantError
from shared.protocol.manifest import Manifest, TensorSpec
from shared.stores.directory import DirectoryStore, DirectoryTransfer
from shared.stores.transfer import HttpTransfer
from shared.tensors.delta_file import DeltaHeader, write_delta

HEADER = DeltaHeader(
    run="test", round=1, site="a", source_sha="0" * 64, codec="int8", codec_version=1
)
# Two blocks with one MD5 (Wang and Yu, 2004). What follows both alike keeps the digests equal, so a
# chunk that begins with one has the etag of a chunk that begins with the other.
COLLISION = bytes.fromhex(
    "d131dd02c5e6eec4693d9a0698aff95c2fcab58712467eab4004583eb8fb7f89"
    "55ad340609f4b30283e488832571415a085125e8f7cdc99fd91dbdf280373c5b"
    "d8823e3156348f5bae6dacd436c919c6dd53e2b487da03fd02396306d248cda0"
    "e99f33420f577ee8ce54b67080a80d1ec69821bcb6a8839396f9652b6ff72a70"
)
TWIN = bytearray(COLLISION)
for _place in (19, 45, 59, 83, 109, 123):
    TWIN[_place] ^= 0x80


class Swapped:
    """A store in which something is done just before a delta is stored under its name."""

    def __init__(self, store, swap):
        self._store = store
        self._swap = swap
        self.swapped = False

    def __getattr__(self, name):
        call = getattr(self._store, name)
        if name not in ("put_file", "compose"):
            return call

        def store(key, *rest):
            if "/deltas/" in key:
                self._swap()
                self.swapped = True
            return call(key, *rest)

        return store


@pytest.fixture(params=["directory", "s3"])
def store(request, tmp_path):
    """Either store, empty."""
    if request.param == "directory":
        return DirectoryStore(tmp_path / "store")
    server = request.getfixturevalue("s3_server")
    return server.store(server.new_bucket())


@pytest.fixture(scope="module")
def delta(tmp_path_factory):
    """A delta of two chunks, the second of which begins with the block that has a twin."""
    shape = (CHUNK_BYTES + 100_000, 1)
    manifest = Manifest(
        target_modules=("m",),
        tensors=(TensorSpec(name="m.lora_B.weight", shape=shape, init="zeros"),),
    )
    path = tmp_path_factory.mktemp("delta") / "delta"
    write_delta(path, manifest, "int8", HEADER, lambda _: np.ones(shape, np.float32), 1)
    data = bytearray(path.read_bytes())
    data[CHUNK_BYTES : CHUNK_BYTES + len(COLLISION)] = COLLISION  # any byte is a whole number
    sha = hashlib.sha256(data).hexdigest()
    return bytes(data), manifest, Upload("test", 1, "a", sha, len(data))


def upload_to(store, data, upload):
    """Put every chunk; the keys."""
    for number in range(upload.chunks):
        start = number * CHUNK_BYTES
        store.put(upload.chunk_key(number), data[start : start + CHUNK_BYTES])


def test_two_blocks_have_one_md5():
    """The public pair is what it is said to be."""
    digests = {hashlib.md5(block, usedforsecurity=False).digest() for block in (COLLISION, TWIN)}
    assert (len(digests), bytes(TWIN) == COLLISION) == (1, False)


@pytest.mark.parametrize("kind", ["other bytes", "the same etag", "gone"])
def test_what_was_checked_is_what_is_stored(store, tmp_path, delta, kind):
    """The site holds its upload URL still and uses it between the check and the storing."""
    data, manifest, upload = delta
    upload_to(store, data, upload)
    last, key = upload.chunk_key(1), topology.delta_key("test", 1, "a", upload.sha)
    tail = data[CHUNK_BYTES + len(COLLISION) :]
    swap = {
        "other bytes": lambda: store.put(last, bytes(len(tail) + len(COLLISION))),
        "the same etag": lambda: store.put(last, bytes(TWIN) + tail),
        "gone": lambda: store.delete(last),
    }[kind]
    before = store.stat(last).etag
    swapped = Swapped(store, swap)
    Intake(swapped, tmp_path / "spool").take(upload, manifest, HEADER, None)
    assert swapped.swapped
    assert store.sha256(key) == upload.sha
    fresh = Intake(store, tmp_path / "another")
    assert digest_file(fresh.local_delta("test", 1, "a", upload.sha))[0] == upload.sha
    assert list(store.list(topology.inbox_prefix("test", 1))) == []
    if kind == "the same etag" and not isinstance(store, DirectoryStore):
        assert store.put("probe", bytes(TWIN) + tail).etag == before  # the server's is the MD5


@pytest.mark.parametrize("wrong", [b"", b"other bytes"])
def test_a_wrong_object_under_a_deltas_name_is_replaced(store, tmp_path, delta, wrong):
    """From whatever cause it lies there: the right bytes are stored when they arrive again."""
    data, manifest, upload = delta
    key = topology.delta_key("test", 1, "a", upload.sha)
    store.put(key, wrong)
    upload_to(store, data, upload)
    Intake(store, tmp_path / "spool").take(upload, manifest, HEADER, None)
    assert store.sha256(key) == upload.sha


class SentAgain:
    """A store in which something is done right after a delta was read at its key."""

    def __init__(self, store, act):
        self._store = store
        self._act = act
        self.acted = False

    def __getattr__(self, name):
        return getattr(self._store, name)

    def spool(self, keys, path):
        spooled = self._store.spool(keys, path)
        self._act()
        self.acted = True
        return spooled


def test_what_was_checked_at_its_key_stays_there(store, tmp_path, delta):
    """The site holds every URL of its grant still, and uses them between the check and the record.

    In one piece as in parts. What was counted is read from there again later.
    """
    data, manifest, upload = delta
    transfer = HttpTransfer()
    if isinstance(store, DirectoryStore):
        transfer = DirectoryTransfer(store)
    grant = Arrivals(store).grant(upload, time.time() + 60, direct=True)
    good, evil = tmp_path / "good", tmp_path / "evil"
    good.write_bytes(data)
    evil.write_bytes(bytes(len(data)))
    refused = []

    def send(path):
        for number, url in grant.urls.items():
            start = number * grant.piece_bytes
            length = min(grant.piece_bytes, len(data) - start)
            try:
                transfer.upload(url, path, start, length)
            except GrantError as error:
                refused.append(error)

    send(good)
    again = SentAgain(store, lambda: send(evil))
    Intake(again, tmp_path / "spool").take(upload, manifest, HEADER, None)
    assert again.acted
    assert len(refused) == (0 if len(grant.urls) == 1 else len(grant.urls))
    assert store.sha256(upload.key) == upload.sha
    assert [info.key for info in store.list("")] == [upload.key]
