"""``gradualdiff queues``: what waits on the broker, who reads it, and the dead letters."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from gradualdiff.cli.deeds import NO_REASON, ReasonOption, on_servers_record
from gradualdiff.cli.kits import Servers, open_servers
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
from shared.errors import BrokerError, BrokerUnavailableError, ConfigError, RunNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.liveness import RunStatus
    from coordinator.runs.newest_round import RoundNow
    from shared.brokers.rabbitmq import RabbitConnection

app = typer.Typer(help="Queues on the broker: list, peek, redrive, purge.", no_args_is_help=True)
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
REFUSED, EVENTS, SITE = "refused", "events", "site:"
PEEK_LIMIT = 10
SITE_PEEK_LIMIT = 1  # each look counts as a delivery, and ten of them are a refusal


@dataclass(frozen=True)
class QueueRow:
    """One queue. ``role``: coordinator, mirror, refused or site.

    ``ready`` None: there is no such queue. ``unacked`` None: nobody can say. The last four are a
    site's: ``online`` None if no coordinator can say.
    """

    queue: str
    role: str
    ready: int | None
    consumers: int | None
    unacked: int | None
    site: str | None = None
    online: bool | None = None
    last_seen: str | None = None
    waits_for: str | None = None


@dataclass(frozen=True)
class QueueList:
    """All queues of a run. ``dead_letters``: messages in the refused queue, of every run."""

    run: str
    dead_letters: int | None
    queues: list[QueueRow]


@app.command("list")
def list_(federation: FederationOption = DEFAULT_FEDERATION, as_json: JsonOption = False) -> None:
    """Each queue of the run: how much waits, who reads, and what each site still owes."""
    servers = open_servers(federation)
    listed = _list(servers)
    if as_json:
        print_json(listed)
        return
    rows = [
        (
            row.queue,
            "no queue" if row.ready is None else row.ready,
            row.consumers,
            "unknown" if row.unacked is None else row.unacked,
            _presence(row),
            row.waits_for,
        )
        for row in listed.queues
    ]
    columns = ("queue", "ready", "consumers", "unacked", "site", "awaited from it")
    print_table(f"Queues of run {listed.run}", columns, rows)
    if listed.dead_letters:
        console().print(
            f"{_letters(listed.dead_letters)}; look: gradualdiff queues peek", soft_wrap=True
        )


@app.command()
def peek(
    queue: Annotated[
        str,
        typer.Argument(
            metavar="QUEUE",
            help="refused, events, or site:NAME; or a queue's name as queues list prints it.",
        ),
    ] = REFUSED,
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="How many messages (default: 10; of a site's queue 1)."),
    ] = None,
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """Look at messages in a queue; they stay there. Signed URLs are never shown.

    QUEUE is refused (dead letters, with the reason), events (copies of what sites said last), or
    site:NAME. Looking at a site's queue counts as a delivery: a message that was delivered ten
    times is refused, so look at it once or twice, and rather while its participant is stopped.
    """
    from gradualdiff.cli.messages import rows_of, show_message, title_of
    from shared.topology import mirror_queue, site_queue

    servers = open_servers(federation)
    name = _queue_name(servers, queue)
    count = limit or (SITE_PEEK_LIMIT if name.startswith(site_queue("")) else PEEK_LIMIT)
    with _connect(servers) as broker:
        if name == mirror_queue(
            servers.config.run.name
        ):  # it is bounded, and what was said last stands at its end
            found = broker.peek(name, broker.depth(name))[-count:]
        else:
            found = broker.peek(name, count)
    messages = [show_message(body, sender, key) for key, sender, body in found]
    if as_json:
        print_json({"queue": name, "messages": messages})
        return
    if not messages:
        console().print(f"{name}: no message")
    for message in messages:
        print_table(title_of(message), ("field", "value"), list(rows_of(message)))


@app.command()
def redrive(
    yes: YesOption = False,
    reason: ReasonOption = NO_REASON,
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """Send dead letters back to the queue that they came from, once their cause is fixed.

    Each goes back in the name of the account that sent it, or stays. What a site sent can go back
    only if this account may speak for others: an operator gives it the tag for that long
    (rabbitmqctl set_user_tags ACCOUNT administrator impersonator). Otherwise restart the site's
    participant: the coordinator sends again all that is pending. What a site reported stays, since
    its word for the sender counts for nothing. What does not decode would only be refused again,
    and stays too.

    Each is published and confirmed before it is taken off: a crash in between doubles a message,
    which does no harm, and loses none. It may be given again.
    """
    from gradualdiff.cli.redrive import redrive as send_back
    from shared.topology import REFUSED_QUEUE

    servers = open_servers(federation)
    with _connect(servers) as broker, contextlib.ExitStack() as record:
        count = broker.depth(REFUSED_QUEUE)
        about = f"{REFUSED} {count}"
        if count:
            agree(f"Send {_letters(count)} back to where they came from?", yes=yes)
            record.enter_context(
                on_servers_record(servers, federation, "queue.redrive", about, reason)
            )
        done = send_back(broker)
    if as_json:
        print_json(done)
        return
    out = console()
    out.print(f"sent back {done.sent} of {_letters(done.sent + len(done.kept))}")
    for kept in done.kept:
        line = f"kept {kept.type or 'a message'} from {kept.sender or 'nobody'}: {kept.why}"
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def purge(
    yes: YesOption = False,
    reason: ReasonOption = NO_REASON,
    federation: FederationOption = DEFAULT_FEDERATION,
    as_json: JsonOption = False,
) -> None:
    """Drop all dead letters, of every run on this virtual host. They cannot be brought back."""
    from shared.topology import REFUSED_QUEUE

    servers = open_servers(federation)
    dropped = 0
    with _connect(servers) as broker:
        count = broker.depth(REFUSED_QUEUE)
        about = f"{REFUSED} {count}"
        if count:
            agree(f"Drop {_letters(count)} for ever?", yes=yes)
        # Not of what nobody was asked about: it may have come since, or not have been counted.
        if count or yes:
            with on_servers_record(servers, federation, "queue.purge", about, reason):
                dropped = broker.purge(REFUSED_QUEUE)
    if as_json:
        print_json({"dropped": dropped})
        return
    console().print(f"dropped {_letters(dropped)}")


# What the commands work with ---------------------------------------------------------------------


def _connect(servers: Servers) -> RabbitConnection:
    from shared.brokers.rabbitmq import connect
    from shared.credentials import broker_address

    return connect(broker_address(servers.broker, servers.folder))


def _queue_name(servers: Servers, queue: str) -> str:
    from shared.config import NAME_PATTERN
    from shared.topology import REFUSED_QUEUE, coordinator_queue, mirror_queue, site_queue

    run = servers.config.run.name
    if queue in (REFUSED, REFUSED_QUEUE):
        return REFUSED_QUEUE
    if queue in (EVENTS, mirror_queue(run)):
        return mirror_queue(run)
    for prefix in (SITE, site_queue("")):
        site = queue.removeprefix(prefix)
        if queue.startswith(prefix) and re.match(NAME_PATTERN, site):
            return site_queue(site)
    if queue == coordinator_queue(run):
        raise ConfigError(
            f"QUEUE: expected one that can be looked into, got {queue}, which the broker shows to "
            "its one reader only; give events, which holds copies of what is in it"
        )
    raise ConfigError(
        f"QUEUE: expected refused, events, site:NAME or a name that gradualdiff queues list "
        f"prints, got {queue!r}; give one"
    )


def _list(servers: Servers) -> QueueList:
    from coordinator.liveness import read_status
    from shared.topology import REFUSED_QUEUE, coordinator_queue, mirror_queue, site_queue

    run = servers.config.run.name
    now, status = _newest_round(servers), read_status(servers.store, run)
    unacked = _unacked(servers)
    with _connect(servers) as broker:

        def row(queue: str, role: str) -> QueueRow:
            ready, consumers = _count(broker, queue)
            return QueueRow(queue, role, ready, consumers, unacked(queue))

        rows = [
            row(coordinator_queue(run), "coordinator"),
            row(mirror_queue(run), "mirror"),
            row(REFUSED_QUEUE, "refused"),
        ]
        letters = rows[-1].ready
        rows += [
            _with_site(row(site_queue(site), "site"), site, now, status)
            for site in servers.config.run.participants
        ]
    return QueueList(run, letters, rows)


def _with_site(
    row: QueueRow, site: str, now: RoundNow | None, status: RunStatus | None
) -> QueueRow:
    from dataclasses import replace

    from coordinator.liveness import AT_THE_SITE, awaits_approval, is_away, moment
    from coordinator.runs.newest_round import awaited

    told = status.sites.get(site) if status else None
    away = is_away(site, status, time.time())
    waits = "nothing: the run has not begun" if now is None else awaited(now, site)
    if awaits_approval(site, status) and not waits.startswith("nothing"):
        waits = f"{waits}; it {AT_THE_SITE}"
    return replace(
        row,
        site=site,
        online=None if away is None else not away,
        last_seen=moment(told.seen) if told else None,
        waits_for=waits,
    )


def _newest_round(servers: Servers) -> RoundNow | None:
    """None before the coordinator's first start."""
    from coordinator.runs.newest_round import Follower

    try:
        return Follower(servers.store, servers.config.run.name).look()
    except RunNotFoundError:
        return None


def _count(broker: RabbitConnection, queue: str) -> tuple[int | None, int | None]:
    try:
        return broker.count(queue)
    except BrokerUnavailableError:
        raise
    except BrokerError:
        return None, None  # it is not there


def _unacked(servers: Servers) -> Callable[[str], int | None]:
    """Asks the management API, if there is one; its silence is a word on stderr, and no more."""
    from coordinator.accounts.broker_administration import ManagementAdmin, broker_admin
    from shared.credentials import broker_address

    if servers.broker.management_url is None:
        return lambda _queue: None
    admin = broker_admin(servers.broker, servers.folder)
    vhost = broker_address(servers.broker, servers.folder).vhost
    failed: list[BrokerError] = []

    def ask(queue: str) -> int | None:
        if failed or not isinstance(admin, ManagementAdmin):
            return None
        try:
            return admin.unacknowledged(vhost, queue)
        except BrokerError as error:
            failed.append(error)
            say(f"unacknowledged messages are unknown: {error}", stderr=True)
            return None

    return ask


def _presence(row: QueueRow) -> str | None:
    if row.site is None:
        return None
    if row.online is None or row.last_seen is None:
        return f"last heard {row.last_seen}" if row.last_seen else "not heard yet"
    return "online" if row.online else f"away since {row.last_seen}"


def _letters(count: int) -> str:
    return f"{count} dead letter" + ("" if count == 1 else "s")
