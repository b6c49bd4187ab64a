"""Events as bytes: a msgpack map ``{v, type, id, time, body}``. Decoding is the border control.

Such a map may come sealed (``shared/trust/seal.py``): opened here, and checked in ``hearing.py``.

Whatever does not decode is a DecodeError that keeps the bytes; nothing else escapes from here. What
a reader would refuse for its bounds is not written either.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from math import isfinite

import msgpack
from pydantic import ValidationError

from shared.brokers.port import MAX_MESSAGE_BYTES
from shared.errors import DecodeError
from shared.printing import printable
from shared.protocol.bounds import AT_THE_DOOR
from shared.protocol.events import EVENTS, Event
from shared.trust.seal import Seal, opened

_SHORT = 80
_MOST_ID = 100


@dataclass(frozen=True)
class Envelope:
    """A decoded message. ``time``: seconds since the epoch when it was packed.

    ``seal``: what it came in, not checked yet; None for an unsigned one.
    """

    id: str
    time: float
    event: Event
    seal: Seal | None = None


def encode(event: Event, now: float, event_id: str | None = None) -> bytes:
    """The bytes of an event. Raises DecodeError if it exceeds a bound or the message limit."""
    body = event.model_dump(mode="python")
    _checked(type(event), body, b"")
    data: bytes = msgpack.packb(
        {
            "v": event.version,
            "type": type(event).__name__,
            "id": event_id or uuid.uuid4().hex,
            "time": now,
            "body": body,
        },
        use_bin_type=True,
    )
    if len(data) > MAX_MESSAGE_BYTES:
        raise DecodeError(
            f"{type(event).__name__}: expected at most {MAX_MESSAGE_BYTES} bytes, got {len(data)}; "
            "large data belongs into the store"
        )
    return data


def decode(data: bytes) -> Envelope:
    """The event in ``data``. Raises DecodeError, keeping the bytes, for anything else."""
    seal = opened(data, MAX_MESSAGE_BYTES)
    return _decoded(data, None) if seal is None else _decoded(seal.data, seal)


def _decoded(data: bytes, seal: Seal | None) -> Envelope:
    if len(data) > MAX_MESSAGE_BYTES:
        raise DecodeError(f"expected at most {MAX_MESSAGE_BYTES} bytes, got {len(data)}", data)
    try:
        outer = msgpack.unpackb(data, strict_map_key=False, raw=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise DecodeError(f"expected one msgpack map, got: {error}", data) from None
    if not isinstance(outer, dict):
        raise DecodeError(f"expected a msgpack map, got {type(outer).__name__}", data)
    name, version, body = outer.get("type"), outer.get("v"), outer.get("body")
    event_id, time = outer.get("id"), outer.get("time")
    kind = EVENTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise DecodeError(f"type: expected a known event, got {_short(name)}", data)
    if type(version) is not int or version != kind.version:
        raise DecodeError(
            f"{name}: expected version {kind.version}, got {_short(version)}; "
            "update the older of the two programs",
            data,
        )
    if not isinstance(event_id, str) or not isinstance(time, int | float) or not isfinite(time):
        raise DecodeError(f"{name}: expected text in id and a finite number in time", data)
    if len(event_id) > _MOST_ID:
        raise DecodeError(f"{name}: expected at most {_MOST_ID} characters in id", data)
    return Envelope(event_id, float(time), _checked(kind, body, data), seal)


def _checked(kind: type[Event], body: object, data: bytes) -> Event:
    """The event, if it keeps to its types and its bounds. Raises DecodeError with ``data``."""
    try:
        return kind.model_validate(body, context=AT_THE_DOOR)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in detail["loc"]) or "body"
        text = printable(f"{kind.__name__}.{field[:_SHORT]}: {detail['msg']}")
        raise DecodeError(text, data) from None


def _short(value: object) -> str:
    """Safe to print: a stranger's nesting overflows repr(), and its length floods the log."""
    return repr(value)[:_SHORT] if isinstance(value, str | int) else type(value).__name__
