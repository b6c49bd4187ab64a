"""Bytes and seconds of a site whose chunks travel side by side."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from gradualdiff.embedded.metering import Meter, MeteredTransfer, Traffic
from shared.disk.files import write_atomically
from tests.patience import PATIENCE_SECONDS


class SlowWire:
    """All of ``together`` chunks are under way at once before any of them ends."""

    def __init__(self, together):
        self._barrier = threading.Barrier(together)

    def upload(self, url, path, start, length):
        self._barrier.wait(timeout=PATIENCE_SECONDS)
        time.sleep(0.2)

    def download(self, url, path, sha256):
        time.sleep(0.05)
        return 7


def test_chunks_that_travel_at_once_are_counted_in_turn(tmp_path):
    """What is put on file at every change is whole, and nothing is lost."""
    meter = Meter()
    path = tmp_path / "traffic.json"
    meter.changed = lambda: write_atomically(path, json.dumps(meter.as_json()).encode())
    transfer = MeteredTransfer(SlowWire(16), meter, "a")
    began = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: transfer.upload("url", path, 0, n), range(16)))
    wall = time.perf_counter() - began
    transfer.download("url", path, "sha")
    found = Meter.from_json(json.loads(path.read_text())).of("a")
    assert (found.objects_up, found.objects_down) == (sum(range(16)), 7)
    assert 0.25 <= found.transfer_seconds <= wall + 0.25


def test_an_upload_that_fails_costs_its_seconds_and_no_bytes(tmp_path):
    class Broken(SlowWire):
        def upload(self, url, path, start, length):
            raise OSError("reset by peer")

    meter = Meter()
    transfer = MeteredTransfer(Broken(1), meter, "a")
    for _ in range(2):
        try:
            transfer.upload("url", tmp_path, 0, 5)
        except OSError:
            continue
    assert meter.of("a").objects_up == 0
    assert meter.of("a").transfer_seconds > 0
    assert meter.of("nobody") == Traffic()
