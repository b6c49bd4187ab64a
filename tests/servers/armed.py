"""``python -m tests.servers.armed MODULE ...``: run a module that signals itself at named points.

``ARMED`` (environment) lists ``POINT=SIGNAL`` by blanks, in the order in which they are to be met:
at the first hit of the first one the process sends itself that signal, then waits for the next.
Each that fired is a line in the file ``ARMED_FIRED``.

``SETTINGS`` lists ``MODULE:NAME=NUMBER`` by blanks: constants of the product that a test shortens.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

from shared import failpoints


def main() -> None:
    """Arm, then be that module."""
    for setting in os.environ.get("SETTINGS", "").split():
        place, _, value = setting.partition("=")
        name, _, constant = place.partition(":")
        module = importlib.import_module(name)
        before = getattr(module, constant)  # a constant that is not there is a mistake of the test
        setattr(module, constant, type(before)(value))
    order = [item.split("=") for item in os.environ.get("ARMED", "").split()]
    fired = Path(os.environ["ARMED_FIRED"])
    lock = threading.Lock()

    def hook(name: str) -> None:
        with lock:
            if not order or order[0][0] != name:
                return
            _, word = order.pop(0)
            with fired.open("a") as file:
                file.write(f"{name} {word}\n")
        os.kill(os.getpid(), getattr(signal, word))

    failpoints.arm(hook)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
