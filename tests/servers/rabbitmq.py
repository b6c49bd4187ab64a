"""A real RabbitMQ for tests: Debian's server on free ports in a folder of its own.

Where none can be started that is a failure, with the command that mends it, and no skip.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests.patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
ADMIN = "operator"
START_SECONDS = 90.0


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, below those that the system gives to outgoing connections."""
    sockets = []
    with contextlib.ExitStack() as stack:
        while len(sockets) < count:
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # taken: draw another
                listener.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
                sockets.append(listener)
        return [listener.getsockname()[1] for listener in sockets]


@dataclass
class RabbitServer:
    """One node. ``tls``: (certificate, key, authority) files for a second, encrypted port.

    ``mutual``: that port takes nobody in who shows no certificate of the authority.
    """

    folder: Path
    tls: tuple[Path, Path, Path] | None = None
    mutual: bool = False
    password: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.port, self.management_port, self.tls_port, self._dist_port = free_ports(4)
        self.node = f"t{self.port}@localhost"
        self._cookie = secrets.token_hex(10)

    @property
    def management_url(self) -> str:
        """The management API."""
        return f"http://127.0.0.1:{self.management_port}"

    @property
    def rabbitmqctl(self) -> list[str]:
        """The command that speaks to this node."""
        home = f"HOME={self.folder}"
        return [
            "env",
            home,
            "/usr/lib/rabbitmq/bin/rabbitmqctl",
            "-n",
            self.node,
            "--erlang-cookie",
            self._cookie,
        ]

    def start(self) -> None:
        """Start (again) on the same data and ports, and wait until it answers."""
        if not SERVER.exists():
            pytest.fail(
                "RabbitMQ is not installed, which these tests need. As root: "
                "apt-get install -y --no-install-recommends rabbitmq-server"
            )
        self._write_configuration()
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(SERVER)],
                cwd=self.folder,
                env={**os.environ, **self._environment()},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "server.log").read_text(errors="replace")[-2000:]
                pytest.fail(f"RabbitMQ did not start in {self.folder}:\n{tail}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL, the whole node at once."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_SECONDS)

    def stop(self) -> None:
        """End it; nothing is left running."""
        self.kill()
        # The port mapper is started by the node, outlives it, and serves other nodes too.

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """One call of the management API as the administrator."""
        request = urllib.request.Request(
            f"{self.management_url}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": "Basic " + b64encode(f"{ADMIN}:{self.password}".encode()).decode(),
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
            text = response.read()
        return json.loads(text) if text else None

    def new_vhost(self) -> str:
        """An empty virtual host which the administrator may use."""
        name = f"t-{secrets.token_hex(6)}"
        self.api("PUT", f"vhosts/{name}")
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.api("PUT", f"permissions/{name}/{ADMIN}", everything)
        return name

    def delete_vhost(self, name: str) -> None:
        """Remove it with all that is in it."""
        self.api("DELETE", f"vhosts/{quote(name, safe='')}")

    def cut(self, account: str, vhost: str) -> int:
        """Close this account's connections from the server's side; how many there were."""
        cut = 0
        deadline = time.monotonic() + 10
        while not cut and time.monotonic() < deadline:  # the API's list lags behind
            for connection in self.api("GET", f"vhosts/{quote(vhost, safe='')}/connections"):
                if connection.get("user") == account:
                    with contextlib.suppress(urllib.error.HTTPError):
                        self.api("DELETE", f"connections/{quote(connection['name'], safe='')}")
                        cut += 1
            time.sleep(0.05)
        return cut

    def _answers(self) -> bool:
        try:
            self.api("GET", "overview")
        except (OSError, ValueError):
            return False
        return True

    def _environment(self) -> dict[str, str]:
        folder = self.folder
        inet = "-kernel inet_dist_use_interface {127,0,0,1}"
        return {
            "HOME": str(folder),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"-setcookie {self._cookie} {inet} -rabbit channel_tick_interval 1000"
            ),
        }

    def _write_configuration(self) -> None:
        for name in ("mnesia", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "enabled_plugins").write_text("[rabbitmq_management].\n")
        lines = [
            f"default_user = {ADMIN}",
            f"default_pass = {self.password}",
            "default_user_tags.administrator = true",
            "management.tcp.ip = 127.0.0.1",
            f"management.tcp.port = {self.management_port}",
            "collect_statistics_interval = 1000",
        ]
        if self.tls is not None:
            certificate, key, authority = self.tls
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}",
                f"ssl_options.cacertfile = {authority}",
                f"ssl_options.certfile = {certificate}",
                f"ssl_options.keyfile = {key}",
                f"ssl_options.verify = {'verify_peer' if self.mutual else 'verify_none'}",
                f"ssl_options.fail_if_no_peer_cert = {'true' if self.mutual else 'false'}",
            ]
        (self.folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def rabbit_server(tmp_path_factory) -> Iterator[RabbitServer]:
    """One node for the whole session; each test makes a virtual host of its own."""
    server = RabbitServer(tmp_path_factory.mktemp("rabbitmq"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def vhost(rabbit_server) -> Iterator[str]:
    """An empty virtual host."""
    name = rabbit_server.new_vhost()
    yield name
    rabbit_server.delete_vhost(name)
