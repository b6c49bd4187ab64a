"""The one consume loop: decode -> bind the log's context -> handler -> error type -> outcome.

Handlers never acknowledge; what becomes of a delivery is decided here, by the type of the error:

- none: acknowledged, because the handler's durable write is done.
- retryable (the store is away): kept, tried again with growing pauses for at most
  ``patience_seconds``, then requeued; the error goes on to whoever runs the loop. When the broker
  is away it goes on at once: only a new connection helps.
- about this message (DecodeError, ProtocolError, or an error nobody foresaw): refused, that is
  published with its bytes and the reason, and acknowledged only after that was confirmed.
- anything else of ours (a damaged ledger, a fenced writer, a person's interrupt): requeued, and
  the error goes on; it is not the message's fault.
"""

from __future__ import annotations

import contextlib
import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from structlog.contextvars import bound_contextvars

from shared.backoff import Backoff
from shared.errors import (
    BrokerError,
    DecodeError,
    DeltaRefusedError,
    GradualDiffError,
    ProtocolError,
    StaleDeliveryError,
)
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.protocol import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shared.brokers.port import Consumer, Delivery
    from shared.protocol.events import Event

ABOUT_THE_MESSAGE = (DecodeError, ProtocolError, DeltaRefusedError)
MAX_ATTEMPTS = 10

Handler = Any  # a function of (event, sender); each takes its own event type


class Outcome(enum.Enum):
    """What became of a delivery."""

    DONE = "done"
    REFUSED = "refused"
    DROPPED = "dropped"


@dataclass(frozen=True)
class Patience:
    """How long a delivery is held while the store or the broker is away, and how one waits."""

    seconds: float
    pause: Callable[[float], None]


NO_PATIENCE = Patience(0.0, time.sleep)


@dataclass(frozen=True)
class Dispatcher:
    """One queue's loop. ``sender_of``: who may have sent this; raises ProtocolError otherwise.

    ``refuse`` publishes the refusal and returns once it is confirmed. ``admits``: whether it is
    looked at at all; what is not is taken off the queue and forgotten, before it costs anything.
    """

    consumer: Consumer
    handlers: Mapping[type[Event], Handler]
    sender_of: Callable[[Delivery, Event], str]
    refuse: Callable[[Delivery, str], None]
    patience_seconds: float = 0.0
    pause: Callable[[float], None] = field(default=time.sleep)
    admits: Callable[[Delivery], bool] = lambda _delivery: True

    def drain(self) -> int:
        """Handle what is there now; how many deliveries."""
        count = 0
        while self.handle_next(0.0) is not None:
            count += 1
        return count

    def handle_next(self, timeout_seconds: float) -> Outcome | None:
        """Wait for one delivery and handle it; None when none came."""
        delivery = self.consumer.receive(timeout_seconds)
        if delivery is None:
            return None
        if not self.admits(delivery):
            delivery.acknowledge()
            return Outcome.DROPPED
        started = time.monotonic()
        outcome, name, reason = self._outcome(delivery)
        failpoint("acknowledge.before", name)
        delivery.acknowledge()
        failpoint("acknowledge.after", name)  # handed over; it may not be on the wire yet
        get_logger().debug(
            "message.handled",
            event_type=name,
            sender=delivery.sender,
            outcome=outcome.value,
            reason=reason,
            seconds=round(time.monotonic() - started, 3),
        )
        return outcome

    def _outcome(self, delivery: Delivery) -> tuple[Outcome, str, str]:
        name = "unknown"
        try:
            event = wire.decode(delivery.body).event
            name = type(event).__name__
            sender = self.sender_of(delivery, event)
            handler = self._handler(delivery, event)
            context = {
                key: getattr(event, key) for key in ("run", "round") if getattr(event, key, None)
            }
            with bound_contextvars(**context, sender=sender):
                self._patiently(handler, event, sender)
        except ABOUT_THE_MESSAGE as error:
            return self._refuse(delivery, name, str(error))
        except (GradualDiffError, KeyboardInterrupt):
            # A connection that is gone has returned it already; that must not hide the cause.
            with contextlib.suppress(StaleDeliveryError):
                delivery.requeue()
            raise
        except Exception as error:  # noqa: BLE001 - the one place that may: refused, never lost
            get_logger().exception("handler.crashed", event_type=name)
            return self._refuse(delivery, name, f"{type(error).__name__}: {error}")
        return Outcome.DONE, name, ""

    def _handler(self, delivery: Delivery, event: Event) -> Handler:
        name = type(event).__name__
        if delivery.attempt > MAX_ATTEMPTS:
            raise ProtocolError(f"{name}: came back {MAX_ATTEMPTS} times without success")
        handler = self.handlers.get(type(event))
        if handler is None:
            raise ProtocolError(f"{name}: is not for this queue ({delivery.queue})")
        return handler

    def _patiently(self, handler: Handler, event: Event, sender: str) -> None:
        pauses, waited = Backoff(), 0.0
        while True:
            try:
                handler(event, sender)
            except GradualDiffError as error:
                # A connection that is lost is never found again by waiting: only the store is.
                waits = error.retryable and not isinstance(error, BrokerError)
                pause = pauses.next()
                waited += pause
                if not waits or waited > self.patience_seconds:
                    raise
                get_logger().warning("handler.waits", reason=str(error), seconds=round(pause, 1))
                self.pause(pause)
            else:
                return

    def _refuse(self, delivery: Delivery, name: str, reason: str) -> tuple[Outcome, str, str]:
        self.refuse(delivery, reason)
        get_logger().warning(
            "message.refused", event_type=name, sender=delivery.sender, reason=reason
        )
        return Outcome.REFUSED, name, reason
