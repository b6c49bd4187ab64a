"""``python -m tests.crash.armed WHAT FILE``: a role's own process that is told where to die.

WHAT is ``coordinator`` or ``participant``, which is the product's command, or ``tiny``, which is a
participant with the trainer of this folder. From the environment: ``CRASH_TRACE`` (a file to which
every point reached is appended with its time), ``CRASH_POINT``, ``CRASH_HIT`` (at which of its hits
to die by SIGKILL, 1 if unset), ``CRASH_PAUSE`` (seconds between the point and the kill in which
other threads go on) and ``CRASH_FAULT`` (for ``tiny``: see the trainer; for ``coordinator``:
``parts``, every delta is uploaded in parts, ``inbox``, the store takes none straight, ``together``,
both sites' deltas are in one batch, or ``late``, it looks at the time often).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from shared import failpoints
from shared.errors import GradualDiffError


@dataclass(frozen=True)
class Orders:
    """Where to trace, and at which hit of which point to die; "" for nowhere."""

    trace: Path
    point: str = ""
    hit: int = 1
    pause: float = 0.0
    fault: str = ""

    @classmethod
    def from_environment(cls) -> Orders:
        """What ``environment`` says."""
        value = os.environ.get
        return cls(
            Path(value("CRASH_TRACE", os.devnull)),
            value("CRASH_POINT", ""),
            int(value("CRASH_HIT", "1")),
            float(value("CRASH_PAUSE", "0")),
            value("CRASH_FAULT", ""),
        )

    @property
    def environment(self) -> dict[str, str]:
        """For a process started as a program."""
        return {
            "CRASH_TRACE": str(self.trace),
            "CRASH_POINT": self.point,
            "CRASH_HIT": str(self.hit),
            "CRASH_PAUSE": str(self.pause),
            "CRASH_FAULT": self.fault,
        }


class Reaper:
    """The hook: one line a point, in one write; at the ordered one the process dies."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._file = os.open(orders.trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.Lock()  # whoever dies says the last word
        self._hits = 0

    def __call__(self, name: str) -> None:
        with self._lock:
            if self._hits == self._orders.hit:
                return  # dying: other threads may go on, but say nothing more
            os.write(self._file, f"{time.time():.6f} {name}\n".encode())
            self._hits += name == self._orders.point
            doomed = self._hits == self._orders.hit
            if doomed and not self._orders.pause:
                os.kill(os.getpid(), signal.SIGKILL)
        if doomed:
            time.sleep(self._orders.pause)
            os.kill(os.getpid(), signal.SIGKILL)


def run(arguments: list[str], orders: Orders) -> None:
    """Arm the points, then be the process that ``arguments`` name."""
    failpoints.arm(Reaper(orders))
    if arguments[0] == "tiny":
        from tests.crash.tiny_trainer import take_part

        try:
            take_part(Path(arguments[1]), orders.fault, orders.trace)
        except GradualDiffError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(error.exit_code)
        return
    from gradualdiff.cli.main import main
    from shared.stores import s3_parts

    if orders.fault == "parts":
        s3_parts.WHOLE_BYTES = 0
    if orders.fault == "inbox":
        s3_parts.S3Parts.why_not = lambda *_: "as was ordered"
    if orders.fault == "together":
        hold_deltas()
    if orders.fault == "late":
        from coordinator import daemon

        daemon.TICK_SECONDS = 0.2
    sys.argv = ["gradualdiff", *arguments]
    main()


def hold_deltas() -> None:
    """Let a delta that is submitted wait, unsettled, until the other site's is there too."""
    from shared.protocol.dispatch import Dispatcher

    take, held = Dispatcher._take, []

    def taken(self, timeout_seconds):
        batch = take(self, timeout_seconds)
        held.extend(item for item in batch if item.name == "DeltaSubmitted")
        batch = [item for item in batch if item.name != "DeltaSubmitted"]
        if len({item.sender for item in held}) == 2:
            batch += held
            held.clear()
        return batch

    Dispatcher._take = taken


def run_forked(arguments: list[str], orders: Orders, log: str) -> None:
    """The same in a fork of a server that has imported everything: a start costs no second."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    run(arguments, orders)


if __name__ == "__main__":
    run(sys.argv[1:], Orders.from_environment())
