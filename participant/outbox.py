"""The site's outbox: what is published while the broker is away waits for the next connection.

Two threads share it. The listening one connects and swaps connections; the working one publishes
and never notices a cut but by waiting. What still waits at the end of the process is told again by
the ledger.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from shared.backoff import Backoff
from shared.errors import (
    BrokerUnavailableError,
    InterruptedRunError,
    MessageRejectedError,
    UnroutableError,
)
from shared.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shared.brokers.port import Broker, Message

UNROUTABLE_SECONDS = 600.0


class Outbox:
    """``publish`` of the ``Broker`` port over changing connections."""

    def __init__(self, stopping: threading.Event, patience_seconds: float | None = None) -> None:
        self._stopping = stopping
        self._patience = patience_seconds
        self._changed = threading.Condition()
        self._broker: Broker | None = None

    def connected(self, broker: Broker | None) -> None:
        """Publish through this connection from now on; None: there is none."""
        with self._changed:
            self._broker = broker
            self._changed.notify_all()

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish, however many connections it takes.

        While the coordinator's queue is full it waits for room, and without such a queue for one,
        but no longer than ten minutes. Raises InterruptedRunError when the process is to stop,
        UnroutableError, AccessRefusedError, and BrokerUnavailableError when there was no
        connection for ``patience_seconds``.
        """
        pauses, waited = Backoff(), 0.0
        while True:
            broker = self._connection()
            try:
                broker.publish(messages)
            except MessageRejectedError as error:  # the connection works: a new one would not help
                pause = pauses.next()
                get_logger().warning("publish.waits", reason=str(error), seconds=round(pause, 1))
                self._stopping.wait(pause)
            except BrokerUnavailableError as error:
                get_logger().info("publish.waits", reason=str(error))
                with self._changed:
                    if self._broker is broker:
                        self._broker = None
            except UnroutableError as error:
                pause = pauses.next()
                waited += pause
                if waited > UNROUTABLE_SECONDS:
                    raise
                get_logger().warning("publish.waits", reason=str(error), seconds=round(pause, 1))
                self._stopping.wait(pause)
            else:
                return

    def _connection(self) -> Broker:
        began = time.monotonic()
        with self._changed:
            while self._broker is None or self._stopping.is_set():
                if self._stopping.is_set():
                    raise InterruptedRunError("stopped before this could be published")
                if self._patience is not None and time.monotonic() - began > self._patience:
                    raise BrokerUnavailableError(
                        f"no connection to the broker for {self._patience:.0f} s"
                    )
                self._changed.wait(0.5)
            return self._broker
