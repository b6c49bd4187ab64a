"""Every exchange, queue, routing key and object key, in one place, as data.

Nothing here talks to a broker or a store; adapters carry a :class:`Topology` out, and the command
line and the tests read the same names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SITES_EXCHANGE = "gradualdiff.sites"
EVENTS_EXCHANGE = "gradualdiff.events"
REFUSED_EXCHANGE = "gradualdiff.refused"
REFUSED_QUEUE = "gradualdiff.refused"
REFUSED_KEY = "refused"
REFUSED_BYTES = 983_040  # of a refused message's bytes are kept: a refusal is a message itself
COORDINATOR = "coordinator"
ANY_RUN = "any"

COORDINATOR_QUEUE_LENGTH = 20_000
COORDINATOR_QUEUE_BYTES = 64 * 1024 * 1024
SITE_QUEUE_LENGTH = 1_000
REFUSED_QUEUE_LENGTH = 10_000
MIRROR_QUEUE_LENGTH = 1_000
MIRROR_QUEUE_BYTES = 64 * 1024 * 1024
# What sites say, but for the chatter of work in progress.
MIRRORED = (
    "ready",
    "declined",
    "requested",
    "submitted",
    "unmasked",
    "signed",
    "failed",
    "evaluated",
)
MIRRORED_ANY = ("online", "refused")
DELIVERY_LIMIT = 20


@dataclass(frozen=True)
class Exchange:
    """``kind`` is ``direct`` or ``topic``; both durable."""

    name: str
    kind: str


@dataclass(frozen=True)
class Queue:
    """A durable queue. ``max_length``, ``max_bytes``: what it holds (None: no limit).

    Beyond that the oldest message is dropped, or with ``refuses`` the newest is not taken.
    ``delivery_limit`` None: messages may come back for ever, so that people may look at them.
    ``remade``: all that is in it is told again, so one of an earlier release is deleted.
    """

    name: str
    max_length: int | None = None
    max_bytes: int | None = None
    refuses: bool = False
    remade: bool = False
    single_active_consumer: bool = False
    delivery_limit: int | None = DELIVERY_LIMIT


@dataclass(frozen=True)
class Binding:
    """``routing_key`` may hold ``*`` (one word) on a topic exchange."""

    exchange: str
    queue: str
    routing_key: str


@dataclass(frozen=True)
class Topology:
    """All that a run needs on the broker."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]


@dataclass(frozen=True)
class Rights:
    """What one account may do, as patterns for whole names (RabbitMQ's four permissions)."""

    configure: re.Pattern[str]
    write: re.Pattern[str]
    read: re.Pattern[str]
    topic_write: re.Pattern[str]


def run_topology(run: str, sites: tuple[str, ...]) -> Topology:
    """What the coordinator of ``run`` declares when it connects; repeatable."""
    queues = [
        Queue(
            coordinator_queue(run),
            max_length=COORDINATOR_QUEUE_LENGTH,
            max_bytes=COORDINATOR_QUEUE_BYTES,
            refuses=True,
            remade=True,
            single_active_consumer=True,
        ),
        Queue(REFUSED_QUEUE, max_length=REFUSED_QUEUE_LENGTH, delivery_limit=None),
        Queue(
            mirror_queue(run),
            max_length=MIRROR_QUEUE_LENGTH,
            max_bytes=MIRROR_QUEUE_BYTES,
            remade=True,
            delivery_limit=None,
        ),
        *(Queue(site_queue(site), max_length=SITE_QUEUE_LENGTH) for site in sites),
    ]
    bindings = [
        Binding(EVENTS_EXCHANGE, coordinator_queue(run), f"{run}.*.*"),
        Binding(EVENTS_EXCHANGE, coordinator_queue(run), f"{ANY_RUN}.*.*"),
        *(Binding(EVENTS_EXCHANGE, mirror_queue(run), f"{run}.*.{word}") for word in MIRRORED),
        *(Binding(EVENTS_EXCHANGE, mirror_queue(run), f"{ANY_RUN}.*.{w}") for w in MIRRORED_ANY),
        Binding(REFUSED_EXCHANGE, REFUSED_QUEUE, REFUSED_KEY),
        *(Binding(SITES_EXCHANGE, site_queue(site), site) for site in sites),
    ]
    return Topology(
        exchanges=(
            Exchange(SITES_EXCHANGE, "direct"),
            Exchange(EVENTS_EXCHANGE, "topic"),
            Exchange(REFUSED_EXCHANGE, "direct"),
        ),
        queues=tuple(queues),
        bindings=tuple(bindings),
    )


def site_rights(site: str) -> Rights:
    """A site reads its own queue and publishes as itself; it declares nothing."""
    name = re.escape(site)
    return Rights(
        configure=re.compile(r"^$"),
        write=re.compile(rf"^{re.escape(EVENTS_EXCHANGE)}$"),
        read=re.compile(rf"^{re.escape(site_queue(site))}$"),
        topic_write=re.compile(rf"^[a-z0-9-]+\.{name}\.[a-z_]+$"),
    )


def coordinator_rights() -> Rights:
    """The coordinator declares, writes to and reads what is ours, and nothing else on its broker.

    Of its own exchange for events any key: only its own queues are bound there.
    """
    ours = re.compile(r"^gradualdiff\..+$")
    return Rights(configure=ours, write=ours, read=ours, topic_write=re.compile(r"^.*$"))


def site_queue(site: str) -> str:
    """The queue a site reads."""
    return f"gradualdiff.site.{site}"


def coordinator_queue(run: str) -> str:
    """The queue a run's coordinator reads."""
    return f"gradualdiff.coordinator.{run}"


def mirror_queue(run: str) -> str:
    """Copies of the newest events to a run's coordinator, for people to look at."""
    return f"gradualdiff.mirror.{run}"


def event_key(run: str, site: str, word: str) -> str:
    """The routing key of a site's (or, with ``coordinator`` as site, the coordinator's) event."""
    return f"{run}.{site}.{word}"


def site_of_key(routing_key: str) -> str:
    """The site that a routing key on the events exchange speaks for; '' when it has none."""
    parts = routing_key.split(".")
    return parts[1] if len(parts) == 3 else ""


def status_key(run: str) -> str:
    """What the coordinator last saw; written again and again, outside the run, and no record."""
    return f"status/{run}.json"


def account_prefix() -> str:
    """Every account record there is."""
    return "sites/"


def account_key(site: str) -> str:
    """A site's broker account: its password's hash, to be able to make it again."""
    return f"{account_prefix()}{site}.json"


def site_keys_prefix(fingerprint: str) -> str:
    """The sites' public keys, as the coordinator with this key enrolled them; numbered from 1."""
    return f"keys/{fingerprint.replace(' ', '')}/"


def site_keys_key(fingerprint: str, number: int) -> str:
    """One enrolment or revocation."""
    return f"{site_keys_prefix(fingerprint)}{number:06d}.json"


def audit_prefix() -> str:
    """All that operators did, of every run and site."""
    return "audit/"


def audit_key(number: int) -> str:
    """What an operator was about to do: the first is 1, and no number is left out."""
    return f"{audit_prefix()}{number:08d}.json"


# Object keys ---------------------------------------------------------------------------------


def run_prefix(run: str) -> str:
    """Everything of one run."""
    return f"runs/{run}/"


def federation_key(run: str) -> str:
    """The resolved config."""
    return f"runs/{run}/federation.json"


def member_key(run: str, site: str) -> str:
    """A site that is part of the run."""
    return f"runs/{run}/members/{site}.json"


def rejoined_key(run: str, site: str, number: int) -> str:
    """A further word of a site that is fixed; the first one is its member's record."""
    return f"runs/{run}/rejoined/{site}/{number:05d}.json"


def declined_key(run: str, site: str) -> str:
    """A site that will not take part, and why."""
    return f"runs/{run}/declined/{site}.json"


def adapter_key(run: str, adapter_sha: str, file: str = "adapter_model.safetensors") -> str:
    """The storage key of a global adapter: a file of the PEFT directory named by its identity."""
    return f"runs/{run}/adapters/{adapter_sha}/{file}"


def bases_prefix(run: str) -> str:
    """All frozen bases of a run's core adapters."""
    return f"runs/{run}/bases/"


def bases_key(run: str, sha256: str) -> str:
    """The frozen bases of a run's core adapters, named by their sha256."""
    return f"{bases_prefix(run)}{sha256}"


def server_state_prefix(run: str) -> str:
    """All that the coordinator alone goes on from."""
    return f"runs/{run}/server_state/"


def server_state_key(run: str, sha256: str) -> str:
    """What the coordinator alone goes on from after a round, named by its sha256.

    The state of the server's optimiser, and with ``codec.down`` the exact adapter.
    """
    return f"{server_state_prefix(run)}{sha256}"


def updates_prefix(run: str) -> str:
    """Every update that led from one global adapter to the next."""
    return f"runs/{run}/updates/"


def update_key(run: str, sha256: str) -> str:
    """An update as its round made it, named by its sha256."""
    return f"{updates_prefix(run)}{sha256}"


def deltas_prefix(run: str, round_number: int | None = None) -> str:
    """All deltas that were sent, or those for a round."""
    prefix = f"runs/{run}/deltas/"
    return prefix if round_number is None else f"{prefix}{round_number:05d}/"


def delta_key(run: str, round_number: int, site: str, sha256: str) -> str:
    """A delta as its site sent it; it counts once a record names it."""
    return f"{deltas_prefix(run, round_number)}{site}-{sha256}.safetensors"


def round_of_delta(key: str) -> int:
    """The round that a delta was sent for."""
    return int(key.split("/")[3])


def site_and_sha_of_delta(key: str) -> tuple[str, str]:
    """The site that was granted a delta's key, and the sha256 of what is to lie there."""
    site, _, sha = key.rpartition("/")[2].removesuffix(".safetensors").rpartition("-")
    return site, sha


AGAIN = "again"


def round_prefix(run: str, round_number: int, attempt: int = 1) -> str:
    """The records of one round; of a further attempt at it those that are its own."""
    again = f"{AGAIN}/{attempt:03d}/" if attempt > 1 else ""
    return f"runs/{run}/rounds/{round_number:05d}/{again}"


def round_key(run: str, round_number: int, record: str, attempt: int = 1) -> str:
    """``opened``, ``closing`` or ``closed`` of one round."""
    return f"{round_prefix(run, round_number, attempt)}{record}.json"


def accepted_key(run: str, round_number: int, site: str, attempt: int = 1) -> str:
    """A valid delta of a site in a round."""
    return f"{round_prefix(run, round_number, attempt)}accepted/{site}.json"


def refused_key(run: str, round_number: int, site: str, sha256: str) -> str:
    """A delta that failed its checks, and why."""
    return f"{round_prefix(run, round_number)}refused/{site}-{sha256}.json"


def failed_key(run: str, round_number: int, site: str, attempt: int) -> str:
    """A local training that failed, and why."""
    return f"{round_prefix(run, round_number)}failed/{site}-{attempt:03d}.json"


def unmasked_key(run: str, round_number: int, site: str, attempt: int = 1) -> str:
    """What a site revealed of the masks of a round's sum."""
    return f"{round_prefix(run, round_number, attempt)}unmasked/{site}.json"


def evaluated_key(run: str, round_number: int, site: str) -> str:
    """A site's held-out loss of the adapter that a round produced."""
    return f"{round_prefix(run, round_number)}evaluated/{site}.json"


def finished_key(run: str) -> str:
    """The end of the run."""
    return f"runs/{run}/finished.json"


def origin_key(run: str) -> str:
    """Where a branch comes from; there before the run begins."""
    return f"runs/{run}/origin.json"


def control_prefix(run: str) -> str:
    """All that operators asked of the run."""
    return f"runs/{run}/control/"


def control_key(run: str, number: int) -> str:
    """What an operator asked of the run: the first is 1, and no number is left out."""
    return f"{control_prefix(run)}{number:05d}.json"


def pruned_prefix(run: str) -> str:
    """All that was deleted on purpose."""
    return f"runs/{run}/pruned/"


def pruned_key(run: str, number: int) -> str:
    """Which objects were deleted on purpose, written before they were."""
    return f"{pruned_prefix(run)}{number:05d}.json"


def links_prefix(run: str) -> str:
    """The chain of links: what proves that no record was dropped, altered or swapped."""
    return f"runs/{run}/chain/"


def link_key(run: str, number: int) -> str:
    """A link of the chain that names every record: the first is 1, and none is left out."""
    return f"{links_prefix(run)}{number:08d}.json"


INBOX = "inbox/"  # RUN/ROUND/SITE/SHA256/CHUNK; nothing is committed by what lies there


def deleting_key(run: str) -> str:
    """That the whole run is being deleted; the last of its objects that goes."""
    return f"runs/{run}/deleting.json"


def inbox_prefix(run: str, round_number: int | None = None) -> str:
    """All that sites upload by way of the inbox, or all in a round."""
    prefix = f"{INBOX}{run}/"
    return prefix if round_number is None else f"{prefix}{round_number:05d}/"


def round_of_inbox(key: str) -> int:
    """The round that an inbox object was uploaded for."""
    return int(key.split("/")[2])


def site_of_inbox(key: str) -> str:
    """The site that was granted an inbox object."""
    return key.split("/")[3]


def inbox_key(run: str, round_number: int, site: str, sha256: str, chunk: int) -> str:
    """Where a site uploads one chunk that may not go to its delta's key; outside the run."""
    return f"{inbox_prefix(run, round_number)}{site}/{sha256}/{chunk:05d}"
