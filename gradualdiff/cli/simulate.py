"""``gradualdiff simulate``: a whole federation in this process, from its TOML files."""

from __future__ import annotations

import contextlib
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import JsonOption, SetOption, console, print_json, set_words
from shared.errors import InterruptedRunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shared.config import FederationConfig


def simulate(
    federation: Annotated[Path, typer.Argument(help="The run's federation.toml.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume a run that the store holds.")
    ] = False,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a whole federation in this process: all roles, one base model, no server.

    The sites are the files that simulation.sites in it names. Ctrl-C loses nothing, a kill at
    most what was trained since the last checkpoint; --resume continues.
    """
    from gradualdiff.cli.progress import make_display, showing
    from gradualdiff.simulation import simulate as run_to_its_end
    from shared.config import load_federation
    from shared.log import configure

    configure(level="warning")
    config = load_federation(federation, sets or ())
    folder = federation.resolve().parent
    again = shlex.join(["gradualdiff", "simulate", str(federation), "--resume", *set_words(sets)])
    with make_display(quiet=as_json) as display, stopping(config, again) as should_stop:
        run = run_to_its_end(
            config, folder, on_event=showing(display), should_stop=should_stop, resume=resume
        )
    summary = run.summary
    if as_json:
        print_json(summary)
        return
    loss = "" if summary.held_out_nll is None else f"held-out loss {summary.held_out_nll:.4f}, "
    line = f"run {run.name} is finished: {loss}adapter sha256 {summary.adapter_sha}"
    console().print(line, soft_wrap=True)
    option = f"--store {folder / config.store.directory}"
    console().print(f"next: gradualdiff rounds list {run.name} {option}", soft_wrap=True)
    console().print(f"      gradualdiff runs verify {run.name} {option}", soft_wrap=True)


@contextlib.contextmanager
def stopping(config: FederationConfig, again: str) -> Iterator[Callable[[], bool]]:
    """As :func:`stop_on_signal`; a run that was stopped names ``again``, which resumes it."""
    try:
        with stop_on_signal() as should_stop:
            yield should_stop
    except InterruptedRunError:
        raise InterruptedRunError(
            f"run {config.run.name} was stopped; everything finished is saved. "
            f"Resume it with: {again}"
        ) from None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ask to stop on the first SIGINT or SIGTERM; the second one ends the process at once."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        del frame
        nonlocal stopped
        stopped = True
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
