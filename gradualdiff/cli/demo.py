"""``gradualdiff demo``: a real model, real text, five participants, one command, no server."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import JsonOption, SetOption, at_least, positive, print_json
from shared.errors import ConfigError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gradualdiff.demo.data import SiteFile
    from gradualdiff.demo.start import Asked, Place
    from gradualdiff.embedded.display import Display
    from gradualdiff.run import Run
    from participant.learner.model_pool import ModelPool
    from shared.config import FederationConfig
    from shared.stores.directory import DirectoryStore

PROMPTS = (
    "What do you like to do on a rainy day?",
    "Can you recommend something for dinner?",
    "How was your week?",
)
REPLY_TOKENS = 40


Dir = Annotated[Path, typer.Option("--dir", help="Where everything of the demo is kept.")]
Model = Annotated[str | None, typer.Option(help="A base model of your own: a path or a hub id.")]
Data = Annotated[Path | None, typer.Option(help="Text of your own: JSONL, CSV or Parquet.")]
Group = Annotated[str | None, typer.Option(help="With --data: the column that tells sites apart.")]
Columns = Annotated[
    str | None,
    typer.Option(help="With --data: which columns hold the text: prompt=COLUMN,answer=COLUMN."),
]
Participants = Annotated[
    int | None, typer.Option(callback=at_least(1), help="How many participants (K): 5.")
]
Rounds = Annotated[int | None, typer.Option(callback=at_least(1), help="How many rounds (T): 5.")]
LocalSteps = Annotated[
    int | None, typer.Option(callback=at_least(1), help="Optimiser steps a round and site: 4.")
]
LearningRate = Annotated[
    float | None, typer.Option(callback=positive, help="AdamW's learning rate: 0.003.")
]
Seed = Annotated[int | None, typer.Option(callback=at_least(0), help="The run's one seed: 1.")]
RunName = Annotated[str | None, typer.Option(help="The run's name, if not demo-1, demo-2, ....")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Begin a new run even if the last one is unfinished.")
]
Prepare = Annotated[
    bool, typer.Option("--prepare", help="Write model, text and settings, and train nothing.")
]
Servers = Annotated[
    Path | None,
    typer.Option(help="With --prepare: a TOML with the tables broker and store, to run over them."),
]
Watched = Annotated[
    bool, typer.Option("--dashboard", help="Show it in a browser while it runs, as dashboard does.")
]


def demo(
    folder: Dir = Path("gradualdiff-demo"),
    model: Model = None,
    data: Data = None,
    group: Group = None,
    columns: Columns = None,
    participants: Participants = None,
    rounds: Rounds = None,
    local_steps: LocalSteps = None,
    learning_rate: LearningRate = None,
    seed: Seed = None,
    name: RunName = None,
    fresh: Fresh = False,
    prepare: Prepare = False,
    servers: Servers = None,
    dashboard: Watched = False,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """A complete federation on this machine: five participants fine-tune one real model.

    An interrupted demo resumes where it was when it is started again, and needs no option then but
    --dir: model, text and settings are those that it began with.
    """
    from gradualdiff.demo.start import Asked
    from shared.base_model import located

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
    _carry_out(asked, servers, prepare=prepare, watched=dashboard, as_json=as_json)


def _carry_out(
    asked: Asked, servers: Path | None, *, prepare: bool, watched: bool, as_json: bool
) -> None:
    from gradualdiff.cli.dashboard import shown_meanwhile
    from gradualdiff.cli.demo_report import show
    from gradualdiff.cli.progress import make_display
    from gradualdiff.demo.start import find_place, leaving_nothing
    from shared.disk.locks import held
    from shared.stores.directory import DirectoryStore

    folder = asked.folder
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
        if watched:
            stack.enter_context(shown_meanwhile(store))
        run, replies = _train(asked, place, store, display)
    if as_json:
        print_json({"run": run.summary, "rounds": run.rounds})
        return
    show(run, folder, place.home, replies)


def _train(
    asked: Asked, place: Place, store: DirectoryStore, display: Display
) -> tuple[Run, list[tuple[str, str, str]]]:
    """Bring the run to its end; the run, and what the model replies before and after it."""
    from gradualdiff.cli.progress import showing
    from gradualdiff.cli.simulate import stopping
    from gradualdiff.demo.start import command
    from gradualdiff.embedded.running import run_here
    from gradualdiff.embedded.sites import load_learners, make_pool
    from gradualdiff.run import Run
    from shared.config import load_federation

    pool = make_pool("auto", place.home)
    if not place.resumes:
        _begin(asked, place, store, pool, display)
    config = load_federation(place.home / "federation.toml")
    learners = load_learners(config, place.home.resolve(), pool)
    with stopping(config, command(asked)) as should_stop:
        show = showing(display)
        run_here(config, store, place.home, learners, show, should_stop, anew=place.anew)
    run = Run(store, place.run, store.root)
    prompts = _prompts(config, place.home.resolve())
    return run, _replies(run, prompts)


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

    from gradualdiff.demo.start import move_in
    from gradualdiff.embedded.preflight import check_start
    from gradualdiff.embedded.sites import load_learners
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
    from gradualdiff.embedded.sites import load_sites
    from participant.data import held_out_prompts

    site, base = load_sites(config, folder)[0]
    if site.data.prompt is not None:  # as the packaged text is written; one's own is not
        return PROMPTS
    return held_out_prompts(site.data, base, len(PROMPTS)) or PROMPTS


def _replies(run: Run, prompts: Sequence[str]) -> list[tuple[str, str, str]]:
    """Each prompt with the base's and the final model's reply."""
    from gradualdiff.conversation import Conversation
    from participant.model import Sampling

    conversation = Conversation(run, Sampling(max_new_tokens=REPLY_TOKENS), beside_base=True)
    answers = []
    for prompt in prompts:
        before, after = conversation.say(prompt).values()
        answers.append((prompt, before, after))
        conversation.forget()
    return answers
