"""Ed25519 keys (RFC 8032): made and kept by their owner, known to others by their public half.

A private key is a PKCS #8 PEM file that only its owner can read. A public key is written
``ed25519:`` and its 32 bytes in base64url; people compare its fingerprint. Every signature is for
one purpose: what was signed as an event is never a valid signature of a record.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import StringConstraints

from shared.errors import ConfigError, SignatureError

# What a signature is for. It is part of what is signed.
Purpose: TypeAlias = Literal["event", "record", "exchange", "survivors"]

_FORM: Final = r"^ed25519:[A-Za-z0-9_-]{43}$"
PublicText = Annotated[str, StringConstraints(pattern=_FORM)]
"""A public key as text, in settings, records and messages."""
SIGNATURE_BYTES: Final = 64
IDENTITY_FILE: Final = "identity.key"  # a site's private key, beside its site.toml


def mode_for_others(path: Path) -> int:
    """Its permission bits if others than its owner may use it, else 0. Raises OSError.

    What systemd hands to a service (``LoadCredential``) is that service's alone, though its mode
    may show a group: that is the mask of an access list.
    """
    handed = os.environ.get("CREDENTIALS_DIRECTORY")
    mode = stat.S_IMODE(path.stat().st_mode)
    if handed and path.resolve().parent == Path(handed).resolve():
        mode &= ~0o070
    return mode if mode & 0o077 else 0


def _framed(purpose: Purpose, data: bytes) -> bytes:
    """What is really signed: no purpose is the beginning of another's bytes."""
    return b"gradualdiff/1/" + purpose.encode() + b"\0" + data


@dataclass(frozen=True)
class PublicKey:
    """The half that everybody may know. ``text``: as :data:`PublicText`."""

    text: str

    def __post_init__(self) -> None:
        """Raises ConfigError for a text that is no such key."""
        try:
            if not re.fullmatch(_FORM, self.text):
                raise ValueError  # noqa: TRY301 - the same answer as to what base64 finds
            self._key()
        except (ValueError, binascii.Error):
            raise ConfigError(
                f"public key: expected ed25519: and 43 characters of base64url, got "
                f"{self.text[:80]!r}; copy the line that gradualdiff site init printed"
            ) from None

    def _key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self._bytes())

    def _bytes(self) -> bytes:
        return base64.urlsafe_b64decode(self.text.removeprefix("ed25519:") + "=")

    @property
    def fingerprint(self) -> str:
        """Half of the sha256 of its bytes, 32 hex digits in groups of four: to be read out."""
        digits = hashlib.sha256(self._bytes()).hexdigest()[:32]
        return " ".join(digits[at : at + 4] for at in range(0, 32, 4))

    def verify(self, purpose: Purpose, signature: bytes, data: bytes) -> None:
        """Whether the owner signed ``data`` for ``purpose``. Raises SignatureError if not."""
        try:
            self._key().verify(signature, _framed(purpose, data))
        except InvalidSignature:
            raise SignatureError(
                f"signature: expected one of {self.fingerprint} on this {purpose}, got another; "
                "what it says was altered, or somebody else signed it"
            ) from None


class SigningKey:
    """The half that signs. It is never printed, logged, sent or put on record."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        raw = key.public_key().public_bytes_raw()
        text = base64.urlsafe_b64encode(raw).decode().rstrip("=")
        self.public = PublicKey(f"ed25519:{text}")

    def __repr__(self) -> str:
        return f"SigningKey({self.public.text})"

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key, from the system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path, setting: str) -> SigningKey:
        """The key in a file. Raises ConfigError naming ``setting`` if there is none to be used.

        A file that others can read is refused: a key that somebody may have copied proves nothing.
        """
        try:
            data = path.read_bytes()
            mode = mode_for_others(path)
        except OSError as error:
            raise ConfigError(
                f"{setting}: expected a private key at {path}, got: {error.strerror}; fix the "
                "path, or make one: gradualdiff site init at a site, gradualdiff setup elsewhere"
            ) from None
        if mode:
            raise ConfigError(
                f"{setting}: expected a file that only its owner can read, got {path} with mode "
                f"{mode:04o}; chmod 600 it, and make a new key if others use this machine"
            )
        key: object = None
        with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):
            key = serialization.load_pem_private_key(data, password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(
                f"{setting}: expected an Ed25519 private key without a passphrase in {path}, got "
                "something else; make one with gradualdiff site init or gradualdiff setup"
            )
        return cls(key)

    @classmethod
    def kept(cls, path: Path, setting: str) -> SigningKey:
        """The key in a file, made first where there is none. Raises ConfigError, OSError."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(ConfigError):  # somebody was faster
                cls.generate().save(path)
        return cls.load(path, setting)

    def save(self, path: Path) -> None:
        """Write it to a new file of mode 0600, on disk when this returns.

        Raises ConfigError if there is such a file: a key is never overwritten. OSError.
        """
        pem = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        temporary = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(8).hex()}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(handle)
            os.link(temporary, path)  # unlike a rename it fails where a file is
        except FileExistsError:
            raise ConfigError(
                f"{path}: expected no file, got one; a key is not overwritten: move it away first"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def sign(self, purpose: Purpose, data: bytes) -> bytes:
        """The signature, 64 bytes; equal for equal keys, purposes and bytes."""
        return self._key.sign(_framed(purpose, data))
