"""``gradualdiff sites``: the sites' accounts on the broker, and their onboarding kits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from gradualdiff.cli.deeds import NO_REASON, ReasonOption, on_servers_record
from gradualdiff.cli.kits import (
    PASSWORD_FILE,
    Certificate,
    Servers,
    accounts_of,
    declare_sites,
    open_servers,
    prepare_kit,
    site_url,
    write_secret,
)
from gradualdiff.cli.output import (
    DEFAULT_FEDERATION,
    FederationOption,
    JsonOption,
    agree,
    console,
    print_json,
    print_table,
    say,
)
from gradualdiff.cli.site_keys import enrol_key, keys_told, revoke_key
from shared.errors import BrokerError, ConfigError

if TYPE_CHECKING:
    from coordinator.accounts.site_accounts import SiteAccount

app = typer.Typer(
    help="Sites' broker accounts: add, list, rotate, renew, expire, remove, restore.",
    no_args_is_help=True,
)
DAY_SECONDS = 86_400.0
NameArgument = Annotated[str, typer.Argument(help="The site's name.")]
KitOption = Annotated[
    Path | None,
    typer.Option(
        "--kit",
        help="Folder of what the site needs (default: kits/NAME beside the federation.toml).",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option("--key", help="The public key that gradualdiff site init printed at the site."),
]


@app.command()
def add(
    name: NameArgument,
    kit: KitOption = None,
    key: KeyOption = None,
    valid_days: Annotated[
        int | None,
        typer.Option(min=1, max=36_500, help="Days until the account ends (default: never)."),
    ] = None,
    cert: Annotated[
        Path | None,
        typer.Option(help="The site's certificate (PEM), for a broker that demands one: a copy."),
    ] = None,
    cert_key: Annotated[
        Path | None,
        typer.Option(
            help="Its private key: a copy. Without it the site puts its own into the kit."
        ),
    ] = None,
    hospital: Annotated[
        bool,
        typer.Option(
            "--hospital",
            help="A kit with accept.approval and the gate of [privacy] on: a person decides there.",
        ),
    ] = False,
    reason: ReasonOption = NO_REASON,
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """Give a site an account and a queue, and write the kit that it begins with."""
    from shared.trust.keys import PublicKey

    servers = open_servers(federation)
    accounts = accounts_of(servers)
    accounts.check_new(name)
    if cert is None and cert_key is not None:
        raise ConfigError("--cert-key: expected --cert with it, got none; give both, or --cert")
    certificate = None if cert is None else Certificate(cert, cert_key)
    if certificate is not None:
        certificate.check(servers.broker)  # before anything is put on record
    if key is not None:
        with on_servers_record(servers, federation, "key.enrol", _told_key(name, key), reason):
            enrol_key(servers, name, PublicKey(key), "added")
    with on_servers_record(servers, federation, "kit.write", name, reason):
        folder = prepare_kit(servers, name, kit, certificate, hospital=hospital)
    # The queue first: whatever fails here, the same command can be given again.
    declare_sites(servers, [name])
    with on_servers_record(servers, federation, "account.add", name, reason):
        write_secret(folder / PASSWORD_FILE, accounts.add(name, _end(valid_days)))
    _tell(servers, name, folder, "added", as_json=as_json)


@app.command()
def rotate(
    name: NameArgument,
    kit: KitOption = None,
    reason: ReasonOption = NO_REASON,
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """Give a site another password; the old one, and who is connected with it, is cut off.

    In a kit that is there only the password is written anew.
    """
    from coordinator.accounts.site_accounts import unknown_site

    servers = open_servers(federation)
    accounts = accounts_of(servers)
    if not accounts.exists(name):
        raise unknown_site(name)
    folder = prepare_kit(servers, name, kit)
    with on_servers_record(servers, federation, "account.rotate", name, reason):
        write_secret(folder / PASSWORD_FILE, accounts.rotate(name))
    _tell(servers, name, folder, "rotated", as_json=as_json)


@app.command()
def remove(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    reason: ReasonOption = NO_REASON,
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """Take a site's account away and cut it off. Its queue and its results stay."""
    servers = open_servers(federation)
    _find(servers, name)
    agree(f"Remove the account of site {name} and cut it off now?", yes=yes)
    with on_servers_record(servers, federation, "account.remove", name, reason):
        accounts_of(servers).remove(name)
    if servers.config.trust is not None:
        with on_servers_record(servers, federation, "key.revoke", name, reason):
            revoke_key(servers, name, "the site was removed")
    if as_json:
        print_json({"site": name, "state": "removed"})
        return
    console().print(f"site {name} is removed; its queue stays")


@app.command("key")
def key_(
    name: NameArgument,
    key: KeyOption = None,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="End the site's key without a new one.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why; it goes on record.")] = "",
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """Enrol a site's public key, in place of the one that it had, or revoke it. Without: show.

    Compare the fingerprint with the one that the site reads out to you. A key that is replaced or
    revoked counts for nothing within seconds; what it signed before stays proven.
    """
    from shared.trust.keys import PublicKey

    servers = open_servers(federation)
    if revoke and (key is not None or not reason):
        raise ConfigError(
            "--revoke: expected --reason and no --key, got otherwise; a new key by itself ends the "
            "old one"
        )
    if key is not None:
        with on_servers_record(servers, federation, "key.enrol", _told_key(name, key), reason):
            enrol_key(servers, name, PublicKey(key), reason or "enrolled")
    if revoke:
        with on_servers_record(servers, federation, "key.revoke", name, reason):
            if revoke_key(servers, name, reason) is None:
                raise ConfigError(
                    f"site {name}: expected a key in force, got none; nothing is revoked"
                )
    told = keys_told(servers, name)
    if as_json:
        print_json(told)
        return
    names = ("fingerprint", "enrolled", "revoked", "reason")
    print_table(f"Keys of {name}", names, [[one[column] for column in names] for one in told])


@app.command()
def renew(
    name: NameArgument,
    valid_days: Annotated[
        int,
        typer.Option(min=0, max=36_500, help="Days from now until it ends; 0: it does not end."),
    ],
    reason: ReasonOption = NO_REASON,
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """Let a site's account last longer (or shorter), with the password and kit that it has."""
    from coordinator.liveness import moment

    servers = open_servers(federation)
    _find(servers, name)
    expires_at = _end(valid_days)
    with on_servers_record(servers, federation, "account.renew", f"{name} {valid_days}", reason):
        accounts_of(servers).renew(name, expires_at)
    if as_json:
        print_json({"site": name, "state": "renewed", "expires": moment(expires_at)})
        return
    until = f"lasts until {moment(expires_at)}" if expires_at else "does not end by itself"
    console().print(f"the account of {name} {until}", highlight=False)


@app.command()
def expire(
    reason: ReasonOption = NO_REASON,
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """Cut off every site whose account has ended: for cron. The coordinator refuses them anyway."""
    servers = open_servers(federation)
    with on_servers_record(servers, federation, "account.expire", "all sites", reason):
        gone = accounts_of(servers).expire()
    if as_json:
        print_json({"expired": gone})
        return
    console().print(f"cut off {len(gone)} accounts that had ended: {', '.join(gone) or 'none'}")


@app.command()
def restore(
    reason: ReasonOption = NO_REASON,
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """Make all accounts and queues anew on a broker that lost them; passwords stay as they are."""
    servers = open_servers(federation)
    with on_servers_record(servers, federation, "account.restore", "all sites", reason):
        restored = accounts_of(servers).restore()
        declare_sites(servers, restored)
    if as_json:
        print_json({"restored": restored})
        return
    console().print(f"restored {len(restored)} accounts: {', '.join(restored) or 'none'}")


@app.command("list")
def list_(federation: FederationOption = DEFAULT_FEDERATION, as_json: JsonOption = False) -> None:
    """Every site: its account, whether it listens now, and when it was last seen.

    Also which of the run's limits it is over, and how much the coordinator dropped.
    """
    from coordinator.accounts.site_accounts import list_accounts

    servers = open_servers(federation)
    sites = _looked_at(servers, list_accounts(servers.store))
    if as_json:
        print_json(sites)
        return
    told = ("site", "account", "version", "created", "ends", "listens", "waiting", "last seen")
    keys = ("site", "state", "version", "created", "expires", "listens", "waiting", "last_seen")
    rows = [[_told(site[key]) for key in (*keys, "over")] for site in sites]
    print_table("Sites", (*told, _over_in(servers)), rows)


@app.command()
def show(
    name: NameArgument,
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """One site: its account, queue and rights, and when it was last seen."""
    from shared.topology import site_queue, site_rights

    servers = open_servers(federation)
    (site,) = _looked_at(servers, [_find(servers, name)])
    rights = site_rights(name)
    site |= {
        "queue": site_queue(name),
        "may_read": rights.read.pattern,
        "may_write": rights.write.pattern,
        "may_publish_as": rights.topic_write.pattern,
        "keys": keys_told(servers, name),
    }
    if as_json:
        print_json(site)
        return
    names = {key: key.replace("_", " ") for key in site} | {"over": _over_in(servers)}
    site["keys"] = ", ".join(
        f"{one['fingerprint']}{' (revoked)' if one['revoked'] else ''}" for one in site["keys"]
    )
    facts = [(names[key], _told(value)) for key, value in site.items()]
    print_table(f"Site {name}", ("fact", "value"), facts)


# What the commands work with ---------------------------------------------------------------------


def _find(servers: Servers, name: str) -> SiteAccount:
    from coordinator.accounts.site_accounts import find_account, unknown_site

    found = find_account(servers.store, name)
    if found is None:
        raise unknown_site(name)
    return found


def _looked_at(servers: Servers, accounts: list[SiteAccount]) -> list[dict[str, Any]]:
    """Each site as shown, without its hash. ``listens`` None: the broker was not to be asked."""
    from coordinator.liveness import moment, read_status

    queues = _queues(servers, [account.site for account in accounts])
    status = read_status(servers.store, servers.config.run.name)
    told = status.sites if status else {}
    over = status.over if status else {}
    return [
        {
            "site": account.site,
            "state": "expired" if _is_expired(account) else account.state,
            "version": account.version,
            "created": moment(account.created),
            "changed": moment(account.changed),
            "expires": moment(account.expires_at),
            "listens": None if account.site not in queues else queues[account.site][1] > 0,
            "waiting": None if account.site not in queues else queues[account.site][0],
            "last_seen": moment(told[account.site].seen if account.site in told else None),
            "over": over.get(account.site, {}),
        }
        for account in accounts
    ]


def _told_key(name: str, key: str) -> str:
    from shared.trust.keys import PublicKey

    return f"{name} {PublicKey(key).fingerprint}"


def _is_expired(account: SiteAccount) -> bool:
    return account.state == "active" and bool(account.ended(time.time()))


def _end(valid_days: int | None) -> float | None:
    return time.time() + valid_days * DAY_SECONDS if valid_days else None


def _queues(servers: Servers, sites: list[str]) -> dict[str, tuple[int, int]]:
    """Waiting messages and consumers by site; a site without a queue is left out.

    The records are worth a look without the broker too: then a word on stderr, and nothing.
    """
    from shared.brokers.rabbitmq import connect
    from shared.credentials import broker_address
    from shared.errors import BrokerUnavailableError
    from shared.topology import site_queue

    found: dict[str, tuple[int, int]] = {}
    if not sites:
        return found
    try:
        with connect(broker_address(servers.broker, servers.folder)) as connection:
            for site in sites:
                try:
                    found[site] = connection.count(site_queue(site))
                except BrokerUnavailableError:
                    raise
                except BrokerError:
                    continue  # the queue is not there
    except BrokerError as error:
        say(f"the broker cannot say who listens: {error}", stderr=True)
    return found


def _over_in(servers: Servers) -> str:
    return f"over in {servers.config.run.name}"  # limits are a run's, accounts are not


def _told(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in sorted(value.items()))
    return value


def _tell(servers: Servers, name: str, folder: Path, done: str, *, as_json: bool) -> None:
    from shared.credentials import is_loopback

    url = site_url(servers.broker, name)
    if as_json:
        print_json({"site": name, "state": done, "kit": str(folder), "url": url})
        return
    out = console()
    out.print(f"site {name} is {done}; its kit is in {folder}", soft_wrap=True, markup=False)
    out.print(f"next: deliver it to the site over a secure channel; {PASSWORD_FILE} is a secret")
    if is_loopback(urlsplit(url).hostname or ""):
        out.print(
            "note: its broker address is this machine's own; for a site elsewhere set "
            "broker.site_url to HOST:PORT as sites reach it, and rotate into a new kit",
            soft_wrap=True,
        )
