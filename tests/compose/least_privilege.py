"""What the coordinator's container can do at the servers, and what lies on the store's disk."""

from __future__ import annotations

import json
import mmap
from base64 import b64decode
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.compose.engine import Engine

# As the store's root, which setup alone holds.
AS_ROOT = """
import base64, io, json, sys
import setup_demo as demo
from minio import Minio

keys = [(demo.STORE_ADMIN / name).read_text() for name in ("access-key", "secret-key")]
root = Minio("minio:9000", access_key=keys[0], secret_key=keys[1], secure=False)
OURS, THEIRS = "gradualdiff", "theirs"
if sys.argv[1] == "bait":
    root.make_bucket(THEIRS)
    root.put_object(THEIRS, "bait", io.BytesIO(b"bait"), 4)
    sys.exit()
delta = next(root.list_objects(OURS, "runs/demo-1/deltas/", recursive=True)).object_name
data = root.get_object(OURS, delta).read()
if sys.argv[1] == "copy":
    root.put_object(THEIRS, "copy", io.BytesIO(data), len(data))
print(json.dumps({
    "encryption": root.stat_object(OURS, delta).metadata.get("X-Amz-Server-Side-Encryption"),
    "delta": base64.b64encode(data).decode(),
}))
"""
# In the coordinator's container, with the secrets that lie there: attempt -> what came of it.
ATTEMPTS = """
import base64, io, json, pathlib, urllib.request
from minio import Minio, MinioAdmin
from minio.commonconfig import ENABLED
from minio.credentials import StaticProvider
from minio.versioningconfig import VersioningConfig

secrets = pathlib.Path("/secrets")
key, secret = ((secrets / "store" / name).read_text() for name in ("access-key", "secret-key"))
password = (secrets / "broker" / "password").read_text()
store = Minio("minio:9000", access_key=key, secret_key=secret, secure=False)
admin = MinioAdmin(endpoint="minio:9000", credentials=StaticProvider(key, secret), secure=False)
OURS, THEIRS = "gradualdiff", "theirs"
anybody = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": "*",
    "Action": ["s3:GetObject"], "Resource": [f"arn:aws:s3:::{OURS}/*"]}]}

def ask(method, path, body=None):
    whole = base64.b64encode(f"coordinator:{password}".encode()).decode()
    headers = {"Authorization": f"Basic {whole}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        "http://rabbitmq:15672/api/" + path, body, headers, method=method
    )
    urllib.request.urlopen(request, timeout=30)

class S3Hidden(Exception):
    code = "AccessDenied"

def see(bucket):
    # A store may answer with the buckets that the key is good for, and no more.
    if bucket not in [found.name for found in store.list_buckets()]:
        raise S3Hidden

attempts = {
    "store: buckets": lambda: see(THEIRS),
    "store: list another": lambda: list(store.list_objects(THEIRS)),
    "store: read another": lambda: store.get_object(THEIRS, "bait"),
    "store: write another": lambda: store.put_object(THEIRS, "bait", io.BytesIO(b"x"), 1),
    "store: delete from another": lambda: store.remove_object(THEIRS, "bait"),
    "store: make a bucket": lambda: store.make_bucket("mine"),
    "store: open the bucket": lambda: store.set_bucket_policy(OURS, json.dumps(anybody)),
    "store: no encryption": lambda: store.delete_bucket_encryption(OURS),
    "store: versions": lambda: store.set_bucket_versioning(OURS, VersioningConfig(ENABLED)),
    "store: make a user": lambda: admin.user_add("somebody", "a-secret-of-mine"),
    "store: list users": lambda: admin.user_list(),
    "store: be an administrator": lambda: admin.policy_set("consoleAdmin", user=key),
    "store: another policy": lambda: admin.policy_add("coordinator", policy=anybody),
    "store: look at the server": lambda: admin.info(),
    "broker: list accounts": lambda: ask("GET", "users"),
    "broker: make an account": lambda: ask("PUT", "users/x", b'{"password": "x", "tags": ""}'),
    "broker: be an administrator": lambda: ask(
        "PUT", "users/coordinator", b'{"password": "x", "tags": "administrator"}'
    ),
    "broker: more rights": lambda: ask(
        "PUT", "permissions/%2F/coordinator", b'{"configure": ".*", "write": ".*", "read": ".*"}'
    ),
    "broker: delete a queue": lambda: ask("DELETE", "queues/%2F/gradualdiff.coordinator"),
}

found = {}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = "done"
    except Exception as error:
        code = getattr(error, "code", None)
        is_refused = code in ("AccessDenied", 401) or "Status: 403" in str(error)
        found[name] = "refused" if is_refused else f"{code} {error}"
files = sorted(str(p.relative_to(secrets)) for p in secrets.rglob("*") if p.is_file())
print(json.dumps({"attempts": found, "secrets": files}))
"""


def as_root(engine: Engine, what: str) -> str:
    """Run :data:`AS_ROOT` where the root's key is mounted; what it printed."""
    run = ("compose", "run", "--rm", "--no-deps", "-T", "--entrypoint", "python")
    script = ("-w", "/opt/gradualdiff", "setup", "-c", AS_ROOT, what)
    return engine.docker(*run, *script).stdout


def check_least_privilege(engine: Engine) -> None:
    """Whoever sits in the coordinator's container administers neither the broker nor the store."""
    as_root(engine, "bait")
    told = engine.docker("compose", "exec", "-T", "coordinator", "python", "-c", ATTEMPTS)
    found: dict[str, Any] = json.loads(told.stdout)
    assert set(found["attempts"].values()) == {"refused"}, found["attempts"]
    assert len(found["attempts"]) == 19
    assert found["secrets"] == ["broker/password", "store/access-key", "store/secret-key"]


def check_encryption(engine: Engine) -> None:
    """A delta lies on no disk in the clear, though a copy of it in another bucket is found there.

    After :func:`check_least_privilege`, which made that bucket, and with a delta in the store.
    """
    inspect = ("volume", "inspect", "--format", "{{.Mountpoint}}", "gradualdiff-fed_store-data")
    disk = Path(engine.docker(*inspect).stdout.strip())
    found: dict[str, str] = json.loads(as_root(engine, "look"))
    assert found["encryption"] == "AES256"
    assert not lies_on(disk, b64decode(found["delta"]))
    as_root(engine, "copy")
    assert lies_on(disk, b64decode(found["delta"]))


def lies_on(disk: Path, data: bytes) -> bool:
    """Whether any of twenty pieces of ``data`` is in the files below ``disk``."""
    pieces = [data[at : at + 48] for at in range(0, len(data) - 48, max(len(data) // 20, 1))]
    # Padding and a format's own words are in every store.
    pieces = [piece for piece in pieces if len(set(piece)) > 16]
    assert len(pieces) >= 10
    for path in disk.rglob("*"):
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
                if any(m.find(piece) >= 0 for piece in pieces):
                    return True
    return False
