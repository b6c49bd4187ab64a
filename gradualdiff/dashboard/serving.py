"""The dashboard's server: where it listens, and who may ask."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import uvicorn

from gradualdiff.dashboard.application import Dashboard
from gradualdiff.dashboard.read_only import ReadOnly
from shared.credentials import is_loopback
from shared.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from gradualdiff.store import Store

LEAST_TOKEN = 16
STOP_SECONDS = 5  # for what is still being answered; a stream of changes ends at once


class Server:
    """The dashboard of ``store``, bound already. ``url``: its address.

    ``token_file``: of the token that whoever asks must give. Raises ConfigError for another address
    than this machine's own without one, and where nobody can listen there.
    """

    def __init__(self, store: Store, host: str, port: int, token_file: Path | None = None) -> None:
        token = read_token(token_file) if token_file is not None else None
        if token is None and not is_loopback(host):
            raise ConfigError(
                f"--host: expected this machine's own address without --token-file, got {host}; "
                "write a long random word into a file and name it, or leave --host out"
            )
        dashboard = Dashboard(ReadOnly(store.objects), store.path, token)
        self._socket = _bound(host, port)
        number = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{number}/"
        config = uvicorn.Config(
            dashboard.application,
            access_log=False,
            log_config=None,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        self._server = uvicorn.Server(config)
        dashboard.is_stopping = lambda: self._server.should_exit

    def serve(self) -> None:
        """Answer until it is stopped, or the process by a signal."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """End ``serve``, from another thread."""
        self._server.should_exit = True


def read_token(path: Path) -> str:
    """The token in a file. Raises ConfigError where there is none, or one that can be guessed."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"--token-file: expected a file, got {path}: {why}") from None
    if len(token) < LEAST_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(
            f"--token-file: expected one word of at least {LEAST_TOKEN} characters in {path}, got "
            f"another text of {len(token)}; write one: openssl rand -hex 24 > {path}"
        )
    return token


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--host, --port: expected an address to listen on, got {host}:{port}: "
            f"{error.strerror or error}; choose another port, or end who has it"
        ) from None
