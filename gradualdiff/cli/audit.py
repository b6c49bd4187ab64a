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
    say,
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
    """Every deed in order: when, who, what, to what, why, how it ended. It checks no link."""
    from coordinator.audit_log import outcomes, read_entries
    from coordinator.liveness import moment

    entries = list(read_entries(_raw(store, None)))
    ended = outcomes(entries)
    deeds = [entry for entry in entries if entry.ended is None]
    if as_json:
        print_json([{**e.model_dump(mode="json"), "exit_code": ended[e.number]} for e in deeds])
        return
    columns = ("number", "when", "who", "what", "about", "why", "outcome", "signed")
    rows = [
        (
            e.number,
            moment(e.time),
            e.by,
            e.what,
            e.about,
            e.why,
            _outcome(ended[e.number]),
            "yes" if e.signed_by else "no",
        )
        for e in deeds
    ]
    print_table("What operators did", columns, rows)
    unsigned = sum(entry.signed_by is None for entry in deeds)
    if unsigned:
        say(
            f"{unsigned} of {len(deeds)} are not signed: a store named by its folder names no key; "
            "give --store federation.toml, with [trust], to sign"
        )


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


def _outcome(exit_code: int | None) -> str:
    match exit_code:
        case None:
            return "not known"
        case 0:
            return "done"
        case _:
            return f"failed ({exit_code})"


def _raw(store: Path, file: Path | None) -> Iterator[tuple[str, bytes]]:
    from coordinator.audit_log import raw_entries
    from gradualdiff.store import open_store
    from shared.topology import audit_key

    if file is None:
        return raw_entries(open_store(store).objects)
    lines = file.read_bytes().split(b"\n")[:-1]
    return ((audit_key(number), line) for number, line in enumerate(lines, 1))
