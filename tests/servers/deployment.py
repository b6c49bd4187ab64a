"""A whole deployment for tests: real servers, real processes, a tiny real model at two sites."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shared.config import load_federation
from shared.protocol.ledger import Ledger
from shared.protocol.records import ClosingRecord
from shared.stores.opening import open_s3
from tests import federations
from tests.command_line import Done, gradualdiff
from tests.numpy_learner import NumpyLearner, manifest_of
from tests.patience import PATIENCE_SECONDS
from tests.servers.rabbitmq import ADMIN
from tests.tiny_model import write_federation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.servers.proxy import FaultProxy
    from tests.servers.rabbitmq import RabbitServer
    from tests.servers.seaweedfs import S3Server

COORDINATOR_PASSWORD = "for-tests"

EXACT = '[codec]\nname = "fp32"\ndown = "whole"\n'  # an adapter's bytes travel both ways


@dataclass
class Deployment:
    """One federation over one virtual host and one bucket. ``sites``: each a letter.

    Without a model the sites train in numpy, and start in a blink. ``proxies``: by whose line
    ("coordinator broker", "a broker", "coordinator store", "sites store") what it goes through;
    the sites share one line to the store, since signed URLs name one server. Plain text only.
    """

    folder: Path
    model: Path | None
    rabbit: RabbitServer
    vhost: str
    s3: S3Server
    rounds: int = 3
    extra: str = ""
    run: str = ""
    authority: Path | None = None  # with it everything goes over TLS
    proxies: Mapping[str, FaultProxy] = field(default_factory=dict)
    width: int = 8  # numpy only: an adapter and a delta have 16 times as many bytes, and some
    bucket: str = ""  # without: one named as the virtual host
    settings: str = ""  # constants that are shorter in all processes, for tests.servers.armed
    sites: str = "ab"
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.federation = write_federation(
            self.folder,
            self.model or self.folder,
            rounds=self.rounds,
            extra=self.extra + self._servers(),
            run=self.run,
            sites=self.sites,
        )
        self._secrets()
        self.command("setup", str(self.federation), "--kits", str(self.folder / "kits"))
        for name in self.sites:
            self._fill_kit(name)

    def command(self, *arguments: str, check: bool = True) -> Done:
        """Run ``gradualdiff`` to its end."""
        done = self._with_settings(*arguments) if self.settings else gradualdiff(*arguments)
        if check and done.returncode:
            raise AssertionError(f"{arguments}: exit {done.returncode}\n{done.stderr}{done.stdout}")
        return done

    def _with_settings(self, *arguments: str) -> Done:
        """The same in a process of its own, whose constants may be changed."""
        ended = subprocess.run(
            [sys.executable, "-m", "tests.servers.armed", "gradualdiff.cli.main", *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
            env={**os.environ, "SETTINGS": self.settings, "ARMED_FIRED": os.devnull},
        )
        return Done(ended.returncode, ended.stdout, ended.stderr)

    def start(
        self,
        name: str,
        *arguments: str,
        slow: float = 0.0,
        armed: str = "",
        inside: Sequence[str] = (),
        clock: float = 0.0,
    ) -> subprocess.Popen[str]:
        """Start ``python -m ARGUMENTS``; its log is ``NAME.log``.

        ``armed``: points and signals for tests.servers.armed; what fired is in ``NAME.fired``.
        ``inside``: a command that runs the rest of its arguments, such as ``ip netns exec X``.
        """
        if armed or self.settings:
            arguments = ("tests.servers.armed", *arguments)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*inside, sys.executable, "-m", *arguments],
                env={
                    **os.environ,
                    "SLOW_SECONDS": str(slow),
                    "WIDTH": str(self.width),
                    "CLOCK_OFFSET": str(clock),
                    "ARMED": armed,
                    "SETTINGS": self.settings,
                    "ARMED_FIRED": str(self.folder / f"{name}.fired"),
                },
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        return self.processes[name]

    def start_coordinator(
        self, name: str = "coordinator", *arguments: str, armed: str = ""
    ) -> subprocess.Popen[str]:
        """The coordinator, or one more to stand by."""
        words = ("gradualdiff.cli.main", "coordinator", str(self.federation), *arguments)
        return self.start(name, *words, armed=armed)

    def start_participant(
        self,
        name: str,
        *arguments: str,
        slow: float = 0.0,
        inside: Sequence[str] = (),
        clock: float = 0.0,
    ) -> subprocess.Popen[str]:
        """A site's process. In numpy: ``slow`` seconds for a training, ``clock`` seconds ahead."""
        program = ("tests.servers.numpy_site",)
        if self.model is not None:
            program = ("gradualdiff.cli.main", "participant")
        return self.start(
            name,
            *program,
            str(self.site_toml(name)),
            *arguments,
            slow=slow,
            inside=inside,
            clock=clock,
        )

    def trained(self, name: str) -> list[str]:
        """The trainings that a numpy site finished, in order: run and round."""
        return _lines(self.site_toml(name).with_name("trained.txt"))

    def begun(self, name: str) -> list[str]:
        """The same of those that it began."""
        return _lines(self.site_toml(name).with_name("begun.txt"))

    def ledger(self) -> Ledger:
        """The run's records, to be read."""
        config = load_federation(self.federation)
        return Ledger(open_s3(config.store, self.folder), config.run.name, "reader", lambda: 0.0)

    def closings(self) -> list[ClosingRecord]:
        """The decisions on record, round by round."""
        records = self.ledger().history()
        return [record for record in records if isinstance(record, ClosingRecord)]

    def wanted(self, names: str = "") -> str:
        """The digest of the same federation, undisturbed, of these sites alone in one process."""
        config, names = load_federation(self.federation), names or self.sites
        run = config.run.model_copy(update={"participants": tuple(names)})
        config = config.model_copy(update={"run": run})
        sites = {name: NumpyLearner(name, manifest=manifest_of(self.width)) for name in names}
        return federations.run(config, self.folder / "embedded", sites).adapter_sha

    def site_toml(self, name: str) -> Path:
        """The site's own file."""
        return self.folder / "kits" / name / "site.toml"

    def log(self, name: str) -> str:
        """What a process has said so far."""
        file = self.folder / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def fired(self, name: str) -> list[str]:
        """The points at which a process signalled itself: point and signal, in order."""
        file = self.folder / f"{name}.fired"
        return file.read_text().splitlines() if file.exists() else []

    def wait_for(
        self, text: str, name: str, seconds: float = PATIENCE_SECONDS, count: int = 1
    ) -> None:
        """Wait until a process (and those of its name before it) has said ``text`` so often."""
        deadline = time.monotonic() + seconds
        while self.log(name).count(text) < count:
            process = self.processes[name]
            assert process.poll() is None, f"{name} ended early:\n{self.log(name)[-3000:]}"
            assert time.monotonic() < deadline, (
                f"{name} never said {text}:\n{self.log(name)[-3000:]}"
            )
            time.sleep(0.05)

    def kill(self, name: str) -> None:
        """SIGKILL; asserts that it was alive."""
        process = self.processes[name]
        assert process.poll() is None, f"{name} had ended:\n{self.log(name)[-3000:]}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_SECONDS)

    def kill_in_turn(self, *victims: str, slow: float = 0.0) -> None:
        """In each round kill one of them, somewhere in its work, and start it again."""
        for round_number, victim in enumerate(victims, start=1):
            self.wait_for("opened.recorded", "coordinator", count=round_number)
            time.sleep(0.3)  # wherever it dies, the result is to be the same
            self.kill(victim)
            if victim == "coordinator":
                self.start_coordinator()
            else:
                self.start_participant(victim, slow=slow)

    def finish(self, name: str = "coordinator", seconds: float = PATIENCE_SECONDS) -> str:
        """Wait for a coordinator's end; the final adapter's sha256."""
        code = self.processes[name].wait(seconds)
        assert code == 0, f"{name}: exit {code}\n{self.log(name)[-3000:]}"
        return self.log(name).rpartition("sha256 ")[2].strip()

    def close(self) -> None:
        """End every process; accounts belong to the whole broker, so they go too."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE_SECONDS)
        for name in (*self.sites, "coordinator"):
            with contextlib.suppress(urllib.error.HTTPError):
                self.rabbit.api("DELETE", f"users/{name}")

    def _servers(self) -> str:
        scheme, port, authority = "amqp", self.rabbit.port, ""
        if self.authority is not None:
            scheme, port = "amqps", self.rabbit.tls_port
            authority = f'ca_file = "{self.authority}"'
        broker = self._through("coordinator broker", f"127.0.0.1:{port}")
        store = self._through("coordinator store", self.s3.url.rpartition("/")[2])
        site_store = self._through("sites store", self.s3.url.rpartition("/")[2])
        plain = any(not proxy.host.startswith("127.") for proxy in self.proxies.values())
        sites = transport = 'transport = "plaintext"\n' if plain else ""
        if store != site_store:
            sites += f'site_url = "{self.s3.url.rpartition("/")[0]}/{site_store}"'
        return f"""
[broker]
url = "{scheme}://coordinator@{broker}/{self.vhost}"
password_file = "broker-password"
management_url = "{self.rabbit.management_url}"
management_account = "{ADMIN}"
management_password_file = "administrators-password"
{transport}
{authority}
[store]
url = "{self.s3.url.rpartition("/")[0]}/{store}"
{sites}
bucket = "{self.bucket or self.vhost}"
{authority}
access_key_file = "access-key"
secret_key_file = "secret-key"
"""

    def _through(self, line: str, address: str) -> str:
        """The address that this line really leads to."""
        proxy = self.proxies.get(line)
        return address if proxy is None else proxy.address

    def _secrets(self) -> None:
        for file, secret in (
            ("broker-password", COORDINATOR_PASSWORD),
            ("administrators-password", self.rabbit.password),
            ("access-key", self.s3.access_key),
            ("secret-key", self.s3.secret_key),
        ):
            (self.folder / file).write_text(secret + "\n")

    def _fill_kit(self, name: str) -> None:
        """What the site's engineer does: say where the text is."""
        text = self.site_toml(name).read_text()
        head, _, rest = text.partition("\n[data]")
        data = (self.folder / f"{name}.toml").read_text().partition("[data]")[2]
        data = data.replace(f"{name}.jsonl", str(self.folder / f"{name}.jsonl"))
        tail = without_minima(rest[rest.index("[device]") :])
        coordinators = self._through("coordinator broker", f"127.0.0.1:{self.rabbit.port}")
        own = self._through(f"{name} broker", f"127.0.0.1:{self.rabbit.port}")
        head = head.replace(f"@{coordinators}/", f"@{own}/")
        self.site_toml(name).write_text(f"{head}\n[data]{data}\n{tail}")


def without_minima(text: str) -> str:
    """A site.toml that takes part in runs of one step of one example, too."""
    return re.sub(r"^(min_\w+) = \d+", r"\1 = 1", text, flags=re.MULTILINE)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
