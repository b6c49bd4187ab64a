"""How the command line speaks: tables for people, JSON for programs, one line for an error."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gradualdiff.units import octets
from shared.errors import ConfigError
from shared.printing import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

    from coordinator.runs.wire import Wire
    from shared.errors import GradualDiffError

_NUMBER = re.compile(r"-|-?[0-9]+(\.[0-9]+)?")
PIPE_COLUMNS = 1000
Number = TypeVar("Number", int | None, float | None)
DEFAULT_STORE = Path("gradualdiff-demo/store")
DEFAULT_SITE = Path("site.toml")
INTERRUPTED = 130  # the exit code of what Ctrl-C ends

SiteOption = Annotated[
    Path, typer.Option("--site", envvar="GRADUALDIFF_SITE", help="The site's site.toml.")
]

StoreOption = Annotated[
    Path,
    typer.Option(
        "--store",
        "--federation",
        envvar="GRADUALDIFF_STORE",
        help="The store's directory, or a federation.toml that names the store.",
    ),
]
FederationOption = Annotated[
    Path,
    typer.Option("--federation", help="The federation.toml, with its tables broker and store."),
]
DEFAULT_FEDERATION = Path("federation.toml")
RunArgument = Annotated[str, typer.Argument(help="The run's name.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="A setting to use instead of the file's; may be given several times.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def toml_value(value: object) -> str:
    """One value on one line, for what is made to be read: tomli-w writes no comments beside it."""
    import tomli_w

    if isinstance(value, dict):
        inner = ", ".join(f"{name} = {toml_value(entry)}" for name, entry in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def set_words(sets: Sequence[str] | None) -> list[str]:
    """The words of a command that give these settings again."""
    return [word for setting in sets or () for word in ("--set", setting)]


def finite(param: typer.CallbackParam, value: float | None) -> float | None:
    """The callback of every option that takes a number with a point. Raises ConfigError."""
    return _within(param, value, "a finite number", value is None or math.isfinite(value))


def positive(param: typer.CallbackParam, value: float | None) -> float | None:
    """The same, of a number that must be above 0. Raises ConfigError."""
    return _within(param, finite(param, value), "a number above 0", value is None or value > 0)


def at_least(least: int) -> Callable[[typer.CallbackParam, int | None], int | None]:
    """The callback of an option that takes a whole number, so many or more."""

    def check(param: typer.CallbackParam, value: int | None) -> int | None:
        return _within(param, value, f"{least} or more", value is None or value >= least)

    return check


def _within(param: typer.CallbackParam, value: Number, expected: str, holds: bool) -> Number:
    if not holds:
        name = f"--{(param.name or '').replace('_', '-')}"
        raise ConfigError(f"{name}: expected {expected}, got {value}; give another")
    return value


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where tables and progress go. In a file or a pipe nothing is folded at a terminal's width.

    Whatever is printed there is made printable: a site's words must not move the cursor or set the
    clipboard of whoever looks at them.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Printable(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                is_safe = segment.control or segment.text.isprintable()
                text = segment.text if is_safe else printable(segment.text, lines=True)
                yield segment if is_safe else Segment(text, segment.style)

    wide = not (stderr or sys.stdout.isatty() or "COLUMNS" in os.environ)
    return Printable(stderr=stderr, quiet=quiet, width=PIPE_COLUMNS if wide else None)


def say(text: str, *, stderr: bool = False) -> None:
    """Print text that is not folded, for other programs or beside a table; made printable too."""
    print(printable(text, lines=True), file=sys.stderr if stderr else sys.stdout, flush=True)


def print_json(value: Any) -> None:
    """Print dataclasses, lists and dicts of them as JSON."""
    print(json.dumps(_plain(value), indent=2, sort_keys=True))  # noqa: T201 - this is the output


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; floats with four decimals, None as a dash. Text left, numbers right."""
    out = console()
    out.print(make_title(title), soft_wrap=True)
    out.print(make_table(columns, rows))


def make_title(title: str) -> Text:
    """A table's title. It is a line of its own, since a title in a table wraps at its width."""
    from rich.text import Text

    return Text(printable(title), style="table.title")


def make_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """The table of :func:`print_table`. No cell is taken for rich's mark-up: ``[a-z]`` stays."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        header_style="bold",
        box=None,
        padding=(0, 2, 0, 0) if len(columns) < 9 else (0, 1, 0, 0),
    )
    texts = [[cell(value) for value in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = all(_NUMBER.fullmatch(row[index]) for row in texts)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in texts:
        table.add_row(*(Text(text) for text in row))
    return table


def cell(value: object) -> str:
    """One value as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return printable(str(value))


def agree(question: str, *, yes: bool) -> None:
    """Go on if ``yes``, or if a person says so; ends the command on a no.

    Raises ConfigError when nobody is there to ask.
    """
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        if sys.stdin.isatty():
            raise
        raise ConfigError(
            "--yes: expected this option, or an answer to the question above, got neither"
        ) from None
    if not agreed:
        raise typer.Abort


def round_line(number: int, rounds: int, held_out: float | None, trained: float | None) -> str:
    """A closed round in one line, with its losses (nats per token) as far as they are known."""
    told = [f"round {number} of {rounds} is closed"]
    if held_out is not None:
        told.append(f"held-out loss before it {held_out:.4f}")
    if trained is not None:
        told.append(f"training loss at its end {trained:.4f}")
    return ", ".join(told)


def wire_facts(wire: Wire | None) -> list[tuple[str, str]]:
    """What a run cost on the wire, as lines of a table; none where no site told."""
    if wire is None:
        return []
    total = wire.total
    objects = f"{octets(total.down)} down, {octets(total.up)} up"
    messages = f"{octets(total.messages_down)} down, {octets(total.messages_up)} up"
    facts = [
        ("bytes in all", f"{objects}; messages {messages}"),
        ("a site's round", f"{octets(wire.down)} down, {octets(wire.up)} up"),
    ]
    if total.setup:
        facts.append(("once, to get ready", f"{octets(total.setup)} down"))
    for name, whole, times in (
        ("fp16 base model", wire.base, wire.to_base),
        ("fp32 adapter", wire.adapter, wire.to_adapter),
    ):
        if times is not None:
            told = f"{octets(whole)}: {times[0]:,.1f} times a round down, {times[1]:,.1f} times up"
            facts.append((name, told))
    return facts


def complain(error: GradualDiffError) -> int:
    """Print an error of the tree to stderr; the exit code."""
    say(f"error: {error}", stderr=True)
    return error.exit_code


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return str(value) if isinstance(value, Path) else value
