"""``gradualdiff dashboard``: a store's runs as pages, live in a browser."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import DEFAULT_STORE, INTERRUPTED, StoreOption, say
from shared.errors import ConfigError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradualdiff.dashboard.serving import Server
    from gradualdiff.store import Store
    from shared.stores.directory import DirectoryStore

HOST, PORT = "127.0.0.1", 8420


def dashboard(
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but this machine's needs a token.")
    ] = HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any free one.")] = PORT,
    token_file: Annotated[
        Path | None,
        typer.Option(help="The file of a token that a browser must give as the password."),
    ] = None,
) -> None:
    """Show the store's runs in a browser, live: states, curves, rounds, sites, records.

    It reads the store and writes nothing. Ctrl-C ends it, with exit code 130.
    """
    from gradualdiff.store import open_store

    server = open_server(open_store(store), host, port, token_file)
    say(f"dashboard: {server.url} (Ctrl-C ends it)")
    try:
        server.serve()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@contextlib.contextmanager
def shown_meanwhile(objects: DirectoryStore) -> Iterator[None]:
    """The dashboard of a directory, on the usual port or else a free one, as long as this lasts."""
    from gradualdiff.store import Store

    store = Store(objects.root, objects)
    try:
        server = open_server(store, HOST, PORT)
    except ConfigError:
        server = open_server(store, HOST, 0)
    thread = threading.Thread(target=server.serve, name="dashboard", daemon=True)
    thread.start()
    say(f"dashboard: {server.url} while this runs", stderr=True)
    try:
        yield
    finally:
        server.stop()
        thread.join()
        say(f"to look on: gradualdiff dashboard --store {objects.root}", stderr=True)


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
