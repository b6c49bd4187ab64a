"""The one consume loop: decode -> bind the log's context -> handler -> error type -> outcome.

Deliveries are taken as they lie there, up to ``most`` at once; a batch of one is the usual case of
a site. A batch is handled in the order of delivery, then what it put on record is written
(``settle``), then what it has to say is published, then all of it is acknowledged together. So
whatever is said is on record, and whatever is acknowledged was said.

Handlers never acknowledge; what becomes of a delivery is decided here, by the type of the error:

- none: acknowledged, because the handler's durable write is done.
- retryable (the store is away): kept, tried again with growing pauses for at most
  ``patience_seconds``, then requeued; the error goes on to whoever runs the loop. When the broker
  is away it goes on at once: only a new connection helps.
- about this message (DecodeError, ProtocolError, or an error nobody foresaw): refused, that is
  published with its bytes and the reason, and acknowledged only after that was confirmed. Its
  neighbours are handled as if it had not been there.
- anything else of ours (a damaged ledger, a fenced writer, a person's interrupt): requeued, and
  the error goes on; it is not the message's fault.

After an error, what came before in the batch is settled and acknowledged if it can be. Where it
cannot, more is handled twice than had to be, which does no harm: every handler is idempotent.
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
from shared.protocol.hearing import hear_anybody

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shared.brokers.port import Consumer, Delivery
    from shared.protocol.events import Event
    from shared.protocol.hearing import Hear

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


class UnsettledError(Exception):
    """Not all that a batch left for later could be done; the cause is chained.

    It may come to light in the handler of another message than the one that it is about.
    """


class Desk:
    """Where a role keeps what its handlers leave undone until the end of a batch: here, nothing."""

    def prepare(self, told: Sequence[tuple[Event, str]]) -> None:
        """Do ahead what does not depend on the batch's order. ``told``: event and sender."""

    def settle(self) -> None:
        """Do what handlers left for later, above all write records. Raises UnsettledError."""

    def publish(self) -> None:
        """Say all that is to be said, and return once it is confirmed."""


@dataclass(eq=False)
class _Item:
    """One delivery under way. ``event`` and ``handler``: None where it is refused.

    ``unproven``: what was decoded, until its signature is checked.
    """

    delivery: Delivery
    started: float = field(default_factory=time.monotonic)
    name: str = "unknown"
    sender: str = ""
    unproven: wire.Envelope | None = None
    event: Event | None = None
    handler: Handler = None
    outcome: Outcome = Outcome.DONE
    reason: str = ""

    def refuse(self, error: BaseException) -> None:
        """It is not handled, and this is why; what nobody foresaw goes to the log."""
        self.outcome, self.reason = Outcome.REFUSED, str(error)
        if not isinstance(error, ABOUT_THE_MESSAGE):
            get_logger().error("handler.crashed", event_type=self.name, exc_info=error)
            self.reason = f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Dispatcher:
    """One queue's loop. ``sender_of``: who may have sent this; raises ProtocolError otherwise.

    ``refuse`` publishes the refusal and returns once it is confirmed, or has ``desk`` do so.
    ``admits``: whether it is looked at at all; what is not is taken off the queue and forgotten,
    before it costs anything. ``most``: how many deliveries are handled together, at most.
    ``hear``: the event, if its sender really said it; raises SignatureError otherwise.
    """

    consumer: Consumer
    handlers: Mapping[type[Event], Handler]
    sender_of: Callable[[Delivery, Event], str]
    refuse: Callable[[Delivery, str], None]
    patience_seconds: float = 0.0
    pause: Callable[[float], None] = field(default=time.sleep)
    admits: Callable[[Delivery], bool] = lambda _delivery: True
    desk: Desk = field(default_factory=Desk)
    most: Callable[[], int] = lambda: 1
    hear: Hear = hear_anybody

    def drain(self) -> int:
        """Handle what is there now; how many deliveries."""
        count = 0
        while handled := self.handle_next(0.0):
            count += handled
        return count

    def handle_next(self, timeout_seconds: float) -> int:
        """Wait for a delivery, handle it and those behind it that are there already; how many."""
        batch = self._take(timeout_seconds)
        if not batch:
            return 0
        todo = [item for item in batch if item.outcome is not Outcome.DROPPED]
        failure: BaseException | None = None
        try:
            self._patiently(todo)
        except (GradualDiffError, KeyboardInterrupt) as error:
            failure = error
        try:
            self._finish([item for item in batch if item not in todo])
        except GradualDiffError as error:
            failure, todo = failure or error, batch
        if failure is not None:
            # A connection that is gone has returned them already; that must not hide the cause.
            with contextlib.suppress(StaleDeliveryError):
                self.consumer.requeue([item.delivery for item in todo])
            raise failure
        return len(batch)

    def _take(self, timeout_seconds: float) -> list[_Item]:
        """What is there, up to ``most``, each looked at; nothing is waited for but the first."""
        batch: list[_Item] = []
        most = self.most()
        while len(batch) < most:
            delivery = self.consumer.receive(0.0 if batch else timeout_seconds)
            if delivery is None:
                break
            batch.append(self._opened(delivery))
        return batch

    def _opened(self, delivery: Delivery) -> _Item:
        item = _Item(delivery)
        if not self.admits(delivery):
            item.outcome = Outcome.DROPPED
            return item
        try:
            envelope = wire.decode(delivery.body)
            item.name = type(envelope.event).__name__
            item.sender = self.sender_of(delivery, envelope.event)
            item.handler = self._handler(delivery, envelope.event)
            item.unproven = envelope
        except Exception as error:  # noqa: BLE001 - refused, never lost; as in _handle
            item.refuse(error)
        return item

    def _handler(self, delivery: Delivery, event: Event) -> Handler:
        name = type(event).__name__
        if delivery.attempt > MAX_ATTEMPTS:
            raise ProtocolError(f"{name}: came back {MAX_ATTEMPTS} times without success")
        handler = self.handlers.get(type(event))
        if handler is None:
            raise ProtocolError(f"{name}: is not for this queue ({delivery.queue})")
        return handler

    def _patiently(self, todo: list[_Item]) -> None:
        """Handle it all, which empties ``todo``; after an error that is where the rest is left."""
        pauses, waited = Backoff(), 0.0
        while todo:
            try:
                self._attempt(todo)
            except GradualDiffError as error:
                # A connection that is lost is never found again by waiting: only the store is.
                waits = error.retryable and not isinstance(error, BrokerError)
                pause = pauses.next()
                waited += pause
                if not waits or waited > self.patience_seconds:
                    raise
                get_logger().warning("handler.waits", reason=str(error), seconds=round(pause, 1))
                self.pause(pause)

    def _attempt(self, todo: list[_Item]) -> None:
        """Handle and settle in order; ``todo`` loses what is done with, however this ends."""
        try:
            self._together(todo)
        except UnsettledError as error:
            cause = error.__cause__
            assert cause is not None  # it is always raised from what happened
            if isinstance(cause, GradualDiffError) and not isinstance(cause, ABOUT_THE_MESSAGE):
                raise cause from cause.__cause__
            if len(todo) == 1:
                todo.pop().refuse(cause)
                return
            while todo:  # one by one it is known whose fault it is
                first = todo[:1]
                self._attempt(first)
                del todo[0]

    def _together(self, todo: list[_Item]) -> None:
        for item in todo:
            self._prove(item)
        told = [(item.event, item.sender) for item in todo if item.event is not None]
        try:
            self.desk.prepare(told)
        except Exception as error:
            raise UnsettledError from error
        handled, failure = 0, None
        for item in todo:
            try:
                self._handle(item)
            except GradualDiffError as error:
                failure = error
                break
            handled += 1
        self.desk.settle()
        del todo[:handled]
        if failure is not None:
            raise failure

    def _prove(self, item: _Item) -> None:
        """Check who said it, once. Raises StoreError where the keys cannot be looked up now."""
        if item.unproven is None:
            return
        try:
            item.event = self.hear(item.unproven, item.sender)
        except ABOUT_THE_MESSAGE as error:
            item.refuse(error)
        item.unproven = None

    def _handle(self, item: _Item) -> None:
        if item.event is None:
            return  # it is refused as it is
        item.outcome = Outcome.DONE
        context = {
            key: getattr(item.event, key)
            for key in ("run", "round")
            if getattr(item.event, key, None)
        }
        try:
            with bound_contextvars(**context, sender=item.sender):
                item.handler(item.event, item.sender)
        except ABOUT_THE_MESSAGE as error:
            item.refuse(error)
        except (GradualDiffError, UnsettledError):
            raise
        except Exception as error:  # noqa: BLE001
            item.refuse(error)

    def _finish(self, done: list[_Item]) -> None:
        """Refuse, say what is to be said, and acknowledge it all."""
        for item in done:
            if item.outcome is Outcome.REFUSED:
                self.refuse(item.delivery, item.reason)
                get_logger().warning(
                    "message.refused",
                    event_type=item.name,
                    sender=item.delivery.sender,
                    reason=item.reason,
                )
        self.desk.publish()
        looked_at = [item for item in done if item.outcome is not Outcome.DROPPED]
        for item in looked_at:
            failpoint("acknowledge.before", item.name)
        if done:
            self.consumer.acknowledge([item.delivery for item in done])
        for item in looked_at:
            failpoint("acknowledge.after", item.name)  # handed over; maybe not on the wire yet
            get_logger().debug(
                "message.handled",
                event_type=item.name,
                sender=item.delivery.sender,
                outcome=item.outcome.value,
                reason=item.reason,
                seconds=round(time.monotonic() - item.started, 3),
            )
