"""What a round costs over a real RabbitMQ and a real S3 server, beside moving the same bytes bare.

One coordinator and K participants, on loopback, each a process of its own up to eight; more share
eight processes, each with its own threads and connection. Nobody trains: a
participant writes the same random values every round (67 MB of fp32 adapter in 128 tensors; with
``--shape llama-2-7b-r64`` 640 MB in 448), which the product encodes, hashes, syncs, uploads,
checks, joins, adds up and stores. A round's seconds are from its ``opened`` record to the next
round's (to ``finished`` for the last); the first round, which waits for everybody, stands apart.
Three floors are measured in turns with the federation:

- ``sdk``: as many processes and threads with the bare minio SDK each get the adapter and put as
  many bytes as a delta of that codec has, all at once, from and into memory; then numpy's mean of K
  fp32 arrays.
- ``read``: the same, and what no coordinator that checks can leave out: one process gets the K
  uploads back, one after another, and puts the mean; the bare SDK and memory again.
- ``tcp``: the bytes of ``sdk`` through K loopback connections, K processes at the other ends.

    python benchmarks/round_over_the_wire.py [--codecs fp32 int8] [--rounds 4] [--participants 5]
        [--shape llama-2-7b-r64]
    python benchmarks/round_over_the_wire.py --table [--codecs int8] [--rounds 4]

The second prints a Markdown table: 5, 50 and 500 participants with an adapter of 0.5 MB, then five
with 67 and 640 MB; each row from servers of its own. ``--table 5 50`` leaves out the 500.

No floor has what else the product adds by intent: encoding, checks, records, files synced. Starts
its own servers through ``tests/servers`` unless they are named. Needs Linux, some 8 GB of disk and
RabbitMQ installed. Aims: within 1.5x of ``sdk``; the coordinator's peak memory below 300 MB.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import io
import itertools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self
from urllib.parse import unquote, urlsplit

import numpy as np
import tomli_w

from shared.protocol.manifest import LocalMetrics, Manifest, Numerics, TensorSpec
from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from shared.stores.s3 import S3Store

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("square", "llama-2-7b-r64", "small")
SHAPE = os.environ.get("WIRE_SHAPE", SHAPES[0])  # so that processes of this file inherit them
RANK, LAYERS = 16, 64
WIDTH = int(os.environ.get("WIRE_WIDTH", "8192"))
# Name, outputs and inputs of LLaMA-2-7B's seven projections; 32 layers, rank 64.
LLAMA = (
    *((f"self_attn.{name}_proj", 4096, 4096) for name in "qkvo"),
    ("mlp.gate_proj", 11008, 4096),
    ("mlp.up_proj", 11008, 4096),
    ("mlp.down_proj", 4096, 11008),
)
PASSWORD = "for-benchmarks"
FLOOR_BUCKET = "bare-bytes"
PATIENCE_SECONDS = 600.0
PHASES_FILE = "phases.json"
TABLE = (5, 50, 500)  # participants
PROCESSES = 8  # of participants, or of the floors


def wire_manifest() -> Manifest:
    """128 tensors of 131,072 values (67 MB in fp32), or LLaMA-2-7B's 448 at rank 64 (640 MB).

    ``small``: 16 of 8,192 (0.5 MB).
    """
    layers, rank, modules = LAYERS, RANK, (("q_proj", WIDTH, WIDTH),)
    if SHAPE == "llama-2-7b-r64":
        layers, rank, modules = 32, 64, LLAMA
    elif SHAPE == "small":
        layers, rank, modules = 8, 8, (("q_proj", 1024, 1024),)
    specs = []
    for layer, (module, outputs, inputs) in itertools.product(range(layers), modules):
        name = f"base_model.model.layers.{layer}.{module}"
        specs += [
            TensorSpec(name=f"{name}.lora_A.weight", shape=(rank, inputs), init="kaiming_uniform"),
            TensorSpec(name=f"{name}.lora_B.weight", shape=(outputs, rank), init="zeros"),
        ]
    specs.sort(key=lambda spec: spec.name)
    targets = tuple(sorted({module.rpartition(".")[2] for module, _, _ in modules}))
    return Manifest(tensors=tuple(specs), target_modules=targets)


@functools.cache
def _drawn(site: str) -> NDArray[np.float32]:
    draw = np.random.default_rng(derive_seed("noise", site))
    return draw.standard_normal(_values(), np.float32) * np.float32(1e-3)


@functools.cache
def _values() -> int:
    return min(4_000_000, 32 * max(spec.elements for spec in wire_manifest().tensors))


def shared_out(names: Sequence[str]) -> list[list[str]]:
    """Names by the process that they belong to, at most PROCESSES."""
    return [list(names[n::PROCESSES]) for n in range(min(PROCESSES, len(names)))]


def noise(site: str, spec: TensorSpec) -> NDArray[np.float32]:
    """Normal values of rms 1e-3, a function of site and tensor: a stretch of some MB of them."""
    start = derive_seed("start", spec.name) % (_values() - spec.elements)
    return _drawn(site)[start : start + spec.elements].reshape(spec.shape)


# Servers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Servers:
    """A broker and a store that are up. ``pids``: of those started here, by name."""

    host: str
    port: int
    account: str
    password: str
    management_url: str
    s3_url: str
    access_key: str
    secret_key: str
    pids: dict[str, int] = field(default_factory=dict)

    def api(self, method: str, path: str, body: object = None) -> None:
        """One call of the broker's management API as the administrator."""
        identity = base64.b64encode(f"{self.account}:{self.password}".encode()).decode()
        request = urllib.request.Request(
            f"{self.management_url.rstrip('/')}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Basic {identity}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600):
            pass

    def new_vhost(self, name: str, tags: str) -> None:
        """An empty virtual host, and the coordinator's account in it with these tags."""
        with contextlib.suppress(urllib.error.HTTPError):
            self.api("DELETE", f"vhosts/{name}")
        self.api("PUT", f"vhosts/{name}")
        self.api("PUT", "users/coordinator", {"password": PASSWORD, "tags": tags})
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        for account in ("coordinator", self.account):
            self.api("PUT", f"permissions/{name}/{account}", everything)

    def store(self, bucket: str) -> S3Store:
        """The bucket, made if it is not there."""
        from shared.stores.s3 import S3Store

        store = S3Store(self.s3_url, bucket, self.access_key, self.secret_key)
        store.make_bucket()
        return store

    def cpu_seconds(self) -> dict[str, float]:
        """Processor seconds that each server started here has used so far."""
        return {name: process_seconds(pid) for name, pid in self.pids.items()}


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Options that name servers to use instead of own ones."""
    named = parser.add_argument_group("servers to use instead of own ones (all five together)")
    named.add_argument("--amqp", help="amqp://ADMINISTRATOR:PASSWORD@HOST:PORT")
    named.add_argument("--management", help="its management API: http://HOST:PORT")
    named.add_argument("--s3", help="http://HOST:PORT")
    named.add_argument("--access-key")
    named.add_argument("--secret-key")
    parser.add_argument("--dir", type=Path, default=None, help="where the files go for a while")


@contextlib.contextmanager
def servers(given: argparse.Namespace, folder: Path) -> Iterator[Servers]:
    """The named servers, or own ones that end with the block."""
    named = (given.amqp, given.management, given.s3, given.access_key, given.secret_key)
    if any(named):
        if not all(named):
            raise SystemExit(
                "expected --amqp, --management, --s3, --access-key and --secret-key together, got "
                "some of them; give all five or none"
            )
        parts = urlsplit(given.amqp)
        yield Servers(
            parts.hostname or "", parts.port or 5672, unquote(parts.username or ""),
            unquote(parts.password or ""), given.management, given.s3, given.access_key,
            given.secret_key,
        )  # fmt: skip
        return
    sys.path.insert(0, str(ROOT))  # tests/ is not installed
    from tests.servers.rabbitmq import ADMIN, RabbitServer
    from tests.servers.seaweedfs import SeaweedFS

    for name in ("rabbitmq", "seaweedfs"):
        (folder / name).mkdir()

    class RoomySeaweedFS(SeaweedFS):
        """Without the tests' memory limit, under which half its time is garbage collection."""

        def _weed(self) -> str:
            script = self.folder / "weed"
            script.write_text(f'#!/bin/sh\nunset GOMEMLIMIT\nexec {super()._weed()} "$@"\n')
            script.chmod(0o755)
            return str(script)

    rabbit, weed = RabbitServer(folder / "rabbitmq"), RoomySeaweedFS(folder / "seaweedfs")
    try:
        rabbit.start()
        weed.start()
        assert rabbit.process is not None
        s3 = weed.server
        yield Servers(
            "127.0.0.1", rabbit.port, ADMIN, rabbit.password, rabbit.management_url, s3.url,
            s3.access_key, s3.secret_key,
            {"broker": rabbit.process.pid, "store": child_named(os.getpid(), "weed")},
        )  # fmt: skip
    finally:
        weed.stop()
        if rabbit.process is not None:
            rabbit.stop()


def process_seconds(pid: int) -> float:
    """Processor seconds of a process and of all it started, as far as they are still there."""
    total = 0.0
    for one in (pid, *descendants(pid)):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{one}/stat").read_text(encoding="utf-8", errors="replace")
            fields = text.rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def descendants(pid: int) -> list[int]:
    """Children and their children."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text(encoding="ascii").split():
                found += [int(child), *descendants(int(child))]
    return found


def child_named(pid: int, name: str) -> int:
    """The child process with this name."""
    for child in descendants(pid):
        if Path(f"/proc/{child}/comm").read_text(encoding="utf-8").strip() == name:
            return child
    raise SystemExit(f"expected a child process {name}, got none")


def memory_mb(kind: str, pid: int | str = "self") -> float:
    """``VmRSS``, ``VmHWM`` or ``RssAnon`` of a process, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"/proc/{pid}/status: expected a line {kind}; run this on Linux")


def end_on_signals() -> None:
    """Let SIGTERM unwind as Ctrl-C does, so that servers and folders go."""

    def leave(number: int, frame: object) -> NoReturn:
        del frame
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


# A federation's processes ------------------------------------------------------------------------


@dataclass
class Federation:
    """One run in a virtual host and bucket of its own; its processes end with the block."""

    servers: Servers
    folder: Path
    name: str
    sites: Sequence[str]
    rounds: int
    codec: str
    tags: str = "administrator"
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.folder.mkdir()
        self.servers.new_vhost(self.name, self.tags)
        for file, secret in (
            ("broker-password", PASSWORD),
            ("access-key", self.servers.access_key),
            ("secret-key", self.servers.secret_key),
        ):
            (self.folder / file).write_text(secret, encoding="utf-8")
        self.file.write_text(tomli_w.dumps(self._tables()), encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def file(self) -> Path:
        """Its federation.toml."""
        return self.folder / "federation.toml"

    def start(self, name: str, *command: str) -> int:
        """Start a Python process whose log is ``NAME.log``; its pid."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=log, start_new_session=True
            )
        return self.processes[name].pid

    def start_coordinator(self) -> int:
        """The real coordinator with a stopwatch in it; its pid."""
        return self.start("coordinator", __file__, "--role", "coordinator", str(self.file))

    def alive(self) -> bool:
        """Whether the coordinator still works. Ends the script when any process has failed."""
        for name, process in self.processes.items():
            code = process.poll()
            if code is not None and (code or name != "coordinator"):
                log = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                raise SystemExit(f"{name} ended with {code}:\n{log[-3000:]}")
        return self.processes["coordinator"].poll() is None

    def wait(self) -> None:
        """Until the coordinator has brought the run to its end."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.alive():
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name}: not finished within {PATIENCE_SECONDS:.0f} s")
            time.sleep(0.05)

    def round_seconds(self) -> list[float]:
        """Seconds from each round's opening to the next one's, or to the end of the run."""
        return [end - begin for begin, end in itertools.pairwise(self.stamps())]

    def stamps(self) -> list[float]:
        """When each round was opened so far, and when the run finished."""
        from shared.protocol.ledger import Ledger
        from shared.protocol.records import FinishedRecord, OpenedRecord

        ledger = Ledger(self.servers.store(self.name), self.name, "benchmark", time.time)
        return [r.time for r in ledger.history() if isinstance(r, OpenedRecord | FinishedRecord)]

    def phases(self, name: str) -> dict[str, float]:
        """What the process's stopwatch says."""
        path = self.folder / f"{name}-{PHASES_FILE}"
        deadline = time.monotonic() + 60.0
        while not path.exists():  # a site hears of the end after the coordinator left
            if time.monotonic() > deadline:
                raise SystemExit(f"{name}: wrote no {path.name}")
            time.sleep(0.05)
        values: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return values

    def _tables(self) -> dict[str, dict[str, object]]:
        broker, sites = self.servers, list(self.sites)
        return {
            "run": {"name": self.name, "rounds": self.rounds, "participants": sites},
            "base": {"model": "none", "quantisation": "none"},
            "training": {"local_steps": 1},
            "codec": {"name": self.codec, "down": "whole"},
            "broker": {
                "url": f"amqp://coordinator@{broker.host}:{broker.port}/{self.name}",
                "password_file": "broker-password",
                "management_url": broker.management_url,
                "transport": "plaintext",
            },
            "store": {
                "url": broker.s3_url,
                "bucket": self.name,
                "access_key_file": "access-key",
                "secret_key_file": "secret-key",
                "transport": "plaintext",
            },
        }


class Phases:
    """Seconds by phase, on every thread; of nested phases the inner one counts alone."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._processor = 0.0
        self._lock = threading.Lock()
        self._inner = threading.local()

    def watch(self, owner: object, name: str, phase: str) -> None:
        """Time every call of ``owner.name``; one that is not there any more is left out."""
        call = getattr(owner, name, None)
        if call is None:
            return

        @functools.wraps(call)
        def timed(*args: object, **settings: object) -> object:
            outer = getattr(self._inner, "seconds", 0.0)
            self._inner.seconds = 0.0
            start = time.perf_counter()
            try:
                return call(*args, **settings)
            finally:
                spent = time.perf_counter() - start
                with self._lock:
                    self.seconds[phase] += spent - self._inner.seconds
                self._inner.seconds = outer + spent

        setattr(owner, name, timed)

    def before(self, owner: object, name: str, do: Callable[..., None]) -> None:
        """Call ``do`` with the arguments of every call of ``owner.name`` first."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def noticed(*args: object, **settings: object) -> object:
            do(*args)
            return call(*args, **settings)

        setattr(owner, name, noticed)

    def clear(self) -> None:
        """Count from now on."""
        with self._lock:
            self.seconds.clear()
        self._processor = time.process_time()

    def write(self, path: Path, **more: float) -> None:
        """Write them as JSON, with the processor's seconds; the file appears whole."""
        part = path.with_suffix(".part")
        more["cpu_seconds"] = time.process_time() - self._processor
        part.write_text(json.dumps({**self.seconds, **more}), encoding="utf-8")
        part.replace(path)


def run_coordinator(federation: Path) -> None:
    """The real command in this process, timed from the second round on."""
    import coordinator.arrivals
    import coordinator.effects
    import coordinator.intake
    from coordinator.deltas import Deltas
    from gradualdiff.cli.serve import coordinator as command
    from shared.brokers.rabbitmq.connection import RabbitConnection
    from shared.brokers.rabbitmq.consumer import RabbitConsumer
    from shared.protocol.ledger import Ledger
    from shared.protocol.records import OpenedRecord
    from shared.stores.s3 import S3Store

    phases = Phases()
    for owner, name, phase in (
        (RabbitConsumer, "receive", "idle"),
        (RabbitConnection, "publish", "publish"),
        (Deltas, "on_upload_requested", "grant"),
        (Deltas, "on_delta_submitted", "take"),
        (coordinator.intake.Intake, "_spooled", "fetch"),
        (S3Store, "stat", "stat"),
        (S3Store, "spool", "read"),
        (coordinator.arrivals.Arrivals, "complete", "complete"),
        (S3Store, "delete", "clear"),
        (S3Store, "create", "record"),
        (S3Store, "put_file", "store"),
        (coordinator.intake, "digest_file", "hash"),
        (coordinator.intake, "check_delta", "check"),
        (coordinator.effects, "aggregate", "aggregate"),
        (os, "fsync", "sync"),
    ):
        phases.watch(owner, name, phase)

    def begin(_ledger: object, record: object) -> None:
        if isinstance(record, OpenedRecord) and record.round == 2:
            phases.clear()

    phases.before(Ledger, "write", begin)
    peak, done = [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], memory_mb("RssAnon"))

    threading.Thread(target=sample, daemon=True).start()
    command(federation, linger=0.0)
    done.set()
    phases.write(
        federation.parent / f"coordinator-{PHASES_FILE}",
        peak_rss_mb=memory_mb("VmHWM"),
        peak_anonymous_mb=peak[0],
    )


@dataclass
class IdleLearner:
    """The ``Learner`` port: hands in the same values every round."""

    site: str
    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def prepare(self, announced: object, report: object) -> object:
        """Draw the values."""
        from participant.learner.port import Readiness

        del announced, report
        manifest = wire_manifest()
        self.values = {spec.name: noise(self.site, spec) for spec in manifest.tensors}
        numerics = Numerics(
            versions={}, device="cpu", cpu_capability="any", cpu_threads=1, compute_dtype="float32"
        )
        return Readiness(manifest, "f" * 64, numerics, 1)

    def learn(self, task: Any, source: Path, state: object, folder: Path, *others: Any) -> object:
        """Encode and write them."""
        from participant.learner.port import DELTA_FILE, Learned
        from shared.tensors.delta_file import DeltaHeader, write_delta

        *_, feedback = others
        del source, state
        header = DeltaHeader.of(
            task.codec, run=task.run, number=task.round, site=self.site, source_sha=task.source_sha
        )
        given = self.values
        delta = write_delta(
            folder / DELTA_FILE, wire_manifest(), task.codec, header,
            lambda spec: given[spec.name], task.seed, feedback,
        )  # fmt: skip
        return Learned(delta, 1, 1, LocalMetrics(steps=1), "fresh")

    def evaluate(self, source: object, report: object) -> None:
        """Nothing to measure."""


def run_sites(federation: Path, sites: Sequence[str]) -> None:
    """A process of participants with learners that learn nothing, timed from round 2 on."""
    import participant.local_round
    import participant.workspace
    from gradualdiff.cli.serve import SITE_HEARTBEAT, connect_broker, stopped_by_signal
    from participant.daemon import ParticipantContext, serve
    from participant.handlers import Participant
    from participant.outbox import Outbox
    from participant.workspace import Workspace
    from shared.config import load_site
    from shared.log import configure
    from shared.stores.transfer import HttpTransfer

    configure(level="info")
    phases = Phases()
    for owner, name, phase in (
        (HttpTransfer, "download", "fetch"),
        (IdleLearner, "learn", "encode"),
        (participant.local_round, "digest_file", "hash"),
        (participant.workspace, "digest_file", "hash"),
        (Workspace, "commit", "commit"),
        (HttpTransfer, "upload", "upload"),
        (Outbox, "publish", "publish"),
        (os, "fsync", "sync"),
    ):
        phases.watch(owner, name, phase)

    first, last = itertools.count(1), itertools.count(1)

    def begin(_workspace: object, _run: object, closed: int, _sha: object) -> None:
        if closed == 1 and next(first) == 1:
            phases.clear()

    def end(*_: object) -> None:
        if next(last) == len(sites):
            phases.write(federation.parent / f"{sites[0]}-{PHASES_FILE}")

    phases.before(Workspace, "sweep", begin)
    phases.before(Participant, "on_run_finished", end)
    stopping = threading.Event()

    def take_part(site: str) -> None:
        folder = federation.parent / "kits" / site
        config = load_site(folder / "site.toml")
        broker = config.broker
        assert broker is not None  # the kit says it
        serve(
            ParticipantContext(
                name=site,
                connect=lambda: connect_broker(broker, folder, SITE_HEARTBEAT),
                transfer=HttpTransfer(plaintext=True),
                workspace=Workspace(folder / config.site.workspace),
                learner=IdleLearner(site),
                accept=config.accept,
                stopping=stopping,
            )
        )

    with stopped_by_signal(stopping):
        at_once(take_part, sites)


def at_once(do: Callable[[Any], object], what: Sequence[Any]) -> None:
    """Each in a thread of its own; raises what one of them raised."""
    with ThreadPoolExecutor(len(what)) as pool:
        for _ in pool.map(do, what):
            pass


# The floors --------------------------------------------------------------------------------------


def run_bare(address: str) -> None:
    """One process of the floors: does what each line of standard input says, answers each."""
    client = bare_client(*json.loads(address))
    data = b""

    def move(key: str) -> None:
        response = client.get_object(FLOOR_BUCKET, "adapter")
        for _ in response.stream(1024 * 1024):
            pass
        response.release_conn()
        client.put_object(FLOOR_BUCKET, key, io.BytesIO(data), len(data))

    def exchange(place: tuple[int, int]) -> None:
        with socket.create_connection(("127.0.0.1", place[0])) as line_:
            receive(line_, place[1])
            line_.sendall(data)
            receive(line_, 1)

    for line in sys.stdin:
        word, *rest = json.loads(line)
        match word:
            case "size":
                data = np.random.default_rng(os.getpid()).bytes(rest[0])
            case "sdk":
                at_once(move, rest)
            case "tcp":
                count, port, size = rest
                at_once(exchange, [(port, size)] * count)
        print("done", flush=True)


def bare_client(url: str, access_key: str, secret_key: str) -> Any:
    """The SDK as it comes."""
    from minio import Minio

    parts = urlsplit(url)
    secure = parts.scheme == "https"
    return Minio(parts.netloc, access_key, secret_key, secure=secure, region="us-east-1")


def receive(connection: socket.socket, size: int) -> None:
    """Take so many bytes and drop them."""
    room = memoryview(bytearray(1024 * 1024))
    while size:
        size -= connection.recv_into(room[: min(size, len(room))])


class Floor:
    """Bare processes for K participants that wait for the word; they end with the block."""

    def __init__(self, place: Servers, participants: int) -> None:
        self._store = place.store(FLOOR_BUCKET)
        count = sum(spec.elements for spec in wire_manifest().tensors)
        adapter = np.random.default_rng(1).standard_normal(count, np.float32)
        self._arrays = [adapter] * participants
        self._keys = shared_out([f"delta-{number}" for number in range(participants)])
        self._adapter_bytes = adapter.tobytes()
        self._store.put("adapter", self._adapter_bytes)
        address = json.dumps([place.s3_url, place.access_key, place.secret_key])
        self._workers = [
            subprocess.Popen(
                [sys.executable, __file__, "--role", "bare", address],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            )
            for _ in self._keys
        ]  # fmt: skip
        self._size = 0
        self._client = bare_client(place.s3_url, place.access_key, place.secret_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()

    def cpu_seconds(self) -> float:
        """Processor seconds of the bare processes so far."""
        return sum(process_seconds(worker.pid) for worker in self._workers)

    def upload_size(self, size: int) -> None:
        """Bytes each process is to put from now on."""
        self._size = size
        self._tell([["size", size]] * len(self._workers))

    def sdk(self) -> float:
        """Seconds of one round with the bare SDK and numpy."""
        start = time.perf_counter()
        self._tell([["sdk", *keys] for keys in self._keys])
        mean = self._arrays[0].copy()
        for array in self._arrays[1:]:
            mean += array
        mean /= np.float32(len(self._arrays))
        return time.perf_counter() - start

    def read(self) -> float:
        """Seconds of what a coordinator must do at least after ``sdk``."""
        start = time.perf_counter()
        for key in itertools.chain(*self._keys):
            response = self._client.get_object(FLOOR_BUCKET, key)
            for _ in response.stream(1024 * 1024):
                pass
            response.release_conn()
        mean = self._adapter_bytes
        self._client.put_object(FLOOR_BUCKET, "mean", io.BytesIO(mean), len(mean))
        return time.perf_counter() - start

    def tcp(self) -> float:
        """Seconds of the same bytes through plain sockets."""
        with socket.create_server(("127.0.0.1", 0), backlog=len(self._arrays)) as listener:

            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(self._adapter_bytes)
                    receive(connection, self._size)
                    connection.sendall(b".")

            start = time.perf_counter()
            threads = [threading.Thread(target=serve) for _ in self._arrays]
            for thread in threads:
                thread.start()
            port, size = listener.getsockname()[1], len(self._adapter_bytes)
            self._tell([["tcp", len(keys), port, size] for keys in self._keys])
            for thread in threads:
                thread.join()
            return time.perf_counter() - start

    def _tell(self, words: list[list[Any]]) -> None:
        for worker, word in zip(self._workers, words, strict=True):
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(word) + "\n")
            worker.stdin.flush()
        for worker in self._workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != "done\n":
                raise SystemExit("a process of the floor ended; see its error above")


# The measurement ---------------------------------------------------------------------------------


def run_federation(federation: Federation, setup: bool = True) -> None:
    """Make accounts and kits, start all processes, wait for the end."""
    start_federation(federation, setup)
    federation.wait()


def start_federation(federation: Federation, setup: bool = True) -> None:
    """Make accounts and kits, start all processes."""
    if setup:
        subprocess.run(
            [sys.executable, "-m", "gradualdiff.cli.main", "setup", str(federation.file), "--kits",
             str(federation.folder / "kits")],
            check=True, capture_output=True,
        )  # fmt: skip
    for site in federation.sites:
        toml = federation.folder / "kits" / site / "site.toml"
        text = toml.read_text(encoding="utf-8").replace('path = ""', 'path = "none"')
        # Nothing is trained, so that there is nothing to hide.
        text = re.sub(r"^(min_\w+) = \d+", r"\1 = 1", text, flags=re.MULTILINE)
        toml.write_text(text, encoding="utf-8")
    for names in shared_out(federation.sites):
        federation.start(names[0], __file__, "--role", "sites", str(federation.file), *names)
    federation.start_coordinator()


def measure(place: Servers, folder: Path, codec: str, floor: Floor, given: Any) -> dict[str, float]:
    """Floors, the federation, floors again; print what came. What a row of the table says."""
    from shared.tensors.codecs import get_codec

    sites = [f"{codec}-{number}" for number in range(given.participants)]
    size = sum(
        part.size_bytes
        for spec in wire_manifest().tensors
        for part in get_codec(codec).layout(spec)
    )
    floor.upload_size(size)
    sdk: list[float] = []
    read: list[float] = []
    tcp: list[float] = []
    floor_cpu = {"sdk": Counter[str](), "read, without sdk's": Counter[str]()}

    def looked() -> dict[str, float]:
        return {**place.cpu_seconds(), "clients": floor.cpu_seconds() + time.process_time()}

    def floors() -> None:
        for _ in range(given.floors):
            looks = [looked()]
            sdk.append(floor.sdk())
            looks.append(looked())
            read.append(sdk[-1] + floor.read())
            looks.append(looked())
            tcp.append(floor.tcp())
            for which, (before, after) in zip(floor_cpu, itertools.pairwise(looks), strict=True):
                floor_cpu[which].update(spent(before, after, 2 * given.floors))

    floors()
    federation = Federation(place, folder / codec, f"wire-{codec}", sites, given.rounds, codec)
    with federation:
        before = place.cpu_seconds()
        run_federation(federation)
        cpu = spent(before, place.cpu_seconds(), given.rounds)
        seconds = federation.round_seconds()
        coordinator = federation.phases("coordinator")
        watches = [federation.phases(names[0]) for names in shared_out(sites)]
        if given.keep_logs:
            for log in federation.folder.glob("*.log"):
                (given.keep_logs / f"{codec}-{log.name}").write_bytes(log.read_bytes())
    floors()
    later = seconds[1:] or seconds
    figure = statistics.median(later)
    print(f"codec {codec}: {len(sites)} deltas of {size / 1e6:.1f} MB a round", flush=True)
    print(f"  round {figure:6.2f} s  of {listed(later)}, the first {seconds[0]:.2f}")
    for name, values in (("sdk", sdk), ("read", read), ("tcp", tcp)):
        floor_seconds = statistics.median(values)
        print(
            f"  {name:<5} {floor_seconds:6.2f} s  of {listed(values)}   "
            f"round / {name} = {figure / floor_seconds:.2f}"
        )
    print(
        f"  coordinator's memory: peak {coordinator.pop('peak_rss_mb'):.0f} MB, of it not mapped "
        f"from files {coordinator.pop('peak_anonymous_mb'):.0f} MB"
    )
    count = max(len(seconds) - 1, 1)
    cpu["coordinator"] = coordinator.pop("cpu_seconds") / count
    cpu["sites"] = sum(watch.pop("cpu_seconds") for watch in watches) / count
    print(f"  processor seconds a round: {told(cpu)}")
    for which, used in floor_cpu.items():
        print(f"  processor seconds of the floor {which}: {told(used)}")
    mean = Counter[str]()
    for watch in watches:
        mean.update({phase: value / len(sites) for phase, value in watch.items()})
    print(f"  a site's seconds a round:        {told(mean, count)}")
    print(f"  the coordinator's, one thread:   {told(Counter(coordinator), count)}", flush=True)
    return {"round": figure, "sdk": statistics.median(sdk), "delta": size / 1e6, **cpu}


def print_table(given: argparse.Namespace) -> None:
    """A row for each number of participants, and for each size of the adapter.

    What else is measured goes to standard error.
    """
    told_by = ("coordinator", "sites", "store", "broker")
    head = ("participants", "shape", "codec", "a delta", "a round", "sdk", "round / sdk", *told_by)
    print(f"| {' | '.join(head)} |\n|---:|---|---|{'---:|' * (len(head) - 3)}", flush=True)
    rows = [(number, "small") for number in given.table or TABLE]
    for participants, shape in (*rows, (5, "square"), (5, "llama-2-7b-r64")):
        with tempfile.TemporaryDirectory(prefix="row-") as folder:
            file = Path(folder) / "row.json"
            options = {"participants": participants, "rounds": given.rounds, "floors": given.floors}
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            subprocess.run(
                [sys.executable, __file__, *words, "--shape", shape, "--to", str(file), "--codecs",
                 *given.codecs],
                check=True, stdout=sys.stderr,
            )  # fmt: skip
            for codec, row in json.loads(file.read_text(encoding="utf-8")).items():
                cells = [
                    str(participants), shape, codec, f"{row['delta']:.1f} MB",
                    f"{row['round']:.2f} s", f"{row['sdk']:.2f} s",
                    f"{row['round'] / row['sdk']:.2f}", *(f"{row[who]:.2f}" for who in told_by),
                ]  # fmt: skip
                print(f"| {' | '.join(cells)} |", flush=True)


def spent(before: dict[str, float], after: dict[str, float], by: int) -> Counter[str]:
    """Processor seconds between two looks, divided."""
    return Counter({name: (after[name] - before[name]) / by for name in after})


def listed(values: Sequence[float]) -> str:
    """Seconds, for a line of text."""
    return " ".join(f"{value:.2f}" for value in values)


def told(values: Counter[str], by: int = 1) -> str:
    """Phases, the longest first."""
    return ", ".join(f"{phase} {value / by:.2f}" for phase, value in values.most_common())


def main() -> None:
    """Start the servers, measure each codec, leave nothing behind."""
    parser = argparse.ArgumentParser(description="Seconds of a round over RabbitMQ and S3.")
    parser.add_argument("--participants", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--codecs", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE)
    parser.add_argument("--floors", type=int, default=2, help="of each kind, before and after")
    parser.add_argument("--table", nargs="*", type=int, default=None, metavar="PARTICIPANTS")
    parser.add_argument("--to", type=Path, default=None, help="write the figures here, as JSON")
    parser.add_argument("--keep-logs", type=Path, default=None, help="copy the logs here")
    add_server_options(parser)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    match given.role:
        case ["coordinator", federation]:
            run_coordinator(Path(federation))
        case ["sites", federation, *sites]:
            run_sites(Path(federation), sites)
        case ["bare", address]:
            run_bare(address)
        case None if given.table is not None:
            print_table(given)
        case None:
            if given.shape != SHAPE:  # read once, when this file is
                os.environ["WIRE_SHAPE"] = given.shape
                os.execv(sys.executable, [sys.executable, *sys.argv])
            end_on_signals()
            if given.dir is not None:
                given.dir.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                name = stack.enter_context(
                    tempfile.TemporaryDirectory(dir=given.dir, prefix="wire-")
                )
                place = stack.enter_context(servers(given, Path(name)))
                floor = stack.enter_context(Floor(place, given.participants))
                rows = {c: measure(place, Path(name), c, floor, given) for c in given.codecs}
            if given.to is not None:
                given.to.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
