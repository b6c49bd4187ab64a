"""Make the secrets of ``docker compose up``, once: the broker's passwords and the store's keys.

A volume for each administrator (the broker's, and the store's root), one for each of the
coordinator's own accounts there, and one for the key that the store encrypts with, so that nobody
holds what is another's. A secret that is there already stays: the servers keep the one they first
started with.
"""

# ruff: noqa: T201 - a script of the image; what it says is the container's log
from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SECRETS = Path("/secrets")
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def word(length: int) -> str:
    """Letters and digits: ``length`` of them."""
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def encryption_key() -> str:
    """As MinIO reads it: a name, and 32 bytes in base64."""
    return f"gradualdiff:{base64.b64encode(secrets.token_bytes(32)).decode()}"


# MinIO wants 3 to 20 characters for a key and 8 to 40 for its secret.
FILES: dict[str, Callable[[], str]] = {
    "broker-admin/password": lambda: word(32),
    "broker/password": lambda: word(32),
    "store-admin/access-key": lambda: word(16),
    "store-admin/secret-key": lambda: word(32),
    "store-encryption/key": encryption_key,
    "store/access-key": lambda: word(16),
    "store/secret-key": lambda: word(32),
}


def main() -> None:
    """Write each missing file, whole or not at all, readable by its owner only."""
    for name, make in FILES.items():
        path = SECRETS / name
        if path.exists():
            print(f"secrets: {name} is there")
            continue
        unfinished = path.with_name(f".{path.name}")
        unfinished.unlink(missing_ok=True)
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as f:
            f.write(make())
            f.flush()
            os.fsync(f.fileno())
        unfinished.replace(path)
        print(f"secrets: {name} is made")


if __name__ == "__main__":
    main()
