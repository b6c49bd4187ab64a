"""A dashboard in a thread, as the command starts it, and what is asked of it over HTTP."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradualdiff.dashboard.serving import Server
from gradualdiff.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str


@contextmanager
def serving(objects, folder, port=0, **options) -> Iterator[str]:
    """The address of a dashboard over these objects."""
    server = Server(Store(folder, objects), "127.0.0.1", port, **options)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server.url.rstrip("/")
    finally:
        server.stop()
        thread.join()


def ask(url, method="GET", **headers) -> Answer:
    """One request; an error is an answer too."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return Answer(answer.status, dict(answer.headers), answer.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read().decode())
