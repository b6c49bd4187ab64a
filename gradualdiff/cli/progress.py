"""What a person sees while a federation runs: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from gradualdiff.cli.output import console as make_console
from gradualdiff.cli.output import round_line
from gradualdiff.events import RunMoved, Said, SiteMoved

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from gradualdiff.embedded.display import Display
    from gradualdiff.events import Event
    from participant.learner.port import Progress as Step

WORDS = {
    "load": "loading the model",
    "evaluate": "measuring held-out loss",
    "train": "training",
    "upload": "sending the delta",
}


def make_display(*, quiet: bool = False) -> Display:
    """Bars when stderr is a terminal, else lines; nothing at all with ``quiet``."""
    console = make_console(stderr=True, quiet=quiet)
    return Bars(console) if console.is_terminal else Lines(console)


def showing(display: Display) -> Callable[[Event], None]:
    """What takes a federation's events and shows them."""

    def show(event: Event) -> None:
        match event:
            case SiteMoved():
                display.report(event.site, event.round, event.step)
            case RunMoved():
                display.moved(event)
            case Said():
                display.say(event.text)

    return show


class Bars:
    """One bar for the run, one for the round, one for each participant at work."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def report(self, site: str, round_number: int | None, step: Step) -> None:
        """Move the participant's bar."""
        del round_number
        note = WORDS[step.activity] if step.loss is None else f"loss {step.loss:.3f}"
        self._set(site, f"  {site}", step.done, step.total, note)

    def moved(self, event: RunMoved) -> None:
        """Move the run's and the round's bar."""
        closed, loss = max(event.closed, 0), event.held_out_nll
        note = "" if loss is None else f"held-out loss {loss:.3f} before this round"
        self._set("run", "rounds", closed, event.rounds, note)
        done = event.selected - len(event.waiting_for)
        number = closed if event.round is None else event.round
        self._set("round", f" round {number}", done, max(event.selected, 1), "deltas")

    def converted(self, done: int, total: int) -> None:
        """Move the conversion's bar."""
        self._set("convert", "converting the base model (once)", done, total, "")

    def say(self, text: str) -> None:
        """A line above the bars, which begin anew."""
        self._bars.console.print(text, markup=False)
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()

    def _set(self, key: str, description: str, done: int, total: int, note: str) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(description, total=total, note=note)
        self._bars.update(
            self._tasks[key], description=description, completed=done, total=total, note=note
        )


class Lines:
    """One line whenever a round closes, with its losses."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._closed = -1
        self._trained: dict[str, float] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return

    def report(self, site: str, round_number: int | None, step: Step) -> None:
        """Remember a participant's newest training loss."""
        del round_number
        if step.loss is not None:
            self._trained[site] = step.loss

    def moved(self, event: RunMoved) -> None:
        """Say which round closed."""
        if event.closed > self._closed:
            self._closed = event.closed
            losses = self._trained.values()
            trained = sum(losses) / len(losses) if losses else None
            line = round_line(self._closed, event.rounds, event.held_out_nll, trained)
            self._say(f"{line}: adapter {(event.adapter_sha or '')[:12]}")
            self._trained.clear()

    def converted(self, done: int, total: int) -> None:
        """Say that the conversion is done."""
        if done == total:
            self._say("the base model is converted")

    def say(self, text: str) -> None:
        """A line; the rounds that follow are another run's."""
        self._closed = -1
        self._say(text)

    def _say(self, text: str) -> None:
        line = f"[{time.monotonic() - self._started:6.1f} s] {text}"
        self._console.print(line, markup=False, soft_wrap=True)
