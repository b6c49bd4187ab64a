"""What the faults fall on: servers of its own behind proxies, two coordinators, three sites.

A supervisor starts again whatever ended, as systemd or a scheduler would. What a fault holds down
on purpose it leaves alone until the fault is over.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shared.config import load_federation
from tests import federations
from tests.chaos.messages import Copier
from tests.chaos.names import BUCKET, COORDINATORS, PASSWORD, SITES, VHOST
from tests.chaos.schedule import RunShape
from tests.servers.deployment import without_minima
from tests.servers.proxy import FaultProxy
from tests.servers.rabbitmq import RabbitServer
from tests.servers.seaweedfs import SeaweedFS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    from shared.stores.s3 import S3Store

SLOW_SECONDS = 0.8
COMMAND_SECONDS = 120.0
LINGER_SECONDS = 15.0  # a site that lost what it took part in sends no loss of the result
# With carry. Less than a training takes, and soon noticed: who comes first closes the round.
QUORUM = """[policy]
kind = "quorum"
quorum = 1
deadline_seconds = 0.5
late = "carry"
"""
OFTEN = "coordinator.daemon:TICK_SECONDS=0.3"
EVERYTHING = {"configure": ".*", "write": ".*", "read": ".*"}


@dataclass
class Slot:
    """One process's place. ``held``: a fault has it in hand, the supervisor keeps away."""

    name: str
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    held: bool = False
    start_at: float | None = None

    @property
    def alive(self) -> bool:
        """Whether its process runs (a stopped one does)."""
        return self.process is not None and self.process.poll() is None


@dataclass(frozen=True)
class Exit:
    """A process that ended by itself in the middle of a run."""

    name: str
    code: int
    started: float
    ended: float
    said: str


@dataclass
class Stand:
    """Context: everything is up inside, and gone after. Times are seconds since it began."""

    folder: Path
    slots: dict[str, Slot] = field(default_factory=dict)
    exits: list[Exit] = field(default_factory=list)
    killed: set[int] = field(default_factory=set)  # process ids that a SIGKILL of ours ended
    wipes: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.lock = threading.RLock()
        self.vhost = VHOST
        self.run: RunShape | None = None
        self._wanted: dict[tuple[object, ...], str] = {}
        self._stopping = threading.Event()
        self._stack = contextlib.ExitStack()
        self.copier = Copier(self)
        for name in ("rabbit", "weed"):
            (self.folder / name).mkdir(parents=True)
        self.rabbit = RabbitServer(self.folder / "rabbit")
        self.weed = SeaweedFS(self.folder / "weed")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self.rabbit.stop)
            self.rabbit.start()
            stack.enter_context(self.weed)
            self._open_links(stack)
            self._set_up()
            self.slots = {name: Slot(name) for name in (*COORDINATORS, *SITES)}
            stack.callback(self._end_processes)
            supervisor = threading.Thread(target=self._supervise, daemon=True)
            supervisor.start()
            stack.callback(supervisor.join, 10)
            stack.callback(self._stopping.set)
            self._stack = stack.pop_all()
        for site in SITES:
            self._start(site, "tests.chaos.site", str(self.kit(site) / "site.toml"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def now(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    @property
    def store(self) -> S3Store:
        """The store itself, past the proxies."""
        return self.weed.server.store(BUCKET)

    def kit(self, site: str) -> Path:
        """A site's folder."""
        return self.folder / "kits" / site

    def log(self, name: str) -> str:
        """All that the processes of this name have said."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``gradualdiff`` to its end, past whatever is wrong with it."""
        return subprocess.run(
            [sys.executable, "-m", "gradualdiff.cli.main", *arguments],
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )

    # Runs --------------------------------------------------------------------------------------

    def federation(self, shape: RunShape) -> Path:
        """The run's file."""
        return self.folder / f"{shape.name}.toml"

    def begin(self, shape: RunShape) -> None:
        """Start both coordinators on this run."""
        self._write(shape)
        self.run = shape
        words = ("coordinator", str(self.federation(shape)), "--linger", str(LINGER_SECONDS))
        command = ("gradualdiff.cli.main", *words)
        if shape.carries:
            command = ("tests.servers.armed", *command)
        for name in COORDINATORS:
            self._start(name, *command)

    @property
    def run_has_ended(self) -> bool:
        """Whether both coordinators said the result and went."""
        return all(self.slots[name].arguments == () for name in COORDINATORS)

    def digest(self, shape: RunShape, name: str) -> str:
        """What a coordinator said at the end of the run."""
        return self.log(name).rpartition(f"run {shape.name} is finished: ")[2].split()[-1]

    def wanted(self, shape: RunShape) -> str:
        """The digest of the same federation, undisturbed, in one process."""
        key = (shape.sites, shape.rounds, shape.codec, shape.down, shape.kind)
        if key not in self._wanted:
            config = load_federation(self.federation(shape))
            place = self.folder / "undisturbed" / shape.name
            self._wanted[key] = federations.run(config, place).adapter_sha
        return self._wanted[key]

    # Processes ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[Slot | None]:
        """Take a living process away from the supervisor; None where there is none to take."""
        with self.lock:
            slot = self.slots[name]
            free = slot.alive and not slot.held
            slot.held = slot.held or free
        if not free:
            yield None
            return
        try:
            yield slot
        finally:
            with self.lock:
                slot.held = False

    def kill(self, slot: Slot) -> bool:
        """SIGKILL a held process; whether that is what ended it."""
        process = slot.process
        assert process is not None
        os.killpg(process.pid, signal.SIGKILL)
        by_us = process.wait(10) == -signal.SIGKILL
        if by_us:
            self.killed.add(process.pid)
        return by_us

    def start_again(self, slot: Slot) -> None:
        """Start what was killed with what it ran before."""
        with self.lock:
            self._spawn(slot)

    def active(self) -> str | None:
        """The coordinator that is the active one, as far as the logs tell."""
        newest: tuple[int, str] | None = None
        for name in COORDINATORS:
            if not self.slots[name].alive:
                continue
            said = self.log(name)
            at = said.rfind("coordinator.active")
            since = max(said.rfind("coordinator.waits"), said.rfind("coordinator.connected"))
            if at > since:
                moment = (self.folder / f"{name}.log").stat().st_mtime_ns
                newest = max(newest or (0, ""), (moment, name))
        return newest[1] if newest else None

    def _start(self, name: str, *arguments: str) -> None:
        with self.lock:
            self.slots[name].arguments = arguments
            self._spawn(self.slots[name])

    def _spawn(self, slot: Slot) -> None:
        if self._stopping.is_set():
            return
        with (self.folder / f"{slot.name}.log").open("ab") as log:
            slot.process = subprocess.Popen(
                [sys.executable, "-m", *slot.arguments],
                env={
                    **os.environ,
                    "SLOW_SECONDS": str(SLOW_SECONDS),
                    "SETTINGS": OFTEN,  # for tests.servers.armed
                    "ARMED_FIRED": os.devnull,
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        slot.started, slot.start_at = self.now, None

    def _supervise(self) -> None:
        while not self._stopping.wait(0.1):
            with self.lock:
                for slot in self.slots.values():
                    if slot.arguments and not slot.held and not slot.alive:
                        self._attend(slot)

    def _attend(self, slot: Slot) -> None:
        assert slot.process is not None
        if slot.start_at is not None:
            if self.now > slot.start_at:
                self._spawn(slot)
            return
        code = slot.process.returncode
        if code == 0 and slot.name in COORDINATORS:
            slot.arguments = ()
            return
        said = self.log(slot.name)[-600:]
        self.exits.append(Exit(slot.name, code, slot.started, self.now, said))
        slot.start_at = self.now + 1.0

    def _end_processes(self) -> None:
        with self.lock:
            for slot in self.slots.values():
                slot.arguments = ()
                if slot.process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(slot.process.pid, signal.SIGKILL)
                    slot.process.wait(10)

    # Setting up --------------------------------------------------------------------------------

    def _open_links(self, stack: contextlib.ExitStack) -> None:
        """A proxy for each kind of client and server: what hits sites spares the coordinators."""
        broker = ("127.0.0.1", self.rabbit.port)
        store = ("127.0.0.1", int(self.weed.server.url.rpartition(":")[2]))
        self.links = {
            f"{server} of {who}": stack.enter_context(FaultProxy(target))
            for server, target in (("broker", broker), ("store", store))
            for who in ("coordinators", "sites")
        }

    def make_vhost(self) -> None:
        """The virtual host, empty, and the coordinator's rights in it."""
        self.rabbit.api("PUT", f"vhosts/{self.vhost}")
        self.rabbit.api("PUT", f"permissions/{self.vhost}/coordinator", EVERYTHING)
        self.rabbit.api("PUT", f"permissions/{self.vhost}/copier", EVERYTHING)

    def _set_up(self) -> None:
        for name, tags in (("coordinator", "administrator"), ("copier", "impersonator")):
            self.rabbit.api("PUT", f"users/{name}", {"password": PASSWORD, "tags": tags})
        self.make_vhost()
        server = self.weed.server
        for file, secret in (
            ("broker-password", PASSWORD),
            ("access-key", server.access_key),
            ("secret-key", server.secret_key),
        ):
            (self.folder / file).write_text(secret + "\n")
        everybody = RunShape(0, SITES, 1, "fp32", "whole", "lora", "all")
        self._write(everybody)
        done = self.command("setup", str(self.federation(everybody)))
        assert done.returncode == 0, done.stderr + done.stdout
        for site in SITES:
            toml = self.kit(site) / "site.toml"
            text = toml.read_text().replace('path = ""', 'path = "unused.jsonl"')
            # Runs of all shapes come.
            text = re.sub(r"^max_", "# max_", without_minima(text), flags=re.MULTILINE)
            toml.write_text(text)

    def _write(self, shape: RunShape) -> None:
        links = {name: proxy.address for name, proxy in self.links.items()}
        names = ", ".join(f'"{site}"' for site in shape.sites)
        self.federation(shape).write_text(f"""
[run]
name = "{shape.name}"
rounds = {shape.rounds}
participants = [{names}]
[base]
model = "none"
[lora]
kind = "{shape.kind}"
[training]
local_steps = 1
{QUORUM if shape.carries else ""}
[codec]
name = "{shape.codec}"
down = "{shape.down}"
[broker]
url = "amqp://coordinator@{links["broker of coordinators"]}/{self.vhost}"
site_url = "{links["broker of sites"]}"
password_file = "broker-password"
management_url = "{self.rabbit.management_url}"
[store]
url = "http://{links["store of coordinators"]}"
site_url = "http://{links["store of sites"]}"
bucket = "{BUCKET}"
access_key_file = "access-key"
secret_key_file = "secret-key"
""")
