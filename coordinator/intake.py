"""A delta's way in: from uploaded chunks to checked bytes under their own name.

Chunks are spooled to local disk, so that the checks and later the aggregation read local files,
tensor by tensor. Only then does the store join the very chunks that were read (by etag) into the
content-addressed object: nobody who still holds an upload URL can change what was checked.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared import topology
from shared.delta_file import check_delta
from shared.durable_files import file_errors
from shared.errors import (
    DeltaRefusedError,
    LedgerDamagedError,
    ObjectChangedError,
    ObjectMissingError,
)
from shared.failpoints import failpoint
from shared.files import digest_file

if TYPE_CHECKING:
    from pathlib import Path

    from shared.delta_file import DeltaHeader
    from shared.manifest import Manifest
    from shared.store import ObjectInfo, ObjectStore

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
        path = self._path(upload.round, upload.site, upload.sha)
        with file_errors(self.spool):
            parts, digest = self._collect(upload, path)
        failpoint("delta.spooled")
        if digest != upload.sha:
            self.discard(upload)
            raise DeltaRefusedError(
                f"sha256: expected {upload.sha[:12]} as announced, got other bytes; "
                "the upload was damaged: start the site again, it sends the delta anew"
            )
        self._hashed.add(path)
        norm = check_delta(path, manifest, expected, max_norm, not_zero).norm
        failpoint("delta.checked")
        key = topology.delta_key(upload.run, upload.round, upload.site, upload.sha)
        if parts:
            try:
                self._store.compose(key, parts)
            except (ObjectChangedError, ObjectMissingError) as error:
                if not self._is_stored(key, upload.sha):
                    raise DeltaRefusedError(
                        f"the upload changed while it was checked ({error}); submit it again"
                    ) from None
            failpoint("delta.composed")
            self._clear_inbox(upload)
        return norm

    def local_delta(self, run: str, round_number: int, site: str, sha: str) -> Path:
        """The spooled file of an accepted delta, fetched again if it is gone.

        Raises LedgerDamagedError when the stored object is missing or altered.
        """
        key = topology.delta_key(run, round_number, site, sha)
        return self._local(key, self._path(round_number, site, sha), sha)

    def local_adapter(self, run: str, sha: str) -> Path:
        """A local copy of a global adapter's tensors. Raises LedgerDamagedError."""
        return self._local(topology.adapter_key(run, sha), self.spool / f"adapter-{sha}", sha)

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

        ``round_number``: whose inbox. What lies there still was never submitted, or never asked
        for. A round before the first one has none.
        """
        for info in self._store.list(topology.inbox_prefix(run, round_number)):
            self._store.delete(info.key)
        kept = {f"adapter-{keep_adapter}", f"state-{keep_state}"}
        self._hashed = {p for p in self._hashed if p.name in kept}
        for path in self.spool.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)
        failpoint("round.swept")

    def scratch(self, name: str) -> Path:
        """A path in the spool for a file being made."""
        self.spool.mkdir(parents=True, exist_ok=True)
        return self.spool / name

    def _collect(self, upload: Upload, target: Path) -> tuple[list[ObjectInfo], str]:
        """Spool the chunks: what was read, its sha256. No parts if the delta is stored already."""
        self.spool.mkdir(parents=True, exist_ok=True)
        key = topology.delta_key(upload.run, upload.round, upload.site, upload.sha)
        with contextlib.suppress(ObjectMissingError):
            return [], self._store.spool([key], target).sha256
        try:
            return self._collect_chunks(upload, target)
        except ObjectMissingError as error:
            # A coordinator that was frozen does not know yet that another one took over. That one
            # may join the chunks and clear the inbox while this one reads them.
            with contextlib.suppress(ObjectMissingError):
                return [], self._store.spool([key], target).sha256
            raise DeltaRefusedError(
                f"the upload changed while it was read ({error}); submit it again"
            ) from None

    def _collect_chunks(self, upload: Upload, target: Path) -> tuple[list[ObjectInfo], str]:
        absent = self.missing_chunks(upload)
        if absent:
            raise DeltaRefusedError(
                f"size: expected {upload.size} bytes in {upload.chunks} chunks, but chunk "
                f"{absent[0]} is absent or has another size; upload it, then submit again"
            )
        spooled = self._store.spool([upload.chunk_key(n) for n in range(upload.chunks)], target)
        for number, part in enumerate(spooled.parts):
            if part.size != upload.chunk_size(number):
                raise DeltaRefusedError(
                    f"size: expected {upload.chunk_size(number)} bytes in chunk {number}, got "
                    f"{part.size}; it changed while it was read: upload it, then submit again"
                )
        return spooled.parts, spooled.sha256

    def _is_stored(self, key: str, sha: str) -> bool:
        """Whether another coordinator joined the same bytes meanwhile."""
        try:
            return self._store.sha256(key) == sha
        except ObjectMissingError:
            return False

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
            digest = self._store.spool([key], path).sha256
        except ObjectMissingError:
            raise LedgerDamagedError(
                f"{key}: is missing; restore this object from a copy of the store"
            ) from None
        if digest != sha:
            raise LedgerDamagedError(
                f"{key}: its bytes do not have the sha256 of its name; "
                "restore this object from a copy of the store"
            )
        self._hashed.add(path)
        return path

    def _state_path(self, sha: str) -> Path:
        return self.spool / f"state-{sha}"

    def _path(self, round_number: int, site: str, sha: str) -> Path:
        return self.spool / f"{round_number:05d}-{site}-{sha}.safetensors"
