"""A store that answers wrong on purpose: every read has an end, and ends in an error of the tree.

What a site asks by signed URLs and what a coordinator asks with its keys, over real sockets.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import resource
import socketserver
import ssl
import threading
from functools import partial
from itertools import cycle

import pytest

from shared.errors import GradualDiffError, StoreError
from shared.stores import transfer
from shared.stores.port import Part, PartUpload
from shared.stores.s3 import S3Store
from shared.stores.transfer import HttpTransfer
from tests.servers.faults import make_certificate

OK = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nLast-Modified: Fri, 27 Nov 2026 20:00:00 GMT\r\n'
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\n"
LISTING = (
    b"<ListBucketResult><Name>bucket</Name><IsTruncated>true</IsTruncated>"
    b"<NextContinuationToken>t</NextContinuationToken><Contents><Key>runs/a</Key><Size>1</Size>"
    b"<ETag>e</ETag><LastModified>2026-11-27T20:00:00.000Z</LastModified></Contents>"
    b"</ListBucketResult>"
)
# The beginning of an answer, and what follows without end.
ENDLESS = {
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "headers": (OK, b"X: y\r\n"),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n"),
    "body": (OK + b"\r\n", bytes(100_000)),
    "chunks": (CHUNKED, b"10000\r\n" + bytes(65536) + b"\r\n"),
    "busy": (BUSY + b"\r\n", bytes(100_000)),
    "refused": (b"HTTP/1.1 400 No\r\nConnection: close\r\n\r\n", bytes(100_000)),
}
LENGTHS = {
    "superscript": b"\xb2",
    "of 5,000 digits": b"9" * 5000,
    "of an exabyte": b"1" + b"0" * 18,
    "negative": b"-5",
    "of two": b"4, 5",
}
BOMB = "unpacks to a gigabyte"
CUT_SHORT = {
    **{
        f"length {name}": OK + b"Content-Length: " + it + b"\r\n\r\nfour"
        for name, it in LENGTHS.items()
    },
    "chunk of an exabyte": CHUNKED + b"de0b6b3a7640000\r\nfour",
    "chunk of a negative size": CHUNKED + b"-5\r\nfour",
    "range of 5,000 digits": b"HTTP/1.1 206 Part\r\nContent-Range: bytes "
    + b"9" * 5000
    + b"-9/9\r\n\r\nfour",
    "no range": b"HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n",
    "no range, as S3 says it": b"HTTP/1.1 416 No\r\nContent-Type: application/xml\r\n"
    b"Content-Length: 39\r\n\r\n<Error><Code>InvalidRange</Code></Error>",
    "nothing": b"",
    "a later HTTP": b"HTTP/9.9 200 OK\r\n\r\n",
    "folded etag": b'HTTP/1.1 200 OK\r\nETag: "a\r\n b"\r\nContent-Length: 9\r\n\r\nfour',
    "a listing": OK + b"Content-Length: %d\r\n\r\n" % len(LISTING) + LISTING,
    BOMB: OK
    + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    % len(bomb := gzip.compress(gzip.compress(bytes(1 << 20)) * 1024))
    + bomb,
}


QUESTIONS = ["download", "continued", "upload", "get", "fetch_file", "spool", "sha256"]
QUESTIONS += ["stat", "list", "create", "put", "begin", "under_way", "arrived", "complete"]


class Hostile(socketserver.ThreadingTCPServer):
    """Answers each request with the next of ``begin``, then sends ``more`` for ever, or closes."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *begin: bytes, more: bytes = b"", certificate=None) -> None:
        self.answers = cycle(begin)
        self.more = more
        self.asked = 0
        self.scheme = "http"
        super().__init__(("127.0.0.1", 0), _Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.scheme = "https"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(socketserver.StreamRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError):
            if not self.rfile.readline():
                return
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            self.rfile.read(length)
            self.server.asked += 1
            self.wfile.write(next(self.server.answers))
            while self.server.more:
                self.wfile.write(self.server.more)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Trouble is tried again without a pause; what is read at once is small."""
    monkeypatch.setattr(transfer, "pause", lambda _failed: None)
    monkeypatch.setattr("shared.stores.s3_reading.pause", lambda _failed: None)
    monkeypatch.setattr("urllib3.Retry.sleep", lambda *_: None)


def put(question, url, site, store, file):
    """One question to the server at ``url``; what came. Raises what comes out of it."""
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(b"whol") if question == "continued" else part.unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    if question == "upload":
        file.write_bytes(b"whole one")
        return site.upload(f"{url}/k", file, 0, 9)
    if question in ("download", "continued"):
        return site.download(f"{url}/k", file, hashlib.sha256(b"whole one").hexdigest())
    questions = {
        "fetch_file": lambda: store.fetch_file("runs/a", file),
        "spool": lambda: store.spool(["runs/a", "runs/b"], file),
        "list": lambda: list(store.list("runs/")),
        "create": lambda: store.create("runs/a", b"whole one"),
        "put": lambda: store.put("runs/a", b"whole one"),
        "begin": lambda: store.parts.begin("runs/a"),
        "under_way": lambda: store.parts.under_way("runs/a"),
        "arrived": lambda: store.parts.arrived(PartUpload("runs/a", "u")),
        "complete": lambda: store.parts.complete(PartUpload("runs/a", "u"), {1: Part(9, "e")}),
    }
    return questions.get(question, lambda: getattr(store, question)("runs/a"))()


def ask(url: str, how: str, folder) -> object:
    """One question of a site or of a coordinator."""
    site = HttpTransfer(max_bytes=50_000_000)
    return put(how, url, site, S3Store(url, "bucket", "access", "secretsecret"), folder / "file")


def answered(server: Hostile, how: str, folder) -> None:
    """Only an error of the tree comes out, and memory does not grow by what is sent."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with server, contextlib.suppress(GradualDiffError):
        ask(server.url, how, folder)
    assert server.asked
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 * 1024, f"{grown} KiB more"


@pytest.mark.parametrize("how", QUESTIONS)
@pytest.mark.parametrize("name", ENDLESS)
def test_an_answer_without_an_end_is_left(name, how, tmp_path):
    """Lines, bodies and errors; each would hold a site or the coordinator for ever."""
    begin, more = ENDLESS[name]
    answered(Hostile(begin, more=more), how, tmp_path)


@pytest.mark.parametrize("how", QUESTIONS)
@pytest.mark.parametrize("name", CUT_SHORT)
def test_an_answer_that_is_none_is_refused(name, how, tmp_path):
    """Lengths, ranges and chunks that cannot be, and what unpacks without end."""
    answered(Hostile(CUT_SHORT[name]), how, tmp_path)


@pytest.mark.parametrize("name", [name for name in CUT_SHORT if name not in ("a listing", BOMB)])
def test_an_answer_that_is_none_is_no_object(name):
    """A read at the coordinator: a 416 is no empty object, and what was cut is no whole one."""
    with Hostile(CUT_SHORT[name]) as server, pytest.raises(StoreError):
        S3Store(server.url, "bucket", "access", "secretsecret").get("runs/a")


PART = (
    b'HTTP/1.1 206 Part\r\nETag: "e"\r\nContent-Length: %d\r\nContent-Range: bytes %d-8/9\r\n\r\n'
)
WHOLE = OK + b"Content-Length: 9\r\n\r\n"


@pytest.mark.parametrize(
    "rest",
    [WHOLE + b"whole one", PART % (9, 0) + b"whole one", PART % (1, 4) + b"e", WHOLE + b" one "],
)
def test_the_rest_of_a_read_is_the_rest(rest):
    """After a cut: the whole once more, another part, fewer bytes than are left."""
    with Hostile(WHOLE + b"whol", rest) as server, pytest.raises(StoreError):
        S3Store(server.url, "bucket", "access", "secretsecret").get("runs/a")


def test_a_read_that_was_cut_ends_whole():
    """The same server, honest: what is asserted above is not that every cut is an error."""
    with Hostile(WHOLE + b"whol", PART % (5, 4) + b"e one") as server:
        assert S3Store(server.url, "bucket", "access", "secretsecret").get("runs/a") == b"whole one"


def test_a_listing_that_tells_the_same_page_for_ever_is_left():
    """Its order shows it."""
    page = OK + b"Content-Length: %d\r\n\r\n" % len(LISTING) + LISTING
    with Hostile(page) as server, pytest.raises(StoreError, match="out of order"):
        list(S3Store(server.url, "bucket", "access", "secretsecret").list("runs/"))


@pytest.mark.parametrize("how", ["download", "get"])
def test_the_same_bounds_hold_over_tls(how, tmp_path):
    """The answer's class is that of every connection."""
    certificate = make_certificate(tmp_path, 10)
    begin, more = ENDLESS["continue"]
    with Hostile(begin, more=more, certificate=certificate) as server:
        if how == "get":
            read = S3Store(server.url, "bucket", "access", "secret", ca_file=certificate[0]).get
        else:
            site = HttpTransfer(ca_file=certificate[0])
            read = partial(site.download, path=tmp_path / "out", sha256="")
        with pytest.raises(StoreError):
            read("k" if how == "get" else f"{server.url}/k")
        assert server.asked
