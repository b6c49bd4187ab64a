"""Message headers that pika cannot decode: of no use to us, and no reason to lose a connection.

pika decodes the headers of whatever arrives and lets the connection die of one it cannot make a
Python value of (a date in the year 36 billion will do), and any site may send one. Here such a
table is skipped by its length, as an empty one.
"""

from __future__ import annotations

import struct
from typing import Any

import pika.data

_decode_table = pika.data.decode_table


def tolerant_decode_table(encoded: bytes, offset: int) -> tuple[dict[str, Any], int]:
    """As pika's, and empty for a table that makes it fail."""
    (length,) = struct.unpack_from(">I", encoded, offset)
    try:
        table, end = _decode_table(encoded, offset)
    except Exception:  # noqa: BLE001 - whatever it was, it came from outside
        return {}, offset + 4 + length
    return table, end


def install() -> None:
    """Let pika use it; its other modules call the function by its module's name."""
    pika.data.decode_table = tolerant_decode_table
