"""The chain of links: how one is signed, and how all of them are walked. Knows no store.

Each link names the sha256 of the one before and of every record since. A signature covers its whole
link and, through the digests, all that came before.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from shared.config import canonical_json
from shared.errors import ConfigError, SignatureError
from shared.trust.keys import PublicKey

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shared.protocol.records import LinkRecord
    from shared.trust.keys import SigningKey

MOST_NAMED: Final = 1_000  # records in one link; more of them take several
_HEAD: Final = re.compile(r"([1-9][0-9]{0,6}):([0-9a-f]{64})")


@dataclass(frozen=True)
class Head:
    """The newest link that somebody knows: its number, and the sha256 of its bytes."""

    number: int
    sha: str

    def __str__(self) -> str:
        return f"{self.number}:{self.sha}"

    @classmethod
    def parse(cls, text: str, name: str) -> Self:
        """``N:SHA256``. Raises ConfigError naming the setting ``name``."""
        found = _HEAD.fullmatch(text.strip())
        if found is None:
            raise ConfigError(
                f"{name}: expected NUMBER:SHA256, as gradualdiff site heads prints it, "
                f"got {text[:100]!r}"
            )
        return cls(int(found[1]), found[2])


def signed(link: LinkRecord, key: SigningKey | None) -> LinkRecord:
    """The link with the coordinator's name and signature; as it is, without a key."""
    if key is None:
        return link
    mine = link.model_copy(update={"by": key.public.text, "signature": None})
    signature = key.sign("link", canonical_json(mine.model_dump(mode="json")))
    text = base64.urlsafe_b64encode(signature).decode().rstrip("=")
    return mine.model_copy(update={"signature": text})


def _check_signature(link: LinkRecord, data: bytes) -> None:
    """Raises SignatureError. ``data``: as stored, which may hold what a later release adds."""
    said = json.loads(data)
    if link.by is None and link.signature is None:
        return
    if link.by is None or link.signature is None:
        raise SignatureError("expected both a key and a signature, or neither")
    del said["signature"]
    try:
        signature = base64.urlsafe_b64decode(link.signature + "==")
        PublicKey(link.by).verify("link", signature, canonical_json(said))
    except ConfigError as error:
        raise SignatureError(str(error)) from None


@dataclass
class Walk:
    """The chain as far as it was walked. ``named``: every record's sha256 by its name.

    ``by``: the key of all links from ``signed_from`` on; None while none was signed. ``heads``:
    each link's digest by its number. ``found``: the records that their link's writer only met.
    """

    named: dict[str, str] = field(default_factory=dict)
    heads: dict[int, str] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)
    by: str | None = None
    signed_from: int | None = None
    head: Head | None = None

    def add(self, number: int, data: bytes, link: LinkRecord | None) -> list[str]:
        """Take the next link; what is wrong with it. ``link``: None where it cannot be read."""
        problems: list[str] = []
        last = self.head.number if self.head else 0
        if number > last + 1:
            gap = f"link {last + 1}" if number == last + 2 else f"links {last + 1} to {number - 1}"
            problems.append(f"expected {gap} before it, got none: dropped, or lost")
        if link is not None:
            problems += self._problems(number, data, link)
            for name, sha in (link.records | link.found).items():
                before = self.named.setdefault(name, sha)
                if before != sha:
                    problems.append(f"{name}: expected {before}, as it was named before, got {sha}")
            self.found |= link.found.keys()
            if self.by is None and link.by is not None:
                self.by, self.signed_from = link.by, number
        self.head = Head(number, hashlib.sha256(data).hexdigest())
        self.heads[number] = self.head.sha
        return problems

    def _problems(self, number: int, data: bytes, link: LinkRecord) -> Iterator[str]:
        follows = self.head is None or self.head.number == number - 1
        expected = self.head.sha if self.head else None
        if follows and link.previous != expected:
            yield f"previous: expected {expected}, got {link.previous}"
        if self.by is not None and link.by != self.by:
            yield (
                f"by: expected {self.by}, whose signature is on links from {self.signed_from} on, "
                f"got {link.by or 'none'}"
            )
        try:
            _check_signature(link, data)
        except SignatureError as error:
            yield str(error)
