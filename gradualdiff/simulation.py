"""A whole federation in this process: every role, one base model, no server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gradualdiff.run import Run
from shared.config import FederationConfig, load_federation
from shared.stores.directory import DirectoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradualdiff.events import Event


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> FederationConfig:
    """Read a federation.toml; ``overrides``: ``section.key=value`` each, instead of its own.

    Raises ConfigError naming every mistake in both.
    """
    return load_federation(Path(path), overrides)


def simulate(
    config: FederationConfig | Path | str,
    folder: Path | str | None = None,
    *,
    on_event: Callable[[Event], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    resume: bool | None = None,
) -> Run:
    """Run a federation to its end, or resume it where it was; the run.

    ``config``: the settings, or their federation.toml. ``folder``: what the paths in it are
    relative to; by default where that file is, else the current folder. ``on_event`` is called in
    this thread, while nothing else goes on. ``should_stop`` is asked between two batches.
    ``resume``: True for a run that must be there already, False for one that must not.

    A process that is killed loses what was trained since a site's last checkpoint; call it again.
    A run without a closed round begins anew where its settings changed or it had failed.

    Raises ConfigError, DataError, ModelError and StoreError before the run begins, RunExistsError
    (other settings than on record), RunNotFoundError, InterruptedRunError once ``should_stop``,
    RunStuckError, RunFailedError and MissingPackageError.
    """
    from coordinator.runs.bases import bases_here
    from gradualdiff.embedded.running import begins_anew, run_here
    from gradualdiff.embedded.sites import load_learners

    if not isinstance(config, FederationConfig):
        folder = Path(config).parent if folder is None else folder
        config = load_federation(Path(config))
    home = Path(folder or ".").resolve()
    place = home / config.store.directory
    store = DirectoryStore(place)
    with bases_here(config, store, home) as (config, bases):
        anew = begins_anew(store, config, resume=resume)
        learners = load_learners(config, home)
        run_here(config, store, home, learners, on_event, should_stop, anew=anew, bases=bases)
    return Run(store, config.run.name, place)
