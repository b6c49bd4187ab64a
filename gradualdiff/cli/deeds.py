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
    from shared.trust.keys import SigningKey

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

    Raises the store's errors; nothing may be done then.
    """
    from coordinator.audit_log import AuditLog
    from coordinator.runs.operating import operator

    log = AuditLog(
        store,
        operator(),
        time.time,
        broker_account=broker_account,
        signer=operator_key(source),
    )
    log.write(what, about, why)


def put_on_servers_record(servers: Servers, source: Path, what: Deed, about: str, why: str) -> None:
    """The same, of a deed that needs the broker too."""
    from shared.credentials import broker_account

    account = broker_account(servers.broker)
    put_on_record(servers.store, source, what, about, why, account)


def operator_key(source: Path) -> SigningKey | None:
    """What signs operators' deeds: the coordinator's key, if ``source`` is a file that names one.

    A store that is named by its folder names no key. Without the key a run can be paused all the
    same: the entry shows that nobody signed it. Raises ConfigError for a file that is no key.
    """
    from shared.config import load_federation
    from shared.trust.keys import SigningKey

    if source.suffix != ".toml":
        return None
    trust = load_federation(source).trust
    path = None if trust is None else source.resolve().parent / trust.key_file
    return SigningKey.load(path, "trust.key_file") if path is not None and path.exists() else None
