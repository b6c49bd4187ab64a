"""``gradualdiff rounds show --follow``: the round at hand on the screen, again every second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from gradualdiff.cli.output import INTERRUPTED, say
from shared.errors import RunNotFoundError, StoreMissingError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gradualdiff.run import Run

REFRESH_SECONDS = 1.0


def follow(path: Path, run: str, number: int | None, *, as_json: bool) -> None:
    """Show the run's newest round, or round ``number``, until the run is finished or it is closed.

    Waits for a run that has not begun. Raises RunNotFoundError for a round that has not. On Ctrl-C
    the process ends with 130.
    """
    from gradualdiff.cli.follow_screens import make_screen

    screen = make_screen(as_json=as_json)
    try:
        for view in wait_for_run(path, run).follow(number, away=say_away):
            screen.show(view)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    finally:
        screen.close()


def say_away(error: Exception) -> None:
    """Say once that the store cannot be read."""
    say(f"the store is away, trying again: {error}", stderr=True)


def wait_for_run(path: Path, run: str, sleep: Callable[[float], None] = time.sleep) -> Run:
    """The run at ``path`` once it has begun: whoever follows may be there first."""
    from gradualdiff.store import open_store

    told = False
    while True:
        try:
            return open_store(path).run(run)
        except (StoreMissingError, RunNotFoundError) as error:
            if not told:
                say(f"{error}\nwaiting until it begins; Ctrl-C ends", stderr=True)
            told = True
            sleep(REFRESH_SECONDS)
