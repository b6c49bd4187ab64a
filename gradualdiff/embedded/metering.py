"""Counts what each site of an embedded federation sends and fetches, at store and broker."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from shared.brokers.port import Broker, Consumer, Delivery, Message
    from shared.stores.port import Transfer
    from shared.topology import Topology


@dataclass
class Traffic:
    """What one site moved: bytes of objects and of message bodies.

    ``transfer_seconds``: while at least one object was on its way; several may be at once.
    """

    objects_down: int = 0
    objects_up: int = 0
    messages_down: int = 0
    messages_up: int = 0
    transfer_seconds: float = 0.0


@dataclass
class Meter:
    """The traffic of every site of one run, by site. ``changed``: called when there is more.

    A delta's chunks are sent by several threads at once, so counting takes turns.
    """

    sites: dict[str, Traffic] = field(default_factory=dict)
    changed: Callable[[], None] = lambda: None
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count(self, site: str, **amounts: float) -> None:
        """Add to the site's counts, by the names of ``Traffic``."""
        with self._turn:
            traffic = self.sites.setdefault(site, Traffic())
            for name, amount in amounts.items():
                setattr(traffic, name, getattr(traffic, name) + amount)
            self.changed()

    def of(self, site: str) -> Traffic:
        """The site's counts."""
        return self.sites.get(site, Traffic())

    def as_json(self) -> dict[str, dict[str, float]]:
        """Plain numbers; ``from_json`` takes them back."""
        return {site: asdict(traffic) for site, traffic in sorted(self.sites.items())}

    @classmethod
    def from_json(cls, values: dict[str, dict[str, Any]]) -> Meter:
        """A meter that goes on where another one ended."""
        return cls({site: Traffic(**traffic) for site, traffic in values.items()})


class MeteredTransfer:
    """The ``Transfer`` port over another, counted."""

    def __init__(self, inner: Transfer, meter: Meter, site: str) -> None:
        self._inner = inner
        self._meter = meter
        self._site = site
        self._turn = threading.Lock()
        self._under_way = 0
        self._began = 0.0

    def download(self, url: str, path: Path, sha256: str) -> int:
        """See the port."""
        with self._timed():
            size = self._inner.download(url, path, sha256)
        self._meter.count(self._site, objects_down=size)
        return size

    def check(self, url: str) -> None:
        """See the port."""
        self._inner.check(url)

    def upload(self, url: str, path: Path, start: int, length: int) -> None:
        """See the port."""
        with self._timed():
            self._inner.upload(url, path, start, length)
        self._meter.count(self._site, objects_up=length)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        with self._turn:
            if not self._under_way:
                self._began = time.perf_counter()
            self._under_way += 1
        try:
            yield
        finally:
            with self._turn:
                self._under_way -= 1
                seconds = 0.0 if self._under_way else time.perf_counter() - self._began
            self._meter.count(self._site, transfer_seconds=seconds)


class MeteredBroker:
    """The ``Broker`` port over another, message bodies counted."""

    def __init__(self, inner: Broker, meter: Meter, site: str) -> None:
        self._inner = inner
        self._meter = meter
        self._site = site

    @property
    def identity(self) -> str:
        """See the port."""
        return self._inner.identity

    def declare(self, topology: Topology) -> None:
        """See the port."""
        self._inner.declare(topology)

    def revive(self, topology: Topology) -> tuple[str, ...]:
        """See the port."""
        return self._inner.revive(topology)

    def publish(self, messages: Sequence[Message]) -> None:
        """See the port."""
        self._inner.publish(messages)
        self._meter.count(self._site, messages_up=sum(len(m.body) for m in messages))

    def consume(self, queue: str, prefetch: int = 1) -> Consumer:
        """See the port."""
        return _MeteredConsumer(self._inner.consume(queue, prefetch), self._meter, self._site)

    def delete(self, queue: str) -> None:
        """See the port."""
        self._inner.delete(queue)

    def depth(self, queue: str) -> int:
        """See the port."""
        return self._inner.depth(queue)

    def consumers(self, queues: Sequence[str]) -> dict[str, int]:
        """See the port."""
        return self._inner.consumers(queues)

    def close(self) -> None:
        """See the port."""
        self._inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _MeteredConsumer:
    def __init__(self, inner: Consumer, meter: Meter, site: str) -> None:
        self._inner = inner
        self._meter = meter
        self._site = site

    def receive(self, timeout_seconds: float = 0.0) -> Delivery | None:
        delivery = self._inner.receive(timeout_seconds)
        if delivery is not None:
            self._meter.count(self._site, messages_down=len(delivery.body))
        return delivery

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self._inner.acknowledge(deliveries)

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        self._inner.requeue(deliveries)

    def close(self) -> None:
        self._inner.close()
