"""``gradualdiff runs export``: an adapter for others, or a whole model with it merged in."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from gradualdiff.cli.deeds import NO_REASON, ReasonOption, on_record
from gradualdiff.cli.output import (
    DEFAULT_STORE,
    JsonOption,
    RunArgument,
    StoreOption,
    console,
    print_json,
    say,
)
from shared.base_model import hub_id
from shared.errors import ConfigError, StoreError


def export(
    run: RunArgument,
    to: Annotated[Path, typer.Option("--to", help="The new directory to write.")],
    round_number: Annotated[
        int | None, typer.Option("--round", help="Which round's adapter (default: the last).")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The round with the lowest held-out loss of all sites.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Under which name others load the base model, such as its hub id."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a whole model with the adapter merged into it.")
    ] = False,
    reason: ReasonOption = NO_REASON,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Write a PEFT adapter directory with a model card that says how to load it.

    The tokenizer comes along where the base model is on this machine. --merge needs the base model
    and the participant's packages.
    """
    from gradualdiff.store import open_store

    if best and round_number is not None:
        raise ConfigError("--best and --round are both given; give one of them")
    opened = open_store(store).run(run)
    adapter = opened.adapter(opened.best_round if best else round_number)
    with _on_record(store, f"{run}@{adapter.round}", reason):
        saved = adapter.save(to, base=base, merge=merge)
    if as_json:
        print_json({"round": saved.round, "sha": saved.sha, "path": saved.path})
        return
    what = "a model with the adapter" if merge else "the adapter"
    best_of = ", the one with the lowest held-out loss" if best else ""
    lines = [f"Wrote {to}: {what} of round {saved.round}{best_of}, sha256 {saved.sha}"]
    if not saved.tokenizer:
        model = opened.config.base.model
        lines.append(f"The tokenizer is left out: the base model {model} is not on this machine")
    if hub_id(saved.base) is None:
        lines.append(
            f"It names its base model as {saved.base}; for others name it by --base HUB_ID"
        )
    lines.append(f"{to / 'README.md'} says how to load it")
    for line in lines:
        console().print(line, soft_wrap=True)


def _on_record(store: Path, about: str, reason: str) -> contextlib.AbstractContextManager[object]:
    """A copy that nobody can write into is exported from all the same; that is said."""
    from gradualdiff.store import open_store

    with contextlib.ExitStack() as stack:
        try:
            objects = open_store(store, writable=True).objects
            stack.enter_context(on_record(objects, store, "run.export", about, reason))
        except StoreError as error:
            say(f"this export is not on the log of operators' doings: {error}", stderr=True)
        return stack.pop_all()
