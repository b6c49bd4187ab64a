"""An S3 object's bytes, read from where a cut left off."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from minio.error import S3Error

from shared.disk.files import READ_BYTES
from shared.errors import ObjectChangedError, StoreUnavailableError
from shared.stores.http import PROGRESS_BYTES, TRIES, content_length, pause, range_start
from shared.stores.keys import check_key
from shared.stores.port import ObjectInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from minio import Minio
    from urllib3 import BaseHTTPResponse

    from shared.stores.s3_errors import S3Errors


class S3Reader:
    """Reads objects of one bucket."""

    def __init__(self, client: Minio, bucket: str, errors: S3Errors) -> None:
        self._client = client
        self._bucket = bucket
        self._errors = errors

    def read(
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
                with (
                    self._errors.translated(key),
                    self._answer(key, position, info) as (response, told),
                ):
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
            size, etag = content_length(response), etag_of(response)
            if size is None or not etag:
                raise self._errors.foreign(key, "no Content-Length or no ETag")
            if (start or left) and range_start(response) != start:
                raise self._errors.foreign(key, f"other bytes than those from {start}")
            if info is not None and size != left:
                raise self._errors.foreign(key, f"{size} bytes instead of {left}")
            yield response, ObjectInfo(key, size, etag)
        finally:
            response.close()
            response.release_conn()


def etag_of(response: BaseHTTPResponse) -> str:
    """Without its quotes; empty where the answer has none."""
    return response.headers.get("ETag", "").replace('"', "")
