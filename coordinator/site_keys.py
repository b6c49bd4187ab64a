"""Which public key is which site's: enrolments and revocations, in order, for ever on record.

The records are numbered without a gap, each names the sha256 of the one before, and the
coordinator's key signs them all: whoever has the store alone can enrol nobody. He can take away the
newest of them; that brings a revoked key back to whoever still holds it, at a coordinator that
starts after that.

An operator adds one; every coordinator under the same key reads on, so nothing is started again.
"""

from __future__ import annotations

import hashlib
import time
from base64 import b64decode, b64encode
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError

from shared.config import Name, Sha256, canonical_json
from shared.errors import (
    ConfigError,
    LedgerDamagedError,
    ObjectExistsError,
    ObjectMissingError,
    SignatureError,
)
from shared.protocol.manifest import Schema
from shared.protocol.record import Number
from shared.topology import site_keys_key
from shared.trust.keys import PublicKey, PublicText

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shared.stores.port import ObjectStore
    from shared.trust.keys import SigningKey


class KeyRecord(Schema):
    """One enrolment or revocation."""

    number: Number
    """Which one, from 1."""
    before: Sha256 | None
    """sha256 of the record before; none in the first one."""
    site: Name
    """The site."""
    action: Literal["enrol", "revoke"]
    """``enrol`` also ends the key that the site had."""
    key: PublicText
    """The site's public key."""
    reason: str
    """Why."""
    by: str
    """Who did it: account@machine."""
    time: float
    """When, seconds since the epoch."""
    signature: Annotated[str, Field(max_length=100)] = ""
    """The coordinator's, over all the rest: 64 bytes in base64."""

    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))


@dataclass(frozen=True)
class SiteKey:
    """A site's key. Times in seconds since the epoch; ``revoked``: None while it is in force."""

    public: PublicKey
    enrolled: float
    revoked: float | None = None
    reason: str = ""


class SiteKeys:
    """The keys that the owner of ``coordinator`` enrolled, as far as they were read."""

    def __init__(self, store: ObjectStore, coordinator: PublicKey) -> None:
        self.coordinator = coordinator
        self._store = store
        self._number = 0
        self._newest: str | None = None
        self._keys: dict[str, tuple[SiteKey, ...]] = {}
        self._owners: dict[str, str] = {}

    def read_on(self) -> SiteKeys:
        """Read what is new; one question where nothing is. Raises StoreError, LedgerDamagedError.

        Of what is not signed by the coordinator's key nothing is believed.
        """
        while True:
            key = site_keys_key(self.coordinator.fingerprint, self._number + 1)
            try:
                data = self._store.get(key)
            except ObjectMissingError:
                return self
            record = self._checked(key, data)
            self._number, self._newest = record.number, hashlib.sha256(data).hexdigest()
            self._fold(record)

    @property
    def sites(self) -> Mapping[str, tuple[SiteKey, ...]]:
        """Every key that a site ever had, oldest first, by site."""
        return self._keys

    def in_force(self, site: str) -> SiteKey | None:
        """The key that the site signs by now."""
        known = self._keys.get(site, ())
        return known[-1] if known and known[-1].revoked is None else None

    def owner(self, public: str) -> str | None:
        """Whose key this is or was."""
        return self._owners.get(public)

    def find(self, site: str, public: str) -> SiteKey | None:
        """The site's key of this text, in force or not; None if it never had it."""
        return next((key for key in self._keys.get(site, ()) if key.public.text == public), None)

    def next(self, record: KeyRecord, signer: SigningKey) -> None:
        """Put one more on record, and read it. Raises ConfigError if somebody else was faster."""
        numbered = record.model_copy(update={"number": self._number + 1, "before": self._newest})
        signature = b64encode(signer.sign("enrolment", numbered.signed_bytes())).decode()
        whole = numbered.model_copy(update={"signature": signature})
        key = site_keys_key(self.coordinator.fingerprint, whole.number)
        try:
            self._store.create(key, canonical_json(whole.model_dump(mode="json")))
        except ObjectExistsError:
            raise ConfigError(
                f"site {record.site}: somebody else changed a site's key at the same time; give "
                "the command again"
            ) from None
        self.read_on()

    def _checked(self, key: str, data: bytes) -> KeyRecord:
        try:
            record = KeyRecord.model_validate_json(data)
            self.coordinator.verify("enrolment", b64decode(record.signature), record.signed_bytes())
        except (ValidationError, ValueError, SignatureError):
            raise LedgerDamagedError(
                f"{key}: expected a site's key signed by {self.coordinator.fingerprint}, got "
                "something else; restore this object from a copy of the store"
            ) from None
        if (record.number, record.before) != (self._number + 1, self._newest):
            raise LedgerDamagedError(
                f"{key}: does not follow the record before it; restore both from a copy of the "
                "store"
            )
        return record

    def _fold(self, record: KeyRecord) -> None:
        known = self._keys.get(record.site, ())
        if known and known[-1].revoked is None:
            over = replace(known[-1], revoked=record.time, reason=record.reason)
            known = (*known[:-1], over)
        if record.action == "enrol":
            public = PublicKey(record.key)
            known = (*known, SiteKey(public, record.time))
            self._owners[record.key] = record.site
        self._keys[record.site] = known


def enrol(
    keys: SiteKeys,
    signer: SigningKey,
    site: str,
    public: PublicKey,
    reason: str,
    by: str,
    clock: Callable[[], float] = time.time,
) -> bool:
    """Make ``public`` the site's key, in place of the one it had; whether it was not so already.

    ``by``: who does it, account@machine.

    Raises ConfigError for a key that is or was another site's, or was revoked.
    """
    keys.read_on()
    now = keys.in_force(site)
    if now is not None and now.public == public:
        return False
    owner = keys.owner(public.text)
    if public == keys.coordinator or owner is not None:
        whose = f"site {owner}'s, in force or revoked" if owner else "the coordinator's own"
        raise ConfigError(
            f"site {site}: expected a new key, got {public.text}, which is {whose}; have the site "
            "make another one: it moves its identity.key away and runs gradualdiff site init"
        )
    keys.next(_record(site, "enrol", public, reason, by, clock), signer)
    return True


def revoke(
    keys: SiteKeys,
    signer: SigningKey,
    site: str,
    reason: str,
    by: str,
    clock: Callable[[], float] = time.time,
) -> SiteKey | None:
    """End the site's key now; the key, None where it has none in force."""
    found = keys.read_on().in_force(site)
    if found is not None:
        keys.next(_record(site, "revoke", found.public, reason, by, clock), signer)
    return found


def _record(
    site: str,
    action: Literal["enrol", "revoke"],
    public: PublicKey,
    reason: str,
    by: str,
    clock: Callable[[], float],
) -> KeyRecord:
    return KeyRecord(
        number=1,
        before=None,
        site=site,
        action=action,
        key=public.text,
        reason=reason,
        by=by,
        time=clock(),
    )
