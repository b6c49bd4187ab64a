"""``gradualdiff simulate``: a whole federation in this process, from its TOML files."""

from __future__ import annotations

import contextlib
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gradualdiff.cli.output import JsonOption, SetOption, console, print_json, set_words
from shared.errors import (
    ConfigError,
    InterruptedRunError,
    MissingPackageError,
    RunExistsError,
    RunNotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coordinator.round.state import RunState
    from gradualdiff.cli.progress import Display
    from participant.learner.model_pool import ModelPool
    from participant.learner.torch_learner import TorchLearner
    from shared.config import FederationConfig, SiteConfig
    from shared.stores.directory import DirectoryStore


def simulate(
    federation: Annotated[Path, typer.Argument(help="The run's federation.toml.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume a run that the store holds.")
    ] = False,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a whole federation in this process: all roles, one base model, no server.

    The sites are the files that simulation.sites in it names. Ctrl-C loses nothing, a kill at
    most what was trained since the last checkpoint; --resume continues.
    """
    from gradualdiff.cli.progress import make_display
    from shared.config import load_federation
    from shared.log import configure
    from shared.stores.directory import DirectoryStore

    configure(level="warning")
    config = load_federation(federation, sets or ())
    folder = federation.resolve().parent
    store = DirectoryStore(folder / config.store.directory)
    anew = check_resume(store, config, resume=resume)
    learners = load_learners(config, folder)
    again = shlex.join(["gradualdiff", "simulate", str(federation), "--resume", *set_words(sets)])
    with make_display(quiet=as_json) as display:
        run_here(config, store, folder, learners, display, again, anew=anew)
    from coordinator.runs.inspection import History, summarise_run

    summary = summarise_run(History(store, config.run.name))
    if as_json:
        print_json(summary)
        return
    loss = "" if summary.held_out_nll is None else f"held-out loss {summary.held_out_nll:.4f}, "
    line = f"run {config.run.name} is finished: {loss}adapter sha256 {summary.adapter_sha}"
    console().print(line, soft_wrap=True)
    option = f"--store {folder / config.store.directory}"
    console().print(f"next: gradualdiff rounds list {config.run.name} {option}", soft_wrap=True)
    console().print(f"      gradualdiff runs verify {config.run.name} {option}", soft_wrap=True)


def check_resume(store: DirectoryStore, config: FederationConfig, *, resume: bool) -> bool:
    """Whether the run is to begin anew: it is there and is not worth resuming.

    That is one without a closed round that failed, that has other settings or that is half
    deleted. Raises RunExistsError (it is there without ``resume``), RunNotFoundError.
    """
    from coordinator.runs.deletion import has_closed_round
    from shared.protocol.ledger import Ledger, list_runs
    from shared.protocol.records import FinishedRecord

    run, known = config.run.name, list_runs(store)
    if run not in known:
        if resume:
            raise RunNotFoundError(f"no run {run} in this store to resume; leave --resume out")
        return False
    if resume or known[run]:
        return known[run] and not resume
    ledger = Ledger(store, run, "reader", lambda: 0.0)
    if not has_closed_round(ledger):
        ended = any(isinstance(record, FinishedRecord) for record in ledger.history())
        if ended or ledger.federation().digest != config.digest:
            return True
    raise RunExistsError(
        f"run {run} already exists in this store; resume it with --resume, choose another "
        f"run.name, or delete it: gradualdiff runs delete {run} --store {store.root}"
    )


def load_learners(
    config: FederationConfig, folder: Path, pool: ModelPool | None = None
) -> dict[str, TorchLearner]:
    """One learner per participant over one shared base model, from the sites' files.

    ``pool``: where that model may be already. Raises as ``load_sites`` does, and where the sites
    do not agree on a device.
    """
    sites = load_sites(config, folder)
    devices = {site.device.kind for site, _ in sites}
    if len(devices) > 1:
        raise ConfigError(
            f"device.kind: expected one for all sites of a simulation, got {sorted(devices)}: "
            "they share one base model"
        )
    pool = pool or make_pool(devices.pop(), folder)
    from participant.learner.torch_learner import TorchLearner

    return {
        site.site.name: TorchLearner(site.site.name, site.data, base, pool) for site, base in sites
    }


def make_pool(device: Literal["auto", "cpu", "cuda"], folder: Path) -> ModelPool:
    """An empty place for a base model. Raises MissingPackageError."""
    try:
        from participant.learner.model_pool import ModelPool
    except ImportError as error:
        raise MissingPackageError(
            f"training needs the package {error.name}; "
            "run: pip install 'gradualdiff-fed[participant]'"
        ) from None
    return ModelPool(device, folder)


def load_sites(config: FederationConfig, folder: Path) -> list[tuple[SiteConfig, Path]]:
    """The sites of a simulation, each with the folder that its paths are relative to.

    Raises ConfigError when the files are not those of the run's participants.
    """
    from shared.config import load_site

    paths = [folder / name for name in config.simulation.sites]
    if not paths:
        raise ConfigError("simulation.sites: expected the sites' files, got none; list them")
    sites: list[tuple[SiteConfig, Path]] = []
    mistakes: list[str] = []
    for path in paths:
        try:
            sites.append((load_site(path), path.resolve().parent))
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    names = [site.site.name for site, _ in sites]
    wanted = sorted(config.run.participants)
    if sorted(names) != wanted:
        raise ConfigError(
            f"simulation.sites: expected the files of {', '.join(wanted)} (run.participants), "
            f"got those of {', '.join(sorted(names))}"
        )
    return sites


def run_here(
    config: FederationConfig,
    store: DirectoryStore,
    folder: Path,
    learners: dict[str, TorchLearner],
    display: Display,
    again: str,
    *,
    anew: bool = False,
) -> RunState:
    """Run the federation to its end; ``again`` is the command that resumes it.

    Model, text and room are checked first. ``anew``: then what is on record of the run goes.
    Raises InterruptedRunError (naming ``again``) on Ctrl-C or SIGTERM, and what the run raises.
    """
    from gradualdiff.cli.deleting import run_lock
    from gradualdiff.cli.preflight import check_start
    from gradualdiff.embedded.federation import Embedding, run_embedded
    from shared.disk.locks import held

    run = config.run.name
    sites = [site.site for site, _ in load_sites(config, folder)]
    # Two processes would be fenced by the ledger sooner or later, but share the sites' workspaces.
    lock = held(folder / f".{run}.lock", f"run {run} in {folder}")
    with lock, run_lock(store, run), stop_on_signal() as should_stop:
        check_start(config, learners, store, display.report, anew=anew)
        if anew:
            _forget(store, run, display)
        _clear_workspaces(config, store, folder)
        embedding = Embedding(
            store=store,
            folder=folder,
            report=display.report,
            moved=display.moved,
            should_stop=should_stop,
            checkpoint_seconds={site.name: site.checkpoint_seconds for site in sites},
        )
        try:
            return run_embedded(config, learners, embedding)
        except InterruptedRunError:
            raise InterruptedRunError(
                f"run {config.run.name} was stopped; everything finished is saved. "
                f"Resume it with: {again}"
            ) from None


def _clear_workspaces(config: FederationConfig, store: DirectoryStore, folder: Path) -> None:
    """What a deleted run of this name left at the sites is of no use to one that begins."""
    import shutil

    from shared import topology
    from shared.errors import ObjectMissingError

    try:
        store.stat(topology.federation_key(config.run.name))
    except ObjectMissingError:
        for site in config.run.participants:
            shutil.rmtree(folder / "sites" / site / config.run.name, ignore_errors=True)


def _forget(store: DirectoryStore, run: str, display: Display) -> None:
    """Let a run begin anew that has no closed round; what it branches from stays."""
    import time

    from coordinator.runs.deletion import delete_run, refuse_if_active
    from coordinator.runs.operating import operator, operator_ledger

    refuse_if_active(store, run, time.time())
    delete_run(operator_ledger(store, run, time.time), operator(), keep_origin=True)
    display.say(f"run {run} had no closed round: it starts over with these settings")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ask to stop on the first SIGINT or SIGTERM; the second one ends the process at once."""
    stopped = False

    def stop(number: int, frame: object) -> None:
        del frame
        nonlocal stopped
        stopped = True
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
