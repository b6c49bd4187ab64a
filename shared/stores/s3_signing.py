"""Signed URLs that bind headers: AWS Signature Version 4, query form.

The SDK signs the header ``host`` alone, and then a URL for a small object takes one of any size,
and one for a new object replaces what is there.
Source of the formula: Amazon S3's API reference, "Authenticating Requests: Using Query Parameters".
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

SIGNED_HEADERS = "X-Amz-SignedHeaders"


def bind(url: str, method: str, headers: Mapping[str, str], secret_key: str) -> str:
    """The presigned ``url``, signed anew: good for ``method`` with these very headers only.

    ``url`` is one that the SDK signed with the same key: its path is encoded already. ``headers``
    by their names in small letters; ``host`` is bound too.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True))
    del query["X-Amz-Signature"]
    bound = sorted({**headers, "host": parts.netloc}.items())
    query[SIGNED_HEADERS] = ";".join(name for name, _ in bound)
    canonical = _canonical(query)
    request = "\n".join(
        [
            method,
            parts.path,
            canonical,
            *(f"{name}:{value}" for name, value in bound),
            "",
            query[SIGNED_HEADERS],
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


def bound_headers(url: str) -> frozenset[str]:
    """The names of the headers that a signed URL binds; empty for one that is none of S3's."""
    values = dict(parse_qsl(urlsplit(url).query)).get(SIGNED_HEADERS, "")
    return frozenset(values.split(";")) - {""}


def _canonical(query: Mapping[str, str]) -> str:
    pairs = sorted((quote(name, safe="~"), quote(value, safe="~")) for name, value in query.items())
    return "&".join(f"{name}={value}" for name, value in pairs)
