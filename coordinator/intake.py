"""A delta's way in: from uploaded chunks to checked bytes under their own name.

Chunks are spooled to local disk, so that the checks and later the aggregation read local files,
tensor by tensor. Then that very file is stored under its sha256. The chunks are not read again, so
nobody who still holds an upload URL can change what was checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared import topology
from shared.disk.durable_files import file_errors
from shared.disk.files import digest_file
from shared.errors import DeltaRefusedError, LedgerDamagedError, ObjectMissingError
from shared.failpoints import failpoint
from shared.stores.port import read_again
from shared.tensors.delta_file import check_delta

if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from pathlib import Path

    from shared.protocol.manifest import Manifest
    from shared.protocol.records import AcceptedRecord
    from shared.stores.port import ObjectStore
    from shared.tensors.delta_file import DeltaHeader

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
    def chunks(self) -> int:
        """How many inbox objects it takes."""
        return -(-self.size // CHUNK_BYTES)

    def chunk_key(self, number: int) -> str:
        """Where chunk ``number`` goes."""
        return topology.inbox_key(self.run, self.round, self.site, self.sha, number)

    def chunk_size(self, number: int) -> int:
        """Bytes of chunk ``number``: all are full but the last."""
        return min(CHUNK_BYTES, self.size - number * CHUNK_BYTES)


class Intake:
    """Takes deltas in. ``spool``: a local folder that may be deleted at any time but now."""

    def __init__(self, store: ObjectStore, spool: Path) -> None:
        self._store = store
        self.spool = spool
        # Files this process hashed itself; a file left by an earlier one is hashed before use.
        self._hashed: set[Path] = set()

    def missing_chunks(self, upload: Upload) -> list[int]:
        """The chunks that are not in the inbox yet, or have the wrong size."""
        prefix = upload.chunk_key(0).rsplit("/", 1)[0] + "/"
        present = {info.key: info.size for info in self._store.list(prefix)}
        return [
            number
            for number in range(upload.chunks)
            if present.get(upload.chunk_key(number)) != upload.chunk_size(number)
        ]

    def uploading(self, upload: Upload) -> set[str]:
        """The shas of which this site has bytes in this round's inbox."""
        prefix = upload.chunk_key(0).rsplit("/", 2)[0] + "/"
        return {info.key.rsplit("/", 2)[1] for info in self._store.list(prefix)}

    def take(
        self,
        upload: Upload,
        manifest: Manifest,
        expected: DeltaHeader,
        max_norm: float | None,
        not_zero: str | None = None,
    ) -> float:
        """Check the uploaded delta and store it under its name; its norm.

        Raises DeltaRefusedError with the reason. Repeatable: a delta that is stored already is
        checked again from there.
        """
        path, is_stored = self._spooled(upload)
        norm = check_delta(path, manifest, expected, max_norm, not_zero).norm
        failpoint("delta.checked")
        if not is_stored:
            self._put(upload, path)
        return norm

    def lost(self, run: str, counted: Iterable[AcceptedRecord]) -> dict[Upload, str]:
        """The deltas that the store does not hold as they were taken, and what is wrong."""
        found = {}
        for one in counted:
            try:
                self.local_delta(run, one.round, one.site, one.sha)
            except LedgerDamagedError as error:
                found[Upload(run, one.round, one.site, one.sha, one.size)] = str(error)
        return found

    def restore(self, upload: Upload) -> None:
        """Store a counted delta again from what its site sent again. Raises DeltaRefusedError.

        It was checked when it was taken, and its sha256 says that it is the same.
        """
        path, is_stored = self._spooled(upload)
        if not is_stored:
            self._put(upload, path)

    def local_delta(self, run: str, round_number: int, site: str, sha: str) -> Path:
        """The spooled file of an accepted delta, fetched again if it is gone.

        Raises LedgerDamagedError when the stored object is missing or altered.
        """
        key = topology.delta_key(run, round_number, site, sha)
        return self._local(key, self._path(round_number, site, sha), sha)

    def local_adapter(self, run: str, adapter_sha: str) -> Path:
        """A local copy of a global adapter's tensors. Raises LedgerDamagedError."""
        key = topology.adapter_key(run, adapter_sha)
        return self._local(key, self.spool / f"adapter-{adapter_sha}", adapter_sha)

    def local_state(self, run: str, sha: str) -> Path:
        """A local copy of a server optimiser's state. Raises LedgerDamagedError."""
        return self._local(topology.server_state_key(run, sha), self._state_path(sha), sha)

    def adopt_state(self, sha: str, path: Path) -> None:
        """Keep a state that this process wrote and stored, for the next round."""
        self._hashed.add(path.replace(self._state_path(sha)))

    def discard(self, upload: Upload) -> None:
        """Forget a refused upload: spool and inbox."""
        self._path(upload.round, upload.site, upload.sha).unlink(missing_ok=True)
        self._clear_inbox(upload)

    def clear_round(
        self, run: str, round_number: int, keep_adapter: str, keep_state: str | None = None
    ) -> None:
        """After a round closed: empty the spool, but for its adapter and state, and the inbox.

        ``round_number``: the newest whose inbox goes, with those of all rounds before it: a URL
        outlives its round. What lies there still was never submitted, or never asked for.
        """
        for info in self._store.list(topology.inbox_prefix(run)):
            if topology.round_of_inbox(info.key) <= round_number:
                self._store.delete(info.key)
        kept = {f"adapter-{keep_adapter}", f"state-{keep_state}"}
        self._hashed = {p for p in self._hashed if p.name in kept}
        for path in self.spool.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)
        failpoint("round.swept")

    def clear_sites(self, run: str, sites: Container[str], lost: Iterable[Upload]) -> None:
        """After sites were taken out: what they uploaded, but for what is asked of them again."""
        kept = {upload.chunk_key(n) for upload in lost for n in range(upload.chunks)}
        for info in self._store.list(topology.inbox_prefix(run)):
            if topology.site_of_inbox(info.key) in sites and info.key not in kept:
                self._store.delete(info.key)

    def clear_inbox(self, run: str) -> None:
        """After the run's end: nothing that was uploaded for it is wanted any more."""
        for info in self._store.list(topology.inbox_prefix(run)):
            self._store.delete(info.key)

    def scratch(self, name: str) -> Path:
        """A path in the spool for a file being made."""
        self.spool.mkdir(parents=True, exist_ok=True)
        return self.spool / name

    def _spooled(self, upload: Upload) -> tuple[Path, bool]:
        """A local file with the sha256 that was announced; whether it is stored under its name.

        What is stored there with other bytes, from whatever cause, counts as not stored.
        """
        path = self._path(upload.round, upload.site, upload.sha)
        key = topology.delta_key(upload.run, upload.round, upload.site, upload.sha)
        with file_errors(self.spool):
            self.spool.mkdir(parents=True, exist_ok=True)
            is_stored = self._is_stored(key, path, upload.sha)
            if not is_stored:
                try:
                    self._spool_chunks(upload, path)
                except DeltaRefusedError:
                    # A coordinator that was frozen does not know yet that another one took over,
                    # which may have stored the delta and cleared the inbox meanwhile.
                    is_stored = self._is_stored(key, path, upload.sha)
                    if not is_stored:
                        raise
        failpoint("delta.spooled")
        self._hashed.add(path)
        return path, is_stored

    def _is_stored(self, key: str, path: Path, sha: str) -> bool:
        """Whether the object is there with these bytes; they are at ``path`` then."""
        try:
            return read_again(lambda: self._store.spool([key], path).sha256, sha) is None
        except ObjectMissingError:
            return False

    def _spool_chunks(self, upload: Upload, target: Path) -> None:
        absent = self.missing_chunks(upload)
        if absent:
            raise DeltaRefusedError(
                f"size: expected {upload.size} bytes in {upload.chunks} chunks, but chunk "
                f"{absent[0]} is absent or has another size; upload it, then submit again"
            )
        keys = [upload.chunk_key(number) for number in range(upload.chunks)]

        def read() -> str:
            spooled = self._store.spool(keys, target)
            for number, part in enumerate(spooled.parts):
                if part.size != upload.chunk_size(number):
                    raise DeltaRefusedError(
                        f"size: expected {upload.chunk_size(number)} bytes in chunk {number}, got "
                        f"{part.size}; it changed while it was read: upload it, then submit again"
                    )
            return spooled.sha256

        try:
            damage = read_again(read, upload.sha)
        except ObjectMissingError as error:
            raise DeltaRefusedError(
                f"the upload changed while it was read ({error}); submit it again"
            ) from None
        if damage is not None:
            raise DeltaRefusedError(
                f"sha256: expected {upload.sha[:12]} as announced, got other bytes ({damage}); "
                "start the site again, it sends the delta anew"
            )

    def _put(self, upload: Upload, path: Path) -> None:
        """Store the very file that was checked; what the inbox holds by now does not matter."""
        key = topology.delta_key(upload.run, upload.round, upload.site, upload.sha)
        self._store.put_file(key, path)
        failpoint("delta.stored")
        self._clear_inbox(upload)

    def _clear_inbox(self, upload: Upload) -> None:
        for number in range(upload.chunks):
            self._store.delete(upload.chunk_key(number))
        failpoint("inbox.cleared")

    def _local(self, key: str, path: Path, sha: str) -> Path:
        if path.exists() and (path in self._hashed or digest_file(path)[0] == sha):
            self._hashed.add(path)
            return path
        self.spool.mkdir(parents=True, exist_ok=True)
        try:
            damage = read_again(lambda: self._store.spool([key], path).sha256, sha)
        except ObjectMissingError:
            raise LedgerDamagedError(
                f"{key}: is missing; restore this object from a copy of the store"
            ) from None
        if damage is not None:
            path.unlink(missing_ok=True)
            raise LedgerDamagedError(
                f"{key}: its bytes do not have the sha256 of its name ({damage}); "
                "restore this object from a copy of the store"
            )
        self._hashed.add(path)
        return path

    def _state_path(self, sha: str) -> Path:
        return self.spool / f"state-{sha}"

    def _path(self, round_number: int, site: str, sha: str) -> Path:
        return self.spool / f"{round_number:05d}-{site}-{sha}.safetensors"
