"""Inputs that are kept: what once came out of a door that it should not, and what may again.

Damage drawn at random does not find them: they are long, and alike all through.
"""

from __future__ import annotations

DEEP = 2000  # beyond what Python's own recursion allows
DOTTED = b"a" + b".a" * DEEP + b" = 1"  # tomllib reads it; a walk over the tables gave up

KEPT: dict[str, list[bytes]] = {
    "wire": [b"\x91" * DEEP, b"\x81\xa1a" * DEEP, b"\xc9\xff\xff\xff\xff"],
    "headers": [b"[" * DEEP, b'{"a":' * DEEP],
    "federation": [DOTTED, b"a = " + b"[" * DEEP, b"a = " + b"{a=" * DEEP, b"\xff\xfe"],
    "site": [DOTTED, b"a = " + b"[" * DEEP, b"a = " + b"{a=" * DEEP, b"\xff\xfe"],
    "records": [b"[" * DEEP, b'{"a":' * DEEP, b'{"config":' * DEEP, b"9" * 5000],
    "management": [b"[" * DEEP * 50, b'{"a":' * DEEP * 50, b"9" * 5000, b"NaN"],
    "accounts": [b"[" * DEEP * 50, b"9" * 5000],
    "keys": [b"ed25519:", b"A" * 5000],
}
