"""Counts what each site of an embedded federation sends and fetches, at store and broker."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from shared.broker import Broker, Consumer, Delivery, Message
    from shared.store import Transfer
    from shared.topology import Topology


@dataclass
class Traffic:
    """What one site moved: bytes of objects and of message bodies, seconds spent on objects."""

    objects_down: int = 0
    objects_up: int = 0
    messages_down: int = 0
    messages_up: int = 0
    transfer_seconds: float = 0.0


@dataclass
class Meter:
    """The traffic of every site of one run, by site. ``changed``: called when there is more."""

    sites: dict[str, Traffic] = field(default_factory=dict)
    changed: Callable[[], None] = lambda: None

    def of(self, site: str) -> Traffic:
        """The site's counts, to be added to."""
        return self.sites.setdefault(site, Traffic())

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
        self._traffic = meter.of(site)

    def download(self, url: str, path: Path, sha256: str) -> int:
        """See the port."""
        began = time.perf_counter()
        size = self._inner.download(url, path, sha256)
        self._traffic.transfer_seconds += time.perf_counter() - began
        self._traffic.objects_down += size
        self._meter.changed()
        return size

    def upload(self, url: str, path: Path, start: int, length: int) -> None:
        """See the port."""
        began = time.perf_counter()
        self._inner.upload(url, path, start, length)
        self._traffic.transfer_seconds += time.perf_counter() - began
        self._traffic.objects_up += length
        self._meter.changed()


class MeteredBroker:
    """The ``Broker`` port over another, message bodies counted."""

    def __init__(self, inner: Broker, meter: Meter, site: str) -> None:
        self._inner = inner
        self._meter = meter
        self._traffic = meter.of(site)

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
        self._traffic.messages_up += sum(len(message.body) for message in messages)
        self._meter.changed()

    def consume(self, queue: str) -> Consumer:
        """See the port."""
        return _MeteredConsumer(self._inner.consume(queue), self._traffic)

    def depth(self, queue: str) -> int:
        """See the port."""
        return self._inner.depth(queue)

    def close(self) -> None:
        """See the port."""
        self._inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _MeteredConsumer:
    def __init__(self, inner: Consumer, traffic: Traffic) -> None:
        self._inner = inner
        self._traffic = traffic

    def receive(self, timeout_seconds: float = 0.0) -> Delivery | None:
        delivery = self._inner.receive(timeout_seconds)
        if delivery is not None:
            self._traffic.messages_down += len(delivery.body)
        return delivery

    def close(self) -> None:
        self._inner.close()
