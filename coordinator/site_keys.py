"""Which public key is which site's: enrolments and revocations, in order, for ever on record.

The records are a chain that the coordinator's key signs: whoever has the store alone can enrol
nobody. If he takes away the newest of them, the links of every run that named them show it.

An operator adds one; every coordinator under the same key reads on, so nothing is started again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from shared.config import Name
from shared.errors import (
    ConfigError,
    LedgerDamagedError,
    ObjectExistsError,
    ObjectMissingError,
)
from shared.protocol.chain import Chained, Walk
from shared.topology import site_keys_key
from shared.trust.keys import PublicKey, PublicText

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shared.stores.port import ObjectStore
    from shared.trust.keys import SigningKey


_RESTORE = "restore it and all before it from a copy of the store"


class KeyRecord(Chained):
    """One enrolment or revocation."""

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
        self.chain = Walk()
        self._store = store
        self._keys: dict[str, tuple[SiteKey, ...]] = {}
        self._owners: dict[str, str] = {}

    def read_on(self) -> SiteKeys:
        """Read what is new; one question where nothing is. Raises StoreError, LedgerDamagedError.

        Of what is not signed by the coordinator's key nothing is believed.
        """
        while True:
            key = self._next_key()
            try:
                data = self._store.get(key)
            except ObjectMissingError:
                return self
            self._fold(self._taken(key, data))

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

    def next(self, signer: SigningKey, **what: str | float) -> None:
        """Put one more on record, and read it. Raises ConfigError if somebody else was faster."""
        key = self._next_key()
        try:
            self._store.create(key, self.chain.next(what, key, signer))
        except ObjectExistsError:
            raise ConfigError(
                f"site {what['site']}: somebody else changed a site's key at the same time; give "
                "the command again"
            ) from None
        self.read_on()

    def _next_key(self) -> str:
        return site_keys_key(self.coordinator.fingerprint, self.chain.due)

    def _taken(self, key: str, data: bytes) -> KeyRecord:
        """The next record, checked. What is not as it should be is not gone on from."""
        step = Walk(self.chain.head)
        by, problems = step.add(key, step.due, data)
        try:
            record = KeyRecord.model_validate_json(data)
        except ValidationError:
            by = None
        for problem in problems:
            raise LedgerDamagedError(f"{key}: {problem}; {_RESTORE}")
        if by != self.coordinator:
            raise LedgerDamagedError(
                f"{key}: expected a site's key signed by {self.coordinator.fingerprint}, got "
                f"something else; {_RESTORE}"
            )
        self.chain.head = step.head
        self.chain.heads |= step.heads
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
    keys.next(
        signer, site=site, action="enrol", key=public.text, reason=reason, by=by, time=clock()
    )
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
        key = found.public.text
        keys.next(signer, site=site, action="revoke", key=key, reason=reason, by=by, time=clock())
    return found
