"""The servers of deploy/local: what is in the ledger is for nobody without the keys."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shared.config import StoreSection
from shared.stores.opening import open_s3
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
SECRET = b"the ledger's own words " * 1000
KEYS = ("runs/demo/federation.json", "deltas/large")


@pytest.fixture
def servers(tmp_path):
    """The folder of both, up."""
    script = ROOT / "deploy" / "local" / "servers.py"
    process = subprocess.Popen(
        [sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert "both are up" in said
        yield tmp_path
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_SECONDS)


def listening(folder: Path) -> set[int]:
    """Every TCP port on which a process that was started in ``folder`` listens."""
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if not (process / "cwd").resolve().is_relative_to(folder):
                continue
            for file in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(str(file.readlink()))
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                ports.add(int(words[1].rpartition(":")[2], 16))
    return ports


def ask(port: int, method: str, path: str) -> bytes | None:
    """What whoever answers there says to a stranger; None if nobody there speaks HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    try:
        connection.request(method, path)
        return connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_no_open_port_gives_an_object_to_a_stranger(servers):
    """By any path under which it lies there; nor can a stranger write or remove one."""
    table = tomllib.loads((servers / "servers.toml").read_text())["store"]
    store = open_s3(StoreSection.model_validate(table), servers)
    store.make_bucket()
    for key in KEYS:
        store.put(key, SECRET)
    settings = json.loads((servers / "settings.json").read_text())
    ports = listening(servers)
    assert {settings[name] for name in ("s3", "filer", "master", "volume", "amqp")} <= ports
    speaking = {port for port in ports if ask(port, "GET", "/") is not None}
    assert {settings[name] for name in ("s3", "filer", "master", "volume")} <= speaking
    for port in speaking:
        for key in KEYS:
            for path in (f"/{table['bucket']}/{key}", f"/buckets/{table['bucket']}/{key}"):
                for method in ("GET", "PUT", "DELETE"):
                    assert SECRET[:20] not in (ask(port, method, path) or b""), (port, path)
        for folder in ("/", f"/buckets/{table['bucket']}/runs/demo/"):
            assert b"federation.json" not in (ask(port, "GET", folder) or b""), folder
    assert [store.get(key) for key in KEYS] == [SECRET, SECRET]
