"""``gradualdiff demo``: a real model, real text, five participants, one command, no server."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import (
    JsonOption,
    SetOption,
    at_least,
    console,
    fixed,
    megabytes,
    positive,
    print_json,
    print_table,
)
from shared.errors import ConfigError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coordinator.runs.inspection import History
    from gradualdiff.cli.progress import Display
    from gradualdiff.demo.data import SiteFile
    from gradualdiff.demo.start import Asked, Place
    from participant.learner.model_pool import ModelPool
    from participant.learner.torch_learner import TorchLearner
    from shared.config import FederationConfig
    from shared.stores.directory import DirectoryStore

PROMPTS = (
    "What do you like to do on a rainy day?",
    "Can you recommend something for dinner?",
    "How was your week?",
)
REPLY_TOKENS = 40


def demo(
    folder: Annotated[
        Path, typer.Option("--dir", help="Where everything of the demo is kept.")
    ] = Path("gradualdiff-demo"),
    model: Annotated[
        str | None, typer.Option(help="A base model of your own: a path or a hub id.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Text of your own: JSONL, CSV or Parquet.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="With --data: the column that tells sites apart.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="With --data: which columns hold the text: prompt=COLUMN,answer=COLUMN."),
    ] = None,
    participants: Annotated[
        int | None, typer.Option(callback=at_least(1), help="How many participants (K): 5.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(callback=at_least(1), help="How many rounds (T): 5.")
    ] = None,
    local_steps: Annotated[
        int | None, typer.Option(callback=at_least(1), help="Optimiser steps a round and site: 4.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(callback=positive, help="AdamW's learning rate: 0.003.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(callback=at_least(0), help="The run's one seed: 1.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The run's name, if not demo-1, demo-2, ...."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin a new run even if the last one is unfinished.")
    ] = False,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="Write model, text and settings, and train nothing."),
    ] = False,
    servers: Annotated[
        Path | None,
        typer.Option(
            help="With --prepare: a TOML with the tables broker and store, to run over them."
        ),
    ] = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """A complete federation on this machine: five participants fine-tune one real model.

    An interrupted demo resumes where it was when it is started again, and needs no option then but
    --dir: model, text and settings are those that it began with.
    """
    from coordinator.runs.inspection import History
    from gradualdiff.cli.progress import make_display
    from gradualdiff.cli.simulate import load_learners, make_pool, run_here
    from gradualdiff.demo.start import Asked, command, find_place, leaving_nothing
    from shared.base_model import located
    from shared.config import load_federation
    from shared.disk.locks import held
    from shared.stores.directory import DirectoryStore

    numbers = {
        "participants": participants,
        "rounds": rounds,
        "local_steps": local_steps,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    asked = Asked(
        folder=folder,
        name=name,
        fresh=fresh,
        model=located(model, Path.cwd()) if model else None,
        numbers={key: value for key, value in numbers.items() if value is not None},
        split=_split(data, group, columns),
        sets=tuple(sets or ()),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(leaving_nothing(folder))
        _configure_log(folder)
        store = DirectoryStore(folder / "store")
        stack.enter_context(held(folder / ".demo.lock", f"the demo in {folder}"))
        display = stack.enter_context(make_display(quiet=as_json))
        place = find_place(asked, store)
        if prepare:
            typer.echo(_prepare(asked, place, display, servers))
            return
        pool = make_pool("auto", place.home)
        if not place.resumes:
            _begin(asked, place, store, pool, display)
        config = load_federation(place.home / "federation.toml")
        learners = load_learners(config, place.home.resolve(), pool)
        again = command(asked)
        run_here(config, store, place.home, learners, display, again, anew=place.anew)
        history = History(store, place.run)
        prompts = _prompts(config, place.home.resolve())
        replies = _replies(history, store, folder, next(iter(learners.values())), prompts)
    if as_json:
        from coordinator.runs.inspection import summarise_rounds, summarise_run

        print_json({"run": summarise_run(history), "rounds": summarise_rounds(history)})
        return
    _show(history, folder, place.home, replies)


def _prepare(asked: Asked, place: Place, display: Display, servers: Path | None) -> str:
    """Write the files of a run; what was done."""
    if place.resumes:
        return f"{place.home / 'federation.toml'} is there, of the unfinished run {place.run}"
    base = asked.model or str(packaged_model(display))
    path = _write(asked, place, base, place.home, _tables(servers))
    return f"wrote {path} and {place.home / 'sites'}; nothing was trained"


def _begin(
    asked: Asked, place: Place, store: DirectoryStore, pool: ModelPool, display: Display
) -> None:
    """Write a new run's files beside their place, try them, and move them in once they fit."""
    import shutil

    from gradualdiff.cli.preflight import check_start
    from gradualdiff.cli.simulate import load_learners
    from gradualdiff.demo.start import move_in
    from shared.config import load_federation

    base = asked.model or str(packaged_model(display))
    staged = asked.folder / ".new-run"
    shutil.rmtree(staged, ignore_errors=True)  # of one that was killed here
    staged.mkdir()
    try:
        config = load_federation(_write(asked, place, base, staged))
        learners = load_learners(config, staged.resolve(), pool)
        check_start(config, learners, store, display.report, anew=place.anew)
        move_in(staged, place.home)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write(
    asked: Asked,
    place: Place,
    base: str,
    to: Path,
    servers: Mapping[str, Mapping[str, object]] | None = None,
) -> Path:
    from gradualdiff.demo.data import prepare_chitchat
    from gradualdiff.demo.files import write_demo
    from gradualdiff.demo.packages import CHITCHAT, find_packaged
    from gradualdiff.demo.start import DEFAULTS, store_from

    settings = {**DEFAULTS, **asked.numbers}
    count = int(settings["participants"])
    if asked.split is not None:
        sites = asked.split(to / "data", count)
    else:
        sites = prepare_chitchat(find_packaged(CHITCHAT), to / "data", count, None)
    store = store_from(place.home, asked.folder)
    return write_demo(to, place.run, base, sites, settings, servers, store, asked.sets)


def _split(
    data: Path | None, group: str | None, columns: str | None
) -> Callable[[Path, int], Sequence[SiteFile]] | None:
    """What writes the text that these options name into a folder, for so many participants."""
    from gradualdiff.demo.data import columns_for, split_own_data

    if data is None:
        if columns is not None:
            raise ConfigError("--columns: expected --data FILE with it, got none; name the file")
        return None
    mapping = columns_for(data, columns)
    return lambda to, count: split_own_data(data, to, count, mapping, group).sites


def _tables(servers: Path | None) -> dict[str, dict[str, object]]:
    """The tables of a ``servers.toml``; its files are named in full, since they move house."""
    import tomllib

    if servers is None:
        return {}
    try:
        tables = tomllib.loads(servers.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--servers {servers}: cannot be read: {error}") from None
    unknown = sorted(set(tables) - {"broker", "store"})
    if unknown or len(tables) != 2:
        raise ConfigError(
            f"--servers {servers}: expected the tables broker and store, got {sorted(tables)}"
        )
    for table in tables.values():
        for key, value in table.items():
            if key.endswith("_file"):
                table[key] = str((servers.resolve().parent / value).resolve())
    return tables


def _configure_log(folder: Path) -> None:
    from shared.log import configure

    folder.mkdir(parents=True, exist_ok=True)
    configure((folder / "demo.log").open("a", encoding="utf-8"), json=True)


def packaged_model(display: Display) -> Path:
    """The demo's model as a folder, converted once. Raises MissingPackageError."""
    from gradualdiff.demo.packages import SMOLLM2, find_packaged

    gguf = find_packaged(SMOLLM2)
    try:
        from participant.model.packaged import convert_gguf
    except ImportError as error:
        raise MissingPackageError(
            f"the demo trains, which needs the package {error.name}; "
            "run: pip install 'gradualdiff-fed[participant]'"
        ) from None
    return convert_gguf(gguf, SMOLLM2.sha256, cache_folder(), display.converted)


def cache_folder() -> Path:
    """Where converted models are kept between runs: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "gradualdiff-fed"


def _prompts(config: FederationConfig, folder: Path) -> Sequence[str]:
    """Of text of one's own, what the first site holds out; else, or where it asks nothing, fixed.

    The packaged text was not looked through and is shown nowhere.
    """
    from gradualdiff.cli.simulate import load_sites
    from participant.data import held_out_prompts

    site, base = load_sites(config, folder)[0]
    if site.data.prompt is not None:  # as the packaged text is written; one's own is not
        return PROMPTS
    return held_out_prompts(site.data, base, len(PROMPTS)) or PROMPTS


def _replies(
    history: History,
    store: DirectoryStore,
    folder: Path,
    learner: TorchLearner,
    prompts: Sequence[str],
) -> list[tuple[str, str, str]]:
    """Each prompt with the base's and the final model's reply."""
    from shared import topology
    from shared.protocol.records import ClosedRecord, GenesisRecord

    answers: list[list[str]] = []
    for number, kind in ((0, GenesisRecord), (history.last_closed, ClosedRecord)):
        record = history.one(number, kind)
        sha = getattr(record, "adapter_sha", "")
        path = folder / f"round-{number}.safetensors"
        store.fetch_file(topology.adapter_key(history.run, sha), path)
        answers.append(learner.replies(path, prompts, REPLY_TOKENS))
        path.unlink()
    return list(zip(prompts, *answers, strict=True))


def _show(
    history: History,
    folder: Path,
    home: Path,
    replies: Sequence[tuple[str, str, str]],
) -> None:
    from gradualdiff.demo.start import texts
    from gradualdiff.figures.held_out import plot_held_out
    from shared.config import load_federation

    _show_rounds(history)
    files = texts(load_federation(home / "federation.toml"), home)
    _show_sites(
        history, {name: len(path.read_bytes().splitlines()) for name, path in files.items()}
    )
    print_table(
        "Replies to prompts that nobody trained on", ("prompt", "base", "after the run"), replies
    )
    plot = folder / f"{history.run}.png"
    plot_held_out(history, plot)
    store = f"--store {folder / 'store'}"
    for line in (
        f"plot      {plot}",
        f"ledger    {folder / 'store' / 'runs' / history.run}",
        f"settings  {home / 'federation.toml'} and {home / 'sites'}",
        f"log       {folder / 'demo.log'}",
        "",
        "What to try next:",
        f"  gradualdiff runs verify {history.run} {store}",
        f"  gradualdiff rounds show {history.run} 1 {store}",
        f"  gradualdiff runs export {history.run} --to my-adapter {store}",
        f"  kill it in the middle and start it again: gradualdiff demo --dir {folder}",
        "  gradualdiff demo --data FILE --model PATH_OR_HUB_ID   (your own text and model)",
    ):
        console().print(line, soft_wrap=True, markup=False, highlight=False)


def _show_rounds(history: History) -> None:
    from coordinator.runs.inspection import summarise_rounds

    names = sorted(history.members)
    rows, by_site = [], []
    for s in summarise_rounds(history):
        losses = history.held_out(s.round)
        at_sites = [losses[name].nll if name in losses else None for name in names]
        by_site.append((s.round, *at_sites))
        seconds = None if s.seconds is None else round(s.seconds)
        size = megabytes(s.bytes)
        rows.append((s.round, s.held_out_nll, fixed(s.perplexity, 2), s.tokens, seconds, size))
    print_table(
        f"{history.run}: held-out loss of the global adapter by round (0 is the base model)",
        ("round", "loss", "perplexity", "tokens", "seconds", "MB up"),
        rows,
    )
    print_table("The same at each site", ("round", *names), by_site)
    first, last = rows[0][1], rows[-1][1]
    if isinstance(first, float) and isinstance(last, float):
        console().print(
            f"held-out loss {first:.4f} -> {last:.4f} (fell by {first - last:.4f} nats), "
            "on conversations no participant trained on"
        )


def _show_sites(history: History, pairs: dict[str, int]) -> None:
    from coordinator.runs.inspection import show_round

    numbers = range(1, history.last_closed + 1)
    rows = []
    for name in sorted(history.members):
        turns = [row for n in numbers for row in show_round(history, n) if row.site == name]
        before, after = history.held_out(0).get(name), history.held_out(numbers[-1]).get(name)
        rows.append(
            (
                name,
                pairs.get(name),
                before.nll if before else None,
                after.nll if after else None,
                sum(row.tokens or 0 for row in turns),
                round(sum(row.seconds or 0.0 for row in turns)),
                megabytes(sum(row.bytes or 0 for row in turns)),
            )
        )
    columns = ("site", "pairs", "loss before", "loss after", "tokens", "seconds", "MB up")
    print_table("By site, over the whole run", columns, rows)
