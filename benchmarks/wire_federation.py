"""A federation whose sites train nothing: its processes over given servers, and their stopwatches.

Run as a script it is one of those processes: ``coordinator FEDERATION`` or ``sites FEDERATION NAME
...``. What a site sends are the same random values every round.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import tomli_w
from wire_servers import PASSWORD, Servers, memory_mb

from shared.protocol.manifest import LocalMetrics, Manifest, Numerics, TensorSpec
from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

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
PATIENCE_SECONDS = 600.0
PHASES_FILE = "phases.json"
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


@dataclass
class Federation:
    """One run in a virtual host and bucket of its own; its processes end with the block."""

    servers: Servers
    folder: Path
    name: str
    sites: Sequence[str]
    rounds: int
    codec: str
    down: str = "whole"
    secure: bool = False
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
        return self.start("coordinator", __file__, "coordinator", str(self.file))

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
            "codec": {"name": self.codec, "down": self.down},
            "aggregation": {"secure": self.secure},
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
        """Time every call of ``owner.name``. Raises AttributeError where there is no such one."""
        call = getattr(owner, name)

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
        (Deltas, "check_ahead", "take"),
        (coordinator.intake.Intake, "_spooled", "fetch"),
        (S3Store, "stat", "stat"),
        (S3Store, "spool", "read"),
        (coordinator.arrivals.Arrivals, "complete", "complete"),
        (S3Store, "delete", "clear"),
        (S3Store, "create", "record"),
        (S3Store, "put_file", "store"),
        (coordinator.intake, "digest_file", "hash"),
        (coordinator.intake, "check_delta", "check"),
        (coordinator.effects, "close_round", "aggregate"),
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
            lambda spec: given[spec.name], task.seed, feedback, packed=task.packed,
        )  # fmt: skip
        return Learned(delta, 1, 1, LocalMetrics(steps=1), "fresh")

    def evaluate(self, source: object, report: object) -> None:
        """Nothing to measure."""


def run_sites(federation: Path, sites: Sequence[str]) -> None:
    """A process of participants with learners that learn nothing, timed from round 2 on."""
    import participant.fetching
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
        (participant.local_round, "mask_delta", "mask"),
        (participant.fetching, "digest_file", "hash"),
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
        federation.start(names[0], __file__, "sites", str(federation.file), *names)
    federation.start_coordinator()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["coordinator", federation]:
            run_coordinator(Path(federation))
        case ["sites", federation, *sites]:
            run_sites(Path(federation), sites)
