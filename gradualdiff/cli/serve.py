"""``gradualdiff coordinator`` and ``gradualdiff participant``: the two long-running processes."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import SetOption, finite
from shared.errors import ConfigError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from participant.daemon import ParticipantContext
    from participant.learner.port import Learner
    from participant.site import Trust
    from shared.brokers.port import Broker
    from shared.config import BrokerSection, SiteConfig
    from shared.stores.s3 import S3Store

STOP_SECONDS = 10.0
COORDINATOR_HEARTBEAT = 4  # a frozen coordinator is replaced within about three of these: 15 s
SITE_HEARTBEAT = 30
LogOption = Annotated[
    str, typer.Option("--log", help="Lines of this level and above: debug, info, warning, error.")
]


def coordinator(
    federation: Annotated[Path, typer.Argument(help="The run's federation.toml.")],
    spool: Annotated[
        Path | None, typer.Option(help="Local disk for deltas (default: spool beside the file).")
    ] = None,
    linger: Annotated[
        float,
        typer.Option(
            callback=finite, help="Seconds after the end to wait for the sites' last evaluation."
        ),
    ] = 600.0,
    sets: SetOption = None,
    log: LogOption = "info",
) -> None:
    """Start or resume a run and bring it to its end; a second one stands by.

    It may be killed at any time: started again, it continues from the ledger.
    """
    from coordinator.daemon import CoordinatorContext, serve
    from coordinator.runs.bases import named_bases, put_bases
    from shared.config import load_federation
    from shared.disk.locks import first_free
    from shared.log import configure
    from shared.stores.opening import open_s3
    from shared.trust.keys import SigningKey

    configure(level=log)
    config = load_federation(federation, sets or ())
    folder = federation.resolve().parent
    if config.broker is None or config.store.url is None:
        raise ConfigError(
            f"{federation}: a coordinator needs [broker] and [store] url; add them, or run it all "
            f"here: gradualdiff simulate {federation}"
        )
    store = open_s3(config.store, folder)
    broker, trust = config.broker, config.trust
    key = SigningKey.load(folder / trust.key_file, "trust.key_file") if trust else None
    stopping = threading.Event()
    with (
        first_free(spool or folder / "spool") as place,
        stopped_by_signal(stopping),
    ):
        _check_store(store, stopping)
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            config, bases = named_bases(config, store, folder, Path(scratch))
            if bases is not None:
                put_bases(config, store, bases)
        context = CoordinatorContext(
            config=config,
            store=store,
            connect=lambda: connect_broker(broker, folder, COORDINATOR_HEARTBEAT),
            spool=place,
            stopping=stopping,
            linger_seconds=linger,
            key=key,
        )
        state = serve(context)
    typer.echo(f"run {config.run.name} is finished: adapter sha256 {state.adapter_sha}")


def participant(
    site: Annotated[Path, typer.Argument(help="The site's site.toml.")],
    once: Annotated[
        bool, typer.Option("--once", help="Take one round and exit: for cron and Slurm.")
    ] = False,
    wait: Annotated[
        float,
        typer.Option(callback=finite, help="With --once: seconds to wait for something to do."),
    ] = 60.0,
    log: LogOption = "info",
) -> None:
    """Take part in whatever runs name this site: train on its text, send deltas, wait.

    With --once the exit code is 3 when there was nothing to do.
    """
    from participant.daemon import serve, serve_once
    from shared.config import load_site
    from shared.disk.locks import held
    from shared.log import configure

    configure(level=log)
    config = load_site(site)
    folder = site.resolve().parent
    learner = make_learner(config, folder)
    stopping, waiting = threading.Event(), []
    with (
        held(folder / config.site.workspace / ".lock", f"the workspace of {config.site.name}"),
        stopped_by_signal(stopping),
    ):
        context = make_context(config, folder, learner, stopping)
        if once:
            waiting = serve_once(context, wait)
        else:
            serve(context)
    if once:
        typer.echo(f"{config.site.name}: handed over")
        if waiting:
            typer.echo(f"waiting for approval (gradualdiff site status): {', '.join(waiting)}")


def connect_broker(section: BrokerSection, folder: Path, heartbeat_seconds: int) -> Broker:
    """A new connection; the password file is read anew, so that a rotated one is taken up."""
    from shared.brokers.rabbitmq import connect
    from shared.credentials import broker_address

    return connect(broker_address(section, folder), heartbeat_seconds)


def make_context(
    config: SiteConfig, folder: Path, learner: Learner, stopping: threading.Event
) -> ParticipantContext:
    """What the participant's process works with. Raises ConfigError."""
    from participant.daemon import ParticipantContext
    from participant.workspace import Workspace
    from shared.credentials import existing_file
    from shared.stores.transfer import HttpTransfer

    broker = config.broker
    if broker is None:
        raise ConfigError("broker: expected where to connect to, got nothing; add [broker]")
    if config.store is None:
        raise ConfigError(
            "store: expected the address of the run's store, which is all that this site fetches "
            'from and sends to, got nothing; add [store] with url = "https://HOST:PORT", as the '
            "coordinator's store.site_url (or store.url) says it"
        )
    return ParticipantContext(
        name=config.site.name,
        connect=lambda: connect_broker(broker, folder, SITE_HEARTBEAT),
        transfer=HttpTransfer(
            ca_file=existing_file(folder, broker.ca_file, "broker.ca_file"),
            plaintext=broker.transport == "plaintext",
            store=config.store.url,
        ),
        workspace=Workspace(folder / config.site.workspace, config.site.checkpoint_seconds),
        learner=learner,
        accept=config.accept,
        stopping=stopping,
        trust=_trust(config, folder),
    )


def _trust(config: SiteConfig, folder: Path) -> Trust:
    from participant.site import Trust
    from shared.trust.keys import PublicKey, SigningKey

    own, pinned = config.trust.key_file, config.trust.coordinator
    return Trust(
        key=SigningKey.load(folder / own, "trust.key_file") if own else None,
        coordinator=PublicKey(pinned) if pinned else None,
    )


def make_learner(config: SiteConfig, folder: Path) -> Learner:
    """What trains for a site whose files are in ``folder``. Raises MissingPackageError."""
    # Read by OpenMP when torch is loaded: a thread that waits sleeps. Spinning, two sites on one
    # machine take each other's cores, and a step of a second takes most of a minute.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from participant.learner.model_pool import ModelPool
        from participant.learner.torch_learner import TorchLearner
    except ImportError as error:
        raise MissingPackageError(
            f"training needs the package {error.name}; "
            "run: pip install 'gradualdiff-fed[participant]'"
        ) from None
    # Whoever names no model takes those of the hub: that owner/name is a folder here too is then
    # nobody's business, and nothing to train over.
    pool = ModelPool(config.device.kind, folder if config.accept.models is not None else None)
    return TorchLearner(config.site.name, config.data, folder, pool, config.privacy)


def _check_store(store: S3Store, stopping: threading.Event) -> None:
    """Wait for the store, then let it show that it is one the ledger can live in."""
    from shared.backoff import Backoff
    from shared.errors import InterruptedRunError, StoreUnavailableError
    from shared.log import get_logger

    pauses = Backoff()
    while not stopping.is_set():
        try:
            store.check()
        except StoreUnavailableError as error:
            pause = pauses.next()
            get_logger().warning("store.waits", reason=str(error), seconds=round(pause, 1))
            stopping.wait(pause)
        else:
            if store.indirect:
                get_logger().warning("store.indirect", reason=store.indirect)
            return
    raise InterruptedRunError("stopped before the store could be reached")


@contextlib.contextmanager
def stopped_by_signal(stopping: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM ask to stop; what does not heed within ten seconds is ended.

    Ending a process at any moment loses nothing but the work in hand.
    """

    def stop(number: int, frame: object) -> None:
        del frame
        stopping.set()
        signal.signal(number, signal.SIG_DFL)
        timer = threading.Timer(STOP_SECONDS, os._exit, (130,))
        timer.daemon = True
        timer.start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
