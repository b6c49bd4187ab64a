"""A network that goes wrong on command: a TCP proxy whose faults are switched while it runs.

It stands in front of one server (a broker or a store). Every switch works on the connections that
exist and on those that come, until ``heal``. ``fired`` counts what a fault really hit, so that a
test can assert that it happened and did not merely get ordered.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_BYTES = 65536
BUFFER_BYTES = 131072  # in the kernel, by side: what a slow line holds back stays with its sender
METHODS = (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE")
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(eq=False)
class _Link:
    """One connection: the client's side and the server's side."""

    near: socket.socket
    far: socket.socket
    limits: dict[str, int] = field(default_factory=dict)  # direction: bytes until it is cut
    silent: set[socket.socket] = field(default_factory=set)  # sides that are told nothing any more
    ended: bool = False


class FaultProxy:
    """Passes TCP on to ``target`` (host, port), or does not. Use it as a context, or ``close`` it.

    Directions are ``up`` (what the client sends) and ``down`` (what the server answers).
    ``fired``: faults by name: ``delay`` and ``throttle`` by block, ``black_hole`` by block held
    back and by connection accepted in vain, ``unavailable`` by request, the others by connection.
    ``passed``: bytes by direction. ``heads``: the first bytes of each HTTP request, in order.
    ``on_fault(name)`` is called from the proxy's threads each time that something fired.
    """

    def __init__(self, target: tuple[str, int], host: str = "127.0.0.1", port: int = 0) -> None:
        self.fired: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()
        self.heads: list[str] = []
        self.on_fault: Callable[[str], object] = lambda _: None
        self._target = target
        self._changed = threading.Condition()
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self._limits: list[tuple[str, int]] = []
        self._closed = False
        self._calm()
        self.host, self.port = host, port
        self._listener: socket.socket | None = self._listen()

    @property
    def address(self) -> str:
        """``HOST:PORT`` for those who are to go through it."""
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Where an HTTP client finds it."""
        return f"http://{self.address}"

    @property
    def connections(self) -> int:
        """How many are open now."""
        return len(self._links)

    # The switches.

    def delay(self, seconds: float) -> None:
        """Hold back each block of at most 64 KiB so long, in both directions."""
        self._set(delay=seconds)

    def throttle(self, bytes_per_second: float) -> None:
        """At most so much in each direction of each connection."""
        self._set(rate=bytes_per_second)

    def black_hole(self) -> None:
        """Accept, keep everything open, pass nothing on. After ``heal`` what was held goes on."""
        self._set(black=True)

    def cut_after(self, count: int, connections: int = 1, direction: str = "up") -> None:
        """Reset each of the next connections once it has passed ``count`` bytes in ``direction``.

        Down, the client sees an end instead of a reset, since a reset takes back what was passed.
        """
        with self._changed:
            self._limits += [(direction, count)] * connections

    def flip(self, blocks: int) -> None:
        """Alter a byte in each of the next so many large blocks on the way down, no two alike."""
        self._set(flips=blocks)

    def cut(self) -> int:
        """Reset every connection there is now, on both sides; how many."""
        return self._cut_all("cut")

    def half_open(self, side: str = "server") -> int:
        """Close only the ``side`` (``server`` or ``client``) of every connection there is now.

        The other side is told nothing: what it sends is taken and lost. How many there were.
        """
        with self._changed:
            links = list(self._links)
            for link in links:
                lost, kept = (link.far, link.near) if side == "server" else (link.near, link.far)
                link.silent.add(kept)
                self._fire("half_open")
                _shut(lost)
            self._changed.notify_all()
        return len(links)

    def refuse(self) -> int:
        """Listen no more, reset what there is. The kernel refuses, so only resets are counted."""
        with self._changed:
            listener, self._listener = self._listener, None
        if listener is not None:
            _shut(listener)
            listener.close()
        return self._cut_all("refuse")

    def unavailable(self) -> None:
        """Answer every HTTP request with 503 (plain HTTP only); reset what there is."""
        self._set(unavailable=True)
        self._cut_all("cut")

    def heal(self) -> None:
        """Pass everything on again. What was cut stays cut, what is half open stays so."""
        with self._changed:
            self._limits.clear()
            self._calm()
            listening = self._listener is not None
            self._changed.notify_all()
        if not listening and not self._closed:
            self._listener = self._listen()

    def wait_fired(self, name: str, count: int = 1, seconds: float = 60.0) -> None:
        """Wait until a fault has hit something so often."""
        deadline = time.monotonic() + seconds
        while self.fired[name] < count:
            assert time.monotonic() < deadline, f"{name} hit nothing within {seconds} s"
            time.sleep(0.02)

    def close(self) -> None:
        """End everything."""
        self._closed = True
        self.heal()
        with self._changed:
            listener, self._listener = self._listener, None
        if listener is not None:
            _shut(listener)
            listener.close()
        self._cut_all("closed")
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The threads.

    def _listen(self) -> socket.socket:
        listener = socket.create_server((self.host, self.port), backlog=128)
        self.host, self.port = listener.getsockname()[:2]
        _narrow(listener)  # what it accepts inherits that
        self._start(self._accept, listener)
        return listener

    def _calm(self) -> None:
        self._delay, self._rate, self._black, self._unavailable = 0.0, 0.0, False, False
        self._flips = 0

    def _set(self, **switches: float) -> None:
        with self._changed:
            for name, value in switches.items():
                setattr(self, f"_{name}", value)
            self._changed.notify_all()

    def _fire(self, name: str) -> None:
        self.fired[name] += 1
        self.on_fault(name)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            self._start(self._open, near)

    def _open(self, near: socket.socket) -> None:
        if self._unavailable:
            self._answer_503(near)
            return
        if self._black:
            self._fire("black_hole")
            self._wait_while(lambda: self._black)
        far = socket.socket()
        _narrow(far)
        far.settimeout(30)
        try:
            far.connect(self._target)
        except OSError:
            far.close()
            near.close()
            return
        far.settimeout(None)
        link = _Link(near, far)
        with self._changed:
            if self._closed:
                near.close()
                far.close()
                return
            if self._limits:
                direction, count = self._limits.pop(0)
                link.limits[direction] = count
            self._links.add(link)
        other = threading.Thread(target=self._pump, args=(link, far, near, "down"), daemon=True)
        other.start()
        self._pump(link, near, far, "up")
        other.join()
        with self._changed:
            self._links.discard(link)
        near.close()
        far.close()

    def _pump(
        self, link: _Link, source: socket.socket, sink: socket.socket, direction: str
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(self._block()):
                self._hinder(data)
                if sink in link.silent:
                    return  # what is lost was closed: nothing more comes from there
                if source in link.silent:
                    continue
                self._note_head(direction, data)
                data = self._flipped(direction, data)
                limit = link.limits.get(direction)
                if limit is not None and len(data) >= limit:
                    sink.sendall(data[:limit])
                    self.passed[direction] += limit
                    self._fire("cut_after")
                    self._end(link, reset=direction == "up")
                    return
                sink.sendall(data)
                self.passed[direction] += len(data)
                if limit is not None:
                    link.limits[direction] = limit - len(data)
        if sink not in link.silent and not link.ended:
            _shut(sink, socket.SHUT_WR)

    def _block(self) -> int:
        return max(1, min(BLOCK_BYTES, int(self._rate / 10))) if self._rate else BLOCK_BYTES

    def _hinder(self, data: bytes) -> None:
        """Hold this block back for as long as the switches say."""
        if self._black:
            self._fire("black_hole")
            self._wait_while(lambda: self._black)
        if self._delay:
            self._fire("delay")
            self._wait_while(lambda: self._delay, self._delay)
        if self._rate:
            self._fire("throttle")
            self._wait_while(lambda: self._rate, len(data) / self._rate)

    def _wait_while(self, on: Callable[[], object], seconds: float | None = None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not on(), seconds)

    def _flipped(self, direction: str, data: bytes) -> bytes:
        with self._changed:
            if direction != "down" or not self._flips or len(data) < 4096:
                return data
            self._flips -= 1
        self._fire("flip")
        return data[:-1] + bytes([data[-1] ^ (self.fired["flip"] % 255 + 1)])

    def _note_head(self, direction: str, data: bytes) -> None:
        if direction == "up" and data.split(b" ", 1)[0] in METHODS:
            self.heads.append(data.partition(b"\r\n\r\n")[0].decode("latin-1"))

    def _answer_503(self, near: socket.socket) -> None:
        """Take one whole request, so that the client reads the answer; then 503."""
        with near, contextlib.suppress(OSError, ValueError):
            near.settimeout(30)
            head, received = b"", b""
            while b"\r\n\r\n" not in received:
                if not (data := near.recv(BLOCK_BYTES)):
                    return
                received += data
            head, _, body = received.partition(b"\r\n\r\n")
            self.heads.append(head.decode("latin-1"))
            lines = [line.partition(b":") for line in head.lower().split(b"\r\n")]
            length = next((int(value) for name, _, value in lines if name == b"content-length"), 0)
            left = length - len(body)
            if b"100-continue" in head.lower():
                left = 0
            while left > 0 and (data := near.recv(BLOCK_BYTES)):
                left -= len(data)
            self._fire("unavailable")
            near.sendall(UNAVAILABLE)
            near.shutdown(socket.SHUT_WR)
            while near.recv(BLOCK_BYTES):
                pass

    def _cut_all(self, name: str) -> int:
        with self._changed:
            links = list(self._links)
            for link in links:
                self._fire(name)
                self._end(link, reset=True)
            self._changed.notify_all()
        return len(links)

    @staticmethod
    def _end(link: _Link, *, reset: bool) -> None:
        link.ended = True
        for one in (link.near, link.far):
            with contextlib.suppress(OSError):
                if reset:  # linger 0: closing sends RST, once nobody reads it any more
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    _shut(one, socket.SHUT_RD)
                    one.close()
                else:
                    one.shutdown(socket.SHUT_RDWR)


def _narrow(one: socket.socket) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        one.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def _shut(one: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(how)
