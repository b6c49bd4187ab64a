"""Seconds of a round with a thousand participants, and whether the coordinator's memory stays flat.

A real coordinator process, a real RabbitMQ and a real S3 server, and one queue for each
participant. The participants' side of the protocol runs in this one process: it reads all their
queues over one connection, answers under each one's name (the coordinator's account is tagged
``impersonator`` for that, so the broker lets it say any ``user_id``), and its threads upload every
delta by its presigned URL. The adapter has 64 values, so what is measured is the protocol: six
messages a participant and round, a delta checked and stored, a record.

The floor, just before the run, on equal servers of its own:

- ``messages``: as many messages as a round sends, published one by one, each confirmed, to as many
  queues of the same kind, and consumed and acknowledged meanwhile; plain pika, a thread each.
- ``puts``: as many presigned PUTs of the same small objects by the same threads.

    python benchmarks/thousand_participants.py [--participants 1000 ...] [--rounds 6]

Several numbers of participants are measured one after another, each on fresh servers; the last
lines are a Markdown table over them. One that fails is a line of it with the reason, and the others
go on; the exit code is 1 then.

A round's seconds are from its ``opened`` record to the next one's. Rounds of 10,000 participants
take minutes on two cores, and their 10,000 queues some GB of memory. Starts its own servers through
``tests/servers`` unless they are named. Needs Linux and RabbitMQ installed. Aims: the coordinator
costs each participant the same, however many they are, and its memory stays below 250 MB with
10,000 of them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import queue
import statistics
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
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
    from collections.abc import Callable, Iterator, Sequence

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
STALLED_SECONDS = 600.0  # without any message


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
        sending = in_thread(self._send)
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
        next_look, seen, moved = 0.0, 0, time.monotonic()
        while self._finished < len(self._federation.sites):
            connection.process_data_events(0.5)
            if self._trouble:
                raise SystemExit(self._trouble[0])
            if sending.done():
                sending.result()
            now, total = time.monotonic(), self.counts.total()
            if total != seen:
                seen, moved = total, now
            if now > moved + STALLED_SECONDS:
                raise SystemExit(f"no message for {STALLED_SECONDS:.0f} s; so far {self.counts}")
            if now > next_look:
                self._federation.alive()
                next_look = now + 2.0
        self._outbox.put(None)
        sending.result()
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
            heartbeat=600, stack_timeout=120,  # a broker with thousands of queues is slow at times
        )
    )  # fmt: skip


def in_thread(do: Callable[[], None]) -> Future[None]:
    """Have it done beside; what it raises is in the future."""
    future: Future[None] = Future()

    def work() -> None:
        try:
            future.set_result(do())
        except BaseException as error:  # noqa: BLE001 - whoever waits raises it
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


# The floor ---------------------------------------------------------------------------------------


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
    consuming = in_thread(consume)
    while not ready.wait(1.0):
        if consuming.done():
            consuming.result()
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
    consuming.result()
    connection.close()
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


class Floor(NamedTuple):
    """Seconds that a round's messages and uploads take by themselves."""

    messages: float
    puts: float


class Figures(NamedTuple):
    """Of one number of participants; memory and processor time are the coordinator's."""

    participants: int
    round_seconds: float
    floor: Floor
    cpu_seconds: float
    peak_mb: float
    anonymous_mb: float

    def line(self) -> str:
        """One line of the table."""
        floor = sum(self.floor)
        return (
            f"| {self.participants:,} | {self.round_seconds:.2f} s | {floor:.2f} s | "
            f"{self.round_seconds / floor:.2f} | "
            f"{1000 * self.cpu_seconds / self.participants:.2f} ms | {self.peak_mb:.0f} MB | "
            f"{self.anonymous_mb:.0f} MB |"
        )


HEAD = """\
| participants | a round | floor | round / floor | coordinator's processor time a participant and \
round | its peak memory | of it not mapped from files |
|---:|---:|---:|---:|---:|---:|---:|"""


def measure_floor(place: Servers, participants: int) -> Floor:
    """As many messages and uploads as a round has."""
    sites, count = names(participants), MESSAGES * participants
    floor = Floor(bare_messages(place, sites, count), bare_puts(place, sites, 800))
    print(
        f"  floor: messages {floor.messages:.2f} s ({count / floor.messages:.0f} a second, one "
        f"after another), puts {floor.puts:.2f} s",
        flush=True,
    )
    return floor


def measure(place: Servers, folder: Path, participants: int, rounds: int, floor: Floor) -> Figures:
    """The run; print what came."""
    sites, count = names(participants), MESSAGES * participants
    federation = Federation(
        place, folder / RUN, RUN, sites, rounds, "fp32", tags="administrator,impersonator"
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
    figure = statistics.median(seconds[1:] or seconds)
    print(f"  a round: {figure:.2f} s, the first {seconds[0]:.2f}; all: {listed(seconds)}")
    print(
        f"  {count / figure:.0f} messages a second in a round; {crowd.counts.total()} in the whole "
        f"run of {whole:.0f} s; queues declared in {declared:.1f} s"
    )
    print(f"  round / (messages + puts) = {figure / sum(floor):.2f}")
    early = min(2, rounds)
    found = Figures(
        participants, figure, floor, phases.pop("cpu_seconds") / max(rounds - 1, 1),
        phases.pop("peak_rss_mb"), phases.pop("peak_anonymous_mb"),
    )  # fmt: skip
    print(
        f"  coordinator's memory: {crowd.memory[early]:.1f} MB after round {early}, "
        f"{crowd.memory[rounds]:.1f} MB after round {rounds}; peak {found.peak_mb:.0f}"
    )
    cpu["coordinator"] = found.cpu_seconds
    print(f"  processor seconds a round: {told(cpu)}")
    print(f"  the coordinator's seconds a round: {told(Counter(phases), max(rounds - 1, 1))}")
    return found


def names(participants: int) -> list[str]:
    """The participants' names."""
    return [site_name(number) for number in range(participants)]


@contextlib.contextmanager
def product(place: Servers) -> Any:
    """The product's own connection to the run's virtual host."""
    from shared.brokers.rabbitmq import connect as product_connect

    with product_connect(address(place, RUN)) as connection:
        yield connection


def measured(given: argparse.Namespace, participants: int) -> Figures:
    """Floor and run of one number of participants, each on servers of its own."""
    print(f"{participants} participants, {given.rounds} rounds", flush=True)
    with fresh(given) as (place, _):
        floor = measure_floor(place, participants)
    with fresh(given) as (place, folder):
        return measure(place, folder, participants, given.rounds, floor)


@contextlib.contextmanager
def fresh(given: argparse.Namespace) -> Iterator[tuple[Servers, Path]]:
    """Servers and a folder for a while.

    A broker is slow for minutes once it is to delete thousands of queues: its end is faster.
    """
    with (
        tempfile.TemporaryDirectory(dir=given.dir, prefix="thousand-") as name,
        servers(given, Path(name)) as place,
    ):
        yield place, Path(name)


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
    lines, failed = [], False
    for participants in given.participants:
        try:
            lines.append(measured(given, participants).line())
        except BaseException as error:  # a server that does not start raises no Exception
            if isinstance(error, SystemExit) and not isinstance(error.code, str):
                raise  # a signal
            if isinstance(error, KeyboardInterrupt):
                raise
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[-300:].replace("|", "/")
            lines.append(f"| {participants:,} | failed: {reason} | | | | | |")
            failed = True
        print(flush=True)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"Load of the last 1, 5 and 15 minutes on {os.cpu_count()} processors: {load}\n")
    print("\n".join([HEAD, *lines]))
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
