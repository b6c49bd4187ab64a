"""The tutorial of many sites, command by command: the demo's files over a real broker and store."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pytest

from tests.patience import PATIENCE_SECONDS
from tests.servers.deployment import COORDINATOR_PASSWORD
from tests.servers.rabbitmq import ADMIN
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.model]
SITES = ("site-1", "site-2")


@pytest.fixture
def servers(rabbit_server, s3_server, vhost, tmp_path):
    """A ``servers.toml``, as deploy/local/servers.py writes it."""
    folder = tmp_path / "servers"
    folder.mkdir()
    secrets = {
        "password": COORDINATOR_PASSWORD,
        "administrators-password": rabbit_server.password,
        "access-key": s3_server.access_key,
        "secret-key": s3_server.secret_key,
    }
    for name, text in secrets.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(text)
    (folder / "servers.toml").write_text(
        f"""
[broker]
url = "amqp://coordinator@127.0.0.1:{rabbit_server.port}/{vhost}"
password_file = "password"
management_url = "{rabbit_server.management_url}"
management_account = "{ADMIN}"
management_password_file = "administrators-password"
[store]
url = "{s3_server.url}"
bucket = "{vhost}"
access_key_file = "access-key"
secret_key_file = "secret-key"
"""
    )
    yield folder / "servers.toml"
    for name in SITES:
        rabbit_server.api("DELETE", f"users/{name}")


def command(*arguments):
    """The words of ``gradualdiff ARGUMENTS``."""
    return [sys.executable, "-m", "gradualdiff.cli.main", *map(str, arguments)]


def gradualdiff(*arguments):
    """Run it to its end; what it said."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_the_demo_over_servers_is_signed_and_runs(servers, tmp_path):
    """Every site enrols the key that it made; who signed what is proven at the end."""
    home = tmp_path / "many-sites"
    model = make_tiny_model(tmp_path / "model")
    options = ("--participants", 2, "--rounds", 1, "--local-steps", 4, "--model", model)
    gradualdiff("demo", "--prepare", "--dir", home, "--servers", servers, *options)
    federation = home / "federation.toml"
    gradualdiff("setup", federation)
    for name in SITES:
        made = json.loads(
            gradualdiff("site", "init", "--site", home / "sites" / f"{name}.toml", "--json")
        )
        gradualdiff("sites", "key", name, "--key", made["key"], "--federation", federation)
    roles = [("coordinator", federation)]
    roles += [("participant", home / "sites" / f"{name}.toml") for name in SITES]
    processes = []
    try:
        for role, file in roles:
            with (tmp_path / f"{role}-{file.stem}.log").open("wb") as log:
                processes.append(subprocess.Popen(command(role, file), stdout=log, stderr=log))
        assert processes[0].wait(PATIENCE_SECONDS) == 0, told(tmp_path)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    run = tomllib.loads(federation.read_text())["run"]["name"]
    verified = gradualdiff("runs", "verify", run, "--federation", federation)
    assert all(name in verified for name in SITES)
    assert "signed" in verified


def told(folder):
    """What the processes said last."""
    return "\n".join(path.read_text()[-1500:] for path in folder.glob("*.log"))
