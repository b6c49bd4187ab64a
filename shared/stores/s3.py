"""The object store on an S3 server: the ``ObjectStore`` port with the minio SDK.

The only file that imports minio. Invariants:

- Keys are the port's keys, one bucket is one store. The server must honour ``If-None-Match: *``:
  that is what lets one coordinator win, and :meth:`S3Store.check` tries it.
- The etag is the server's: of equal bytes it may be equal.
- No object's bytes are held whole but by ``put``, ``create`` and ``get``.
- Every request has a time limit; dropped connections and 5xx are tried again a few times. A
  ``create`` that is tried again may meet its own first try: ObjectExistsError, and who gets it
  reads the record and adopts it, as after any lost race.
- Errors name the endpoint and the setting to fix; no key, no URL and no text of the server.

An upload in parts that a killed process left is invisible, but takes room: let the bucket's
lifecycle rules drop such uploads after some days.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import re
import time
import uuid
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import HTTPError

from shared.disk.durable_files import file_errors, make_directories, temporary, write_new
from shared.disk.files import READ_BYTES, sync_path
from shared.errors import (
    ConfigError,
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
)
from shared.stores.keys import check_key, is_key
from shared.stores.port import ObjectInfo, Spooled
from shared.stores.s3_signing import bind_length
from shared.stores.transfer import (
    PROGRESS_BYTES,
    RETRY_STATUSES,
    TRIES,
    WHOLE_BYTES,
    content_length,
    error_code,
    http_pool,
    network_error,
    pause,
    range_start,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from urllib3 import BaseHTTPResponse

PART_BYTES = 16 * 1024 * 1024
MAX_SIGNED_SECONDS = 7 * 24 * 3600

_FULL = frozenset({"XMinioStorageFull", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"})
_BUSY = frozenset(
    {"ConditionalRequestConflict", "NoSuchUpload", "OperationAborted", "RequestTimeout", "SlowDown"}
)
_WRONG_REGION = frozenset({"AuthorizationHeaderMalformed", "PermanentRedirect", "Redirect"})


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
        self._pool = http_pool(ca_file, "store.ca_file", retries)
        self._where = urlsplit(endpoint).netloc
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

    # Once, at start ----------

    def check(self) -> None:
        """Try that the bucket is there, the keys are right and a create is conditional.

        Writes and removes a small object below ``.probe/``. Raises StoreError saying what to fix:
        the bucket, a key file, a clock, the server.
        """
        self._try_bucket()
        key = f".probe/{uuid.uuid4().hex}"
        try:
            self.create(key, b"probe")
            with contextlib.suppress(ObjectExistsError):
                self.create(key, b"again")
                raise StoreError(self._unconditional("it wrote the same key twice"))
        finally:
            self.delete(key)

    def make_bucket(self) -> None:
        """Make the bucket; one that is there and can be listed is no error."""
        with self._errors(f"bucket {self._bucket}"):
            try:
                self._client.make_bucket(self._bucket)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
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
            with self._errors(key):
                url = self._client.get_presigned_url("PUT", self._bucket, key)
                response = self._pool.urlopen("PUT", url, body=data, headers=headers)
            if response.status == 200:
                return ObjectInfo(key, len(data), _etag(response))
            code = error_code(response.data, response.status)
            if response.status == 412:
                raise ObjectExistsError(f"{key}: already exists; read it and adopt it")
            if response.status == 501 or code == "NotImplemented":
                raise StoreError(self._unconditional(f"it answered {code}"))
            # Two at once, and neither has won yet: ask again who did.
            if code != "ConditionalRequestConflict" or not left:
                break
            pause(TRIES - left)
        raise self._refusal(code, response.status, response, key)

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
                raise self._foreign(key, f"{info.size} bytes for what is read at once")

        return b"".join(self._read(key, tell=check))

    def fetch_file(self, key: str, path: Path) -> ObjectInfo:
        """Copy the object to a local file of the caller's own, replacing it whole."""
        found: list[ObjectInfo] = []
        chunks = self._read(key, tell=found.append)
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
                    for chunk in self._read(key, tell=parts.append):
                        digest.update(chunk)
                        out.write(chunk)
            temp.replace(path)
        return Spooled(parts, digest.hexdigest())

    def stat(self, key: str) -> ObjectInfo:
        """Size and etag. Raises ObjectMissingError."""
        check_key(key)
        with self._errors(key):
            try:
                found = self._client.stat_object(self._bucket, key)
            except S3Error as error:
                if error.code == "AccessDenied":
                    self._try_bucket()  # an answer to HEAD has no text: this one says why
                raise
            size = found.size or 0
            if size < 0:
                raise self._foreign(key, f"{size} bytes")
            return ObjectInfo(key, size, found.etag or "")

    def sha256(self, key: str) -> str:
        """Hex digest of the object's bytes, read now. Raises ObjectMissingError."""
        digest = hashlib.sha256()
        for chunk in self._read(key):
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
                raise self._foreign(f"bucket {self._bucket}", "a listing out of order")
            if not group:
                stem = prefix + info.key[len(prefix) :].partition("/")[0]
            group[info.key] = info
        yield from (group[key] for key in sorted(group))

    def delete(self, key: str) -> None:
        """Remove; nothing there is no error."""
        check_key(key)
        with self._errors(key):
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
        return bind_length(self._sign("PUT", key, expires_at), length, self._secret_key)

    # Inside ----------

    def _put(self, key: str, file: BinaryIO, size: int) -> ObjectInfo:
        with self._errors(key):
            made = self._client.put_object(
                self._bucket, key, file, size, part_size=PART_BYTES, num_parallel_uploads=1
            )
        return ObjectInfo(key, size, made.etag or "")

    def _read(
        self, key: str, tell: Callable[[ObjectInfo], object] = lambda _found: None
    ) -> Iterator[bytes]:
        """The object's bytes; goes on after a cut.

        The first answer tells how many there are: neither more nor fewer are taken. What is read
        on must have its etag, or ObjectChangedError. ``tell`` hears of its size and etag before the
        first bytes come.
        """
        check_key(key)
        position, failed, info = 0, 0, None
        while True:
            before = position
            try:
                with self._errors(key), self._answer(key, position, info) as (response, told):
                    if info is None:
                        info = told
                        tell(info)
                    for chunk in response.stream(READ_BYTES, decode_content=False):
                        position += len(chunk)
                        yield chunk
            except StoreUnavailableError:
                failed = 1 if position - before >= PROGRESS_BYTES else failed + 1
                if info is None or failed >= TRIES:  # before it the SDK has tried again itself
                    raise
                pause(failed)
            else:
                return

    @contextlib.contextmanager
    def _answer(
        self, key: str, start: int, info: ObjectInfo | None
    ) -> Iterator[tuple[BaseHTTPResponse, ObjectInfo]]:
        """The answer to one request, its size and etag.

        ``info``: what the first answer told; this one must bring all of it from ``start`` on.
        """
        left = 0 if info is None else info.size - start
        headers: dict[str, str | list[str] | tuple[str]] = {"Accept-Encoding": "identity"}
        if info is not None:
            headers["If-Match"] = f'"{info.etag}"'
        try:
            response = self._client.get_object(
                self._bucket, key, start, left, request_headers=headers
            )
        except S3Error as error:
            if error.code == "PreconditionFailed" and info is not None:
                raise ObjectChangedError(
                    f"{key}: was written anew while it was read; read it again"
                ) from None
            raise
        try:
            size, etag = content_length(response), _etag(response)
            if size is None or not etag:
                raise self._foreign(key, "no Content-Length or no ETag")
            if (start or left) and range_start(response) != start:
                raise self._foreign(key, f"other bytes than those from {start}")
            if info is not None and size != left:
                raise self._foreign(key, f"{size} bytes instead of {left}")
            yield response, ObjectInfo(key, size, etag)
        finally:
            response.close()
            response.release_conn()

    def _foreign(self, what: str, found: str) -> StoreError:
        """The error for an answer that no S3 server gives."""
        return StoreError(
            f"{what}: expected the answer of an S3 server at {self._where}, got something else "
            f"({found}); check store.url"
        )

    def _listed(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the server tells them; folders and foreign names are left out."""
        with self._errors(f"bucket {self._bucket}"):
            for found in self._client.list_objects(self._bucket, prefix, recursive=True):
                key = found.object_name or ""
                if not found.is_dir and is_key(key):
                    etag = (found.etag or "").replace('"', "")
                    yield ObjectInfo(key, found.size or 0, etag)

    def _try_bucket(self) -> None:
        next(self._listed(".probe/"), None)

    def _sign(self, method: str, key: str, expires_at: float) -> str:
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
        )

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn what the SDK and urllib3 raise into our tree. ``what``: key or bucket."""
        try:
            yield
        except S3Error as error:
            raise self._refusal(
                error.code or "no code", error.response.status, error.response, what
            ) from None
        except ServerError as error:
            raise self._refusal(
                f"HTTP {error.status_code}", error.status_code, None, what
            ) from None
        except (HTTPError, HTTPException) as error:
            raise network_error(error, f"{what}: store at {self._where}", "store.ca_file") from None
        except (MinioException, ParseError, ValueError) as error:
            status = _status(error)
            if status >= 500:
                raise self._refusal(f"HTTP {status}", status, None, what) from None
            kind = "no XML" if isinstance(error, InvalidResponseError) else type(error).__name__
            raise self._foreign(what, kind) from None

    def _refusal(
        self, code: str, status: int, response: BaseHTTPResponse | None, what: str
    ) -> StoreError:
        """The error that an S3 error code or HTTP status means."""
        where = f"store at {self._where}"
        fix = {
            "InvalidAccessKeyId": "the access key is not known there; fix store.access_key_file",
            "SignatureDoesNotMatch": "the secret key is wrong; fix store.secret_key_file",
            "AccessDenied": (
                f"this key may not do that in bucket {self._bucket}; grant it, or fix "
                "store.access_key_file and store.secret_key_file"
            ),
            "NoSuchBucket": (
                f"there is no bucket {self._bucket}; `gradualdiff setup FEDERATION.toml` makes it"
            ),
            "RequestTimeTooSkewed": (
                f"its clock and this machine's differ by more than 15 minutes{_skew(response)}; "
                "set both, best by NTP"
            ),
        }.get(code)
        if fix is not None:
            return StoreError(f"{what}: {where}: {fix} ({code})")
        if code == "NoSuchKey":
            return ObjectMissingError(f"{what}: no such object in bucket {self._bucket} of {where}")
        if code in _FULL or status == 507:
            return StoreUnavailableError(f"{what}: {where} is full ({code}); free space there")
        if code in _BUSY or status in RETRY_STATUSES or status >= 500:
            return StoreUnavailableError(f"{what}: {where} cannot serve now ({code}); try again")
        if code in _WRONG_REGION:
            return StoreError(f"{what}: {where}: {code}; check store.region and store.url")
        return StoreError(f"{what}: {where} refused it: {code} (HTTP {status})")

    def _unconditional(self, what: str) -> str:
        return (
            f"store at {self._where}: expected it to honour If-None-Match: * on a write, but "
            f"{what}; without that two coordinators can overwrite each other: use a server or "
            "version that has conditional writes (SeaweedFS, MinIO, AWS S3)"
        )


def _status(error: Exception) -> int:
    """The HTTP status of an answer that is not S3's, from a balancer in front of it say; 0: none.

    The SDK keeps it in the text alone.
    """
    found = re.search(r"Response code: (\d{3})", str(error))
    return int(found[1]) if isinstance(error, InvalidResponseError) and found else 0


def _etag(response: BaseHTTPResponse) -> str:
    return response.headers.get("ETag", "").replace('"', "")


def _skew(response: BaseHTTPResponse | None) -> str:
    """How far apart the clocks are, if the answer tells the server's."""
    try:
        there = parsedate_to_datetime(response.headers["Date"]) if response is not None else None
    except (KeyError, TypeError, ValueError):
        there = None
    if there is None:
        return ""
    return f" (there {there:%Y-%m-%d %H:%M:%S} UTC, here {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC)"
