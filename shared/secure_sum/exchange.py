"""What two sites share and the coordinator does not know: X25519 keys (RFC 7748) and what follows.

Each pair has one secret a run, by HKDF-SHA256 (RFC 5869). From it come a mask key for each attempt
at a round, which may be revealed and opens nothing else, and a key under which shares are sealed
(ChaCha20-Poly1305, RFC 8439).
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from pydantic import StringConstraints

from shared.config.values import canonical_json
from shared.errors import ProtocolError
from shared.secure_sum.said import SEED_BYTES

if TYPE_CHECKING:
    from shared.secure_sum.cohort import Attempt

_FORM: Final = r"^x25519:[A-Za-z0-9_-]{43}$"
ExchangeText = Annotated[str, StringConstraints(pattern=_FORM)]
"""A public key as text, in messages and records."""
_NONCE_BYTES: Final = 12


class ExchangeKey:
    """A site's own half. It is never printed, logged or sent."""

    def __init__(self, raw: bytes) -> None:
        """``raw``: 32 bytes. Raises ValueError for another length."""
        self._key = X25519PrivateKey.from_private_bytes(raw)
        public = base64.urlsafe_b64encode(self._key.public_key().public_bytes_raw())
        self.public = f"x25519:{public.decode().rstrip('=')}"

    def __repr__(self) -> str:
        return f"ExchangeKey({self.public})"

    @classmethod
    def generate(cls) -> ExchangeKey:
        """A new key, from the system's generator."""
        return cls(os.urandom(32))

    @property
    def raw(self) -> bytes:
        """The 32 bytes, for its owner's file."""
        return self._key.private_bytes_raw()

    def pair(self, other: str, run: str) -> Pair:
        """What this site and the owner of ``other`` share in a run; both get the same.

        Raises ProtocolError for a public key that is none, or gives no secret.
        """
        try:
            if not re.fullmatch(_FORM, other):
                raise ValueError  # noqa: TRY301 - one answer for all that is no key
            raw = base64.urlsafe_b64decode(other.removeprefix("x25519:") + "=")
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(raw))
        except ValueError:
            raise ProtocolError(
                f"exchange key: expected x25519: and 43 characters of base64url that make a key, "
                f"got {other[:80]!r}; the site it belongs to must be started again"
            ) from None
        context = _label("pair", run, *sorted((self.public, other)))
        return Pair(HKDF(SHA256(), SEED_BYTES, salt=None, info=context).derive(shared))


@dataclass(frozen=True)
class Pair:
    """One pair's secret in a run."""

    _secret: bytes = field(repr=False)

    def mask_key(self, attempt: Attempt) -> bytes:
        """The seed of this attempt's mask: the one secret that may be revealed, after it."""
        return self._expand(_label("mask", attempt.run, attempt.round, attempt.number))

    def seal(self, data: bytes, attempt: Attempt, sender: str, to: str, sha: str) -> bytes:
        """``data`` so that ``to`` alone can read it: nonce, ciphertext and tag.

        ``sha``: the masked vector that it belongs to.
        """
        nonce = os.urandom(_NONCE_BYTES)
        about = _label("shares", attempt.run, attempt.round, attempt.number, sender, to, sha)
        return nonce + ChaCha20Poly1305(self._expand(about)).encrypt(nonce, data, about)

    def unseal(self, sealed: bytes, attempt: Attempt, sender: str, to: str, sha: str) -> bytes:
        """What was sealed. Raises ProtocolError where it is of another, or altered."""
        about = _label("shares", attempt.run, attempt.round, attempt.number, sender, to, sha)
        nonce, data = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            return ChaCha20Poly1305(self._expand(about)).decrypt(nonce, data, about)
        except (InvalidTag, ValueError):
            raise ProtocolError(
                f"shares of {sender} for {to}: expected those sealed for vector {sha[:12]} of "
                f"round {attempt.round}, attempt {attempt.number}, got others; whoever carried "
                "them altered or exchanged them"
            ) from None

    def _expand(self, about: bytes) -> bytes:
        return HKDFExpand(SHA256(), SEED_BYTES, info=about).derive(self._secret)


def _label(purpose: str, *about: object) -> bytes:
    """No label is the beginning of another's."""
    return b"gradualdiff/1/secure-sum/" + canonical_json([purpose, *about])
