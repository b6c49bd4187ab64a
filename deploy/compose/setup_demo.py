"""The setup of ``docker compose up``: the demo's federation, over the servers beside it.

Prepares model, text and settings; makes the bucket, the queues and the accounts; hands each site
its own kit and its own text and nothing else. Repeatable: what is there stays, what is missing or
was lost with a server is made again, so it runs before every start.
"""

# ruff: noqa: T201 - a script of the image; it runs our own command and says so
from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from minio import Minio, MinioAdmin
from minio.credentials import StaticProvider
from minio.sseconfig import Rule, SSEConfig

OPERATOR = Path("/operator")  # seen by this setup only
PREPARED = OPERATOR / "prepared"
KITS = OPERATOR / "kits"
FEDERATION = Path("/federation/federation.toml")  # the coordinator's
SITES = Path("/sites")  # one volume each; a site sees its own, as /site
MODEL = Path("/model")  # all sites', and at the same path

BROKER = {
    "url": "amqp://coordinator@rabbitmq:5672/",
    "password_file": "/secrets/broker/password",
    "transport": "plaintext",  # one host, one internal network
    "management_url": "http://rabbitmq:15672",
    # Mounted here and not at the coordinator, whose own account administers nothing.
    "management_account": "operator",
    "management_password_file": "/secrets/broker-admin/password",
}
STORE = {
    "url": "http://minio:9000",
    "bucket": "gradualdiff",
    "access_key_file": "/secrets/store/access-key",
    "secret_key_file": "/secrets/store/secret-key",
    "transport": "plaintext",
}

# The store's root, mounted at the store and here: it makes the bucket and the coordinator's key.
STORE_ADMIN = Path("/secrets/store-admin")
STORE_POLICY = Path(__file__).with_name("store_policy.json")

Tables = dict[str, dict[str, Any]]


def main() -> None:
    """All of it, in an order in which a kill at any point is healed by the next start."""
    wanted = {
        "rounds": int(os.environ["GRADUALDIFF_ROUNDS"]),
        "local_steps": int(os.environ["GRADUALDIFF_LOCAL_STEPS"]),
    }
    if not FEDERATION.exists():
        prepare(wanted)
    tables = tomllib.loads(FEDERATION.read_text())
    say_what_holds(tables, wanted)
    open_the_store()
    # A broker that lost its volume gets its accounts back from the record in the store.
    gradualdiff("setup", FEDERATION, "--kits", KITS)
    for name in tables["run"]["participants"]:
        hand_over(name)
        enrol(name)
    print("setup: done")


def prepare(wanted: dict[str, int]) -> None:
    """The demo's model, text and settings; the coordinator's federation.toml is written last."""
    options = ("--rounds", wanted["rounds"], "--local-steps", wanted["local_steps"])
    # The demo keeps its converted model in the user's cache folder: here that is the volume.
    gradualdiff("demo", "--prepare", "--dir", PREPARED, *options, XDG_CACHE_HOME=str(MODEL))
    tables = tomllib.loads((PREPARED / "federation.toml").read_text())
    tables.pop("simulation", None)
    write(FEDERATION, tomli_w.dumps({**tables, "broker": BROKER, "store": STORE}).encode())


def say_what_holds(tables: Tables, wanted: dict[str, int]) -> None:
    """A run's settings are fixed; whoever asks for others now is told, and nothing is changed."""
    fixed = {
        "rounds": tables["run"]["rounds"],
        "local_steps": tables["training"]["local_steps"],
    }
    for name, value in fixed.items():
        if value != wanted[name]:
            print(
                f"setup: this run has {name} = {value}, and {wanted[name]} is asked for; it stays. "
                "To begin anew, losing this run: docker compose down --volumes",
                file=sys.stderr,
            )


def open_the_store() -> None:
    """The bucket, encrypted at rest, and a key that is good for it alone; as the store's root."""
    endpoint = STORE["url"].removeprefix("http://")
    key, secret = ((STORE_ADMIN / name).read_text() for name in ("access-key", "secret-key"))
    root = Minio(endpoint, access_key=key, secret_key=secret, secure=False)
    if not root.bucket_exists(STORE["bucket"]):
        root.make_bucket(STORE["bucket"])
    # A store that has lost its encryption key refuses this, and setup ends before anything is sent.
    root.set_bucket_encryption(STORE["bucket"], SSEConfig(Rule.new_sse_s3_rule()))
    admin = MinioAdmin(endpoint=endpoint, credentials=StaticProvider(key, secret), secure=False)
    coordinator = Path(STORE["access_key_file"]).read_text()
    admin.user_add(coordinator, Path(STORE["secret_key_file"]).read_text())
    admin.policy_add("coordinator", STORE_POLICY)
    admin.policy_set("coordinator", user=coordinator)
    print("setup: the store encrypts the bucket; the coordinator's key is good for it alone")


def hand_over(name: str) -> None:
    """A site's volume: its kit, its text, and the settings that join the two."""
    folder = SITES / name
    if not folder.is_dir():
        sys.exit(f"setup: no volume for participant {name}; compose.yaml has one for each site")
    kit = tomllib.loads((KITS / name / "site.toml").read_text())
    password = Path(kit["broker"]["password_file"]).name
    own = tomllib.loads((PREPARED / "sites" / f"{name}.toml").read_text())
    text = (PREPARED / "sites" / own["data"]["path"]).resolve()
    tables: Tables = {
        "site": {**own["site"], "workspace": "/workspace"},
        "data": {**own["data"], "path": text.name},
    }
    # How it reaches broker and store, and what the kit lets it take part in.
    tables |= {
        table: kit[table] for table in ("broker", "store", "trust", "accept") if table in kit
    }
    write(folder / text.name, text.read_bytes())
    write(folder / password, (KITS / name / password).read_bytes())
    write(folder / "site.toml", tomli_w.dumps(tables).encode())


def enrol(name: str) -> None:
    """The site's key, made in its own volume. One owner has them all here: nobody phones."""
    command = ["gradualdiff", "site", "init", "--site", str(SITES / name / "site.toml"), "--json"]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    key = json.loads(made.stdout)["key"]
    gradualdiff("sites", "key", name, "--key", key, "--federation", FEDERATION)


def gradualdiff(*arguments: object, **environment: str) -> None:
    """The command line; its exit code ends this setup, its message is on the screen already."""
    command = ["gradualdiff", *map(str, arguments)]
    print(f"setup: {' '.join(command)}")
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def write(path: Path, content: bytes) -> None:
    """Whole or not at all: a site may be reading the file of the start before."""
    if path.exists() and path.read_bytes() == content:
        return
    unfinished = path.with_name(f".{path.name}")
    unfinished.unlink(missing_ok=True)
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


if __name__ == "__main__":
    main()
