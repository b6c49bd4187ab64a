"""Faults of the links: each kind of client reaches each server through a proxy of its own."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chaos.schedule import Fault
    from tests.chaos.stand import Stand
    from tests.servers.proxy import FaultProxy

ALL = ("broker of coordinators", "broker of sites", "store of coordinators", "store of sites")
STORES = ("store of coordinators", "store of sites")
_LOCKS: dict[str, threading.Lock] = defaultdict(threading.Lock)


def reset(stand: Stand, fault: Fault) -> str | None:
    """RST on every connection there is."""
    return _on(stand, fault.choice(ALL), "cut", lambda link: link.cut())


def cut_after(stand: Stand, fault: Fault) -> str | None:
    """RST in the middle of the next two connections' bytes, after 100 to 4,100 of them."""
    count = 100 + fault.draw // 7 % 4_000
    direction = ("up", "down")[fault.draw // 5 % 2]

    def do(link: FaultProxy) -> None:
        link.cut_after(count, 2, direction)
        time.sleep(fault.seconds)

    return _on(stand, fault.choice(ALL), "cut_after", do)


def delay(stand: Stand, fault: Fault) -> str | None:
    """A quarter of a second a block."""
    return _for_a_while(stand, fault, ALL, "delay", lambda link: link.delay(0.25))


def throttle(stand: Stand, fault: Fault) -> str | None:
    """4 KiB a second."""
    return _for_a_while(stand, fault, ALL, "throttle", lambda link: link.throttle(4096))


def hole_sites(stand: Stand, fault: Fault) -> str | None:
    """Shorter than the sites' heartbeat of 30 s, so that it may end without a cut."""
    links = ("broker of sites", "store of sites")
    return _for_a_while(stand, fault, links, "black_hole", lambda link: link.black_hole())


def hole_coordinators(stand: Stand, fault: Fault) -> str | None:
    """Shorter and longer than their heartbeat of 5 s."""
    links = ("broker of coordinators", "store of coordinators")
    return _for_a_while(stand, fault, links, "black_hole", lambda link: link.black_hole())


def half_open(stand: Stand, fault: Fault) -> str | None:
    """One side is gone and the other is not told; at the end it meets a reset."""
    side = ("server", "client")[fault.draw // 5 % 2]

    def do(link: FaultProxy) -> None:
        link.half_open(side)
        time.sleep(fault.seconds)
        link.cut()

    return _on(stand, fault.choice(ALL), "half_open", do)


def refuse(stand: Stand, fault: Fault) -> str | None:
    """Connections are reset and refused."""
    return _for_a_while(stand, fault, ALL, "refuse", lambda link: link.refuse())


def unavailable(stand: Stand, fault: Fault) -> str | None:
    """503 for every request."""
    return _for_a_while(stand, fault, STORES, "unavailable", lambda link: link.unavailable())


def _for_a_while(
    stand: Stand,
    fault: Fault,
    links: tuple[str, ...],
    counter: str,
    do: Callable[[FaultProxy], object],
) -> str | None:
    def act(link: FaultProxy) -> None:
        do(link)
        time.sleep(fault.seconds)

    return _on(stand, fault.choice(links), counter, act)


def _on(stand: Stand, name: str, counter: str, do: Callable[[FaultProxy], object]) -> str | None:
    """One fault of a link at a time; what it is called and what it hit, or None for nothing."""
    if not _LOCKS[name].acquire(blocking=False):
        return None
    link = stand.links[name]
    before = link.fired[counter]
    try:
        do(link)
    finally:
        link.heal()
        _LOCKS[name].release()
    hits = link.fired[counter] - before
    return f"{name}, {hits} hits" if hits else None
