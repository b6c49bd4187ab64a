"""A site's ``Transfer`` over HTTP: signed URLs only, no key. And the HTTP rules of every store.

Invariants:

- A file is at its path whole and checked, or not there. What has come so far lies beside it as
  ``.<name>.part`` and is continued after a cut or a restart; only the sha256 decides what it is.
- Every request has a time limit, and trouble that may pass is tried again a few times.
- No redirect is followed: a signed URL is good for one host.
- No answer is without an end: its lines, its body and what may be tried again are bounded.
- No error repeats a URL: its signature is a key. urllib3's own texts do, so none is passed on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import ssl
import time
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import TYPE_CHECKING, Any, BinaryIO, Self
from urllib.parse import urlsplit

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
)
from urllib3.exceptions import SSLError as HTTPSError

from shared.credentials import is_loopback
from shared.disk.durable_files import file_errors, make_directories, read_chunks
from shared.disk.files import READ_BYTES, sync_path
from shared.errors import (
    ConfigError,
    GrantError,
    IntegrityError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
)
from shared.stores.port import read_again

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from urllib3 import BaseHTTPResponse

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
TRIES = 5
MAX_BYTES = 64 * 1024**3
RETRY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

# A plain socket must take each piece within CONNECT_SECONDS: 64 KiB goes over any line.
_SEND_BYTES = 64 * 1024
# A try that brings less than this counts as failed, however often it is made.
PROGRESS_BYTES = 1024 * 1024
_ERROR_BYTES = 64 * 1024
# Of an answer that is read at once: a page of a listing, a record, an error.
WHOLE_BYTES = 64 * 1024 * 1024
_LINE_BYTES = 256 * 1024
_STORAGE_FULL = 507

_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/(?:[0-9]{1,18}|\*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
)
# A bad signature, wherever the server puts it. Other 400s are not about the URL.
_GRANT_CODES = frozenset(
    {"AuthorizationQueryParametersError", "AuthorizationHeaderMalformed", "ExpiredToken"}
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

        Raises IntegrityError if the file is shorter, GrantError, StoreUnavailableError.
        """
        where = self._place(url)
        with file_errors(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if start < 0 or length < 0 or start + length > size:
                raise IntegrityError(
                    f"{path}: expected {length} bytes from {start}, but the file has {size}"
                )
            for left in reversed(range(TRIES)):
                file.seek(start)
                try:
                    headers = {"Content-Length": str(length)}
                    body = _slice(file, path, length)
                    with self._answer("PUT", url, where, headers=headers, body=body):
                        pass
                except StoreUnavailableError:
                    if not left:
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
        """Move to ``path``, read-only, all of it on disk."""
        self._file.flush()
        os.fchmod(self._file.fileno(), 0o444)
        os.fsync(self._file.fileno())
        self._path.replace(path)
        sync_path(path.parent)

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
        chunk = file.read(min(_SEND_BYTES, left))
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


# HTTP, for this and for the coordinator's view of the store ----------


class _Lines(io.BufferedReader):
    """What comes from a server; the lines between two reads of a body are bounded together.

    Without that, ``100 Continue`` and trailers may come for ever.
    """

    _seen = 0

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        self._seen += len(line)
        if self._seen > _LINE_BYTES:
            raise HTTPException("too many lines")
        return line

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:  # a chunk of a negative size, too
            raise HTTPException("no length")
        self._seen = 0
        return super().read(size)


class _Answer(HTTPResponse):
    """An answer whose lines, and whose body where it is read at once or an error, have an end."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.fp = _Lines(self.fp.detach())
        self._taken = 0

    def read(self, amt: int | None = None) -> bytes:
        data = super().read(WHOLE_BYTES + 1 if amt is None else amt)
        self._taken += len(data)
        if self._taken > WHOLE_BYTES and (amt is None or self.status >= 300):
            raise HTTPException("too long")
        if amt is None:
            self.close()  # an answer without a length holds its socket until then
            if self.length:
                raise IncompleteRead(data, self.length)
        return data


class _Connection(urllib3.connection.HTTPConnection):
    """Sends large bodies in pieces: the time limit is for each, not for the whole body.

    sendall() of a plain socket counts its timeout from the first byte to the last.
    """

    response_class = _Answer

    def send(self, data: Any) -> None:
        if not isinstance(data, bytes):
            super().send(data)
            return
        view = memoryview(data)
        for start in range(0, len(view), _SEND_BYTES):
            super().send(view[start : start + _SEND_BYTES])


class _SecureConnection(urllib3.connection.HTTPSConnection):
    response_class = _Answer


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Pools(urllib3.PoolManager):
    def urlopen(  # type: ignore[override]  # PoolManager's own differs from its base, too
        self, method: str, url: str, redirect: bool = True, **settings: Any
    ) -> BaseHTTPResponse:
        """Nothing is unpacked: a few bytes may become any number."""
        return super().urlopen(method, url, redirect, decode_content=False, **settings)


def http_pool(ca_file: Path | None, setting: str, retries: urllib3.Retry) -> urllib3.PoolManager:
    """Connections with time limits; certificates are checked against ``ca_file`` or the system's.

    Raises ConfigError naming ``setting`` if ``ca_file`` cannot be read or holds no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        reason = "no certificate in it" if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(
            f"{setting}: expected a PEM file with certificates at {ca_file}, got: {reason}; "
            "fix the path"
        ) from None
    pool = _Pools(
        ssl_context=context,
        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        retries=retries,
        maxsize=10,
    )
    pool.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
    return pool


def pause(failed: int) -> None:
    """Wait before another try: up to 0.3 s after the first failure, then twice as long each."""
    time.sleep(random.uniform(0.5, 1) * 0.3 * 2 ** (failed - 1))  # noqa: S311 - only spreads load


def content_length(response: BaseHTTPResponse) -> int | None:
    """The number of bytes that an answer says it has and is held to; None if there is none."""
    found = _LENGTH.fullmatch(response.headers.get("Content-Length", ""))
    return int(found[0]) if found and "Transfer-Encoding" not in response.headers else None


def range_start(response: BaseHTTPResponse) -> int | None:
    """From which byte of its object an answer is a part; None if it is none."""
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return int(found[1]) if found and response.status == 206 else None


def error_code(body: bytes, status: int) -> str:
    """The S3 error code in a refusal's body, or ``HTTP <status>`` where there is none."""
    found = _CODE.search(body)
    return found[1].decode() if found else f"HTTP {status}"


def network_error(error: Exception, where: str, ca_setting: str) -> StoreError:
    """What a failed request means: StoreUnavailableError, or StoreError for a wrong certificate.

    ``error`` is urllib3's or http.client's; its text is not used, since it may hold the URL.
    """
    if isinstance(error, MaxRetryError) and error.reason is not None:
        error = error.reason
    if isinstance(error, HTTPSError):
        return _tls_error(error, where, ca_setting)
    return StoreUnavailableError(f"{where}: {_cause(error)}; try again once it answers")


def _cause(error: Exception) -> str:
    if isinstance(error, NameResolutionError):
        return "the host name is not known"
    inner = error.__cause__ or next(
        (arg for arg in reversed(error.args) if isinstance(arg, Exception)), None
    )
    reason = inner.strerror if isinstance(inner, OSError) else None
    if isinstance(error, NewConnectionError):
        return f"no connection ({reason or 'refused or unreachable'})"
    if isinstance(error, ConnectTimeoutError):
        return f"no connection within {CONNECT_SECONDS:.0f} s"
    if isinstance(error, ReadTimeoutError):
        return f"no answer within {READ_SECONDS:.0f} s"
    if isinstance(inner, TimeoutError):
        return f"nothing could be sent for {CONNECT_SECONDS:.0f} s"
    return f"the connection was cut ({reason or type(inner or error).__name__})"


def _tls_error(error: HTTPSError, where: str, ca_setting: str) -> StoreError:
    inner = next((arg for arg in error.args if isinstance(arg, ssl.SSLError)), None)
    if isinstance(inner, ssl.SSLCertVerificationError):
        return StoreError(
            f"{where}: the server's certificate is refused: {inner.verify_message}; renew it, or "
            f"name its authority in {ca_setting}"
        )
    reason = (inner.reason if inner is not None else None) or "unknown"
    if any(text in reason for text in _NOT_TLS):
        return StoreError(
            f"{where}: expected TLS, got something else ({reason}); use the port that speaks "
            "https, or an http:// address"
        )
    if isinstance(inner, ssl.SSLEOFError | ssl.SSLZeroReturnError) or inner is None:
        return StoreUnavailableError(f"{where}: the connection was cut (TLS); try again")
    return StoreError(f"{where}: TLS failed ({reason}); check the server's TLS and {ca_setting}")
