"""Where a delta's bytes arrive: straight at the delta's own key, or by way of the inbox.

Straight: one URL creates a small delta, a larger one is an upload in parts, which the coordinator
completes, if nothing is there, once it is submitted. Either way nobody who still holds a URL can
change an object that is there, so what was read and checked is what is counted. It counts when a
record names it, not before; what no record names is swept.

The inbox is for what a URL must not create: a delta that was counted and that the store lost (what
is damaged there is replaced, never deleted first), a site of a release before this way, and a store
that cannot. Those bytes are stored again under the delta's key after the checks.

Objects and uploads are found again by their prefix; what a process remembers of its grants only
saves it from asking, or helps at a server that lists no uploads by a prefix.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from shared import topology
from shared.errors import ObjectExistsError, ObjectMissingError
from shared.failpoints import failpoint
from shared.protocol.records import AcceptedRecord

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

    from shared.stores.port import ObjectStore, PartUpload

CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Upload:
    """What a site says it sends in a round: sha256 and size in bytes."""

    run: str
    round: int
    site: str
    sha: str
    size: int

    @property
    def key(self) -> str:
        """Where it is to lie."""
        return topology.delta_key(self.run, self.round, self.site, self.sha)

    @property
    def chunks(self) -> int:
        """How many inbox objects it takes."""
        return count_of(self.size, CHUNK_BYTES)

    def chunk_key(self, number: int) -> str:
        """Where chunk ``number`` goes."""
        return topology.inbox_key(self.run, self.round, self.site, self.sha, number)

    def chunk_size(self, number: int) -> int:
        """Bytes of chunk ``number``: all are full but the last."""
        return min(CHUNK_BYTES, self.size - number * CHUNK_BYTES)


@dataclass(frozen=True)
class Grant:
    """URLs by number of the pieces, of ``piece_bytes`` each but the last, that are missing."""

    piece_bytes: int
    urls: dict[int, str]


def count_of(size: int, piece: int) -> int:
    """How many pieces a size takes."""
    return -(-size // piece)


class Arrivals:
    """What sites sent, in one store."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._begun: set[PartUpload] = set()
        # Until when a URL of this process is good, by round.
        self._granted: dict[int, float] = {}

    # Granting ----------------------------------------------------------------------------------

    def shas(self, upload: Upload, *, direct: bool) -> set[str]:
        """The shas of which this site has bytes at the store for this round, by this way."""
        if not direct or self._store.indirect:
            prefix = upload.chunk_key(0).rsplit("/", 2)[0] + "/"
            return {info.key.rsplit("/", 2)[1] for info in self._store.list(prefix)}
        prefix = f"{topology.deltas_prefix(upload.run, upload.round)}{upload.site}-"
        keys = [info.key for info in self._store.list(prefix)]
        if self._in_parts(upload):
            keys += [one.key for one in self._under_way(prefix)]
        named = map(topology.site_and_sha_of_delta, keys)
        return {sha for site, sha in named if site == upload.site}

    def grant(
        self, upload: Upload, expires_at: float, *, direct: bool = False, seen: bool = True
    ) -> Grant:
        """A URL for each piece that is missing.

        ``direct``: URLs may create the delta's object. ``seen``: something of it may be there.
        """
        if not direct or self._store.indirect:
            urls = {
                number: self._store.sign_put(
                    upload.chunk_key(number), expires_at, upload.chunk_size(number)
                )
                for number in self.missing_chunks(upload)
            }
            return Grant(CHUNK_BYTES, urls)
        self._granted[upload.round] = expires_at
        if seen:
            with contextlib.suppress(ObjectMissingError):
                self._store.stat(upload.key)
                # It is read when it is submitted, and removed if it is wrong.
                return Grant(upload.size, {})
        if not self._in_parts(upload):
            url = self._store.sign_create(upload.key, expires_at, upload.size)
            return Grant(upload.size, {0: url})
        return self._grant_parts(upload, expires_at, seen=seen)

    def _grant_parts(self, upload: Upload, expires_at: float, *, seen: bool) -> Grant:
        parts = self._store.parts
        assert parts is not None  # whoever calls has looked
        under_way = next(iter(parts.under_way(upload.key)), None) if seen else None
        arrived = parts.arrived(under_way) if under_way is not None else {}
        begun = under_way or parts.begin(upload.key)
        self._begun.add(begun)
        failpoint("parts.begun")
        urls = {
            number - 1: parts.sign(begun, number, expires_at, size)
            for number, size in self._sizes(upload).items()
            if number not in arrived or arrived[number].size != size
        }
        return Grant(parts.part_bytes, urls)

    def _in_parts(self, upload: Upload) -> bool:
        parts = self._store.parts
        return parts is not None and not self._store.indirect and upload.size > parts.whole_bytes

    def _sizes(self, upload: Upload) -> dict[int, int]:
        """Bytes of each part, by number from 1."""
        assert self._store.parts is not None
        full = self._store.parts.part_bytes
        return {
            number + 1: min(full, upload.size - number * full)
            for number in range(count_of(upload.size, full))
        }

    def _uploads_of(self, key: str) -> Iterator[PartUpload]:
        """Those of this process; the store is asked for others only by who wants more of them."""
        yield from [one for one in tuple(self._begun) if one.key == key]
        yield from self._under_way(key)

    def _under_way(self, prefix: str) -> list[PartUpload]:
        return [] if self._store.parts is None else self._store.parts.under_way(prefix)

    # Taking in ---------------------------------------------------------------------------------

    def complete(self, upload: Upload) -> None:
        """Make the object of its parts, if they are all there. Raises ObjectChangedError.

        Of several uploads, as of two coordinators, the first whole one; the others are swept.
        """
        parts = self._store.parts
        if parts is None or not self._in_parts(upload):
            return
        for one in self._uploads_of(upload.key):
            arrived = parts.arrived(one)
            if {number: part.size for number, part in arrived.items()} != self._sizes(upload):
                continue
            # Somebody else has: then that is read, and judged by its sha256.
            with contextlib.suppress(ObjectExistsError, ObjectMissingError):
                parts.complete(one, arrived)
                self._begun.discard(one)
                failpoint("parts.completed")
            return

    def expects(self, upload: Upload) -> bool:
        """Whether this process began an upload in parts of it that is not complete."""
        return any(one.key == upload.key for one in tuple(self._begun))

    def missing_chunks(self, upload: Upload) -> list[int]:
        """The chunks that are not in the inbox yet, or have the wrong size."""
        prefix = upload.chunk_key(0).rsplit("/", 1)[0] + "/"
        present = {info.key: info.size for info in self._store.list(prefix)}
        return [
            number
            for number in range(upload.chunks)
            if present.get(upload.chunk_key(number)) != upload.chunk_size(number)
        ]

    # Clearing ----------------------------------------------------------------------------------

    def discard(self, upload: Upload) -> None:
        """Remove a delta that no record names and none ever will, and what of it is under way."""
        self._store.delete(upload.key)
        if self._in_parts(upload):
            self.abort(upload.key)
        self.clear_chunks(upload)

    def clear_chunks(self, upload: Upload) -> None:
        """Empty a delta's inbox."""
        for number in range(upload.chunks):
            self._store.delete(upload.chunk_key(number))
        failpoint("inbox.cleared")

    def sweep_closed(self, run: str, newest: int, now: float) -> None:
        """Remove what was sent for rounds up to ``newest``, which take nothing more, in vain.

        Of a round twice: when it takes nothing more, and when the last URL for it is over.
        """
        for info in self._store.list(topology.inbox_prefix(run)):
            if topology.round_of_inbox(info.key) <= newest:
                self._store.delete(info.key)
        over = {n for n, until in self._granted.items() if n <= newest and until < now}
        for number in sorted({newest} | over):
            if number >= 1:
                self._sweep(run, number)
                self.abort(topology.deltas_prefix(run, number))
        for number in over:
            del self._granted[number]

    def sweep_sites(
        self, run: str, rounds: Iterable[int], sites: Container[str], lost: Iterable[Upload]
    ) -> None:
        """Remove what these sites sent in vain, but for what is asked of them again."""
        kept = {upload.chunk_key(n) for upload in lost for n in range(upload.chunks)}
        for info in self._store.list(topology.inbox_prefix(run)):
            if topology.site_of_inbox(info.key) in sites and info.key not in kept:
                self._store.delete(info.key)
        for number in rounds:
            self._sweep(run, number, sites)
        self.abort(topology.deltas_prefix(run), sites)

    def sweep_run(self, run: str) -> None:
        """After the run's end: remove all that was sent in vain."""
        for info in self._store.list(topology.inbox_prefix(run)):
            self._store.delete(info.key)
        sent = self._store.list(topology.deltas_prefix(run))
        for number in sorted({topology.round_of_delta(info.key) for info in sent}):
            self._sweep(run, number)
        self.abort(topology.deltas_prefix(run))

    def _sweep(self, run: str, number: int, sites: Container[str] | None = None) -> None:
        """Remove deltas of a round that no record names, of ``sites`` or all.

        They can be accepted no more, by what is on record; what is accepted stays.
        """
        sent: dict[str, list[str]] = {}
        for info in self._store.list(topology.deltas_prefix(run, number)):
            site, _ = topology.site_and_sha_of_delta(info.key)
            if sites is None or site in sites:
                sent.setdefault(site, []).append(info.key)
        # Looked at after the objects: what a record has named meanwhile is kept.
        accepted: dict[str, list[str]] = {}
        for info in self._store.list(topology.round_prefix(run, number)) if sent else ():
            folder, _, name = info.key.rpartition("/")
            if folder.endswith("/accepted"):
                accepted.setdefault(name.removesuffix(".json"), []).append(info.key)
        for site, keys in sent.items():
            records = accepted.get(site, [])
            if len(keys) == len(records):
                continue  # the usual case asks nothing more
            try:
                kept = {
                    AcceptedRecord.model_validate_json(self._store.get(record)).sha
                    for record in records
                }
            except ValidationError:
                continue  # a damaged record says nothing against an object
            for key in keys:
                if topology.site_and_sha_of_delta(key)[1] not in kept:
                    self._store.delete(key)

    def abort(self, prefix: str, sites: Container[str] | None = None) -> None:
        """Give up the uploads in parts below ``prefix``, of ``sites`` or all."""
        if self._store.parts is None:
            return
        begun = {one for one in self._begun if one.key.startswith(prefix)}
        for one in sorted({*begun, *self._under_way(prefix)}, key=lambda one: (one.key, one.id)):
            if sites is None or topology.site_and_sha_of_delta(one.key)[0] in sites:
                self._store.parts.abort(one)
                self._begun.discard(one)
