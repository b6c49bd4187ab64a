"""``python -m tests.participant.killed TRACE SIGNAL POINT NTH ARGUMENTS...``: a process that ends.

Runs ``gradualdiff ARGUMENTS`` and sends itself SIGNAL (a name) at the NTH passing of POINT (``-``:
never). Every point that is passed, and the signal, is a line of TRACE. Time, as checkpoints see it,
passes by optimiser steps alone, 10 s each: when one is due does not depend on this machine.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from participant import checkpoints
from shared import failpoints

STEP_SECONDS = 10.0


def main() -> None:
    trace, name, point, nth, *arguments = sys.argv[1:]
    passed: list[str] = []

    def note(line: str) -> None:
        with Path(trace).open("a") as file:
            file.write(f"{line}\n")

    def hook(here: str) -> None:
        passed.append(here)
        note(here)
        if here == point and passed.count(here) == int(nth):
            note(name)
            os.kill(os.getpid(), signal.Signals[name])

    clock = SimpleNamespace(monotonic=lambda: STEP_SECONDS * passed.count("training.stepped"))
    checkpoints.time = clock  # type: ignore[attr-defined, assignment]
    failpoints.arm(hook)
    sys.argv[1:] = arguments

    from gradualdiff.cli.main import main as gradualdiff

    gradualdiff()


if __name__ == "__main__":
    main()
