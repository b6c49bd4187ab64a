"""Messages in a queue as people may see them: decoded, without signed URLs, without raw bytes.

Bytes that do not decode are told by size, sha256 and their first few: more of them could be text
or half of a URL.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coordinator.liveness import moment
from shared.errors import DecodeError
from shared.log import redact
from shared.protocol import wire
from shared.protocol.events import MessageRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.protocol.events import Event

BEGINNING = 16  # bytes; a signature is longer
MANY = 20
DEEPEST = 3  # a refusal of a refusal of a refusal: what is in it, a stranger could have nested


@dataclass(frozen=True)
class ShownMessage:
    """One message. ``problem``: why it does not decode; then ``begins`` holds hex digits.

    ``refused``: what a refusal is about, if it decodes or says why it does not.
    """

    sender: str | None
    routing_key: str | None
    bytes: int
    sha256: str
    type: str | None = None
    id: str | None = None
    time: str | None = None
    run: str | None = None
    round: int | None = None
    fields: dict[str, Any] | None = None
    problem: str | None = None
    begins: str | None = None
    refused: ShownMessage | None = None


def show_message(
    body: bytes, sender: str | None, routing_key: str | None, depth: int = DEEPEST
) -> ShownMessage:
    """The message as it may be shown."""
    digest = hashlib.sha256(body).hexdigest()
    try:
        envelope = wire.decode(body)
    except DecodeError as error:
        return ShownMessage(
            sender=sender,
            routing_key=routing_key,
            bytes=len(body),
            sha256=digest,
            problem=_safe(str(error)),
            begins=body[:BEGINNING].hex(" "),
        )
    event = envelope.event
    inner = None
    if isinstance(event, MessageRefused) and depth:
        inner = show_message(event.data, event.sender, None, depth - 1)
    return ShownMessage(
        sender=sender,
        routing_key=routing_key,
        bytes=len(body),
        sha256=digest,
        type=type(event).__name__,
        id=_safe(envelope.id),
        time=_moment(envelope.time),
        run=getattr(event, "run", None),
        round=getattr(event, "round", None),
        fields=_fields(event),
        refused=inner,
    )


def title_of(message: ShownMessage) -> str:
    """The message for a person in one line."""
    who = message.sender or "nobody (the broker names no sender)"
    if message.problem is not None:
        return f"{message.bytes} bytes that do not decode, from {who}"
    run = f", run {message.run}" if message.run else ""
    number = f", round {message.round}" if message.round is not None else ""
    return f"{message.time}  {message.type} from {who}{run}{number}"


def rows_of(message: ShownMessage) -> Iterator[tuple[str, object]]:
    """Its fields, each with its value; what is within a field has the field's name before it."""
    if message.problem is not None:
        yield "reason", message.problem
        yield "begins", message.begins
        yield "sha256", message.sha256
        return
    yield from _flat("", message.fields or {})
    if message.refused is not None:
        yield "what was refused", title_of(message.refused)
        yield from ((f"  {name}", value) for name, value in rows_of(message.refused))


def _flat(name: str, value: Any) -> Iterator[tuple[str, object]]:
    """A list of many is cut: a manifest names hundreds of tensors, and --json has them all."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for count, (key, item) in enumerate(items):
        if count == MANY:
            yield f"{name}...", f"{len(value) - MANY} more; --json has them all"
            return
        if isinstance(item, dict | list | tuple) and item:
            yield from _flat(f"{name}{key}.", item)
        else:
            yield f"{name}{key}", item


def _fields(event: Event) -> dict[str, Any]:
    """The body but for run and round; bytes are told by their number."""
    body = event.model_dump(mode="python", exclude={"run", "round"})
    if isinstance(event, MessageRefused):
        body["data"] = f"{len(event.data)} bytes"
    return dict(redact(None, "", body))


def _safe(text: str) -> str:
    return str(redact(None, "", {"text": text})["text"])


def _moment(seconds: float) -> str:
    try:
        return moment(seconds) or ""
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s since 1970"
