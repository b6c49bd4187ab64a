"""What the minio SDK raises and an S3 server answers, as errors of our tree.

They name the endpoint and the setting to fix; no key, no URL and no text of the server.
"""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import TYPE_CHECKING
from xml.etree.ElementTree import ParseError

from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import HTTPError

from shared.errors import ObjectMissingError, StoreError, StoreUnavailableError
from shared.stores.http import RETRY_STATUSES, network_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from urllib3 import BaseHTTPResponse

_FULL = frozenset({"XMinioStorageFull", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"})
_BUSY = frozenset(
    {"ConditionalRequestConflict", "NoSuchUpload", "OperationAborted", "RequestTimeout", "SlowDown"}
)
_WRONG_REGION = frozenset({"AuthorizationHeaderMalformed", "PermanentRedirect", "Redirect"})


class S3Errors:
    """Of one bucket at one endpoint, ``where`` (host and port)."""

    def __init__(self, where: str, bucket: str) -> None:
        self._where = where
        self._bucket = bucket

    @contextlib.contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """Turn what the SDK and urllib3 raise into our tree. ``what``: key or bucket."""
        try:
            yield
        except S3Error as error:
            raise self.refusal(
                error.code or "no code", error.response.status, error.response, what
            ) from None
        except ServerError as error:
            raise self.refusal(f"HTTP {error.status_code}", error.status_code, None, what) from None
        except (HTTPError, HTTPException) as error:
            raise network_error(error, f"{what}: store at {self._where}", "store.ca_file") from None
        except (MinioException, ParseError, ValueError) as error:
            status = _status(error)
            if status >= 500:
                raise self.refusal(f"HTTP {status}", status, None, what) from None
            kind = "no XML" if isinstance(error, InvalidResponseError) else type(error).__name__
            raise self.foreign(what, kind) from None

    def refusal(
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

    def unconditional(self, what: str) -> StoreError:
        """The error for a server that lets two writers both win."""
        return StoreError(
            f"store at {self._where}: expected it to honour If-None-Match: * on a write, but "
            f"{what}; without that two coordinators can overwrite each other: use a server or "
            "version that has conditional writes (SeaweedFS, MinIO, AWS S3)"
        )

    def foreign(self, what: str, found: str) -> StoreError:
        """The error for an answer that no S3 server gives."""
        return StoreError(
            f"{what}: expected the answer of an S3 server at {self._where}, got something else "
            f"({found}); check store.url"
        )


def _status(error: Exception) -> int:
    """The HTTP status of an answer that is not S3's, from a balancer in front of it say; 0: none.

    The SDK keeps it in the text alone.
    """
    found = re.search(r"Response code: (\d{3})", str(error))
    return int(found[1]) if isinstance(error, InvalidResponseError) and found else 0


def _skew(response: BaseHTTPResponse | None) -> str:
    """How far apart the clocks are, if the answer tells the server's."""
    try:
        there = parsedate_to_datetime(response.headers["Date"]) if response is not None else None
    except (KeyError, TypeError, ValueError):
        there = None
    if there is None:
        return ""
    return f" (there {there:%Y-%m-%d %H:%M:%S} UTC, here {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC)"
