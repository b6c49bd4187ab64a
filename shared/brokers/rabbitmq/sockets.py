"""pika's loop, and the sockets that it opens on it: closed when the connection is given up.

pika closes a socket when its connection ends in good order. One that is given up (no answer in
time, a loop that stops while a handshake is under way) stays open until the collector comes by.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any, Self

from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


class Sockets(SelectorIOServicesAdapter):  # type: ignore[misc]
    """The services that a ``SelectConnection`` runs on. ``close`` leaves no socket open."""

    def __init__(self) -> None:
        self.loop = IOLoop()
        super().__init__(self.loop)
        self._opened: list[socket.socket] = []

    def connect_socket(
        self, sock: socket.socket, resolved_addr: Any, on_done: Callable[..., None]
    ) -> Any:
        """As pika does, but remembered."""
        self._opened.append(sock)
        return super().connect_socket(sock, resolved_addr, on_done)

    def create_streaming_connection(
        self,
        protocol_factory: Callable[..., Any],
        sock: socket.socket,
        on_done: Callable[..., None],
        ssl_context: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
    ) -> Any:
        """As pika does; the socket that TLS makes of ``sock`` is remembered too."""
        if ssl_context is not None:
            ssl_context.sslsocket_class = remembered_in(self._opened)
        return super().create_streaming_connection(
            protocol_factory, sock, on_done, ssl_context, server_hostname
        )

    def close(self) -> None:
        """Call it when the loop has ended."""
        self.loop.close()
        for opened in self._opened:
            opened.close()


def remembered_in(made: list[socket.socket]) -> type[ssl.SSLSocket]:
    """The class of one connection's TLS sockets, each of which is appended to ``made``."""

    class Remembered(ssl.SSLSocket):
        def __new__(cls, *_args: object, **_settings: object) -> Self:
            new = super().__new__(cls)
            made.append(new)
            return new

    return Remembered
