"""What a key of the object store may look like; the same rule for every adapter."""

from __future__ import annotations

import re

from shared.errors import StoreError

KEY_PART = re.compile(r"[A-Za-z0-9._-]+")


def is_key(key: str) -> bool:
    """Whether ``key`` is parts of ``A-Z a-z 0-9 . _ -`` joined by ``/``, none ``.`` or ``..``."""
    return all(KEY_PART.fullmatch(part) and part not in (".", "..") for part in key.split("/"))


def check_key(key: str) -> None:
    """Raise StoreError unless ``key`` is a key."""
    if not is_key(key):
        raise StoreError(
            f"key {key!r}: expected parts of A-Z a-z 0-9 . _ - joined by /, none of them "
            "empty, '.' or '..'"
        )
