"""Messages in a queue as people may see them: decoded, without signed URLs, without raw bytes.

Bytes that do not decode are told by size, sha256 and their first few: more of them could be text
or half of a URL.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli.output import cell
from cli.standing import moment
from shared import wire
from shared.errors import DecodeError
from shared.events import MessageRefused
from shared.log import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.events import Event

BEGINNING = 16  # bytes; a signature is longer
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


def lines_of(message: ShownMessage) -> Iterator[str]:
    """The message for a person, line by line."""
    who = message.sender or "nobody (the broker knows no sender)"
    if message.problem is not None:
        yield f"{message.bytes} bytes that do not decode, from {who}"
        yield f"  reason  {message.problem}"
        yield f"  begins  {message.begins}  (sha256 {message.sha256})"
        return
    run = f", run {message.run}" if message.run else ""
    number = f", round {message.round}" if message.round is not None else ""
    yield f"{message.time}  {message.type} from {who}{run}{number}"
    for name, value in (message.fields or {}).items():
        yield f"  {name}  {cell(value)}"
    if message.refused is not None:
        yield "  what was refused:"
        yield from (f"    {line}" for line in lines_of(message.refused))


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
