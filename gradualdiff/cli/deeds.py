"""For every command that does something for good: it is on record before, and how it ended."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.output import INTERRUPTED
from shared.errors import GradualDiffError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.audit_log import Deed
    from gradualdiff.cli.kits import Servers
    from shared.stores.port import ObjectStore

ReasonOption = Annotated[str, typer.Option("--reason", help="The reason, which stays on record.")]
NO_REASON = "no reason given"


@contextlib.contextmanager
def on_record(
    store: ObjectStore,
    source: Path,
    what: Deed,
    about: str,
    why: str,
    broker_account: str | None = None,
) -> Iterator[None]:
    """Log that what is in the block is about to be done, and then how it ended.

    ``source``: what ``--store`` or ``--federation`` named. Signed by the coordinator's key where
    that is here. Without it a run can be paused all the same: the entry shows that nobody signed
    it. Raises the store's errors; nothing may be done then.
    """
    from coordinator.audit_log import AuditLog
    from coordinator.runs.operating import operator
    from gradualdiff.attesting import own_key

    log = AuditLog(
        store,
        operator(),
        time.time,
        broker_account=broker_account,
        signer=own_key(source),
    )
    number, code = log.write(what, about, why).number, 0
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        code = getattr(error, "exit_code", INTERRUPTED if interrupted else 1)
        raise
    finally:
        try:
            log.write(what, about, why, ended=number, exit_code=code)
        except GradualDiffError as error:  # the deed is done, or failed for a reason of its own
            typer.echo(f"how it ended is not on record: {error}", err=True)


def on_servers_record(
    servers: Servers, source: Path, what: Deed, about: str, why: str
) -> contextlib.AbstractContextManager[None]:
    """The same, of a deed that needs the broker too."""
    from shared.credentials import broker_account

    return on_record(servers.store, source, what, about, why, broker_account(servers.broker))
