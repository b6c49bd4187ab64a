"""A store for scripts: which runs it holds, and each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.runs.inspection import RunSummary, summarise_runs
from gradualdiff.rows import Rows
from gradualdiff.run import Run
from shared.config import load_federation
from shared.errors import StoreMissingError
from shared.stores.directory import DirectoryStore

if TYPE_CHECKING:
    from shared.stores.port import ObjectStore


@dataclass(frozen=True)
class Store:
    """The object store that is named by ``path``."""

    path: Path
    objects: ObjectStore

    @property
    def runs(self) -> Rows[RunSummary]:
        """A line on every run, in name order."""
        return Rows(RunSummary, summarise_runs(self.objects))

    def run(self, name: str) -> Run:
        """A run as it is on record now. Raises RunNotFoundError, LedgerDamagedError."""
        return Run(self.objects, name, self.path)


def open_store(path: Path | str, *, writable: bool = False) -> Store:
    """An existing store: its directory, or the federation.toml that names it.

    Raises StoreMissingError where there is none, ConfigError and StoreUnavailableError.
    """
    path = Path(path)
    directory = path
    if path.suffix == ".toml":
        from shared.stores.opening import open_s3

        config = load_federation(path)
        if config.store.url is not None:
            return Store(path, open_s3(config.store, path.resolve().parent))
        directory = path.parent / config.store.directory
    _check_store(directory)
    return Store(path, DirectoryStore(directory, create=writable))


def _check_store(path: Path) -> None:
    """A store was opened for writing once, or is a copy of one that holds a run."""

    def is_store(folder: Path) -> bool:
        return (folder / ".tmp").is_dir() or any(folder.glob("runs/*/federation.json"))

    if is_store(path):
        return
    near = [path.parent, *(sorted(path.iterdir()) if path.is_dir() else ())]
    found = [str(folder) for folder in near if is_store(folder)]
    hint = f"there is one here: {', '.join(found)}" if found else "give another path"
    raise StoreMissingError(
        f"no store at {path}: expected a directory that a run was begun in; {hint}"
    )
