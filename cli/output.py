"""How the command line speaks: tables for people, JSON for programs, one line for an error."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from shared.directory_store import DirectoryStore
    from shared.errors import GradualDiffError

DEFAULT_STORE = Path("gradualdiff-demo/store")

StoreOption = Annotated[
    Path,
    typer.Option("--store", envvar="GRADUALDIFF_STORE", help="The store's directory."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def open_store(path: Path) -> DirectoryStore:
    """An existing store. Raises StoreError when there is none at ``path``."""
    from shared.directory_store import DirectoryStore

    return DirectoryStore(path, create=False)


def console() -> Console:
    """Where tables go."""
    from rich.console import Console

    return Console(soft_wrap=False)


def print_json(value: Any) -> None:
    """Print dataclasses, lists and dicts of them as JSON."""
    print(json.dumps(_plain(value), indent=2, sort_keys=True))  # noqa: T201 - this is the output


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; floats with four decimals, None as a dash. Text left, numbers right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        values = [row[index] for row in rows]
        numeric = any(isinstance(v, int | float) for v in values)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    console().print(table)


def cell(value: object) -> str:
    """One value as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return str(value)


def megabytes(count: int) -> str:
    """Bytes as MB (10^6)."""
    return f"{count / 1e6:.1f} MB"


def complain(error: GradualDiffError) -> int:
    """Print an error of the tree to stderr; the exit code."""
    print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is the output
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
