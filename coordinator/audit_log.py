"""The log of operators' doings: who asked for what, when and why, in a chain that shows a gap.

An entry is written before the deed: whatever was done stands here. A second one says how it ended;
where there is none it was cut off. Each names the sha256 of the one before, so that none can be
altered, swapped or taken out unseen; whoever kept the digest of the newest one sees also that none
was cut off at the end. Only people's doings are logged, not those of a process.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
)

from shared import topology
from shared.config import Sha256, canonical_json
from shared.errors import LedgerDamagedError, ObjectExistsError, SignatureError
from shared.protocol.manifest import Schema
from shared.protocol.record import Number
from shared.trust.keys import PublicKey, PublicText

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from shared.stores.port import ObjectStore
    from shared.trust.keys import SigningKey

Deed: TypeAlias = Literal[
    "account.add",
    "account.rotate",
    "account.remove",
    "account.restore",
    "account.renew",
    "account.expire",
    "key.enrol",
    "key.revoke",
    "kit.write",
    "run.pause",
    "run.resume",
    "run.stop",
    "run.extend",
    "run.exclude",
    "run.branch",
    "run.export",
    "run.prune",
    "run.erase",
    "run.delete",
    "queue.redrive",
    "queue.purge",
]
Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


class AuditEntry(Schema):
    """A deed that an operator was about to do, or how an earlier one ended."""

    number: Number
    """Which one, from 1."""
    what: Deed
    """The deed."""
    about: str
    """The run or site it was done to, and what else was asked: ``demo-1 site north``."""
    why: str
    """The reason that was given."""
    by: str
    """Who was at the keyboard: account@machine."""
    broker_account: str | None = None
    """Who that was to the broker; none if the deed does not need it."""
    store_account: str | None = None
    """Who that was to the store: the name of its access key, which is no secret. None for a
    directory.
    """
    time: float
    """When, seconds since the epoch."""
    before: Sha256 | None
    """sha256 of the bytes of the entry before; none of the first."""
    key: PublicText | None = None
    """The public key of who signed it; none if nobody did."""
    ended: Number | None = None
    """Which earlier entry's deed has ended. Not there in the entry of a deed."""
    exit_code: int | None = None
    """How it ended: 0 done, otherwise failed. Not there in the entry of a deed."""
    signature: Signature | None = None
    """Ed25519 over the canonical JSON of all other fields, in hex."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        if self.ended is None:
            values.pop("ended", None)
            values.pop("exit_code", None)
        return values

    def signed_bytes(self) -> bytes:
        """What a signature is made of: all but the signature."""
        return canonical_json(self.model_dump(mode="json", exclude={"signature"}))


@dataclass(frozen=True)
class Walked:
    """What a walk along a whole chain found. ``head``: sha256 of its last entry, none of none."""

    entries: int
    signed: int
    head: str | None


class AuditLog:
    """The log in one store. ``by``, ``signer``: who writes; ``clock``: seconds since the epoch."""

    def __init__(
        self,
        store: ObjectStore,
        by: str,
        clock: Callable[[], float],
        *,
        broker_account: str | None = None,
        signer: SigningKey | None = None,
    ) -> None:
        self._store = store
        self._by = by
        self._clock = clock
        self._broker_account = broker_account
        self._signer = signer

    def write(
        self, what: Deed, about: str, why: str, *, ended: int | None = None, exit_code: int = 0
    ) -> AuditEntry:
        """Put on record that this is about to be done, at the next free number.

        ``ended``, ``exit_code``: or that the deed of that entry has ended, and how.
        Whoever is not first takes the next. Raises the store's errors, and LedgerDamagedError if
        the last entry is not one.
        """
        while True:
            number, before = self._next()
            entry = self._signed(
                AuditEntry(
                    number=number,
                    what=what,
                    about=about,
                    why=why,
                    by=self._by,
                    broker_account=self._broker_account,
                    store_account=self._store.account,
                    time=self._clock(),
                    before=before,
                    key=self._signer.public.text if self._signer else None,
                    ended=ended,
                    exit_code=None if ended is None else exit_code,
                )
            )
            try:
                self._store.create(topology.audit_key(number), _bytes(entry))
            except ObjectExistsError:
                continue
            return entry

    def _next(self) -> tuple[int, str | None]:
        last = None
        for info in self._store.list(topology.audit_prefix()):
            last = info.key
        if last is None:
            return 1, None
        data = self._store.get(last)
        return _read(last, data).number + 1, hashlib.sha256(data).hexdigest()

    def _signed(self, entry: AuditEntry) -> AuditEntry:
        if self._signer is None:
            return entry
        signature = self._signer.sign("operator", entry.signed_bytes())
        return entry.model_copy(update={"signature": signature.hex()})


def raw_entries(store: ObjectStore) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of every entry, in order."""
    for info in store.list(topology.audit_prefix()):
        yield info.key, store.get(info.key)


def read_entries(raw: Iterable[tuple[str, bytes]]) -> Iterator[AuditEntry]:
    """The entries, each by itself. Raises LedgerDamagedError at one that is none."""
    for key, data in raw:
        yield _read(key, data)


def outcomes(entries: Iterable[AuditEntry]) -> dict[int, int | None]:
    """By the number of each deed its exit code; None where nothing says that it ended."""
    found: dict[int, int | None] = {}
    for entry in entries:
        if entry.ended is None:
            found[entry.number] = None
        else:
            found[entry.ended] = entry.exit_code
    return found


def walk(
    raw: Iterable[tuple[str, bytes]],
    *,
    trusted: Iterable[PublicKey] | None = None,
    head: str | None = None,
) -> Walked:
    """Check every entry, its place, its link to the one before and its signature.

    ``trusted``: the keys that every entry must be signed by one of; None: whoever signed, and it
    may be nobody. ``head``: digest of an entry that must be there still. Raises LedgerDamagedError
    naming the first entry that is wrong.
    """
    keys = None if trusted is None else {key.text for key in trusted}
    before, number, signed, is_there = None, 0, 0, head is None
    for key, data in raw:
        number += 1
        expected = topology.audit_key(number)
        if key != expected:
            raise _damaged(expected, f"the next one is {key}")
        entry = _read(key, data)
        if entry.before != before:
            raise _damaged(key, f"before: expected {before}, got {entry.before}")
        if entry.signature is not None:
            _check_signature(key, entry)
            signed += 1
        if keys is not None and entry.key not in keys:
            raise _damaged(key, f"key: expected one of {len(keys)} trusted keys, got {entry.key}")
        before = hashlib.sha256(data).hexdigest()
        is_there = is_there or before == head
    if not is_there:
        raise _damaged(topology.audit_key(number + 1), f"no entry has the sha256 {head}")
    return Walked(number, signed, before)


def _check_signature(key: str, entry: AuditEntry) -> None:
    if entry.key is None or entry.signature is None:
        raise _damaged(key, "it has a signature and no key")
    try:
        signature = bytes.fromhex(entry.signature)
        PublicKey(entry.key).verify("operator", signature, entry.signed_bytes())
    except SignatureError as error:
        raise _damaged(key, str(error)) from None


def _bytes(entry: AuditEntry) -> bytes:
    return canonical_json(entry.model_dump(mode="json"))


def _read(key: str, data: bytes) -> AuditEntry:
    try:
        entry = AuditEntry.model_validate_json(data)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in detail["loc"]) or "the object"
        raise _damaged(key, f"{field}: {detail['msg']}") from None
    if topology.audit_key(entry.number) != key:
        raise _damaged(key, f"it says that it is entry {entry.number}")
    if _bytes(entry) != data:
        raise _damaged(key, "its bytes are not those that it was written with")
    return entry


def _damaged(key: str, problem: str) -> LedgerDamagedError:
    return LedgerDamagedError(
        f"{key}: expected the next entry of the log of operators' doings, but {problem}; entries "
        "were altered or taken out from here on: compare with a copy or an export"
    )
