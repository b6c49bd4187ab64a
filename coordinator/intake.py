"""A delta's way in: from what its site sent to checked bytes under their own name.

They are spooled to local disk, once, so that the checks and later the aggregation read local files,
tensor by tensor. What came by the inbox is stored from that very file: its chunks are not read
again, so nobody who still holds an upload URL can change what was checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from coordinator.arrivals import Arrivals, Upload
from shared import topology
from shared.disk.durable_files import file_errors
from shared.disk.files import digest_file
from shared.errors import (
    DeltaRefusedError,
    LedgerDamagedError,
    ObjectChangedError,
    ObjectMissingError,
)
from shared.failpoints import failpoint
from shared.stores.port import read_again
from shared.tensors.delta_file import check_delta
from shared.tensors.masked_file import check_masked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from shared.protocol.manifest import Manifest
    from shared.protocol.records import AcceptedRecord
    from shared.secure_sum.ring import Ring
    from shared.stores.port import ObjectStore, Spooled
    from shared.tensors.delta_file import DeltaHeader


Checked = TypeVar("Checked")


class _Fault(NamedTuple):
    """Why a delta's object is not the one announced. ``is_stored``: the object itself is wrong."""

    reason: str
    is_stored: bool = False


class Intake:
    """Takes deltas in. ``spool``: a local folder that may be deleted at any time but now."""

    def __init__(self, store: ObjectStore, spool: Path) -> None:
        self._store = store
        self.spool = spool
        self.arrivals = Arrivals(store)
        # Files this process hashed itself; a file left by an earlier one is hashed before use.
        self._hashed: set[Path] = set()

    def take(
        self,
        upload: Upload,
        manifest: Manifest,
        expected: DeltaHeader,
        max_norm: float | None,
        not_zero: str | None = None,
    ) -> float:
        """Check the uploaded delta, which lies under its name afterwards; its norm.

        Raises DeltaRefusedError with the reason; what was read and is wrong is removed by then.
        Repeatable: a delta that is there already is checked again.
        """

        def check(path: Path) -> float:
            return check_delta(path, manifest, expected, max_norm, not_zero).norm

        return self._taken(upload, check)

    def take_masked(
        self, upload: Upload, manifest: Manifest, expected: DeltaHeader, ring: Ring
    ) -> None:
        """The same of a masked delta, of which nothing but its form can be checked."""
        self._taken(upload, lambda path: check_masked(path, manifest, expected, ring))

    def _taken(self, upload: Upload, check: Callable[[Path], Checked]) -> Checked:
        path, is_stored = self._spooled(upload, discards=True)
        try:
            found = check(path)
        except DeltaRefusedError:
            self.discard(upload)
            raise
        failpoint("delta.checked")
        if not is_stored:
            self._put(upload, path)
        return found

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
        path, is_stored = self._spooled(upload, discards=False)
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
        return self._local(key, self._adapter_path(adapter_sha), adapter_sha)

    def local_state(self, run: str, sha: str) -> Path:
        """A local copy of what the coordinator alone goes on from. Raises LedgerDamagedError."""
        return self._local(topology.server_state_key(run, sha), self._state_path(sha), sha)

    def adopt_adapter(self, adapter_sha: str, path: Path) -> None:
        """Keep an adapter that this process wrote and stored, for the next round."""
        self._hashed.add(path.replace(self._adapter_path(adapter_sha)))

    def adopt_state(self, sha: str, path: Path) -> None:
        """Keep a state that this process wrote and stored, for the next round."""
        self._hashed.add(path.replace(self._state_path(sha)))

    def discard(self, upload: Upload) -> None:
        """Forget a delta that no record names and none ever will."""
        self._path(upload.round, upload.site, upload.sha).unlink(missing_ok=True)
        self.arrivals.discard(upload)

    def clear_round(
        self,
        run: str,
        round_number: int,
        now: float,
        keep_adapter: str,
        keep_states: Iterable[str | None] = (),
    ) -> None:
        """After a round closed: sweep what was sent in vain, and the spool.

        The round's adapter and states stay. ``round_number``: the newest that takes no more deltas.
        """
        self.arrivals.sweep_closed(run, round_number, now)
        kept = {f"adapter-{keep_adapter}", *(f"state-{sha}" for sha in keep_states)}
        self._hashed = {p for p in self._hashed if p.name in kept}
        for path in self.spool.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)
        failpoint("round.swept")

    def scratch(self, name: str) -> Path:
        """A path in the spool for a file being made."""
        self.spool.mkdir(parents=True, exist_ok=True)
        return self.spool / name

    def _spooled(self, upload: Upload, *, discards: bool) -> tuple[Path, bool]:
        """A local file with the sha256 that was announced; whether it is stored under its name.

        What is stored there with other bytes counts as not stored, and with ``discards`` it goes,
        unless the inbox has the right ones. Raises DeltaRefusedError.
        """
        path = self._path(upload.round, upload.site, upload.sha)
        with file_errors(self.spool):
            self.spool.mkdir(parents=True, exist_ok=True)
            fault = self._fetch(upload, path)
            is_stored = fault is None
            if fault is not None:
                try:
                    self._spool_chunks(upload, path, fault.reason)
                except DeltaRefusedError:
                    # A coordinator that was frozen does not know yet that another one took over,
                    # which may have stored the delta and cleared the inbox meanwhile.
                    fault = self._fetch(upload, path)
                    is_stored = fault is None
                    if fault is not None:
                        if discards and fault.is_stored:
                            self.discard(upload)
                        raise
        failpoint("delta.spooled")
        self._hashed.add(path)
        return path, is_stored

    def _fetch(self, upload: Upload, path: Path) -> _Fault | None:
        """Bring what lies at the delta's key to ``path``; None if it is what was announced.

        By then nobody who holds a URL can change it.
        """
        reads: list[Spooled] = []

        def read() -> str:
            reads.append(self._store.spool([upload.key], path))
            return reads[-1].sha256

        try:
            if self.arrivals.expects(upload):  # so it is not there yet
                self.arrivals.complete(upload)
            try:
                damage = read_again(read, upload.sha)
            except ObjectMissingError:
                self.arrivals.complete(upload)
                damage = read_again(read, upload.sha)
        except (ObjectMissingError, ObjectChangedError):
            return _Fault(
                f"size: expected {upload.size} bytes, but they are not all at the store; upload "
                "what is missing, then submit again"
            )
        if damage is not None:
            same = len({one.sha256 for one in reads}) == 1
            return _Fault(_other_bytes(upload, damage), is_stored=same)
        size = reads[-1].parts[0].size
        if size != upload.size:
            return _Fault(f"size: expected {upload.size} bytes as announced, got {size}", True)
        return None

    def _spool_chunks(self, upload: Upload, target: Path, reason: str) -> None:
        """Spool what the inbox holds; without all of it, ``reason`` says why that was looked at."""
        if self.arrivals.missing_chunks(upload):
            raise DeltaRefusedError(reason)
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
            raise DeltaRefusedError(_other_bytes(upload, damage))

    def _put(self, upload: Upload, path: Path) -> None:
        """Store the very file that was checked; what the inbox holds by now does not matter."""
        self._store.put_file(upload.key, path)
        failpoint("delta.stored")
        self.arrivals.clear_chunks(upload)

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

    def _adapter_path(self, sha: str) -> Path:
        return self.spool / f"adapter-{sha}"

    def _state_path(self, sha: str) -> Path:
        return self.spool / f"state-{sha}"

    def _path(self, round_number: int, site: str, sha: str) -> Path:
        return self.spool / f"{round_number:05d}-{site}-{sha}.safetensors"


def _other_bytes(upload: Upload, damage: str) -> str:
    return (
        f"sha256: expected {upload.sha[:12]} as announced, got other bytes ({damage}); start the "
        "site again, it sends the delta anew"
    )
