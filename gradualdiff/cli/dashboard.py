"""``gradualdiff dashboard``: a store's runs as pages, live in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import DEFAULT_STORE, StoreOption, say
from shared.errors import MissingPackageError

if TYPE_CHECKING:
    from gradualdiff.dashboard.serving import Server
    from gradualdiff.store import Store

PORT = 8420


def dashboard(
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but this machine's needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any free one.")] = PORT,
    token_file: Annotated[
        Path | None,
        typer.Option(help="The file of a token that a browser must give as the password."),
    ] = None,
) -> None:
    """Show the store's runs in a browser, live: states, curves, rounds, sites, records.

    It reads the store and writes nothing. Ctrl-C ends it.
    """
    from gradualdiff.store import open_store

    server = open_server(open_store(store), host, port, token_file)
    say(f"dashboard: {server.url} (Ctrl-C ends it)")
    server.serve()


def open_server(store: Store, host: str, port: int, token_file: Path | None = None) -> Server:
    """The server, listening. Raises ConfigError, and MissingPackageError without its packages."""
    try:
        from gradualdiff.dashboard.serving import Server
    except ImportError as error:
        raise MissingPackageError(
            f"the dashboard needs the package {error.name}; "
            "run: pip install 'gradualdiff-fed[dashboard]'"
        ) from None
    return Server(store, host, port, token_file)
