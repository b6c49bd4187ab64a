"""Faults of the servers: killed and started on the same data, cut, wiped and restored."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.error
from typing import TYPE_CHECKING

from tests.chaos.names import SITES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.chaos.schedule import Fault
    from tests.chaos.stand import Stand

RESTORE_SECONDS = 60.0
BROKER, STORE = threading.Lock(), threading.Lock()  # one fault of a server at a time


def kill_broker(stand: Stand, fault: Fault) -> str | None:
    """SIGKILL of the node; it comes back on its data."""
    with alone(BROKER) as free:
        if not free:
            return None
        stand.rabbit.kill()
        time.sleep(fault.seconds)
        stand.rabbit.start()
        return "broker"


def kill_store(stand: Stand, fault: Fault) -> str | None:
    """SIGKILL of the store; it comes back on its data."""
    with alone(STORE) as free:
        if not free:
            return None
        stand.weed.kill()
        time.sleep(fault.seconds)
        stand.weed.start()
        return "store"


def kill_both(stand: Stand, fault: Fault) -> str | None:
    """A power cut in the machine room; the store is back first."""
    with alone(BROKER) as broker, alone(STORE) as store:
        if not (broker and store):
            return None
        stand.rabbit.kill()
        stand.weed.kill()
        time.sleep(fault.seconds)
        stand.weed.start()
        stand.rabbit.start()
        return "broker and store"


def cut_site(stand: Stand, fault: Fault) -> str | None:
    """The broker closes a site's connections."""
    return _cut(stand, fault.choice(SITES))


def cut_coordinators(stand: Stand, fault: Fault) -> str | None:
    """The broker closes the connections of both coordinators."""
    del fault
    return _cut(stand, "coordinator")


def wipe(stand: Stand, fault: Fault) -> str | None:
    """The broker forgets everything; a person makes the virtual host anew and restores accounts."""
    with alone(BROKER) as free:
        run = stand.run
        if not free or run is None:
            return None
        began = stand.now
        stand.rabbit.delete_vhost(stand.vhost)
        for site in SITES:
            stand.rabbit.api("DELETE", f"users/{site}")
        gone = [_is_gone(lambda: stand.rabbit.api("GET", f"vhosts/{stand.vhost}"))]
        gone += [_is_gone(lambda s=site: stand.rabbit.api("GET", f"users/{s}")) for site in SITES]
        time.sleep(fault.seconds)
        stand.make_vhost()
        deadline = time.monotonic() + RESTORE_SECONDS
        words = ("sites", "restore", "--federation", str(stand.federation(run)))
        while (done := stand.command(*words)).returncode:  # the store may be away meanwhile
            assert time.monotonic() < deadline, f"not restored: {done.stderr}"
            time.sleep(1.0)
        stand.wipes.append((began, stand.now))
        return "broker" if all(gone) else None


def _cut(stand: Stand, account: str) -> str | None:
    with alone(BROKER) as free:
        if not free:
            return None
        cut = stand.rabbit.cut(account, stand.vhost)
        return f"{account}, {cut} connections" if cut else None


@contextlib.contextmanager
def alone(lock: threading.Lock) -> Iterator[bool]:
    """Whether the server is ours alone inside; no waiting for who has it."""
    free = lock.acquire(blocking=False)
    try:
        yield free
    finally:
        if free:
            lock.release()


def _is_gone(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except urllib.error.HTTPError as error:
        return error.code == 404
    return False
