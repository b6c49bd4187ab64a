"""Faults of our own processes: killed and started again, frozen and woken up."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chaos.names import COORDINATORS, LOST, SITES, TRACE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chaos.schedule import Fault
    from tests.chaos.stand import Stand

LATE_SECONDS = 6.0  # to wait for a training that ends
ACTIVE_SECONDS = 3.0  # to wait until one of the coordinators is the active one


def kill_active(stand: Stand, fault: Fault) -> str | None:
    """The coordinator that decides."""
    return _kill(stand, _active(stand), fault)


def kill_standby(stand: Stand, fault: Fault) -> str | None:
    """The coordinator that waits."""
    return _kill(stand, _standby(stand), fault)


def kill_site(stand: Stand, fault: Fault) -> str | None:
    """A site, whatever it is at."""
    return _kill(stand, fault.choice(SITES), fault)


def kill_late(stand: Stand, fault: Fault) -> str | None:
    """A site, as soon as it has written down that a delta is made: before, in or after its commit.

    The drawn number decides how long after, up to 4 ms.
    """
    name = fault.choice(stand.run.sites if stand.run else SITES)
    trace = stand.kit(name) / TRACE
    before = trace.stat().st_size if trace.exists() else 0
    deadline = time.monotonic() + LATE_SECONDS
    while time.monotonic() < deadline:
        if trace.exists() and b" trained " in trace.read_bytes()[before:]:
            time.sleep(fault.draw % 5 / 1000)
            return _kill(stand, name, fault)
        time.sleep(0.001)
    return None


def lose(stand: Stand, fault: Fault) -> str | None:
    """A site and its disk: what it trained, fetched and left out of its deltas is gone."""
    name = fault.choice(SITES)
    kit = stand.kit(name)
    workspace = kit / "workspace"

    def wipe() -> bool:
        held = any(path.is_file() for path in workspace.rglob("*"))
        shutil.rmtree(workspace, ignore_errors=True)
        with (kit / TRACE).open("a") as trace:
            trace.write(f"0 {LOST} - 0\n")
        return held and not workspace.exists()

    return _kill(stand, name, fault, wipe)


def freeze_active(stand: Stand, fault: Fault) -> str | None:
    """Longer than a takeover takes: it wakes up as one that somebody replaced."""
    return _freeze(stand, _active(stand), fault)


def freeze_standby(stand: Stand, fault: Fault) -> str | None:
    """The coordinator that waits."""
    return _freeze(stand, _standby(stand), fault)


def freeze_site(stand: Stand, fault: Fault) -> str | None:
    """For less than its heartbeat."""
    return _freeze(stand, fault.choice(SITES), fault)


def _active(stand: Stand) -> str | None:
    deadline = time.monotonic() + ACTIVE_SECONDS
    while (name := stand.active()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return name


def _standby(stand: Stand) -> str | None:
    active = _active(stand)
    return next((name for name in COORDINATORS if active and name != active), None)


def _kill(
    stand: Stand, name: str | None, fault: Fault, then: Callable[[], bool] = lambda: True
) -> str | None:
    """``then``: done while it is down; whether it did what it is for."""
    if name is None:
        return None
    with stand.hold(name) as slot:
        if slot is None or not stand.kill(slot):
            return None
        done = then()
        time.sleep(fault.seconds)
        stand.start_again(slot)
    return name if done else None


def _freeze(stand: Stand, name: str | None, fault: Fault) -> str | None:
    if name is None:
        return None
    with stand.hold(name) as slot:
        if slot is None or slot.process is None:
            return None
        pid = slot.process.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(0.05)
            stopped = _state(pid) == "T"
            other = next((o for o in COORDINATORS if o != name), name)
            before = stand.log(other).count("coordinator.active")
            time.sleep(fault.seconds)
        finally:
            os.kill(pid, signal.SIGCONT)
        replaced = name in COORDINATORS and stand.log(other).count("coordinator.active") > before
    if not stopped:
        return None
    return f"{name}, replaced" if replaced else name


def _state(pid: int) -> str:
    """The kernel's letter for a process: T is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
