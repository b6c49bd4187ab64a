"""A byte that is altered on its way, or in the store: read again, then said which of the two."""

import time
from random import Random
from urllib.parse import urlsplit

import numpy as np
import pytest

from coordinator.arrivals import Upload
from coordinator.intake import Intake
from shared import topology
from shared.disk.files import digest_file
from shared.errors import DeltaRefusedError, IntegrityError, LedgerDamagedError
from shared.stores.transfer import HttpTransfer
from shared.tensors.delta_file import DeltaHeader, write_delta
from tests.contracts.store_contract import sha256
from tests.numpy_learner import manifest_of
from tests.servers.proxy import FaultProxy

MANIFEST = manifest_of(50_000)
HEADER = DeltaHeader(
    run="test", round=1, site="a", source_sha="0" * 64, codec="fp32", codec_version=1
)
DATA = Random(1).randbytes(800_000)
ALWAYS = 10**9


@pytest.fixture
def stores(s3_server):
    """A bucket, the same one through a proxy, and that proxy."""
    bucket, where = s3_server.new_bucket(), urlsplit(s3_server.url)
    with FaultProxy((where.hostname, where.port)) as proxy:
        yield s3_server.store(bucket), s3_server.store(bucket, endpoint=proxy.url), proxy


@pytest.fixture
def upload(stores, tmp_path):
    """A delta in the inbox."""
    path = tmp_path / "delta"
    write_delta(path, MANIFEST, "fp32", HEADER, lambda s: np.ones(s.shape, np.float32), 1)
    upload = Upload("test", 1, "a", *digest_file(path))
    stores[0].put(upload.chunk_key(0), path.read_bytes())
    return upload


def test_a_download_with_a_flipped_byte_is_made_again(stores, tmp_path):
    """The file is whole in the end."""
    store, through, proxy = stores
    store.put("k", DATA)
    proxy.flip(1)
    url = through.sign_get("k", time.time() + 60)
    HttpTransfer().download(url, tmp_path / "out", sha256(DATA))
    assert proxy.fired["flip"] == 1
    assert (tmp_path / "out").read_bytes() == DATA


@pytest.mark.parametrize(
    ("flips", "says"),
    [(ALWAYS, "the transfer damages the data"), (0, "the stored object is damaged")],
)
def test_a_download_that_stays_damaged_says_which_side_it_is(stores, tmp_path, flips, says):
    """Other bytes each time are the way's doing, the same ones the store's. Nothing is kept."""
    store, through, proxy = stores
    store.put("k", DATA if flips else bytes(len(DATA)))
    proxy.flip(flips)
    url = through.sign_get("k", time.time() + 60)
    with pytest.raises(IntegrityError, match=says):
        HttpTransfer().download(url, tmp_path / "out", sha256(DATA))
    assert (proxy.fired["flip"] >= 3) == bool(flips)
    assert list(tmp_path.iterdir()) == []


def test_a_delta_with_a_flipped_byte_on_its_way_is_not_refused(stores, upload, tmp_path):
    """Neither when it is taken nor when it is read for the closing."""
    store, through, proxy = stores
    for number, folder in enumerate(("one", "two"), start=1):
        proxy.flip(1)
        intake = Intake(through, tmp_path / folder)
        if number == 1:
            intake.take(upload, MANIFEST, HEADER, None)
        intake.local_delta("test", 1, "a", upload.sha)
        assert proxy.fired["flip"] == number
    assert store.sha256(topology.delta_key("test", 1, "a", upload.sha)) == upload.sha


def test_a_delta_that_stays_damaged_says_which_side_it_is(stores, upload, tmp_path):
    """By the reason that the site hears, and by the error that ends the coordinator."""
    store, through, proxy = stores
    proxy.flip(ALWAYS)
    with pytest.raises(DeltaRefusedError, match="the transfer damages the data"):
        Intake(through, tmp_path / "one").take(upload, MANIFEST, HEADER, None)
    proxy.heal()
    Intake(through, tmp_path / "two").take(upload, MANIFEST, HEADER, None)
    store.put(topology.delta_key("test", 1, "a", upload.sha), DATA)
    with pytest.raises(LedgerDamagedError, match="the stored object is damaged"):
        Intake(through, tmp_path / "three").local_delta("test", 1, "a", upload.sha)
