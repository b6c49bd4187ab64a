"""The object store on an S3 server: the ``ObjectStore`` port with the minio SDK.

Invariants:

- Keys are the port's keys, one bucket is one store. The server must honour ``If-None-Match: *``:
  that is what lets one coordinator win, and :meth:`S3Store.check` tries it.
- The etag is the server's: of equal bytes it may be equal.
- No object's bytes are held whole but by ``put``, ``create`` and ``get``.
- Every request has a time limit; dropped connections and 5xx are tried again a few times. A
  ``create`` that is tried again may meet its own first try: ObjectExistsError, and who gets it
  reads the record and adopts it, as after any lost race.

An upload in parts that a killed process left is invisible, but takes room: the coordinator aborts
those of deltas, and let the bucket's lifecycle rules drop the others after some days.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import time
import uuid
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import S3Error

from shared.disk.durable_files import file_errors, make_directories, temporary, write_new
from shared.disk.files import sync_path
from shared.errors import ConfigError, ObjectExistsError, StoreError
from shared.stores.http import RETRY_STATUSES, TRIES, WHOLE_BYTES, error_code, http_pool, pause
from shared.stores.keys import check_key, is_key
from shared.stores.port import ObjectInfo, Spooled
from shared.stores.s3_errors import S3Errors
from shared.stores.s3_parts import PART_BYTES, S3Parts
from shared.stores.s3_reading import S3Reader, etag_of
from shared.stores.s3_signing import bind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from shared.stores.port import PartUploads


MAX_SIGNED_SECONDS = 7 * 24 * 3600
_ALREADY_MADE = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists", "AccessDenied")


class S3Store:
    """One bucket of the server at ``endpoint`` (``http://host:port`` or ``https://...``).

    ``site_endpoint``: the server's URL as sites reach it, if that differs; signed URLs carry it.
    ``ca_file``: the authority of the server's certificate, None for the system's. Nothing is asked
    of the server here: see :meth:`check`. Raises ConfigError.
    """

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        access_key: str,
        secret_key: str,
        *,
        region: str = "us-east-1",
        ca_file: Path | None = None,
        site_endpoint: str | None = None,
    ) -> None:
        retries = urllib3.Retry(
            total=TRIES - 1,
            other=0,  # a wrong certificate stays wrong
            redirect=0,
            raise_on_redirect=False,
            allowed_methods=None,
            status_forcelist=RETRY_STATUSES,
            raise_on_status=False,
            respect_retry_after_header=False,
            backoff_factor=0.2,
            backoff_jitter=0.2,
            backoff_max=5,
        )
        self._bucket = bucket
        self._secret_key = secret_key
        self._access_key = access_key
        self._pool = http_pool(ca_file, "store.ca_file", retries)
        clients = []
        for url, setting in (
            (endpoint, "store.url"),
            (site_endpoint or endpoint, "store.site_url"),
        ):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise ConfigError(
                    f"{setting}: expected http://HOST:PORT or https://HOST, got {url}"
                )
            try:
                client = Minio(
                    parts.netloc,
                    access_key,
                    secret_key,
                    secure=parts.scheme == "https",
                    region=region,  # known, so that nothing is asked of the server to sign
                    http_client=self._pool,
                )
                client.get_presigned_url("GET", bucket, "k")
            except ValueError as error:
                raise ConfigError(
                    f"{setting} or store.bucket: expected an S3 server and bucket name, got {url} "
                    f"and {bucket!r}: {error}"
                ) from None
            clients.append(client)
        self._client, self._site_client = clients
        self._errors = S3Errors(urlsplit(endpoint).netloc, bucket)
        self._reader = S3Reader(self._client, bucket, self._errors)
        self._parts = S3Parts(
            self._client, self._pool, bucket, self._errors, secret_key, self._sign_put
        )
        self._indirect = ""

    @property
    def account(self) -> str:
        """The access key: its name, which every signed URL carries too."""
        return self._access_key

    @property
    def indirect(self) -> str:
        """What :meth:`check` found missing at this server; "" before it."""
        return self._indirect

    @property
    def parts(self) -> PartUploads | None:
        """Uploads in parts."""
        return self._parts

    # Once, at start ----------

    def check(self) -> None:
        """Try that the bucket is there, the keys are right and a create is conditional.

        Also whether sites may create objects by URLs: ``indirect`` says it from then on. Writes and
        removes small objects below ``.probe/``. Raises StoreError saying what to fix:
        the bucket, a key file, a clock, the server.
        """
        self._try_bucket()
        key = f".probe/{uuid.uuid4().hex}"
        try:
            self.create(key, b"probe")
            with contextlib.suppress(ObjectExistsError):
                self.create(key, b"again")
                raise self._errors.unconditional("it wrote the same key twice")
        finally:
            self.delete(key)
        self._indirect = self._parts.why_not(f"{key}-by-url")

    def make_bucket(self) -> None:
        """Make the bucket; one that is there and can be listed is no error.

        A key that is good for this bucket alone may not make it: somebody else did.
        """
        with self._errors.translated(f"bucket {self._bucket}"):
            try:
                self._client.make_bucket(self._bucket)
            except S3Error as error:
                if error.code not in _ALREADY_MADE:
                    raise
        self._try_bucket()

    # The port ----------

    def put(self, key: str, data: bytes) -> ObjectInfo:
        """Write, replacing what was there."""
        check_key(key)
        return self._put(key, io.BytesIO(data), len(data))

    def create(self, key: str, data: bytes) -> ObjectInfo:
        """Write only if nothing is there. Raises ObjectExistsError.

        By a signed URL, since the SDK's put_object takes no condition.
        """
        check_key(key)
        headers = {
            "If-None-Match": "*",
            "Content-Type": "application/octet-stream",
            "Content-MD5": base64.b64encode(
                hashlib.md5(data, usedforsecurity=False).digest()
            ).decode(),
        }
        for left in reversed(range(TRIES)):
            with self._errors.translated(key):
                url = self._client.get_presigned_url("PUT", self._bucket, key)
                response = self._pool.urlopen("PUT", url, body=data, headers=headers)
            if response.status == 200:
                return ObjectInfo(key, len(data), etag_of(response))
            code = error_code(response.data, response.status)
            if response.status == 412:
                raise ObjectExistsError(f"{key}: already exists; read it and adopt it")
            if response.status == 501 or code == "NotImplemented":
                raise self._errors.unconditional(f"it answered {code}")
            # Two at once, and neither has won yet: ask again who did.
            if code != "ConditionalRequestConflict" or not left:
                break
            pause(TRIES - left)
        raise self._errors.refusal(code, response.status, response, key)

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        """Write a local file's bytes, in parts of 16 MiB. StoreError if there is no such file."""
        check_key(key)
        if not path.is_file():
            raise StoreError(f"{path}: expected a file, got none; give the path of a file")
        with file_errors(path), path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return self._put(key, file, size)

    def get(self, key: str) -> bytes:
        """The whole object, of a size to be held. Raises ObjectMissingError."""

        def check(info: ObjectInfo) -> None:
            if info.size > WHOLE_BYTES:
                raise self._errors.foreign(key, f"{info.size} bytes for what is read at once")

        return b"".join(self._reader.read(key, tell=check))

    def fetch_file(self, key: str, path: Path) -> ObjectInfo:
        """Copy the object to a local file of the caller's own, replacing it whole."""
        found: list[ObjectInfo] = []
        chunks = self._reader.read(key, tell=found.append)
        first = next(chunks, b"")  # no object, no file
        with file_errors(path):
            make_directories(path.parent)
            with temporary(path.parent, f".{path.name}.") as temp:
                write_new(temp, chain((first,), chunks))
                temp.chmod(0o644)
                temp.replace(path)
                sync_path(path.parent)
        return found[0]

    def spool(self, keys: Sequence[str], path: Path) -> Spooled:
        """One pass: what comes is hashed and written. Raises ObjectMissingError."""
        digest = hashlib.sha256()
        parts: list[ObjectInfo] = []
        with file_errors(path), temporary(path.parent, f".{path.name}.") as temp:
            with temp.open("wb") as out:
                for key in keys:
                    for chunk in self._reader.read(key, tell=parts.append):
                        digest.update(chunk)
                        out.write(chunk)
            temp.replace(path)
        return Spooled(parts, digest.hexdigest())

    def stat(self, key: str) -> ObjectInfo:
        """Size and etag. Raises ObjectMissingError."""
        check_key(key)
        with self._errors.translated(key):
            try:
                found = self._client.stat_object(self._bucket, key)
            except S3Error as error:
                if error.code == "AccessDenied":
                    self._try_bucket()  # an answer to HEAD has no text: this one says why
                raise
            size = found.size or 0
            if size < 0:
                raise self._errors.foreign(key, f"{size} bytes")
            return ObjectInfo(key, size, found.etag or "")

    def sha256(self, key: str) -> str:
        """Hex digest of the object's bytes, read now. Raises ObjectMissingError."""
        digest = hashlib.sha256()
        for chunk in self._reader.read(key):
            digest.update(chunk)
        return digest.hexdigest()

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, in key order, page by page.

        Held back and sorted are the keys that begin with the same name after ``prefix``: some
        servers go by folders and tell ``a/b`` before ``a-b``. A key that is told again, or out of
        order, is refused: such a listing may have no end.
        """
        if not is_key(f"{prefix.removesuffix('/')}x") or prefix == "/":
            return
        group: dict[str, ObjectInfo] = {}
        stem = ""
        for info in self._listed(prefix):
            if group and not info.key.startswith(stem):
                yield from (group[key] for key in sorted(group))
                group.clear()
            if info.key in group or info.key < stem or not info.key.startswith(prefix):
                raise self._errors.foreign(f"bucket {self._bucket}", "a listing out of order")
            if not group:
                stem = prefix + info.key[len(prefix) :].partition("/")[0]
            group[info.key] = info
        yield from (group[key] for key in sorted(group))

    def delete(self, key: str) -> None:
        """Remove; nothing there is no error."""
        check_key(key)
        with self._errors.translated(key):
            try:
                self._client.remove_object(self._bucket, key)
            except S3Error as error:
                if error.code != "NoSuchKey":
                    raise

    def sign_get(self, key: str, expires_at: float) -> str:
        """A URL that reads this object until ``expires_at``, in whole seconds, 7 days at most."""
        return self._sign("GET", key, expires_at)

    def sign_put(self, key: str, expires_at: float, length: int) -> str:
        """A URL that writes ``length`` bytes until ``expires_at``; the server refuses others.

        In whole seconds, 7 days at most.
        """
        return self._sign_put(key, {}, expires_at, length)

    def sign_create(self, key: str, expires_at: float, length: int) -> str:
        """As ``sign_put``; the server refuses it where something is by then."""
        return self._sign_put(key, {}, expires_at, length, {"if-none-match": "*"})

    # Inside ----------

    def _put(self, key: str, file: BinaryIO, size: int) -> ObjectInfo:
        with self._errors.translated(key):
            made = self._client.put_object(
                self._bucket, key, file, size, part_size=PART_BYTES, num_parallel_uploads=1
            )
        return ObjectInfo(key, size, made.etag or "")

    def _listed(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the server tells them; folders and foreign names are left out."""
        with self._errors.translated(f"bucket {self._bucket}"):
            for found in self._client.list_objects(self._bucket, prefix, recursive=True):
                key = found.object_name or ""
                if not found.is_dir and is_key(key):
                    etag = (found.etag or "").replace('"', "")
                    yield ObjectInfo(key, found.size or 0, etag)

    def _try_bucket(self) -> None:
        next(self._listed(".probe/"), None)

    def _sign_put(
        self,
        key: str,
        query: dict[str, str],
        expires_at: float,
        length: int,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        url = self._sign("PUT", key, expires_at, query)
        bound = {"content-length": str(length), **(headers or {})}
        return bind(url, "PUT", bound, self._secret_key)

    def _sign(
        self, method: str, key: str, expires_at: float, query: dict[str, str] | None = None
    ) -> str:
        check_key(key)
        now, end = int(time.time()), int(expires_at)
        # S3 counts from the moment of signing, 1 s at least: one that is over was signed before.
        start = min(now, end - 1)
        return self._site_client.get_presigned_url(
            method,
            self._bucket,
            key,
            expires=timedelta(seconds=min(end - start, MAX_SIGNED_SECONDS)),
            request_date=datetime.fromtimestamp(start, UTC),
            extra_query_params=dict(query) if query else None,
        )
