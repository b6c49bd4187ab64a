"""Make the secrets of ``docker compose up``, once: the broker's passwords and the store's keys.

A volume for the broker's administrator, one for the coordinator's account there, and one for the
store, so that nobody holds what is another's. A secret
that is there already stays: the broker and the store keep the one they first started with.
"""

# ruff: noqa: T201 - a script of the image; what it says is the container's log
from __future__ import annotations

import os
import secrets
from pathlib import Path

SECRETS = Path("/secrets")
# MinIO wants 3 to 20 characters for a key and 8 to 40 for its secret.
FILES = {
    "broker-admin/password": 32,
    "broker/password": 32,
    "store/access-key": 16,
    "store/secret-key": 32,
}
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def main() -> None:
    """Write each missing file, whole or not at all, readable by its owner only."""
    for name, length in FILES.items():
        path = SECRETS / name
        if path.exists():
            print(f"secrets: {name} is there")
            continue
        unfinished = path.with_name(f".{path.name}")
        unfinished.unlink(missing_ok=True)
        text = "".join(secrets.choice(ALPHABET) for _ in range(length))
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        unfinished.replace(path)
        print(f"secrets: {name} is made")


if __name__ == "__main__":
    main()
