"""A signed message: a msgpack map ``{sealed, to, by, signature}``, and ``head`` where one is told.

``sealed``: the bytes of what is said, as they would travel unsigned. The signature is over who says
it, to whom, the head and those bytes, each after its length: nothing of it can be moved into
another's place. Opening one believes nothing: whoever does has to check it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgpack

from shared.errors import DecodeError, SignatureError
from shared.trust.keys import SIGNATURE_BYTES

if TYPE_CHECKING:
    from shared.trust.keys import PublicKey, SigningKey

MOST_TEXT: Final = 200  # characters of ``to``, ``by`` and ``head``
MOST_SEAL_BYTES: Final = 4 * MOST_TEXT + SIGNATURE_BYTES + 64  # what a seal adds, at most
_FIELDS: Final = ("sealed", "to", "by", "signature")
# How every signed message begins, and no unsigned one: a map of four or five, this name first.
_BEGINNINGS: Final = tuple(bytes([0x80 + size]) + b"\xa6sealed" for size in (4, 5))


@dataclass(frozen=True)
class Seal:
    """A signed message, opened. ``by``: the public key it names. ``signature``: 64 bytes."""

    data: bytes
    to: str
    by: str
    signature: bytes
    head: str | None = None

    def check(self, sender: str, to: str, key: PublicKey) -> None:
        """Whether the owner of ``key`` said this as ``sender`` to ``to``. Raises SignatureError."""
        if self.to != to:
            raise SignatureError(
                f"to: expected {to}, got {self.to} from {sender}; it was said to somebody else and "
                "brought here"
            )
        key.verify("event", self.signature, _signed(sender, self.to, self.head, self.data))


def seal(data: bytes, sender: str, to: str, key: SigningKey, head: str | None = None) -> bytes:
    """``data`` as ``sender`` signs it for ``to``. ``head``: up to 200 characters, signed too."""
    outer = {
        "sealed": data,
        "to": to,
        "by": key.public.text,
        "signature": key.sign("event", _signed(sender, to, head, data)),
    }
    if head is not None:
        outer["head"] = head
    packed: bytes = msgpack.packb(outer, use_bin_type=True)
    return packed


def opened(message: bytes, most_bytes: int) -> Seal | None:
    """The seal on a message; None for an unsigned one. Nothing of it is checked yet.

    Raises DecodeError for what begins like a signed message and is none, or is longer than
    ``most_bytes``.
    """
    if not message.startswith(_BEGINNINGS):
        return None
    if len(message) > most_bytes:
        raise DecodeError(f"expected at most {most_bytes} bytes, got {len(message)}", message)
    try:
        outer = msgpack.unpackb(
            message,
            raw=False,
            max_bin_len=len(message),
            max_str_len=MOST_TEXT,
            max_map_len=len(_FIELDS) + 1,
            max_array_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise DecodeError(f"expected a signed message, got: {error}", message) from None
    return _of(outer, message)


def _of(outer: dict[str, Any], message: bytes) -> Seal:
    kinds = dict.fromkeys(_FIELDS, str) | {"sealed": bytes, "signature": bytes}
    if "head" in outer:
        kinds["head"] = str
    if outer.keys() != kinds.keys():
        raise DecodeError(f"expected {', '.join(_FIELDS)} of a signed message", message)
    for name, kind in kinds.items():
        if not isinstance(outer[name], kind):
            raise DecodeError(f"{name}: expected {kind.__name__} in a signed message", message)
    if len(outer["signature"]) != SIGNATURE_BYTES:
        raise DecodeError(f"signature: expected {SIGNATURE_BYTES} bytes", message)
    return Seal(outer["sealed"], outer["to"], outer["by"], outer["signature"], outer.get("head"))


def _signed(sender: str, to: str, head: str | None, data: bytes) -> bytes:
    texts = (sender, to, "" if head is None else f"+{head}")  # none is not an empty one
    parts = (*(text.encode() for text in texts), data)
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)
