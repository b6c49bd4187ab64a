"""The log of operators' doings: who asked for what, when and why, in a chain that shows a gap.

An entry is written before the deed: whatever was done stands here. A second one says how it ended;
where there is none it was cut off. The entries are a chain, so that none can be altered, swapped or
taken out unseen; whoever kept the digest of the newest one sees also that none was cut off at the
end. Only people's doings are logged, not those of a process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import ValidationError

from shared import topology
from shared.errors import LedgerDamagedError, ObjectExistsError
from shared.protocol.chain import Chained, Walk
from shared.protocol.record import Number
from shared.trust.keys import PublicText

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from shared.stores.port import ObjectStore
    from shared.trust.keys import PublicKey, SigningKey

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


class AuditEntry(Chained):
    """A deed that an operator was about to do, or how an earlier one ended."""

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
    ended: Number | None = None
    """Which earlier entry's deed has ended. Not there in the entry of a deed."""
    exit_code: int | None = None
    """How it ended: 0 done, otherwise failed. Not there in the entry of a deed."""
    signed_by: PublicText | None = None
    """The public key of who signed it. Not there if nobody did."""


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
        deed: dict[str, object] = {
            "what": what,
            "about": about,
            "why": why,
            "by": self._by,
            "broker_account": self._broker_account,
            "store_account": self._store.account,
            "time": self._clock(),
        }
        if ended is not None:
            deed |= {"ended": ended, "exit_code": exit_code}
        while True:
            walk = self._newest()
            key = topology.audit_key(walk.due)
            data = walk.next(deed, key, self._signer)
            try:
                self._store.create(key, data)
            except ObjectExistsError:
                continue
            return _read(key, data)

    def _newest(self) -> Walk:
        walk, last = Walk(), None
        for info in self._store.list(topology.audit_prefix()):
            last = info.key
        if last is not None:
            data = self._store.get(last)
            walk.add(last, _read(last, data).number, data)
        return walk


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
    chain, number, signed = Walk(), 0, 0
    for number, (key, data) in enumerate(raw, 1):
        expected = topology.audit_key(number)
        if key != expected:
            raise _damaged(expected, f"the next one is {key}")
        _read(key, data)
        by, problems = chain.add(key, number, data)
        for problem in problems:
            raise _damaged(key, problem)
        if keys is not None and (by is None or by.text not in keys):
            got = by.text if by else "none"
            raise _damaged(key, f"signed_by: expected one of {len(keys)} trusted keys, got {got}")
        signed += by is not None
    if head is not None and head not in chain.heads.values():
        raise _damaged(topology.audit_key(number + 1), f"no entry has the sha256 {head}")
    return Walked(number, signed, chain.head.sha if chain.head else None)


def _read(key: str, data: bytes) -> AuditEntry:
    try:
        entry = AuditEntry.model_validate_json(data)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in detail["loc"]) or "the object"
        raise _damaged(key, f"{field}: {detail['msg']}") from None
    if topology.audit_key(entry.number) != key:
        raise _damaged(key, f"it says that it is entry {entry.number}")
    return entry


def _damaged(key: str, problem: str) -> LedgerDamagedError:
    return LedgerDamagedError(
        f"{key}: expected the next entry of the log of operators' doings, but {problem}; entries "
        "were altered or taken out from here on: compare with a copy or an export"
    )
