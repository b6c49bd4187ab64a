"""Signed objects, and chains of them: a run's links, enrolled keys and operators' deeds alike.

An object is canonical JSON. Where somebody signs, ``signed_by`` and ``signature`` stand in it; the
signature is over all the rest and over the place where it lies, so that what was signed for one
run, number or name says nothing in another. The objects of a chain are numbered from 1, and each
names in ``previous`` the sha256 of the one before: a signature covers all that came before it too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from shared.config import Sha256, canonical_json
from shared.errors import ConfigError, SignatureError
from shared.protocol.manifest import Schema
from shared.protocol.record import HEAD_FORM, Number
from shared.trust.keys import PublicKey

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.trust.keys import SigningKey


class Chained(Schema):
    """An object of a chain that lies beside the runs."""

    number: Number
    """Which one, from 1."""
    previous: Sha256 | None
    """sha256 of the one before; none in the first one."""


@dataclass(frozen=True)
class Head:
    """The newest object of a chain that somebody knows: its number, and the sha256 of its bytes."""

    number: int
    sha: str

    def __str__(self) -> str:
        return f"{self.number}:{self.sha}"

    @classmethod
    def parse(cls, text: str, name: str) -> Self:
        """``N:SHA256``. Raises ConfigError naming the setting ``name``."""
        if not re.match(HEAD_FORM, text.strip()):
            raise ConfigError(
                f"{name}: expected NUMBER:SHA256, as gradualdiff site heads prints it, "
                f"got {text[:100]!r}"
            )
        number, _, sha = text.strip().partition(":")
        return cls(int(number), sha)


def signed_json(values: dict[str, Any], where: str, key: SigningKey | None) -> bytes:
    """The bytes of an object that is to lie at ``where``; unsigned without ``key``."""
    if key is None:
        return canonical_json(values)
    values = values | {"signed_by": key.public.text}
    signature = key.sign("record", canonical_json([where, values]))
    return canonical_json(values | {"signature": _text(signature)})


def opened_json(data: bytes, where: str) -> tuple[dict[str, Any], PublicKey | None]:
    """What an object at ``where`` says, and who signed it, if anybody. Raises SignatureError.

    Its bytes are those that were signed, whatever of it a later release added.
    """
    try:
        values = json.loads(data)
        whole = isinstance(values, dict) and canonical_json(values) == data
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise SignatureError("expected the bytes that it was written with, got others")
    by, signature = values.get("signed_by"), values.pop("signature", None)
    if by is None and signature is None:
        return values, None
    if not isinstance(by, str) or not isinstance(signature, str):
        raise SignatureError("expected both a key and a signature, or neither")
    try:
        key, raw = PublicKey(by), base64.urlsafe_b64decode(signature + "==")
        if _text(raw) != signature:
            raise SignatureError("signature: expected it in base64url, got something else")
        key.verify("record", raw, canonical_json([where, values]))
    except (ConfigError, ValueError) as error:
        raise SignatureError(str(error)) from None
    return values, key


def _text(signature: bytes) -> str:
    return base64.urlsafe_b64encode(signature).decode().rstrip("=")


@dataclass
class Walk:
    """A chain as far as it was walked. ``heads``: each object's digest by its number."""

    head: Head | None = None
    heads: dict[int, str] = field(default_factory=dict)

    @property
    def due(self) -> int:
        """The number of the next object."""
        return self.head.number + 1 if self.head else 1

    def add(self, where: str, number: int, data: bytes) -> tuple[PublicKey | None, list[str]]:
        """Take the next object, which lies at ``where``; who signed it, and what is wrong."""
        problems: list[str] = []
        values: dict[str, Any] = {}
        by = None
        if number > self.due:
            gap = f"{self.due}" if number == self.due + 1 else f"{self.due} to {number - 1}"
            problems.append(f"expected number {gap} before it, got none: dropped, or lost")
        try:
            values, by = opened_json(data, where)
        except SignatureError as error:
            problems.append(str(error))
        expected = {**self._place(), "number": number}
        if number != self.due:
            del expected["previous"]
        problems += [
            f"{name}: expected {value}, got {values[name]}"
            for name, value in expected.items()
            if name in values and values[name] != value
        ]
        self.head = Head(number, hashlib.sha256(data).hexdigest())
        self.heads[number] = self.head.sha
        return by, problems

    def next(self, values: Mapping[str, Any], where: str, key: SigningKey | None) -> bytes:
        """The bytes of the object after the newest one, to be created at ``where``."""
        return signed_json({**values, **self._place()}, where, key)

    def _place(self) -> dict[str, int | str | None]:
        return {"number": self.due, "previous": self.head.sha if self.head else None}
