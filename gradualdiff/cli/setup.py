"""``gradualdiff setup``: bucket, exchanges, queues, accounts and kits, once and repeatably."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.deeds import on_servers_record
from gradualdiff.cli.kits import (
    KITS,
    PASSWORD_FILE,
    Servers,
    accounts_of,
    prepare_kit,
    write_secret,
)
from gradualdiff.cli.output import SetOption, console
from gradualdiff.cli.site_keys import known_keys
from shared.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.audit_log import Deed

SETUP = "gradualdiff setup"


def setup(
    federation: Annotated[Path, typer.Argument(help="The run's federation.toml.")],
    kits: Annotated[
        Path | None, typer.Option(help="Folder for the sites' kits (default: kits beside it).")
    ] = None,
    sets: SetOption = None,
) -> None:
    """Make what a run needs on its servers, and a kit for each participant without an account.

    What is there stays as it is, so it may be run again, after adding a participant for instance.
    All accounts on record get the rights and limits of this release; nobody is cut off. What --set
    says here, the coordinator must be told too.
    """
    from coordinator.accounts.coordinator_account import make_coordinator_account
    from shared.brokers.rabbitmq import connect
    from shared.config import load_federation
    from shared.credentials import broker_address
    from shared.stores.opening import open_s3
    from shared.topology import run_topology
    from shared.trust.keys import SigningKey

    config = load_federation(federation, sets or ())
    folder = federation.resolve().parent
    if config.store.url is None or config.broker is None:
        raise ConfigError(
            f"{federation}: expected [broker] and [store] url, got a run for this machine alone; "
            "add them"
        )
    out = console()
    store = open_s3(config.store, folder)
    store.make_bucket()
    store.check()
    out.print(f"store   {config.store.url}: bucket {config.store.bucket} exists and can be used")
    account = make_coordinator_account(config.broker, folder)
    if account is not None:
        out.print(f"broker  account {account} may use what is ours alone, and administers nothing")
    with connect(broker_address(config.broker, folder)) as broker:
        broker.declare(run_topology(config.run.name, config.run.participants))
    out.print(f"broker  queues for run {config.run.name} exist")
    servers = Servers(config, config.broker, folder, store)
    if config.trust is not None:
        own = SigningKey.kept(folder / config.trust.key_file, "trust.key_file").public
        out.print(f"key     {own.text}, fingerprint {own.fingerprint}", soft_wrap=True)
    accounts = accounts_of(servers)
    with on_servers_record(servers, federation, "account.restore", "all sites", SETUP):
        accounts.restore()  # the broker may have lost them, or hold an earlier release's limits
    for name in config.run.participants:
        place = (kits or folder / KITS) / name
        # A kit without a password was never handed out: we died before it was written.
        unfinished = place.exists() and not (place / PASSWORD_FILE).exists()
        if accounts.exists(name) and not unfinished:
            out.print(f"site    {name}: has an account; its kit is not written again")
            continue
        with on_servers_record(servers, federation, "kit.write", name, SETUP):
            kit = prepare_kit(servers, name, place)
        is_there = accounts.exists(name)
        deed: Deed = "account.rotate" if is_there else "account.add"
        with on_servers_record(servers, federation, deed, name, SETUP):
            password = accounts.rotate(name) if is_there else accounts.add(name)
            write_secret(kit / PASSWORD_FILE, password)
        out.print(f"site    {name}: kit in {place}", soft_wrap=True)
    if config.trust is None:
        return
    known = known_keys(servers)
    for name in (site for site in config.run.participants if known.in_force(site) is None):
        out.print(
            f"site    {name}: has no key yet: it runs gradualdiff site init, and you gradualdiff "
            f"sites key {name} --key KEY",
            soft_wrap=True,
        )
