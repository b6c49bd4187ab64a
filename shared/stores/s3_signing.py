"""Signed PUT URLs that bind the length of the body: AWS Signature Version 4, query form.

The SDK signs the header ``host`` alone, and then a URL for a small object takes one of any size.
Source of the formula: Amazon S3's API reference, "Authenticating Requests: Using Query Parameters".
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

SIGNED_HEADERS = "content-length;host"


def bind_length(url: str, length: int, secret_key: str) -> str:
    """The presigned PUT ``url``, signed anew so that it is good for ``length`` bytes only.

    ``url`` is one that the SDK signed with the same key: its path is encoded already.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True))
    del query["X-Amz-Signature"]
    query["X-Amz-SignedHeaders"] = SIGNED_HEADERS
    canonical = _canonical(query)
    request = "\n".join(
        [
            "PUT",
            parts.path,
            canonical,
            f"content-length:{length}",
            f"host:{parts.netloc}",
            "",
            SIGNED_HEADERS,
            "UNSIGNED-PAYLOAD",
        ]
    )
    scope = query["X-Amz-Credential"].split("/", 1)[1]
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", query["X-Amz-Date"], scope, digest])
    key = b"AWS4" + secret_key.encode()
    for part in scope.split("/"):  # date, region, service, "aws4_request"
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    return f"{parts.scheme}://{parts.netloc}{parts.path}?{canonical}&X-Amz-Signature={signature}"


def _canonical(query: Mapping[str, str]) -> str:
    pairs = sorted((quote(name, safe="~"), quote(value, safe="~")) for name, value in query.items())
    return "&".join(f"{name}={value}" for name, value in pairs)
