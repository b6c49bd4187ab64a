"""Seconds of a round with a thousand participants, and whether the coordinator's memory stays flat.

A real coordinator process, a real RabbitMQ and a real S3 server, and one queue for each
participant. The participants' side of the protocol runs in this one process: it reads all their
queues over one connection, answers under each one's name (the coordinator's account is tagged
``impersonator`` for that, so the broker lets it say any ``user_id``), and its threads upload every
delta by its presigned URL. The adapter has 64 values, so what is measured is the protocol: six
messages a participant and round, a delta checked and stored, a record.

Baselines, in the same run on the same servers:

- ``messages``: as many messages as a round sends, published one by one, each confirmed, to as many
  queues of the same kind, and consumed and acknowledged meanwhile; plain pika, a thread each.
- ``puts``: as many presigned PUTs of the same small objects by the same threads.

    python benchmarks/thousand_participants.py [--participants 1000 ...] [--rounds 6]

Several numbers of participants are measured one after another, each on fresh servers; the last
lines are a table over them, with the coordinator's cost.

A round's seconds are from its ``opened`` record to the next one's. ``--rounds 20`` may take a
quarter of an hour on two cores. Starts its own servers through ``tests/servers`` unless they are
named. Needs Linux and RabbitMQ installed. Aim: the coordinator's memory after the last round as
after the second.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import queue
import statistics
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pika
import urllib3
from round_over_the_wire import listed, spent, told
from wire_federation import Federation
from wire_servers import (
    PASSWORD,
    Servers,
    add_server_options,
    end_on_signals,
    memory_mb,
    servers,
)

from shared import topology
from shared.protocol import wire
from shared.protocol.events import (
    DeltaAnswered,
    DeltaSubmitted,
    Event,
    ParticipantReady,
    RoundClosed,
    RoundStarted,
    RunAnnounced,
    RunFinished,
    SiteOnline,
    UploadGranted,
    UploadRequested,
)
from shared.protocol.manifest import LocalMetrics, Manifest, Numerics, TensorSpec
from shared.tensors.delta_file import DeltaHeader, write_delta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pika.adapters.blocking_connection import BlockingChannel

MANIFEST = Manifest(
    tensors=(
        TensorSpec(name="layer.lora_A.weight", shape=(4, 8), init="kaiming_uniform"),
        TensorSpec(name="layer.lora_B.weight", shape=(8, 4), init="zeros"),
    ),
    target_modules=("layer",),
)
NUMERICS = Numerics(
    versions={}, device="cpu", cpu_capability="any", cpu_threads=1, compute_dtype="float32"
)
MESSAGES = 6  # started, requested, granted, submitted, answered, closed
THREADS = 8
RUN = "thousand"


def site_name(number: int) -> str:
    """All of one length, so that one delta becomes another's by exchanging the name."""
    return f"site-{number:05d}"


class Crowd:
    """The participants' side of the protocol, all of them in one process."""

    def __init__(self, place: Servers, federation: Federation, coordinator: int) -> None:
        self._place = place
        self._federation = federation
        self._coordinator = coordinator
        self._folder = federation.folder
        self._http = urllib3.PoolManager(maxsize=THREADS, retries=urllib3.Retry(3))
        self._uploads = ThreadPoolExecutor(THREADS, "upload")
        self._outbox: queue.SimpleQueue[tuple[str, Event] | None] = queue.SimpleQueue()
        self._deltas: dict[tuple[str, str], bytes] = {}
        self._templates: dict[int, bytes] = {}
        self._trouble: list[str] = []
        self.counts: Counter[str] = Counter()
        self.memory: dict[int, float] = {}
        self._closed: Counter[int] = Counter()
        self._finished = 0

    def work(self) -> None:
        """Answer everything until every participant has heard of the end."""
        sender = threading.Thread(target=self._send, daemon=True)
        sender.start()
        connection = connect(self._place, RUN)
        channel = connection.channel()
        channel.basic_qos(prefetch_count=20)
        for site in self._federation.sites:
            name = topology.site_queue(site)
            channel.basic_consume(
                name,
                lambda ch, method, _properties, body, site=site: self._take(ch, method, body, site),
            )
        for site in self._federation.sites:
            self._say(site, SiteOnline())
        next_look = 0.0
        while self._finished < len(self._federation.sites):
            connection.process_data_events(0.5)
            if self._trouble:
                raise SystemExit(self._trouble[0])
            if time.monotonic() > next_look:
                self._federation.alive()
                next_look = time.monotonic() + 2.0
        self._outbox.put(None)
        sender.join()
        self._uploads.shutdown()
        connection.close()

    def _take(self, channel: BlockingChannel, method: Any, body: bytes, site: str) -> None:
        event = wire.decode(body).event
        self.counts[type(event).__name__] += 1
        match event:
            case RunAnnounced():
                self._join(site, event)
            case RoundStarted():
                self._train(site, event)
            case UploadGranted():
                self._uploads.submit(self._upload, site, event)
            case DeltaAnswered() if event.verdict != "accepted":
                self._trouble.append(f"{site}: {event.verdict}: {event.reason}")
            case RoundClosed():
                self._close(event.round)
            case RunFinished():
                self._finished += 1
        channel.basic_ack(method.delivery_tag)

    def _join(self, site: str, event: RunAnnounced) -> None:
        self._say(
            site,
            ParticipantReady(
                run=event.run,
                config_digest=event.config_digest,
                manifest=MANIFEST,
                fingerprint="f" * 64,
                numerics=NUMERICS,
                examples=1,
            ),
        )

    def _train(self, site: str, event: RoundStarted) -> None:
        data = self._delta(site, event)
        sha = hashlib.sha256(data).hexdigest()
        self._deltas[site, sha] = data
        self._source = event.source_sha
        wanted = UploadRequested(
            run=event.run, round=event.round, sha=sha, size=len(data), creates=True
        )
        self._say(site, wanted)

    def _delta(self, site: str, event: RoundStarted) -> bytes:
        """One file a round is written, and the name in it exchanged: a crowd must be cheap."""
        if event.round not in self._templates:
            path = self._folder / "template"
            header = DeltaHeader.of(
                event.codec, run=event.run, number=event.round, site=site_name(0),
                source_sha=event.source_sha,
            )  # fmt: skip
            import numpy as np

            draw = np.random.default_rng(event.round)
            write_delta(
                path, MANIFEST, event.codec, header,
                lambda spec: draw.standard_normal(spec.shape, np.float32), event.seed,
            )  # fmt: skip
            self._templates = {event.round: path.read_bytes()}
        return self._templates[event.round].replace(site_name(0).encode(), site.encode(), 1)

    def _upload(self, site: str, event: UploadGranted) -> None:
        data = self._deltas[site, event.sha]
        for number, url in event.urls.items():
            start = number * event.chunk_size
            body = data[start : start + event.chunk_size]
            answer = self._http.request("PUT", url, body=body, headers={"If-None-Match": "*"})
            if answer.status != 200:
                self._trouble.append(f"{site}: a PUT was answered with HTTP {answer.status}")
                return
        submitted = DeltaSubmitted(
            run=event.run,
            round=event.round,
            source_sha=self._source,
            sha=event.sha,
            size=len(data),
            examples=1,
            tokens=1,
            metrics=LocalMetrics(steps=1),
        )
        self._say(site, submitted)

    def _close(self, number: int) -> None:
        self._closed[number] += 1
        if self._closed[number] == 1:
            self.memory[number] = memory_mb("VmRSS", self._coordinator)
            self._deltas.clear()
            print(f"  round {number} closed; coordinator {self.memory[number]:.1f} MB", flush=True)

    def _say(self, site: str, event: Event) -> None:
        self._outbox.put((site, event))

    def _send(self) -> None:
        """Publishes in the order of the outbox; pika's connections know one thread each.

        Confirms are not waited for one by one: each of a thousand real participants waits for its
        own only. ``mandatory`` and the coordinator's counting of the round show what is lost.
        """
        connection = connect(self._place, RUN)
        channel = connection.channel()
        while True:
            try:
                item = self._outbox.get(timeout=5.0)
            except queue.Empty:
                connection.process_data_events(0)  # heartbeats
                continue
            if item is None:
                break
            site, event = item
            self.counts[type(event).__name__] += 1
            run = topology.ANY_RUN if isinstance(event, SiteOnline) else RUN
            channel.basic_publish(
                topology.EVENTS_EXCHANGE,
                topology.event_key(run, site, event.word),
                wire.encode(event, time.time()),
                pika.BasicProperties(delivery_mode=2, user_id=site),
                mandatory=True,
            )
        connection.close()


def connect(place: Servers, vhost: str) -> pika.BlockingConnection:
    """A plain connection as the account that may speak for all."""
    return pika.BlockingConnection(
        pika.ConnectionParameters(
            place.host, place.port, vhost, pika.PlainCredentials("coordinator", PASSWORD),
            heartbeat=60,
        )
    )  # fmt: skip


# The baselines -----------------------------------------------------------------------------------


def bare_messages(place: Servers, sites: Sequence[str], count: int) -> float:
    """Seconds for ``count`` messages: two of three to the sites' queues, the rest to one queue.

    Each is confirmed before the next; a second connection consumes them meanwhile.
    """
    from shared.brokers.rabbitmq import connect as product_connect

    place.new_vhost("bare", "administrator,impersonator")
    with product_connect(address(place, "bare")) as connection:
        connection.declare(topology.run_topology("bare", tuple(sites)))
    body = b"x" * 400
    ready = threading.Event()

    def consume() -> None:
        connection = connect(place, "bare")
        channel, left = connection.channel(), [count]
        channel.basic_qos(prefetch_count=20)

        def take(_channel: object, method: Any, _properties: object, _body: bytes) -> None:
            channel.basic_ack(method.delivery_tag)
            left[0] -= 1

        for site in sites:
            channel.basic_consume(topology.site_queue(site), take)
        channel.basic_consume(topology.coordinator_queue("bare"), take)
        ready.set()
        while left[0]:
            connection.process_data_events(0.5)
        ended.append(time.perf_counter())
        connection.close()

    ended: list[float] = []
    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    ready.wait()
    connection = connect(place, "bare")
    channel = connection.channel()
    channel.confirm_delivery()
    start = time.perf_counter()
    for number in range(count):
        site = sites[number // 3 % len(sites)]
        to_site = number % 3
        channel.basic_publish(
            topology.SITES_EXCHANGE if to_site else topology.EVENTS_EXCHANGE,
            site if to_site else topology.event_key("bare", site, "requested"),
            body,
            pika.BasicProperties(delivery_mode=2, user_id="coordinator" if to_site else site),
            mandatory=True,
        )
    consumer.join()
    connection.close()
    # A virtual host with thousands of queues takes the broker longer than its API answers.
    with product_connect(address(place, "bare")) as connection:
        for site in sites:
            connection.delete(topology.site_queue(site))
    place.api("DELETE", "vhosts/bare")
    return ended[0] - start


def address(place: Servers, vhost: str) -> Any:
    """For the product's own connection."""
    from shared.credentials import BrokerAddress

    return BrokerAddress(place.host, place.port, vhost, "coordinator", PASSWORD, tls=False)


def bare_puts(place: Servers, sites: Sequence[str], size: int) -> float:
    """Seconds for one presigned PUT of ``size`` bytes a site."""
    store = place.store("bare")
    urls = [store.sign_put(f"delta/{site}", time.time() + 3600, size) for site in sites]
    http, data = urllib3.PoolManager(maxsize=THREADS), b"x" * size
    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for answer in pool.map(lambda url: http.request("PUT", url, body=data), urls):
            if answer.status != 200:
                raise SystemExit(f"a bare PUT was answered with HTTP {answer.status}")
    return time.perf_counter() - start


# The measurement ---------------------------------------------------------------------------------


class Figures(NamedTuple):
    """Of one number of participants; memory and processor time are the coordinator's."""

    participants: int
    round_seconds: float
    floor_seconds: float
    peak_mb: float
    cpu_seconds: float

    def line(self) -> str:
        """One line of the table."""
        each = 1000 * self.cpu_seconds / self.participants
        return (
            f"{self.participants:12} {self.round_seconds:9.2f} {self.floor_seconds:9.2f} "
            f"{self.round_seconds / self.floor_seconds:7.2f} {self.peak_mb:9.0f} {each:16.2f}"
        )


HEAD = "participants   round s   floor s   ratio   peak MB   CPU ms a participant and round"


def measure(place: Servers, folder: Path, participants: int, rounds: int) -> Figures:
    """Baselines, the run, baselines again; print what came."""
    sites = [site_name(number) for number in range(participants)]
    count = MESSAGES * participants
    print(f"{participants} participants, {rounds} rounds, {count} messages a round", flush=True)
    messages, puts = [bare_messages(place, sites, count)], [bare_puts(place, sites, 800)]
    print(f"  bare: messages {messages[0]:.2f} s, puts {puts[0]:.2f} s", flush=True)
    federation = Federation(
        place, folder / RUN, RUN, sites, rounds, "fp32", "administrator,impersonator"
    )
    with federation:
        place.store(RUN)
        began = time.perf_counter()
        with product(place) as connection:
            connection.declare(topology.run_topology(RUN, tuple(sites)))
        declared = time.perf_counter() - began
        before, began = place.cpu_seconds(), time.perf_counter()
        pid = federation.start_coordinator()
        crowd = Crowd(place, federation, pid)
        crowd.work()
        federation.wait()
        whole = time.perf_counter() - began
        cpu = spent(before, place.cpu_seconds(), rounds)
        seconds = federation.round_seconds()
        phases = federation.phases("coordinator")
    messages.append(bare_messages(place, sites, count))
    puts.append(bare_puts(place, sites, 800))
    later = seconds[1:] or seconds
    figure = statistics.median(later)
    total = sum(crowd.counts.values())
    bare = statistics.median(messages) + statistics.median(puts)
    print(f"round    {figure:7.2f} s, the first {seconds[0]:.2f}; all: {listed(seconds)}")
    print(
        f"         {count / figure:7.0f} messages a second in a round; {total} in the whole run of "
        f"{whole:.0f} s; queues declared in {declared:.1f} s"
    )
    print(
        f"messages {statistics.median(messages):7.2f} s of {listed(messages)}: "
        f"{count / statistics.median(messages):.0f} a second, one after another"
    )
    print(f"puts     {statistics.median(puts):7.2f} s of {listed(puts)}")
    print(f"round / (messages + puts) = {figure / bare:.2f}")
    early, peak = min(2, rounds), phases.pop("peak_rss_mb")
    print(
        f"coordinator's memory: {crowd.memory[early]:.1f} MB after round {early}, "
        f"{crowd.memory[rounds]:.1f} MB after round {rounds}; peak {peak:.0f}"
    )
    phases.pop("peak_anonymous_mb")
    cpu["coordinator"] = phases.pop("cpu_seconds") / max(rounds - 1, 1)
    print(f"processor seconds a round: {told(cpu)}")
    print(f"the coordinator's seconds a round: {told(Counter(phases), max(rounds - 1, 1))}")
    return Figures(participants, figure, bare, peak, cpu["coordinator"])


@contextlib.contextmanager
def product(place: Servers) -> Any:
    """The product's own connection to the run's virtual host."""
    from shared.brokers.rabbitmq import connect as product_connect

    with product_connect(address(place, RUN)) as connection:
        yield connection


def main() -> None:
    """Start the servers, measure, leave nothing behind."""
    parser = argparse.ArgumentParser(description="A thousand participants over RabbitMQ and S3.")
    parser.add_argument("--participants", type=int, nargs="+", default=[1000])
    parser.add_argument("--rounds", type=int, default=6)
    add_server_options(parser)
    given = parser.parse_args()
    end_on_signals()
    if given.dir is not None:
        given.dir.mkdir(parents=True, exist_ok=True)
    found = []
    for participants in given.participants:
        with (
            tempfile.TemporaryDirectory(dir=given.dir, prefix="thousand-") as name,
            servers(given, Path(name)) as place,
        ):
            found.append(measure(place, Path(name), participants, given.rounds))
    print(HEAD)
    for figures in found:
        print(figures.line())


if __name__ == "__main__":
    main()
