"""``gradualdiff audit``: the log of operators' doings, shown, checked and exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    console,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(
    help="Who did what to sites, runs and queues: list, verify, export.", no_args_is_help=True
)
FileOption = Annotated[
    Path | None,
    typer.Option("--file", help="An exported file instead of a store."),
]


@app.command("list")
def list_(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Every deed in order: when, who, what, to what, and why. It checks no link between them."""
    from coordinator.audit_log import read_entries
    from coordinator.liveness import moment

    entries = list(read_entries(_raw(store, None)))
    if as_json:
        print_json(entries)
        return
    columns = ("number", "when", "who", "what", "about", "why", "signed")
    rows = [
        (e.number, moment(e.time), e.by, e.what, e.about, e.why, "yes" if e.signed_by else "no")
        for e in entries
    ]
    print_table("What operators did", columns, rows)


@app.command()
def verify(
    file: FileOption = None,
    head: Annotated[
        str | None,
        typer.Option("--head", help="sha256 of an entry that must be there: an earlier head."),
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            "--key", help="A public key; each entry must be signed by one of those given."
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Check that no entry was altered, swapped or taken out. Exit code 21 names the first.

    Entries that were cut off at the end show only against a head that was noted before (--head).
    """
    from coordinator.audit_log import walk
    from shared.trust.keys import PublicKey

    trusted = [PublicKey(text) for text in keys] if keys else None
    found = walk(_raw(store, file), trusted=trusted, head=head)
    if as_json:
        print_json(found)
        return
    console().print(
        f"{found.entries} entries, {found.signed} of them signed, each in its place; head sha256 "
        f"{found.head or 'none'}",
        soft_wrap=True,
        highlight=False,
    )


@app.command()
def export(
    to: Annotated[
        Path | None, typer.Option("--to", help="The file to write (default: print them).")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write every entry as a line of JSON: the very bytes that the next one names the sha256 of.

    An entry that is damaged is written too, on one line; verify says which it is.
    """
    lines = [data.replace(b"\n", b" ") + b"\n" for _, data in _raw(store, None)]
    if to is None:
        sys.stdout.buffer.write(b"".join(lines))
        sys.stdout.buffer.flush()
        return
    to.write_bytes(b"".join(lines))
    console().print(f"wrote {len(lines)} entries to {to}", markup=False, soft_wrap=True)


def _raw(store: Path, file: Path | None) -> Iterator[tuple[str, bytes]]:
    from coordinator.audit_log import raw_entries
    from gradualdiff.store import open_store
    from shared.topology import audit_key

    if file is None:
        return raw_entries(open_store(store).objects)
    lines = file.read_bytes().split(b"\n")[:-1]
    return ((audit_key(number), line) for number, line in enumerate(lines, 1))
