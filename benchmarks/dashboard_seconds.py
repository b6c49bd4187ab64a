"""Seconds until a page of the dashboard is there, for a run of many sites and rounds.

Writes a run's records straight into a directory (no training, no tensors), starts the dashboard in
a process of its own, and asks for its pages over HTTP as a browser does:

- ``first page``: from a server that has read nothing yet, until the whole page has come;
- ``all read``: until the run's page shows the run, all its records read once;
- each page then, the median of five requests, and its size;
- ``a change``: from a record's writing until the stream says so.

    python benchmarks/dashboard_seconds.py [--sites 1000] [--rounds 500]

Aims: the first page under 0.5 s, a change within 2 s.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from shared.config import FederationConfig, parse
from shared.protocol.ledger import Ledger, bytes_of
from shared.protocol.manifest import HeldOut, LocalMetrics, Manifest, Numerics, TensorSpec
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    GenesisRecord,
    Input,
    MemberRecord,
    OpenedRecord,
)
from shared.stores.directory import DirectoryStore

if TYPE_CHECKING:
    from shared.protocol.record import Record

RUN, SHA = "many", "a" * 64
ASKED = 5
NUMERICS = Numerics(
    versions={"torch": "2.13.0"},
    device="cpu",
    cpu_capability="AVX2",
    cpu_threads=1,
    compute_dtype="bf16",
)


class Written:
    """A run's records, as plain files: half a million of them need no fsync each."""

    def __init__(self, root: Path, sites: int, rounds: int) -> None:
        self.root = root
        self.sites = [f"site-{index:04}" for index in range(sites)]
        self.rounds = rounds
        self._made: set[Path] = set()
        self._template: tuple[int, str, bytes] = (0, "", b"")
        settings = {
            "run": {"name": RUN, "rounds": rounds, "participants": self.sites},
            "base": {"model": "none"},
        }
        store = DirectoryStore(root)
        Ledger(store, RUN, "bench", time.time).begin(parse(FederationConfig, settings, "bench"))

    def put(self, record: Record) -> None:
        """One record, seen whole or not at all."""
        self._put(record.key(RUN), bytes_of(record))

    def _put(self, key: str, data: bytes) -> None:
        path = self.root / key
        if path.parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(path.parent)
        temporary = self.root / ".tmp" / "one"
        temporary.write_bytes(data)
        temporary.replace(path)

    def write(self) -> None:
        """All rounds; of the last one only that it is open."""
        specs = (
            TensorSpec(name="layer.lora_A.weight", shape=(8, 8), init="kaiming_uniform"),
            TensorSpec(name="layer.lora_B.weight", shape=(8, 8), init="zeros"),
        )
        manifest = Manifest(tensors=specs, target_modules=("layer",))
        for site in self.sites:
            self.put(
                MemberRecord(
                    site=site, manifest=manifest, fingerprint=SHA, numerics=NUMERICS, examples=100
                )
            )
        sites = tuple(self.sites)
        self.put(
            GenesisRecord(
                members=sites, manifest=manifest, fingerprint=SHA, adapter_sha=SHA, adapter_size=1
            )
        )
        for number in range(1, self.rounds + 1):
            self.open(number)
            if number < self.rounds:
                for index in range(len(sites)):
                    self.accept(number, index)
                self.close(number)

    def open(self, number: int) -> None:
        """A round begins."""
        self.put(
            OpenedRecord(
                time=1e9 + 60 * number,
                writer="bench",
                round=number,
                selected=tuple(self.sites),
                source_sha=SHA,
                seed=1,
                progress_from=(number - 1) / self.rounds,
                progress_to=number / self.rounds,
            )
        )

    def accept(self, number: int, index: int) -> None:
        """A site's delta is there; all of a round are made of its first one."""
        site = self.sites[index]
        if self._template[0] != number:
            record = self._accepted(number, site)
            self._template = (
                number,
                record.key(RUN),
                bytes_of(record).replace(site.encode(), b"@"),
            )
        _, key, data = self._template
        self._put(f"{key.rpartition('/')[0]}/{site}.json", data.replace(b"@", site.encode()))

    def _accepted(self, number: int, site: str) -> AcceptedRecord:
        loss = 4.0 / (1 + number / 50)
        held_out = HeldOut(nll=loss, examples=10, tokens=100)
        metrics = LocalMetrics(
            steps=4,
            train_nll=loss,
            first_step_nll=loss,
            last_step_nll=loss,
            mean_grad_norm=1.0,
            held_out=held_out,
            seconds={"train": 30.0, "evaluate": 5.0, "encode": 0.1},
        )
        return AcceptedRecord(
            time=1e9 + 60 * number + 40,
            writer="bench",
            round=number,
            site=site,
            sha=SHA,
            size=2_000_000,
            examples=100,
            tokens=1000,
            norm=1.0,
            metrics=metrics,
            state="fresh",
        )

    def close(self, number: int) -> None:
        """A round ends."""
        share = 1 / len(self.sites)
        inputs = tuple(
            Input(site=site, from_round=number, sha=SHA, weight=share) for site in self.sites
        )
        self.put(
            ClosingRecord(
                time=1e9 + 60 * number + 50,
                writer="bench",
                round=number,
                source_sha=SHA,
                inputs=inputs,
                excluded={},
            )
        )
        self.put(
            ClosedRecord(
                round=number,
                source_sha=SHA,
                adapter_sha=SHA,
                adapter_size=1,
                mean_norm=1.0 / number,
                cosines=dict.fromkeys(self.sites, 0.5),
                delta_norms=dict.fromkeys(self.sites, 1.0),
                source_held_out=None,
            )
        )


def fetch(url: str) -> tuple[float, str]:
    """Seconds and the page."""
    began = time.perf_counter()
    with urllib.request.urlopen(url, timeout=600) as answer:
        text = answer.read().decode()
    return time.perf_counter() - began, text


def measure(written: Written, url: str, server: int) -> None:
    """Ask and print. ``server``: its process."""
    seconds, _ = fetch(f"{url}runs/{RUN}")
    print(f"first page        {seconds:8.3f} s")
    began, slowest = time.perf_counter(), 0.0
    while True:
        seconds, text = fetch(f"{url}runs/{RUN}")
        slowest = max(slowest, seconds)
        if 'id="strip"' in text:
            break
        time.sleep(0.5)
    print(f"all read          {time.perf_counter() - began:8.1f} s, slowest page {slowest:.3f} s")
    rss = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server}/status").read_text())
    print(f"memory            {int(rss[1]) / 1e3 if rss else 0:8.0f} MB")
    last = f"runs/{RUN}/rounds/{written.rounds - 1}"
    for path in ("", f"runs/{RUN}", last, f"runs/{RUN}/sites"):
        times, size = [], 0
        for _ in range(ASKED):
            seconds, text = fetch(url + path)
            times.append(seconds)
            size = len(text)
        print(
            f"{statistics.median(times):8.3f} s, most {max(times):.3f} {size / 1e3:5.0f} kB /{path}"
        )
    waited = []
    with urllib.request.urlopen(f"{url}runs/{RUN}/changes", timeout=600) as stream:
        news = (line for line in stream if line.startswith(b"data"))
        next(news)
        for index in range(ASKED):
            began = time.perf_counter()
            written.accept(written.rounds, index)
            next(news)
            waited.append(time.perf_counter() - began)
    print(f"a change          {statistics.median(waited):8.3f} s, most {max(waited):.3f} s")


def main() -> None:
    """Write, serve, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=500)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gradualdiff-dashboard-") as folder:
        written = Written(Path(folder) / "store", asked.sites, asked.rounds)
        began = time.perf_counter()
        written.write()
        spent = time.perf_counter() - began
        print(f"{asked.sites} sites, {asked.rounds} rounds, written in {spent:.0f} s")
        command = [sys.executable, "-m", "gradualdiff", "dashboard", "--port", "0"]
        with subprocess.Popen(
            [*command, "--store", str(written.root)], stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            try:
                url = server.stdout.readline().split()[1]
                measure(written, url, server.pid)
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
