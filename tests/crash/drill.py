"""One row of the crash table carried out: real servers, real processes, one SIGKILL, one restart.

Servers, accounts and kits are made once (``Ground``); each ``Drill`` has a run, site queues and
workspaces of its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gradualdiff.cli.kits import declare_sites, open_servers
from gradualdiff.embedded.federation import Embedding, run_embedded
from participant.held import AuditedDeltas
from shared.brokers.port import Message
from shared.brokers.rabbitmq import connect
from shared.config import load_federation, load_site
from shared.credentials import broker_address
from shared.protocol.ledger import Ledger
from shared.protocol.records import AcceptedRecord, ClosingRecord, FinishedRecord
from shared.stores.directory import DirectoryStore
from shared.topology import (
    SITES_EXCHANGE,
    coordinator_queue,
    delta_key,
    deltas_prefix,
    site_queue,
)
from tests.crash.armed import Orders, run_forked
from tests.crash.table import LORA, OF_COORDINATOR, SECURE, UNDISTURBED
from tests.crash.tiny_trainer import STEPS, TinyTrainer
from tests.patience import wait_until
from tests.servers.deployment import Deployment
from tests.tiny_model import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shared.protocol.manifest import AuditFigures
    from tests.crash.table import Row
    from tests.servers.rabbitmq import RabbitServer
    from tests.servers.seaweedfs import S3Server

ROUNDS = 2
HELD_OUT = "held_out_fraction = 0.25"  # in a site's file
OFF = 'audit = "off"'
# What a site passes when something of a delta leaves.
SENDING = {"publish.sent:UploadRequested", "upload.before", "publish.sent:DeltaSubmitted"}
SITES = ("a", "b")  # of most rows; Row.sites says whose a row is
# Loaded by the server that processes are forked from.
PRELOAD = [
    "tests.crash.drill",
    "gradualdiff.cli.main",
    "coordinator.daemon",
    "shared.stores.s3",
    "participant.learner.torch_learner",
    "participant.learner.model_pool",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "peft",
    "bitsandbytes",
]
# The first of these after a restart is the next useful effect. Ticks and greetings are none.
USEFUL = ("record.after", "publish.confirmed", "upload.after", "commit.renamed")
USEFUL += ("adapter.after", "server_state.after", "update.after")
IDLE_WORDS = ("CoordinatorTick", "SiteOnline", "TrainingProgressed")


@dataclass
class Life:
    """One process from start to end. ``name``: coordinator, a or b; ``began``: before its start."""

    name: str
    process: Any  # multiprocessing.Process or subprocess.Popen
    trace: Path
    log: Path
    began: float

    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def points(self) -> list[tuple[float, str]]:
        """Time and name of every point reached."""
        lines = self.trace.read_text().splitlines() if self.trace.exists() else []
        return [(float(when), name) for when, name in (line.split(" ", 1) for line in lines)]

    def tail(self) -> str:
        """The end of its log and trace, for a failure."""
        log = self.log.read_text(errors="replace")[-2500:] if self.log.exists() else ""
        return f"{self.name}: {[name for _, name in self.points()][-12:]}\n{log}"

    def kill(self) -> None:
        """SIGKILL, if it still lives."""
        with contextlib.suppress(ProcessLookupError):
            if self.code() is None:
                os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait() if isinstance(self.process, subprocess.Popen) else self.process.join()


@dataclass
class Ground:
    """What all drills stand on. ``forked``: start processes as forks; else as programs."""

    folder: Path
    rabbit: RabbitServer
    s3: S3Server
    forked: bool = True

    def __post_init__(self) -> None:
        self._runs = 0
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload(PRELOAD)
        self.vhost = self.rabbit.new_vhost()
        self.deployment = Deployment(
            self.folder / "base",
            make_tiny_model(self.folder / "model"),
            self.rabbit,
            self.vhost,
            self.s3,
            rounds=ROUNDS,
            sites="abc",
            extra='optimizer_state = "keep"\n[codec]\nname = "uniform4"\ndown = "int4"\n'
            '[server]\noptimizer = "nesterov"\n',
        )
        self._wanted: dict[tuple[str, bool, bool], str] = {}
        self.audited: dict[int, AcceptedRecord] = {}  # of a site with a gate that nobody disturbed

    def wanted(self, row: Row) -> str:
        """The digest of the undisturbed federation: in one process, but where a site is late."""
        gate = row.fault == "gate"
        key = (row.settings, row.real, gate)
        if key not in self._wanted:
            alive = gate or row.fault == "late"
            find = self._drilled if alive else self._simulated if row.real else self._embedded
            self._wanted[key] = find(row)
        return self._wanted[key]

    def write_federation(self, path: Path, run: str, row: Row) -> None:
        """The base's, for another run, and with what is special about this row."""
        text = self.deployment.federation.read_text()
        text = text.replace('name = "tiny"', f'name = "{run}"', 1)
        assert LORA in text
        text = text.replace(LORA, row.settings, 1)
        if row.settings == SECURE:
            text = text.replace('name = "uniform4"', 'name = "int8"')
        everybody, files = (json.dumps([f"{s}{end}" for s in "abc"]) for end in ("", ".toml"))
        assert everybody in text
        assert files in text
        text = text.replace(everybody, json.dumps(list(row.sites)))
        path.write_text(text.replace(files, json.dumps([f"{site}.toml" for site in row.sites])))

    def _drilled(self, row: Row) -> str:
        row = replace(row, point="")
        with self.drill(row) as drill:
            _start_all(drill, row, "coordinator")
            _finish(drill, row)
            if row.is_gated:
                self.audited = drill.accepted("a")
            return drill.finished()

    def _simulated(self, row: Row) -> str:
        path = self.deployment.federation.with_name(f"{'core' if row.core else 'lora'}.toml")
        self.write_federation(path, path.stem, row)
        done = self.deployment.command("simulate", str(path), "--json")
        return json.loads(done.stdout)["adapter_sha"]

    def _embedded(self, row: Row) -> str:
        folder = self.folder / f"embedded-{len(self._wanted)}"
        path = self.deployment.federation.with_name(f"{folder.name}.toml")
        self.write_federation(path, folder.name, row)
        config, trainers = load_federation(path), {}
        for site in row.sites:
            (folder / site).mkdir(parents=True)
            trainers[site] = TinyTrainer(site, folder / site)
        embedding = Embedding(
            DirectoryStore(folder / "store"), folder, lambda *_: None, lambda _: None
        )
        return run_embedded(config, trainers, embedding).adapter_sha

    @contextlib.contextmanager
    def drill(self, row: Row = UNDISTURBED) -> Iterator[Drill]:
        """A new run, to be started; all of its processes and queues are gone afterwards."""
        if row.point:
            self.wanted(row)  # now: it may take processes, and a site's queue serves one
        self._runs += 1
        drill = Drill(self, f"run-{self._runs}", row)
        try:
            yield drill
        finally:
            drill.close()

    def start(self, life: str, arguments: list[str], orders: Orders, log: Path) -> Life:
        """Start one process."""
        began = time.time()
        process: Any
        if self.forked:
            process = self._forks.Process(
                target=run_forked, args=(arguments, orders, str(log)), daemon=True
            )
            process.start()
        else:
            with log.open("ab") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.crash.armed", *arguments],
                    env={**os.environ, **orders.environment},
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
        return Life(life, process, orders.trace, log, began)

    def drop_queue(self, name: str) -> None:
        """Delete a queue with all that is in it."""
        with contextlib.suppress(urllib.error.HTTPError):
            self.rabbit.api("DELETE", f"queues/{self.vhost}/{quote(name, safe='')}")

    def close(self) -> None:
        """Take back what the servers were given."""
        self.deployment.close()
        self.rabbit.delete_vhost(self.vhost)


@dataclass
class Drill:
    """One run of two sites, whose processes are started, killed and started again."""

    ground: Ground
    run: str
    row: Row
    lives: list[Life] = field(default_factory=list)
    released: list[tuple[int, str]] = field(default_factory=list)  # round, delta; at site a

    def __post_init__(self) -> None:
        base = self.ground.deployment
        self.folder = self.ground.folder / self.run
        self.folder.mkdir(parents=True)
        for secret in ("broker-password", "access-key", "secret-key"):
            shutil.copy(base.folder / secret, self.folder)
        self.federation = self.folder / "federation.toml"
        self.ground.write_federation(self.federation, self.run, self.row)
        for site in self.row.sites:
            shutil.copytree(base.site_toml(site).parent, self.folder / site)
            # Due after every step, so that a kill may cost one.
            toml = self.folder / site / "site.toml"
            often = "[site]\ncheckpoint_seconds = 0.000001"
            toml.write_text(toml.read_text().replace("[site]", often, 1))
        if self.row.fault == "gate":
            self._set_gate(self.folder / "a")
        office = open_servers(self.federation)
        self.store = office.store
        declare_sites(office, list(self.row.sites))

    def _set_gate(self, folder: Path) -> None:
        """Audits that can measure something, and a limit that each delta crosses."""
        toml = folder / "site.toml"
        text = toml.read_text()
        assert HELD_OUT in text
        assert OFF in text
        gate = 'audit = "gate"\nauc_warn = 0.0\nauc_block = 0.0'
        rows = ({"prompt": f"count {i} at a", "answer": f"{i} and {i} and {i}"} for i in range(40))
        (folder / "gate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = text.replace(load_site(toml).data.path, "gate.jsonl")
        toml.write_text(text.replace(HELD_OUT, "held_out_fraction = 0.5").replace(OFF, gate))

    def start(self, name: str, *, real: bool = False, **orders: Any) -> Life:
        """Start the coordinator or a site; ``orders`` as in ``Orders``."""
        number = sum(life.name == name for life in self.lives)
        place = Orders(self.folder / f"{name}.{number}.trace", **orders)
        if name == "coordinator":
            arguments = ["coordinator", str(self.federation), "--linger", "30"]
        else:
            arguments = ["participant" if real else "tiny", str(self.folder / name / "site.toml")]
        log = self.folder / f"{name}.{number}.log"
        self.lives.append(self.ground.start(name, arguments, place, log))
        return self.lives[-1]

    def spoil_queue(self, site: str) -> None:
        """Put a message that nobody can read into a site's queue."""
        config = load_federation(self.federation)
        with connect(broker_address(config.broker, self.folder)) as broker:
            broker.publish([Message(SITES_EXCHANGE, site, b"nobody can read this")])

    def wait(self, what: str, is_there: Callable[[], bool]) -> None:
        """Wait for it, or fail with what everybody said last; release what a gate keeps."""

        def looked() -> bool:
            if self.row.is_gated:
                self._release()
            return is_there()

        wait_until(looked, lambda: f"{what}\n{self.tails()}")

    def _release(self) -> None:
        """As the site's operator does; nothing of it left before."""
        toml = self.folder / "a" / "site.toml"
        deltas = AuditedDeltas(toml.parent / load_site(toml).site.workspace, time.time)
        for kept in deltas.all():
            if kept.state == "held":
                points = self.points("a")
                last = max(at for at, point in enumerate(points) if point == "learn.after")
                assert not {*points[last:]} & SENDING, points
                deltas.release(kept.submission.sha, "ward@north", "public text")
                self.released.append((kept.submission.round, kept.submission.sha))

    def tails(self) -> str:
        """The end of every log."""
        return "\n".join(life.tail() for life in self.lives)

    def points(self, name: str) -> list[str]:
        """All points that the lives of this name reached."""
        return [point for life in self.lives if life.name == name for _, point in life.points()]

    def steps(self, site: str) -> list[str]:
        """Round and step of every optimiser step that a tiny site made."""
        file = self.folder / site / "steps.txt"
        return file.read_text().splitlines() if file.exists() else []

    def close(self) -> None:
        """End all of it."""
        for life in self.lives:
            life.kill()
        for queue in (coordinator_queue(self.run), *map(site_queue, self.row.sites)):
            self.ground.drop_queue(queue)

    def ledger(self) -> Ledger:
        """What is on record."""
        return Ledger(self.store, self.run, "reader", time.time)

    def accepted(self, site: str) -> dict[int, AcceptedRecord]:
        """A site's deltas on record, by round."""
        found = (one for one in self.ledger().history() if isinstance(one, AcceptedRecord))
        return {one.round: one for one in found if one.site == site}

    def finished(self) -> str:
        """Digest of the run's result."""
        history = self.ledger().history()
        (sha,) = [record.sha for record in history if isinstance(record, FinishedRecord)]
        assert sha is not None, "the run ended without a result"
        return sha


def carry_out(drill: Drill) -> float | None:
    """Kill at the row's point, start again, wait for the end.

    Seconds from the restart to its next useful effect; None where there was none left to do.
    Asserts that the kill happened there, and that the coordinator ended well.
    """
    row = drill.row
    victim_name = "coordinator" if row.role == "coordinator" else "a"
    if row.fault == "garbage":
        drill.spoil_queue("a")
    victim = _start_all(drill, row, victim_name)
    if row.fault == "unfit":  # the run waits for this, so no point beyond it is reached before
        _mend(drill, row)
    drill.wait(f"{row.name}: the kill", lambda: victim.code() is not None)
    assert victim.code() == -signal.SIGKILL, f"{row.name}: ended by itself\n{victim.tail()}"
    reached = [name for _, name in victim.points()]
    assert reached[-1] == row.point, f"{row.name}: {reached[-3:]}"
    assert reached.count(row.point) == row.hit, row.name
    if row.fault == "together":
        assert reached.count("delta.checked") == len(SITES), f"{row.name}: no batch"
    fault = row.fault if victim_name in _sick(row) and row.fault != "together" else ""
    reborn = drill.start(victim_name, real=row.real, fault=fault)
    if victim_name == "coordinator" and row.fault in MENDED_BY_RESTART:
        _mend(drill, row)
    _finish(drill, row)
    return next_useful(reborn)


def _start_all(drill: Drill, row: Row, victim: str) -> Life:
    """The coordinator, then the sites: what they say first is to find its queue; the victim."""
    armed = {"point": row.point, "hit": row.hit, "pause": row.pause}
    for name in ("coordinator", *row.sites):
        orders: dict[str, Any] = {"fault": row.fault} if name in _sick(row) else {}
        orders |= armed if name == victim else {}
        life = drill.start(name, real=row.real, **orders)
        if name == "coordinator":
            drill.wait(f"{row.name}: queues", functools.partial(_is_open_or_dead, life))
    return next(life for life in drill.lives if life.name == victim)


def _sick(row: Row) -> tuple[str, ...]:
    """Whose the fault is."""
    if row.fault == "late":
        return ("coordinator", *SITES)
    return ("coordinator",) if row.fault in OF_COORDINATOR else ("a",)


def _is_open_or_dead(life: Life) -> bool:
    return life.code() is not None or "queues.after" in [name for _, name in life.points()]


# What a site's operator mends by starting it again, and what its log says before.
MENDED_BY_RESTART = {"declined": "run.declined", "spoilt": "delta.answered"}
# Whose word must have come through before it is taken back: where it is on record.
ON_RECORD = {"declined": "declined/", "unfit": "members/a.json"}


def _mend(drill: Drill, row: Row) -> None:
    sick = next(life for life in drill.lives if life.name == "a")
    said = MENDED_BY_RESTART.get(row.fault, "")
    drill.wait(
        f"{row.name}: {said}",
        lambda: sick.log.exists() and said in sick.log.read_text(errors="replace"),
    )
    if row.fault == "spoilt":
        # The word of a refusal comes before the forgetting. Killed between them, the site sends
        # the same delta again, whole this time, and trains once less.
        forgot = "forget.after"
        drill.wait(f"{row.name}: {forgot}", lambda: forgot in [name for _, name in sick.points()])
    if row.fault in ON_RECORD:
        prefix = f"runs/{drill.run}/{ON_RECORD[row.fault]}"
        drill.wait(f"{row.name}: on record", lambda: any(drill.store.list(prefix)))
    sick.kill()
    drill.start("a", fault=row.fault)


def _finish(drill: Drill, row: Row) -> None:
    coordinators = [life for life in drill.lives if life.name == "coordinator"]
    drill.wait(f"{row.name}: the end", lambda: coordinators[-1].code() is not None)
    assert coordinators[-1].code() == 0, f"{row.name}: {coordinators[-1].tail()}"


def next_useful(life: Life) -> float | None:
    """Seconds from this process's start to its first effect that moves the run on."""
    for when, point in life.points():
        stage, _, subject = point.partition(":")
        if stage in USEFUL and subject not in IDLE_WORDS:
            return when - life.began
    return None


def check(drill: Drill) -> None:
    """The end is the undisturbed one: same adapter, each training once, each delta counted once."""
    row = drill.row
    name = row.name
    assert drill.finished() == drill.ground.wanted(row), name
    history = drill.ledger().history()
    closings = [record for record in history if isinstance(record, ClosingRecord)]
    counted = [[(i.site, i.from_round) for i in closing.inputs] for closing in closings]
    assert counted == row.counted, name
    for site in row.sites:
        rounds = [number for inputs in counted for one, number in inputs if one == site]
        disturbed = row is not UNDISTURBED and site == "a"
        least = len(rounds) + (row.again if disturbed else 0)
        most = least + (row.perhaps if disturbed else 0)
        trained = drill.points(site).count("learn.after")
        untold = row.untold if disturbed else 0
        assert least - untold <= trained <= most, f"{name}: {site} trained {trained} times"
        if not row.real:
            steps = drill.steps(site)
            # A checkpoint follows each step: a kill costs one. A refused delta costs all of them.
            refused = row.fault == "spoilt"
            fewest = STEPS * (least if refused else len(rounds))
            at_most = STEPS * (most if refused else len(rounds)) + disturbed
            assert fewest <= len(steps) <= at_most, f"{name}: {site}: {steps}"
            assert set(steps) == {f"{r} {s}" for r in rounds for s in range(STEPS)}, name
    if row.is_gated:
        _check_gate(drill)


def _check_gate(drill: Drill) -> None:
    """Each delta was kept, released once and counted; its audit is the undisturbed one.

    That its values are follows from the adapter; a delta's header names its run.
    """
    name, sent = drill.row.name, drill.accepted("a")
    assert drill.released == [(number, sent[number].sha) for number in (1, 2)], name
    keys = {delta_key(drill.run, number, "a", sha) for number, sha in drill.released}
    stored = {info.key for info in drill.store.list(deltas_prefix(drill.run))}
    assert {key for key in stored if "/a-" in key} == keys, name  # nothing else ever left
    for number, record in sent.items():
        assert record.audit is not None, name
        assert (record.audit.verdict, record.audit.released) == ("blocked", True), name
        if drill.row.fault == "gate":
            assert _timeless(record) == _timeless(drill.ground.audited[number]), name


def _timeless(record: AcceptedRecord) -> AuditFigures:
    assert record.audit is not None
    return record.audit.model_copy(update={"seconds": 0.0})
