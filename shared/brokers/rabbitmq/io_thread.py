"""The one thread that owns a connection's socket, and how the other threads ask it.

What is asked runs in that thread and answers a future; the end of the connection fails every one
that is open. A loop that hangs is given up after a time limit.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import pika
import pika.exceptions

from shared.brokers.rabbitmq import decoding
from shared.brokers.rabbitmq.futures import answer, fail, guarded
from shared.brokers.rabbitmq.sockets import Sockets
from shared.brokers.rabbitmq.tls import tls_context
from shared.brokers.rabbitmq.translation import because, translate
from shared.errors import BrokerSilentError, BrokerUnavailableError
from shared.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from pika.channel import Channel

    from shared.credentials import BrokerAddress

CONNECT_SECONDS = 15.0
ANSWER_SECONDS = 60.0  # for one question, or for the confirms of one batch
CLOSE_SECONDS = 5.0

Answer = TypeVar("Answer")

# pika logs every lost connection with a traceback; what it knows is in our errors.
logging.getLogger("pika").addHandler(logging.NullHandler())
logging.getLogger("pika").propagate = False
decoding.install()


class Subscription(Protocol):
    """What the end of a connection does to a consumer. Both are called in the I/O thread."""

    def skip_cancel(self) -> None:
        """The connection is about to be closed."""

    def end(self, why: str) -> None:
        """The connection is gone."""


class IoThread:
    """A connection to ``address``: made, asked, closed. A context manager.

    Raises BrokerUnavailableError, AccessRefusedError, BrokerError when it cannot be made.
    """

    def __init__(self, address: BrokerAddress, heartbeat_seconds: int) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._pending: set[Future[Any]] = set()
        self._subscriptions: list[Subscription] = []
        self._blocked: str | None = None
        self._ended: BaseException | None = None
        self._opened: Future[None] = Future()
        self._pending.add(self._opened)
        self._sockets = Sockets()
        self._connection: pika.SelectConnection
        self._thread = threading.Thread(
            target=self._run,
            args=(_parameters(address, heartbeat_seconds),),
            name="rabbitmq",
            daemon=True,
        )
        self._thread.start()
        try:
            self._opened.result(CONNECT_SECONDS)
        except TimeoutError:
            self._abort()
            raise BrokerUnavailableError(
                f"broker {address}: no answer within {CONNECT_SECONDS:.0f} s; check broker.url and "
                "the network"
            ) from None

    @property
    def version(self) -> str:
        """The server's own word for its version."""
        properties = self._connection.server_properties or {}
        return str(properties.get("version", "unknown"))

    def watch(self, subscription: Subscription) -> None:
        """Tell it of the end. Before it is asked for: the end may come meanwhile."""
        with self._lock:
            self._subscriptions.append(subscription)

    def close(self) -> None:
        """End the connection and its consumers. Repeatable."""
        if self._ended is None:
            self._hand_over(self._close)
            self._thread.join(CLOSE_SECONDS)
            self._abort()
        self._thread.join(CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def hand_over(self, call: Callable[[], None]) -> None:
        """Run ``call`` in the I/O thread, some time. Raises BrokerUnavailableError."""
        self.check_open()
        self._hand_over(call)

    def new_channel(self, on_open: Callable[[Channel], None]) -> Channel:
        """In the I/O thread."""
        return self._connection.channel(on_open_callback=on_open)

    def _hand_over(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(Exception):  # its loop has just ended; _ended says so
            self._sockets.loop.add_callback_threadsafe(call)

    def ask(self, start: Callable[[Future[Answer]], None]) -> Answer:
        """Run ``start`` in the I/O thread and wait until somebody answers its future."""
        future: Future[Answer] = Future()
        with self._lock:
            self.check_open()
            self._pending.add(future)
        self._hand_over(lambda: guarded(future, self.address, lambda: start(future)))
        try:
            return future.result(ANSWER_SECONDS)
        except TimeoutError:
            # What was asked may still happen; on a new connection it cannot be mixed up.
            blocked = self._blocked
            self._abort()
            if blocked:
                raise BrokerUnavailableError(
                    f"broker {self.address}: takes no messages: {blocked}; free memory or disk "
                    "there"
                ) from None
            raise BrokerSilentError(
                f"broker {self.address}: no answer within {ANSWER_SECONDS:.0f} s"
            ) from None
        finally:
            with self._lock:
                self._pending.discard(future)

    def on_own_channel(self, start: Callable[[Channel, Callable[[object], None]], None]) -> object:
        """``start(channel, done)`` on a channel of its own, which an error may close."""

        def open_channel(future: Future[object]) -> None:
            results: list[object] = []

            def done(result: object) -> None:
                # Answered once it is closed: what it held is back in its queue by then.
                results.append(result)
                if channel.is_open:
                    channel.close()

            channel = self.new_channel(
                lambda opened: guarded(future, self.address, lambda: start(opened, done))
            )

            def on_close(_channel: object, reason: BaseException) -> None:
                if results:
                    answer(future, results[0])
                else:
                    fail(future, translate(reason, self.address))

            channel.add_on_close_callback(on_close)

        return self.ask(open_channel)

    def check_open(self) -> None:
        """Raise BrokerUnavailableError once the connection has ended."""
        if self._ended is not None:
            raise BrokerUnavailableError(
                f"{self.address.account}: the connection to the broker is closed"
                f"{because(self._ended)}; connect again"
            )

    def _abort(self) -> None:
        """End without the other side."""
        self._end(pika.exceptions.ConnectionClosedByClient(200, "given up"))
        self._hand_over(self._stop)

    # The I/O thread's side ---------------------------------------------------------------------

    def _run(self, parameters: pika.ConnectionParameters) -> None:
        try:
            self._connection = pika.SelectConnection(
                parameters,
                on_open_callback=self._on_open,
                on_open_error_callback=lambda _, error: self._finish(error),
                on_close_callback=lambda _, reason: self._finish(reason),
                custom_ioloop=self._sockets,
            )
            self._sockets.loop.start()
        except Exception as error:  # noqa: BLE001 - a dead I/O thread must not leave anyone waiting
            self._end(error)
        finally:
            self._sockets.close()

    def _on_open(self, connection: pika.SelectConnection) -> None:
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(self._on_unblocked)
        answer(self._opened, None)

    def _on_blocked(self, _connection: object, frame: Any) -> None:
        self._blocked = f"{frame.method.reason} (its memory or disk alarm)"
        get_logger().warning("broker.blocked", broker=str(self.address), reason=self._blocked)

    def _on_unblocked(self, _connection: object, _frame: object) -> None:
        self._blocked = None
        get_logger().warning("broker.unblocked", broker=str(self.address))

    def _close(self) -> None:
        for subscription in self._subscriptions:
            subscription.skip_cancel()
        if self._connection.is_open:
            self._connection.close()
        else:
            self._stop()

    def _stop(self) -> None:
        self._sockets.loop.stop()

    def _finish(self, error: BaseException) -> None:
        self._end(error)
        self._stop()

    def _end(self, error: BaseException) -> None:
        with self._lock:
            if self._ended is None:
                self._ended = error
            pending, self._pending = self._pending, set()
        for future in pending:
            fail(future, translate(error, self.address))
        for subscription in self._subscriptions:
            subscription.end(f"the connection is gone{because(error)}")


def _parameters(address: BrokerAddress, heartbeat_seconds: int) -> pika.ConnectionParameters:
    options = None
    if address.tls:
        options = pika.SSLOptions(tls_context(address), address.host)
    return pika.ConnectionParameters(
        host=address.host,
        port=address.port,
        virtual_host=address.vhost,
        credentials=pika.PlainCredentials(address.account, address.password),
        heartbeat=heartbeat_seconds,
        connection_attempts=1,
        socket_timeout=CONNECT_SECONDS,
        stack_timeout=CONNECT_SECONDS,
        ssl_options=options,
        client_properties={"connection_name": f"gradualdiff {address.account}"},
    )
