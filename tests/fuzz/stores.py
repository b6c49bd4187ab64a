"""A store whose answers are damaged, and all that a site and a coordinator ask of one.

An input is the question's number in a byte, then the answers, one for each request and from the
first again. What stands in an answer after EVER is sent over and over.
"""

from __future__ import annotations

import atexit
import hashlib
import resource
from functools import cache
from itertools import chain, cycle, islice, repeat
from typing import TYPE_CHECKING
from unittest import mock

from shared.stores.s3 import S3Store
from shared.stores.transfer import HttpTransfer
from tests.red_team.test_hostile_store import CUT_SHORT, ENDLESS, Hostile, put

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NEXT, EVER = b"\n<next>\n", b"\n<ever>\n"
MOST_REQUESTS = 100
EVER_BYTES = 4 * 1024 * 1024
WHOLE_BYTES = 1024 * 1024  # in place of what is read at once outside
MOST_KIB = 400 * 1024

SHA = hashlib.sha256(b"whole one").hexdigest()
HEAD = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nLast-Modified: Fri, 27 Nov 2026 20:00:00 GMT\r\n'
DONE = HEAD + b"Content-Length: 0\r\n\r\n"
WHOLE = HEAD + b"Content-Length: 9\r\n\r\n"
REST = (
    b'HTTP/1.1 206 Partial Content\r\nETag: "e"\r\nContent-Length: 5\r\n'
    b"Content-Range: bytes 4-8/9\r\n\r\ne one"
)
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nwhol\r\n5\r\ne one\r\n0\r\n\r\n"
XML = b"Content-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s"


def with_xml(head: bytes, body: bytes) -> bytes:
    """An answer with a document."""
    return head + XML % (len(body), body)


def page(key: bytes, *, more: bool) -> bytes:
    """A page of a listing."""
    token = b"<NextContinuationToken>t</NextContinuationToken>" if more else b""
    return with_xml(
        HEAD,
        b"<ListBucketResult><Name>bucket</Name><IsTruncated>%s</IsTruncated>%s<Contents><Key>%s"
        b"</Key><Size>9</Size><ETag>e</ETag><LastModified>2026-11-27T20:00:00.000Z</LastModified>"
        b"</Contents></ListBucketResult>" % (b"true" if more else b"false", token, key),
    )


REFUSED = [
    with_xml(b"HTTP/1.1 %s\r\n" % status, b"<Error><Code>%s</Code></Error>" % code)
    for status, code in (
        (b"403 Forbidden", b"SignatureDoesNotMatch"),
        (b"404 Not Found", b"NoSuchKey"),
        (b"412 Precondition Failed", b"PreconditionFailed"),
        (b"416 Range Not Satisfiable", b"InvalidRange"),
        (b"503 Slow Down", b"SlowDown"),
    )
]
# What is asked, and whole answers to it, each by a server of its own.
READ: list[list[bytes]] = [[WHOLE + b"whole one"], [WHOLE + b"whol", REST]]
QUESTIONS: dict[str, list[list[bytes]]] = {
    "download": [*READ, [CHUNKED]],
    "continued": [[REST], [REFUSED[3], WHOLE + b"whole one"]],
    "upload": [[DONE], [REFUSED[4], DONE]],
    "get": READ,
    "fetch_file": READ,
    "spool": READ[:1],
    "sha256": READ,
    "stat": [[WHOLE]],
    "list": [[page(b"runs/a", more=True), page(b"runs/b", more=False)]],
    "create": [[DONE], [REFUSED[4], DONE]],
    "put": [[DONE]],
    "begin": [[with_xml(HEAD, b"<R><UploadId>u</UploadId></R>")]],
    "under_way": [
        [
            with_xml(
                HEAD,
                b"<R><IsTruncated>true</IsTruncated><NextKeyMarker>runs/a"
                b"</NextKeyMarker><Upload><Key>runs/a</Key><UploadId>u</UploadId></Upload></R>",
            ),
            DONE,
        ]
    ],
    "arrived": [
        [
            with_xml(
                HEAD,
                b"<R><IsTruncated>false</IsTruncated><Part><PartNumber>1"
                b"</PartNumber><Size>9</Size><ETag>e</ETag></Part></R>",
            )
        ]
    ],
    "complete": [[DONE]],
}


def script(question: str, answers: list[bytes]) -> bytes:
    """An input."""
    return bytes([list(QUESTIONS).index(question)]) + NEXT.join(answers)


def scripts() -> list[bytes]:
    """Whole answers, and bad ones that are known, to begin with."""
    whole = [script(question, one) for question, all_ in QUESTIONS.items() for one in all_]
    bad = [*REFUSED, *CUT_SHORT.values(), *(a + EVER + b for a, b in ENDLESS.values())]
    names = list(QUESTIONS)
    return whole + [script(names[n % len(names)], [answer]) for n, answer in enumerate(bad)]


@cache
def opened() -> tuple[Hostile, HttpTransfer, S3Store]:
    """The server, a site's and a coordinator's view of it; as long as the process."""
    server = Hostile(b"")
    server.__enter__()
    atexit.register(server.__exit__)
    site = HttpTransfer(max_bytes=WHOLE_BYTES)
    return server, site, S3Store(server.url, "bucket", "access", "secretsecret")


def ask(question: str, answers: Iterator[bytes], file: Path) -> object:
    """One question to the server that answers so."""
    server, site, store = opened()
    server.answers, server.asked = answers, 0
    return put(question, server.url, site, store, file)


def feed(data: bytes, file: Path) -> None:
    """An answer or an error of the tree, after so many requests and in so much memory."""
    question = list(QUESTIONS)[(data[0] if data else 0) % len(QUESTIONS)]
    answers = []
    for answer in data[1:].split(NEXT):
        begin, _, more = answer.partition(EVER)
        answers.append(begin + more * (EVER_BYTES // max(len(more), 1)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with (
            mock.patch("shared.stores.http.WHOLE_BYTES", WHOLE_BYTES),
            mock.patch("shared.stores.s3.WHOLE_BYTES", WHOLE_BYTES),
            mock.patch("shared.stores.transfer.pause"),
            mock.patch("shared.stores.s3.pause"),
            mock.patch("shared.stores.s3_reading.pause"),
            mock.patch("urllib3.Retry.sleep"),
        ):
            ask(question, chain(islice(cycle(answers), MOST_REQUESTS), repeat(b"")), file)
    finally:
        assert opened()[0].asked <= MOST_REQUESTS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB
