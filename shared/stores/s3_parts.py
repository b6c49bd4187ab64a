"""Objects made in parts on an S3 server, and the trial whether sites may create objects by URLs.

The SDK has no public call for either: its own uploads in parts are whole files, unconditional.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from shared.errors import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
)
from shared.stores.http import error_code
from shared.stores.keys import check_key, is_key
from shared.stores.port import Part, PartUpload
from shared.stores.s3_signing import bind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import urllib3
    from minio import Minio

    from shared.stores.s3_errors import S3Errors

PART_BYTES = 16 * 1024 * 1024  # S3 takes no part below 5 MiB but the last
WHOLE_BYTES = PART_BYTES
_CREATE = {"If-None-Match": "*"}
_CHANGED = frozenset({"InvalidPart", "InvalidPartOrder", "EntityTooSmall"})
_PASSED_BY = frozenset({"PreconditionFailed", "ObjectAlreadyExists"})


class S3Parts:
    """The ``PartUploads`` port. ``sign``: a PUT of a key with these questions and length."""

    def __init__(
        self,
        client: Minio,
        pool: urllib3.PoolManager,
        bucket: str,
        errors: S3Errors,
        secret_key: str,
        sign: Callable[[str, dict[str, str], float, int], str],
    ) -> None:
        self._client = client
        self._pool = pool
        self._bucket = bucket
        self._errors = errors
        self._secret_key = secret_key
        self._sign = sign

    @property
    def whole_bytes(self) -> int:
        """16 MiB."""
        return WHOLE_BYTES

    @property
    def part_bytes(self) -> int:
        """16 MiB."""
        return PART_BYTES

    def begin(self, key: str) -> PartUpload:
        """Begin one more upload of this object."""
        check_key(key)
        found = self._ask("POST", key, {"uploads": ""}).findtext("{*}UploadId")
        if not found:
            raise self._errors.foreign(key, "no UploadId")
        return PartUpload(key, found)

    def under_way(self, prefix: str) -> list[PartUpload]:
        """The uploads of keys that start with ``prefix``, in key order; a whole key is one."""
        found: set[PartUpload] = set()
        markers: dict[str, str] = {}
        while True:
            page = self._ask("GET", "", {"uploads": "", "prefix": prefix, **markers})
            for item in page.iterfind("{*}Upload"):
                key, upload = item.findtext("{*}Key") or "", item.findtext("{*}UploadId") or ""
                if key.startswith(prefix) and is_key(key) and upload:
                    found.add(PartUpload(key, upload))
            after = {
                "key-marker": page.findtext("{*}NextKeyMarker") or "",
                "upload-id-marker": page.findtext("{*}NextUploadIdMarker") or "",
            }
            if page.findtext("{*}IsTruncated") != "true":
                return sorted(found, key=lambda one: (one.key, one.id))
            if (after["key-marker"], after["upload-id-marker"]) <= tuple(markers.values()):
                raise self._errors.foreign(f"bucket {self._bucket}", "a listing without an end")
            markers = after

    def arrived(self, upload: PartUpload) -> dict[int, Part]:
        """The parts that are there, by number; none of an upload that is over."""
        # SeaweedFS may tell both of a part that was sent twice: the newest counts, of one second
        # the larger.
        found: dict[int, tuple[str, int, str]] = {}
        marker = 0
        while True:
            query = {"uploadId": upload.id, "part-number-marker": str(marker)}
            try:
                page = self._ask("GET", upload.key, query)
            except ObjectMissingError:
                return {}
            with self._errors.translated(upload.key):
                for item in page.iterfind("{*}Part"):
                    number = int(item.findtext("{*}PartNumber") or "")
                    size = int(item.findtext("{*}Size") or "")
                    etag = (item.findtext("{*}ETag") or "").strip('"')
                    told = (item.findtext("{*}LastModified") or "", size, etag)
                    found[number] = max(told, found.get(number, told))
            last = max(found, default=0)
            if page.findtext("{*}IsTruncated") != "true":
                return {number: Part(size, etag) for number, (_, size, etag) in found.items()}
            if last <= marker:
                raise self._errors.foreign(upload.key, "a listing without an end")
            marker = last

    def sign(self, upload: PartUpload, number: int, expires_at: float, length: int) -> str:
        """A URL that writes this part, of exactly ``length`` bytes, until ``expires_at``."""
        query = {"partNumber": str(number), "uploadId": upload.id}
        return self._sign(upload.key, query, expires_at, length)

    def complete(self, upload: PartUpload, parts: Mapping[int, Part]) -> None:
        """Make the object of these parts, if nothing is at its key."""
        root = ET.Element("CompleteMultipartUpload")
        for number in sorted(parts):
            part = ET.SubElement(root, "Part")
            ET.SubElement(part, "PartNumber").text = str(number)
            ET.SubElement(part, "ETag").text = f'"{parts[number].etag}"'
        self._ask("POST", upload.key, {"uploadId": upload.id}, ET.tostring(root), _CREATE)

    def abort(self, upload: PartUpload) -> None:
        """Drop it and its parts; one that is over is no error."""
        with contextlib.suppress(ObjectMissingError):
            self._ask("DELETE", upload.key, {"uploadId": upload.id})

    def why_not(self, key: str) -> str:
        """What this server does not do so that a site could create objects by URLs; "": nothing.

        Tried with objects at ``key``, which is to be free, and is afterwards.
        """
        signed = bind(
            self._client.get_presigned_url("PUT", self._bucket, key),
            "PUT",
            {"content-length": "5", "if-none-match": "*"},
            self._secret_key,
        )
        upload = None
        try:
            for status in (200, 412):
                with self._errors.translated(key):
                    answer = self._pool.urlopen("PUT", signed, body=b"probe", headers=_CREATE)
                if answer.status != status:
                    return f"a signed PUT with If-None-Match: * answered HTTP {answer.status}"
            upload = self.begin(key)
            query = {"partNumber": "1", "uploadId": upload.id}
            self._ask("PUT", key, query, b"part")
            if self.under_way(key) != [upload]:
                return "an upload in parts that is under way is not listed"
            self.complete(upload, self.arrived(upload))
        except ObjectExistsError:
            return ""
        except StoreUnavailableError:
            raise
        except StoreError as error:
            return str(error)
        else:
            return "completing an upload in parts replaced an object in spite of If-None-Match: *"
        finally:
            if upload is not None:
                with contextlib.suppress(StoreError):
                    self.abort(upload)
            with self._errors.translated(key):
                self._client.remove_object(self._bucket, key)

    def _ask(
        self,
        method: str,
        key: str,
        query: dict[str, str],
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> ET.Element:
        """What the server answers to a question about ``key``, or about the bucket ("")."""
        what = key or f"bucket {self._bucket}"
        with self._errors.translated(what):
            url = self._url(method, key, query)
            response = self._pool.urlopen(method, url, body=body, headers=dict(headers or {}))
            is_xml = bool(response.data) and response.status == 200
            # As the SDK reads what it asks; expat bounds what entities become.
            root = ET.fromstring(response.data) if is_xml else ET.Element("none")  # noqa: S314
        # Of a long completion S3 says 200 before it knows how it ends.
        if response.status in (200, 204) and root.tag.rpartition("}")[2] != "Error":
            return root
        code = error_code(response.data, response.status)
        if response.status == 412 or code in _PASSED_BY:
            raise ObjectExistsError(f"{what}: already exists")
        if code == "NoSuchUpload":
            raise ObjectMissingError(f"{what}: the upload in parts is over")
        if code in _CHANGED:
            raise ObjectChangedError(f"{what}: a part was written anew meanwhile ({code})")
        status = response.status if response.status >= 300 else 500
        raise self._errors.refusal(code, status, response, what)

    def _url(self, method: str, key: str, query: dict[str, str]) -> str:
        url = self._client.get_presigned_url(
            method,
            self._bucket,
            key or "k",
            extra_query_params=dict(query),
        )
        # The SDK signs no question to a bucket: one to an object in it, shortened, is one.
        return url if key else bind(url.replace("/k?", "/?", 1), method, {}, self._secret_key)
