"""HTTP to a store, for a site and for the coordinator: pools, and the bounds on what comes in.

Invariants:

- Every request has a time limit.
- No answer is without an end: its lines, and its body where it is read at once, are bounded.
- No error repeats a URL: its signature is a key. urllib3's own texts do, so none is passed on.
"""

from __future__ import annotations

import io
import re
import ssl
import time
from http.client import HTTPException, HTTPResponse, IncompleteRead
from typing import TYPE_CHECKING, Any

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
)
from urllib3.exceptions import SSLError as HTTPSError

from shared.backoff import pause_after
from shared.errors import ConfigError, StoreError, StoreUnavailableError

if TYPE_CHECKING:
    from pathlib import Path

    from urllib3 import BaseHTTPResponse

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
TRIES = 5
RETRY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

# A plain socket must take each piece within CONNECT_SECONDS: 64 KiB goes over any line.
SEND_BYTES = 64 * 1024
# A try that brings less than this counts as failed, however often it is made.
PROGRESS_BYTES = 1024 * 1024
# Of an answer that is read at once: a page of a listing, a record, an error.
WHOLE_BYTES = 64 * 1024 * 1024
_LINE_BYTES = 256 * 1024

_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/(?:[0-9]{1,18}|\*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
)


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
        for start in range(0, len(view), SEND_BYTES):
            super().send(view[start : start + SEND_BYTES])


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
    """Wait before another try."""
    time.sleep(pause_after(failed, first=0.2))


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
