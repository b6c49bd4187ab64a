"""Which run a demo resumes or begins, and where that run's settings and text lie.

The files of a run that could be resumed are never written over: a run that is begun beside an
unfinished one gets a folder of its own, ``DIR/RUN``. All share ``DIR/store``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shared.config import NAME_PATTERN, load_federation, load_site
from shared.errors import ConfigError, GradualDiffError, RunExistsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gradualdiff.demo.data import SiteFile
    from shared.config import FederationConfig
    from shared.stores.directory import DirectoryStore

DEFAULTS: Mapping[str, float] = {
    "participants": 5,
    "rounds": 5,
    "local_steps": 4,
    "learning_rate": 3e-3,
    "seed": 1,
}
FEDERATION = "federation.toml"
# What the demo decides by its own options.
DECIDED = {"run.name": "--name", "run.participants": "--participants", "base.model": "--model"}


@dataclass(frozen=True)
class Asked:
    """The command's options: None, or left out of ``numbers``, where not given.

    ``split`` writes the text given by the options to a folder, for so many participants; None where
    none was given.
    """

    folder: Path
    name: str | None
    fresh: bool
    model: str | None
    numbers: Mapping[str, float] = field(default_factory=dict)
    split: Callable[[Path, int], Sequence[SiteFile]] | None = None
    sets: Sequence[str] = ()


@dataclass(frozen=True)
class Place:
    """A run's name and the folder of its files. ``resumes``: it is on record, with these files.

    ``anew``: what is on record of it, without a closed round, is to go.
    """

    run: str
    home: Path
    resumes: bool = False
    anew: bool = False


def find_place(asked: Asked, store: DirectoryStore) -> Place:
    """The newest unfinished run, the one that is asked for by name, or a new one.

    Raises ConfigError (no name for a run), RunExistsError (a run that ended has that name, or the
    unfinished one began with other options than these).
    """
    import re

    from coordinator.runs.deletion import has_closed_round
    from coordinator.runs.inspection import DYING, summarise_runs
    from shared.protocol.ledger import Ledger

    if asked.name is not None and not re.fullmatch(NAME_PATTERN, asked.name):
        raise ConfigError(f"--name: expected 1 to 40 of a-z, 0-9 and dashes, got {asked.name!r}")
    _check_sets(asked.sets)
    runs = {summary.run: summary for summary in summarise_runs(store)}
    ended = {run for run, summary in runs.items() if summary.state in ("finished", "failed", DYING)}
    homes = {run: _home(asked.folder, run) for run in runs if run not in ended}
    unfinished = {run: home for run, home in homes.items() if home is not None}
    newest = max(unfinished, key=lambda run: (runs[run].began, run), default=None)
    wanted = asked.name or newest
    if wanted in unfinished and not (asked.fresh and asked.name is None):
        place = Place(wanted, unfinished[wanted], resumes=True)
        _check_same(asked, place)
        return place
    if asked.name is not None and asked.name in runs:
        raise RunExistsError(
            f"run {asked.name} is in {store.root} already ({runs[asked.name].state}); choose "
            f"another --name, or delete it: gradualdiff runs delete {asked.name} --store "
            f"{store.root}"
        )
    if newest is not None and asked.name is None:
        ledger = Ledger(store, newest, "reader", lambda: 0.0)
        if not has_closed_round(ledger):  # --fresh, and nothing of it is worth keeping
            return Place(newest, unfinished[newest], anew=True)
    run = asked.name or f"demo-{max(map(_number, runs), default=0) + 1}"
    taken = asked.folder in unfinished.values()
    return Place(run, asked.folder / run if taken else asked.folder)


@contextlib.contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """Takes a folder that this demo made away again where an error came before its settings."""
    new = not folder.exists()
    try:
        yield
    except GradualDiffError:
        if new and not (folder / FEDERATION).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def command(asked: Asked) -> str:
    """The command that resumes the run: it needs no other option."""
    words = ["gradualdiff", "demo", "--dir", str(asked.folder)]
    return shlex.join([*words, "--name", asked.name] if asked.name else words)


def _home(folder: Path, run: str) -> Path | None:
    """Where the run's files are; None where they are no more (or cannot be read)."""
    for home in (folder, folder / run):
        try:
            if load_federation(home / FEDERATION).run.name == run:
                return home
        except GradualDiffError:
            continue
    return None


def _check_sets(sets: Sequence[str]) -> None:
    """Raises ConfigError for a setting that the demo makes itself."""
    for setting in sets:
        name = setting.partition("=")[0].strip()
        if name in DECIDED:
            raise ConfigError(f"--set {name}: the demo decides it; use {DECIDED[name]}")
        if name.startswith(("store", "simulation")):
            raise ConfigError(f"--set {name}: the demo decides it; use --dir for another folder")


def _number(run: str) -> int:
    tail = run.removeprefix("demo-")
    return int(tail) if tail.isdigit() else 0


def _check_same(asked: Asked, place: Place) -> None:
    """Raises RunExistsError naming each option that is not what the run began with."""
    config = load_federation(place.home / FEDERATION)
    there: dict[str, object] = {
        "participants": len(config.run.participants),
        "rounds": config.run.rounds,
        "local_steps": config.training.local_steps,
        "learning_rate": config.training.learning_rate,
        "seed": config.run.seed,
    }
    given: dict[str, object] = dict(asked.numbers)
    if asked.model is not None:
        there["model"], given["model"] = config.base.model, asked.model
    other = [
        f"--{name.replace('_', '-')} is {there[name]} there, {value} here"
        for name, value in given.items()
        if there[name] != value
    ]
    if asked.split is not None and not _is_same_text(asked.split, config, place.home):
        other.append("--data (and how it is split) is another text there")
    other += [
        f"--set {setting} is not so there"
        for setting in asked.sets
        if load_federation(place.home / FEDERATION, [setting]) != config
    ]
    if other:
        raise RunExistsError(
            f"run {place.run} is not finished and began with other options: {'; '.join(other)}. "
            f"Resume it: {shlex.join(['gradualdiff', 'demo', '--dir', str(asked.folder)])} "
            f"{'--name ' + place.run if asked.name else '(no other option)'}; or begin another "
            "one beside it: add --fresh, or --name with another name"
        )


def _is_same_text(
    split: Callable[[Path, int], Sequence[SiteFile]], config: FederationConfig, home: Path
) -> bool:
    with tempfile.TemporaryDirectory(prefix="gradualdiff-demo-") as scratch:
        made = split(Path(scratch), len(config.run.participants))
        return {site.name: site.path.read_bytes() for site in made} == {
            name: path.read_bytes() for name, path in texts(config, home).items() if path.is_file()
        }


def texts(config: FederationConfig, home: Path) -> dict[str, Path]:
    """Each site's file of text."""
    files = [home / name for name in config.simulation.sites]
    sites = [(load_site(file), file.parent) for file in files]
    return {site.site.name: folder / site.data.path for site, folder in sites}


def move_in(staged: Path, home: Path) -> None:
    """Put what was written and checked elsewhere into its place, ``federation.toml`` last."""
    files = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
    for name in sorted(files, key=lambda name: name == Path(FEDERATION)):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(home / name)


def store_from(home: Path, folder: Path) -> str:
    """``[store] directory`` of a ``federation.toml`` in ``home``."""
    return os.path.relpath(folder / "store", home)
