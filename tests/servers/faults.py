"""Small servers that go wrong on purpose: a proxy that cuts, and one that answers as told."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class CuttingProxy:
    """Passes TCP on to ``target`` and cuts the connections that it was told to cut.

    ``answers`` and ``requests``: after how many bytes of the next connections' answers or requests
    to cut, one entry a connection, None for never. ``heads``: the first bytes of every request.
    ``cuts``: how many connections were cut, so that a test knows that its fault happened.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self.answers: list[int | None] = []
        self.requests: list[int | None] = []
        self.heads: list[str] = []
        self.cuts = 0
        self.on_cut: Callable[[], object] = lambda: None
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._sockets: list[socket.socket] = []
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            _shut(one)
        for thread in self._threads:
            thread.join(10)
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            self._sockets += [near, far]
            answer = self.answers.pop(0) if self.answers else None
            request = self.requests.pop(0) if self.requests else None
            for source, sink, limit, head in (
                (near, far, request, True),
                (far, near, answer, False),
            ):
                thread = threading.Thread(
                    target=self._pump, args=(source, sink, limit), kwargs={"head": head}
                )
                thread.daemon = True
                self._threads.append(thread)
                thread.start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, limit: int | None, *, head: bool
    ) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if head and data.split(b" ", 1)[0] in (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE"):
                    self.heads.append(data.partition(b"\r\n\r\n")[0].decode("latin-1"))
                if limit is not None and passed + len(data) > limit:
                    sink.sendall(data[: limit - passed])
                    self.cuts += 1
                    self.on_cut()
                    if head:  # not for answers: a reset takes back what was passed on
                        _reset(source)
                    break
                sink.sendall(data)
                passed += len(data)
        _shut(source)
        _shut(sink)


def _reset(near: socket.socket) -> None:
    """Close at once: a mere shutdown lets the other side send on until the buffers are full."""
    _shut(near)
    with contextlib.suppress(OSError):
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near.close()


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


class ToldServer:
    """Answers each request by ``answer(handler)``. ``seen``: method and path of each request."""

    def __init__(
        self,
        answer: Callable[[BaseHTTPRequestHandler], None],
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self.seen: list[tuple[str, str]] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                seen.append((self.command, self.path))
                with contextlib.suppress(ConnectionError):
                    answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one  # noqa: N815

            def log_message(self, *_args) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_args) -> None:
                pass  # a refused handshake is what some tests are about

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._scheme = "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    """One whole answer."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def make_certificate(folder: Path, days: int) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1 and its key; a negative ``days`` is over already."""
    certificate, key, request = (folder / f"{name}{days}.pem" for name in ("cert", "key", "req"))
    names = folder / "names"
    names.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n", encoding="ascii")
    for words in (
        f"req -new -newkey rsa:2048 -nodes -subj /CN=localhost -keyout {key} -out {request}",
        f"x509 -req -in {request} -signkey {key} -out {certificate} -days {days} -extfile {names}",
    ):
        subprocess.run(["openssl", *words.split()], check=True, capture_output=True)
    return certificate, key
