"""``gradualdiff runs export``: an adapter for others, or a whole model with it merged in."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import (
    DEFAULT_STORE,
    JsonOption,
    RunArgument,
    StoreOption,
    console,
    print_json,
)
from shared.base_model import TOKENIZER_FILES, hub_id, located
from shared.errors import ConfigError, MissingPackageError

if TYPE_CHECKING:
    from coordinator.runs.inspection import History


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
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Write a PEFT adapter directory with a model card that says how to load it.

    The tokenizer comes along where the base model is on this machine. --merge needs the base model
    and the participant's packages.
    """
    from coordinator.runs.export import best_round, export_adapter, new_folder
    from coordinator.runs.inspection import History
    from gradualdiff.store import open_store

    if best and round_number is not None:
        raise ConfigError("--best and --round are both given; give one of them")
    objects = open_store(store).objects
    history = History(objects, run)
    number = best_round(history) if best else round_number
    given = history.config.base.model
    found = located(given, store.resolve().parent)
    folder = _kept_folder(found)
    if folder is None and base is not None:
        found = located(base, Path.cwd())
    name = base or hub_id(found) or (given if folder is None else str(folder))
    if merge:
        with tempfile.TemporaryDirectory(prefix="gradualdiff-export-") as scratch:
            new_folder(to)
            source = Path(scratch) / "adapter"
            exported = export_adapter(history, objects, source, number, name, merged=True)
            _merge(history, source, to, found if folder is None else str(folder))
    else:
        exported = export_adapter(history, objects, to, number, name)
        tokenizer = _copy_tokenizer(folder, to)
    if as_json:
        print_json(replace(exported, path=to))
        return
    what = "a model with the adapter" if merge else "the adapter"
    best_of = ", the one with the lowest held-out loss" if best else ""
    say = console()
    say.print(
        f"Wrote {to}: {what} of round {exported.round}{best_of}, sha256 {exported.sha}",
        soft_wrap=True,
    )
    if not merge and not tokenizer:
        say.print(
            f"The tokenizer is left out: the base model {given} is not on this machine",
            soft_wrap=True,
        )
    if hub_id(name) is None:
        say.print(
            f"It names its base model as {name}; for others name it by --base HUB_ID",
            soft_wrap=True,
        )
    say.print(f"{to / 'README.md'} says how to load it", soft_wrap=True)


def _kept_folder(model: str) -> Path | None:
    """The base model's folder on this machine; of a hub id the one in the hub's own cache."""
    folder = Path(model)
    if folder.is_absolute() and folder.is_dir():
        return folder
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):  # it is not there, or no id
        return None


def _copy_tokenizer(base: Path | None, to: Path) -> bool:
    """Whether there was one to copy."""
    found = [] if base is None else [base / n for n in TOKENIZER_FILES if (base / n).is_file()]
    for path in found:
        shutil.copyfile(path, to / path.name)
    return bool(found)


def _merge(history: History, adapter: Path, to: Path, base: str) -> None:
    try:
        from participant.model import save_merged
    except ImportError as error:
        raise MissingPackageError(
            f"--merge needs the package {error.name}; "
            "run: pip install 'gradualdiff-fed[participant]'"
        ) from None
    section = history.config.base.model_copy(update={"model": base})
    save_merged(section, next(iter(history.members.values())).fingerprint, adapter, to)
    shutil.copyfile(adapter / "README.md", to / "README.md")
