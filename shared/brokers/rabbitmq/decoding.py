"""What pika cannot decode of a message: of no use to us, and no reason to lose a connection.

pika decodes the headers of whatever arrives and lets the connection die of one it cannot make a
Python value of (a date in the year 36 billion will do), and any site may send one. Here such a
table is skipped by its length, as an empty one.

A message's properties begin with flags that say which of them follow. Flags that announce more
flags are read in another way by RabbitMQ before 3.13 than by pika: the broker checks one
``user_id`` and pika finds another, or dies of the rest. Nobody of ours writes such flags, so a
message that has them has no properties here, and that is to say: no sender.
"""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pika.data
from pika.spec import BasicProperties

_decode_table = pika.data.decode_table
_decode_properties = BasicProperties.decode
_NO_PROPERTY = 0b11  # the two lowest flags: more flags follow, and one that means nothing


def tolerant_decode_table(encoded: bytes, offset: int) -> tuple[dict[str, Any], int]:
    """As pika's, and empty for a table that makes it fail."""
    (length,) = struct.unpack_from(">I", encoded, offset)
    try:
        table, end = _decode_table(encoded, offset)
    except Exception:  # noqa: BLE001 - whatever it was, it came from outside
        return {}, offset + 4 + length
    return table, end


def careful_decode_properties(
    properties: BasicProperties, encoded: bytes, offset: int = 0
) -> BasicProperties:
    """As pika's, and all empty where they can be read in two ways or in none."""
    with contextlib.suppress(Exception):  # whatever it was, it came from outside
        (flags,) = struct.unpack_from(">H", encoded, offset)
        if not flags & _NO_PROPERTY:
            _decode_properties(properties, encoded, offset)
            if isinstance(properties.user_id, str | None):
                return properties
    vars(properties).update(vars(BasicProperties()))
    return properties


def as_text(key: str | bytes) -> str:
    """A routing key; pika leaves one that is no UTF-8 as bytes."""
    return key if isinstance(key, str) else key.decode(errors="replace")


def install() -> None:
    """Let pika use them; its other modules call the functions by their owner's name."""
    pika.data.decode_table = tolerant_decode_table
    BasicProperties.decode = careful_decode_properties
