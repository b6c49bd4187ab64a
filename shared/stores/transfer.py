"""A site's ``Transfer`` over HTTP: signed URLs only, no key.

Invariants:

- A file is at its path whole and checked, or not there; after a power cut it may be torn, so
  whoever finds one hashes it before use. What has come so far lies beside it as ``.<name>.part``
  and is continued after a cut or a restart; only the sha256 decides what it is.
- Trouble that may pass is tried again a few times.
- No redirect is followed: a signed URL is good for one host.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from http.client import HTTPException
from typing import TYPE_CHECKING, BinaryIO, Self
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from shared.credentials import is_loopback
from shared.disk.durable_files import file_errors, make_directories, read_chunks
from shared.disk.files import READ_BYTES
from shared.errors import (
    ConfigError,
    GrantError,
    IntegrityError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
)
from shared.stores.http import (
    PROGRESS_BYTES,
    RETRY_STATUSES,
    SEND_BYTES,
    TRIES,
    content_length,
    error_code,
    http_pool,
    network_error,
    pause,
    range_start,
)
from shared.stores.port import read_again
from shared.stores.s3_signing import bound_headers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from urllib3 import BaseHTTPResponse

MAX_BYTES = 64 * 1024**3

_ERROR_BYTES = 64 * 1024
_STORAGE_FULL = 507

# A bad signature, wherever the server puts it, or an upload that was completed or given up. Other
# 400s are not about the URL.
_GRANT_CODES = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "AuthorizationQueryParametersError",
        "ExpiredToken",
        "NoSuchUpload",
    }
)
_PASSING_CODES = frozenset({"RequestTimeout", "BadDigest", "IncompleteBody"})


class HttpTransfer:
    """Signed URLs over HTTP or HTTPS.

    ``ca_file``: the authority that signed the store's certificate, None for the system's.
    ``plaintext``: allow ``http://`` to another machine. ``store``: scheme, host and port of the
    only server that is asked, None for whichever a URL names. ``max_bytes``: the largest file a
    download may become. Raises ConfigError if ``ca_file`` holds no certificate.
    """

    def __init__(
        self,
        *,
        ca_file: Path | None = None,
        plaintext: bool = False,
        store: str | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._pool = http_pool(ca_file, "broker.ca_file", urllib3.Retry(0, raise_on_status=False))
        self._plaintext = plaintext
        self._prefixes = None if store is None else _prefixes(store)
        self._max_bytes = max_bytes

    def check(self, url: str) -> None:
        """Nothing is asked. Raises ConfigError, GrantError."""
        self._place(url)

    def download(self, url: str, path: Path, sha256: str) -> int:
        """Fetch to a local file, replacing it whole; its size in bytes.

        What an earlier call or process left half-done is continued. Raises IntegrityError (nothing
        is kept), GrantError, ObjectMissingError, StoreUnavailableError (what has come is kept).
        """
        where = self._place(url)
        with file_errors(path):
            make_directories(path.parent)
            with _Part(path.with_name(f".{path.name}.part")) as part:
                # What lay there may be of another object: it is no read of this one.
                if part.size and part.digest != sha256:
                    self._fetch(url, where, part)

                def read() -> str:
                    part.clear()
                    self._fetch(url, where, part)
                    return part.digest

                is_whole = bool(part.size) and part.digest == sha256
                damage = None if is_whole else read_again(read, sha256)
                if damage is not None:
                    raise IntegrityError(f"{where}: expected sha256 {sha256}; {damage}")
                part.finish(path)
                return part.size

    def upload(self, url: str, path: Path, start: int, length: int) -> None:
        """Send ``length`` bytes of a local file from ``start``.

        Raises IntegrityError if the file is shorter, GrantError (also when the upload that the part
        belongs to is over), StoreUnavailableError.
        """
        where = self._place(url)
        creates = "if-none-match" in bound_headers(url)
        headers = {"Content-Length": str(length)} | ({"If-None-Match": "*"} if creates else {})
        with file_errors(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if start < 0 or length < 0 or start + length > size:
                raise IntegrityError(
                    f"{path}: expected {length} bytes from {start}, but the file has {size}"
                )
            for left in reversed(range(TRIES)):
                file.seek(start)
                try:
                    body = _slice(file, path, length)
                    with self._answer("PUT", url, where, headers=headers, body=body):
                        pass
                except StoreUnavailableError:
                    if not left:
                        raise
                except ObjectExistsError:  # a try before this one, or a process before us, made it
                    if creates:
                        return
                    raise
                else:
                    return
                pause(TRIES - left)

    def _place(self, url: str) -> str:
        """HOST:PORT, for messages. Raises ConfigError for another server, or plain text to one."""
        if self._prefixes is not None and not url.lower().startswith(self._prefixes):
            # Letter by letter, up to the slash that ends it: no two ways to read a URL.
            raise ConfigError(
                "signed URL: expected one of this site's store, got one of another server, which "
                "is not asked; store.url in site.toml must be the coordinator's store.site_url "
                "(or store.url)"
            )
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or parts.scheme not in ("http", "https"):
            raise GrantError("signed URL: expected http:// or https://; ask for a new one")
        if parts.scheme == "http" and not self._plaintext and not is_loopback(host):
            raise ConfigError(
                f"signed URL: expected TLS (https://) to {host}, got plain text, which anybody on "
                "the way can read and alter; have the coordinator's store.site_url use https, or "
                'say broker.transport = "plaintext"'
            )
        return f"{host}:{port or (443 if parts.scheme == 'https' else 80)}"

    def _fetch(self, url: str, where: str, part: _Part) -> None:
        """Bring the rest into ``part``. A try that brings much starts the count again."""
        failed, most = 0, part.size
        while True:
            try:
                self._fetch_once(url, where, part)
            except StoreUnavailableError:
                failed = 1 if part.size - most >= PROGRESS_BYTES else failed + 1
                if failed >= TRIES:
                    raise
                most = max(most, part.size)
                pause(failed)
            else:
                return

    def _fetch_once(self, url: str, where: str, part: _Part) -> None:
        headers: dict[str, str] = {}
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
            if part.etag:
                headers["If-Range"] = part.etag
        with self._answer("GET", url, where, headers=headers) as response:
            if _continues(response, part):
                self._receive(response, where, part)
                return
            if response.status == 200:
                part.clear()
                self._receive(response, where, part)
                return
        if not part.size:
            raise StoreError(f"{where}: expected the whole object, got HTTP {response.status}")
        part.clear()  # another object, or shorter than what is here
        self._fetch_once(url, where, part)

    def _receive(self, response: BaseHTTPResponse, where: str, part: _Part) -> None:
        part.etag = response.headers.get("ETag")
        announced = content_length(response)
        if announced is not None:
            self._check_size(part.size + announced, where)
        for chunk in response.stream(READ_BYTES, decode_content=False):
            self._check_size(part.size + len(chunk), where)
            part.write(chunk)

    def _check_size(self, size: int, where: str) -> None:
        if size > self._max_bytes:
            raise IntegrityError(
                f"{where}: expected at most {self._max_bytes} bytes, got {size} or more; "
                "ask for a new URL"
            )

    @contextlib.contextmanager
    def _answer(
        self,
        method: str,
        url: str,
        where: str,
        *,
        headers: dict[str, str],
        body: Iterator[bytes] | None = None,
    ) -> Iterator[BaseHTTPResponse]:
        """The answer to one request, 200, 204, 206 or 416; its body may fail to arrive."""
        headers = {"Accept-Encoding": "identity", **headers}
        try:
            response = self._pool.urlopen(
                method, url, headers=headers, body=body, preload_content=False, redirect=False
            )
            try:
                if response.status == 412:
                    raise ObjectExistsError(f"{where}: the object is there already")
                if response.status not in (200, 204, 206, 416):
                    raise _refusal(response, where)
                yield response
            finally:
                response.close()
                response.release_conn()
        except (HTTPError, HTTPException) as error:
            raise network_error(error, where, "broker.ca_file") from None


class _Part:
    """The bytes of a download so far: on disk, counted and hashed. ``etag``: of their object."""

    def __init__(self, path: Path) -> None:
        self.etag: str | None = None
        self.size = 0
        self._path = path
        self._hash = hashlib.sha256()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._file: BinaryIO = os.fdopen(handle, "r+b")
        for chunk in read_chunks(self._file):
            self._count(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk fails the flush too, after the write did
            self._file.close()
        wrong = kind is not None and issubclass(kind, IntegrityError | ObjectMissingError)
        if wrong or not self.size:
            self._path.unlink(missing_ok=True)

    @property
    def digest(self) -> str:
        """Hex sha256 of what is there."""
        return self._hash.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Add to the end."""
        self._file.write(chunk)
        self._count(chunk)

    def clear(self) -> None:
        """Begin again."""
        self._file.seek(0)
        self._file.truncate()
        self.etag, self.size, self._hash = None, 0, hashlib.sha256()

    def finish(self, path: Path) -> None:
        """Move to ``path``, read-only."""
        os.fchmod(self._file.fileno(), 0o444)
        self._file.close()  # where a file system of another machine tells that it is full
        self._path.replace(path)

    def _count(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._hash.update(chunk)


def _prefixes(store: str) -> tuple[str, ...]:
    """How a URL of this server begins: its default port may be written or not."""
    plain = store.lower().rstrip("/")
    port = ":443" if plain.startswith("https:") else ":80"
    bare = plain.removesuffix(port)
    has_port = bare == plain and plain.rpartition(":")[2].isdigit()
    return (f"{plain}/",) if has_port else (f"{bare}/", f"{bare}{port}/")


def _slice(file: BinaryIO, path: Path, length: int) -> Iterator[bytes]:
    left = length
    while left:
        chunk = file.read(min(SEND_BYTES, left))
        if not chunk:
            raise IntegrityError(f"{path}: became {left} bytes shorter while it was sent")
        left -= len(chunk)
        yield chunk


def _continues(response: BaseHTTPResponse, part: _Part) -> bool:
    """Whether the answer is the rest of what is here, as far as the server tells."""
    same = part.etag is None or response.headers.get("ETag") == part.etag
    return same and range_start(response) == part.size


def _refusal(response: BaseHTTPResponse, where: str) -> StoreError:
    """The error that a status means. Takes the S3 code from the body, and no other text."""
    status = response.status
    code = error_code(response.read(_ERROR_BYTES, decode_content=False), status)
    if status in (401, 403) or code in _GRANT_CODES:
        return GrantError(
            f"{where}: the signed URL was refused ({code}): expired, altered, or for another "
            "object or method; ask for a new one"
        )
    if status == 404:
        return ObjectMissingError(f"{where}: there is no such object ({code})")
    if status == _STORAGE_FULL:
        return StoreUnavailableError(f"{where}: the store is full ({code}); free space there")
    if status in RETRY_STATUSES or code in _PASSING_CODES:
        return StoreUnavailableError(f"{where}: cannot serve now ({code}); try again later")
    if 300 <= status < 400:
        return StoreError(
            f"{where}: expected the object, got a redirect (HTTP {status}), which is not followed; "
            "store.site_url must be the store itself"
        )
    return StoreError(f"{where}: expected the object, got {code} (HTTP {status})")
