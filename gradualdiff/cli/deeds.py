"""For every command that does something for good: an operator's deed put on record before it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coordinator.audit_log import Deed
    from gradualdiff.cli.kits import Servers
    from shared.stores.port import ObjectStore

ReasonOption = Annotated[str, typer.Option("--reason", help="The reason, which stays on record.")]
NO_REASON = "no reason given"


def put_on_record(
    store: ObjectStore,
    source: Path,
    what: Deed,
    about: str,
    why: str,
    broker_account: str | None = None,
) -> None:
    """Log that this is about to be done. ``source``: what ``--store`` or ``--federation`` named.

    Signed by the coordinator's key where that is here. Without it a run can be paused all the same:
    the entry shows that nobody signed it. Raises the store's errors; nothing may be done then.
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
    log.write(what, about, why)


def put_on_servers_record(servers: Servers, source: Path, what: Deed, about: str, why: str) -> None:
    """The same, of a deed that needs the broker too."""
    from shared.credentials import broker_account

    account = broker_account(servers.broker)
    put_on_record(servers.store, source, what, about, why, account)
