"""A broker and a store for the benchmarks, their own or named ones, and what processes use."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from shared.stores.s3 import S3Store

ROOT = Path(__file__).resolve().parents[1]
PASSWORD = "for-benchmarks"


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

    class RoomyRabbit(RabbitServer):
        """For 10,000 queues, where a node as it comes answers no connection any more.

        It sets aside three file handles for each, of its limit of open files; and it looks at each
        every few seconds, which takes a core: here once a minute.
        """

        def _environment(self) -> dict[str, str]:
            name = "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"
            found = super()._environment()
            more = "-rabbit quorum_tick_interval 60000 -rabbit file_handles_high_watermark 100000"
            return {**found, name: f"{found[name]} {more}"}

        def _write_configuration(self) -> None:
            super()._write_configuration()
            file = self.folder / "rabbitmq.conf"
            text = re.sub(r"(collect_statistics_interval) = \d+", r"\1 = 60000", file.read_text())
            file.write_text(text)

    rabbit, weed = RoomyRabbit(folder / "rabbitmq"), RoomySeaweedFS(folder / "seaweedfs")
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
