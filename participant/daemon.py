"""The participant as a process: one thread listens, the main thread works.

Listening is short: a message is checked, noted and acknowledged, and a training of ten hours keeps
none of them waiting. It also says every minute that the site is there and how far it is. Working
happens in the main thread, in turn: what the messages ask for, then the next piece of work.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from participant.agenda import Agenda
from participant.bootstrap import subscribe
from participant.handlers import ONLINE_EXPIRES_SECONDS, Participant
from participant.outbox import Outbox
from participant.reporting import Reporter
from participant.site import NOBODY_SIGNS, Site
from shared import topology
from shared.backoff import Backoff
from shared.errors import (
    GradualDiffError,
    InterruptedRunError,
    MessageRejectedError,
    NoWorkError,
    RunStuckError,
    UnroutableError,
)
from shared.log import get_logger
from shared.protocol.events import SiteOnline
from shared.protocol.messages import to_coordinator

if TYPE_CHECKING:
    from collections.abc import Callable

    from participant.learner.port import Learner
    from participant.site import Trust
    from participant.workspace import Workspace
    from shared.brokers.port import Broker, Message
    from shared.config import AcceptSection
    from shared.protocol.dispatch import Dispatcher
    from shared.protocol.events import Event, TrainingProgressed
    from shared.stores.port import Transfer

ONLINE_SECONDS = 60.0
PROGRESS_SECONDS = 5.0
LONGEST_PROGRESS_SECONDS = 60.0


@dataclass(frozen=True)
class ParticipantContext:
    """What a participant's process works with. ``connect`` makes a new connection each time."""

    name: str
    connect: Callable[[], Broker]
    transfer: Transfer
    workspace: Workspace
    learner: Learner
    accept: AcceptSection
    stopping: threading.Event
    clock: Callable[[], float] = time.time
    trust: Trust = NOBODY_SIGNS


class Listener(threading.Thread):
    """Connects for ever, notes what comes, says that the site is there."""

    def __init__(
        self, context: ParticipantContext, outbox: Outbox, agenda: Agenda, reporter: Reporter
    ) -> None:
        super().__init__(name="listener", daemon=True)
        self._context = context
        self._outbox = outbox
        self._agenda = agenda
        self._reporter = reporter
        self.participant: Participant | None = None
        self.failure: BaseException | None = None
        self.was_connected = False
        self.lost: GradualDiffError | None = None
        self._said_online = False

    def run(self) -> None:
        """Until the process is to stop, or the first connection fails for good."""
        pauses, stopping = Backoff(), self._context.stopping
        while not stopping.is_set():
            try:
                self._listen(pauses)
            except GradualDiffError as error:
                self.lost = error
                if not (self.was_connected or error.retryable):
                    self._give_up(error)
                    return
                pause = pauses.next()
                get_logger().warning("broker.lost", reason=str(error), seconds=round(pause, 1))
                stopping.wait(pause)
            except BaseException as error:
                self._give_up(error)
                raise

    def _give_up(self, error: BaseException) -> None:
        self.failure = error
        self._context.stopping.set()

    def _listen(self, pauses: Backoff) -> None:
        assert self.participant is not None  # set before the thread starts
        context = self._context
        with context.connect() as broker:
            kinds = self.participant.handlers
            handlers = dict.fromkeys(kinds, self._note)
            dispatcher = subscribe(
                context.name,
                broker,
                handlers,
                context.clock,
                self.participant.meter.heard,
                context.trust,
                self.participant.births,
            )
            self._outbox.connected(broker)
            self.was_connected = True
            get_logger().info("broker.connected", site=context.name)
            try:
                self._serve(broker, dispatcher, pauses)
            finally:
                self._outbox.connected(None)

    def _note(self, event: Event, sender: str) -> None:
        del sender
        assert self.participant is not None  # set before the thread starts
        self.participant.hear(event)
        self._agenda.note(event)

    def _serve(self, broker: Broker, dispatcher: Dispatcher, pauses: Backoff) -> None:
        next_online = next_progress = 0.0
        while not self._context.stopping.is_set():
            now = time.monotonic()
            if now >= next_online:
                self._say_online(broker)
                next_online = now + ONLINE_SECONDS
            if now >= next_progress:
                next_progress = now + pause_after_progress(self._say_progress(broker))
            dispatcher.handle_next(0.5)
            pauses.reset()

    def _say_online(self, broker: Broker) -> None:
        in_hand = self.participant.in_hand if self.participant else None
        event = SiteOnline(
            run=in_hand.run if in_hand else None,
            round=getattr(in_hand, "round", None),
            first=not self._said_online,
        )
        try:
            broker.publish([self._message(event, ONLINE_EXPIRES_SECONDS)])
        except UnroutableError:
            get_logger().warning("coordinator.absent", reason="no run is open on this broker")
        except MessageRejectedError as error:  # it is said again in a minute
            get_logger().warning("publish.waits", reason=str(error))
        else:
            self._said_online = True

    def _say_progress(self, broker: Broker) -> float:
        """Publish it; the seconds for which this has been going on."""
        event = self._reporter.newest()
        if event is None:
            return 0.0
        with contextlib.suppress(UnroutableError, MessageRejectedError):
            broker.publish([self._message(event, 6 * PROGRESS_SECONDS)])
        return event.seconds

    def _message(self, event: SiteOnline | TrainingProgressed, expires_seconds: float) -> Message:
        assert self.participant is not None  # set before the thread starts
        context = self._context
        voice = self.participant.births.voice(context.trust.key, event.run)
        message = to_coordinator(context.name, event, context.clock(), expires_seconds, voice)
        self.participant.meter.said(event.run, len(message.body))
        return message


def pause_after_progress(seconds: float) -> float:
    """Seconds until the next word on what has been going on for ``seconds``.

    Of an hour's training nobody needs to hear every five seconds, and where deltas are small, such
    words would be most of what a site sends.
    """
    return min(max(PROGRESS_SECONDS, seconds / 12), LONGEST_PROGRESS_SECONDS)


class Worker:
    """The main thread's side of a participant's process."""

    def __init__(self, context: ParticipantContext, patience_seconds: float | None = None) -> None:
        self._context = context
        self._agenda = Agenda()
        self._reporter = Reporter()
        self.is_idle = False  # whether the last turn had nothing to do
        self.failed: GradualDiffError | None = None  # why the last work did not work
        outbox = Outbox(context.stopping, patience_seconds)
        self.participant = Participant(
            Site(
                name=context.name,
                outbox=outbox,
                transfer=context.transfer,
                workspace=context.workspace,
                learner=context.learner,
                clock=context.clock,
                accept=context.accept,
                should_stop=context.stopping.is_set,
                report=self._reporter.report,
                trust=context.trust,
            )
        )
        self._reporter.participant = self.participant
        self._listener = Listener(context, outbox, self._agenda, self._reporter)
        self._listener.participant = self.participant

    def run(self, is_done: Callable[[], bool]) -> None:
        """Work until ``is_done()`` or the process is to stop.

        Raises InterruptedRunError when stopped, or what the first connection failed with.
        """
        stopping = self._context.stopping
        self._listener.start()
        try:
            while not (stopping.is_set() or is_done()):
                self._turn()
        finally:
            interrupted = stopping.is_set()
            stopping.set()
            self._listener.join(10.0)
        if self._listener.failure is not None:
            raise self._listener.failure
        if interrupted:
            raise InterruptedRunError(
                f"{self._context.name}: stopped; what is trained is kept for the next start"
            )

    @property
    def not_connected(self) -> GradualDiffError | None:
        """Why there never was a connection; None when there was one."""
        return None if self._listener.was_connected else self._listener.lost

    def _turn(self) -> None:
        participant = self.participant
        event = self._agenda.take(0.0 if participant.has_work else 0.5)
        self.is_idle = event is None and not participant.has_work
        try:
            if event is not None:
                participant.handlers[type(event)](event, topology.COORDINATOR)
            elif participant.has_work:
                participant.work()
                self.failed = None
            else:
                participant.offer_released()
        except InterruptedRunError:
            self._context.stopping.set()
        except GradualDiffError as error:
            # The work stays on the agenda: it is tried again until it works or is called off.
            self.failed = error
            pause = participant.defer()
            get_logger().warning("work.waits", reason=str(error), seconds=round(pause, 1))
        except Exception:  # noqa: BLE001 - a daemon outlives what nobody foresaw, and says it
            pause = participant.defer()
            get_logger().exception("work.crashed", seconds=round(pause, 1))


def serve(context: ParticipantContext) -> None:
    """Take part in whatever comes until the process is to stop.

    Raises InterruptedRunError then, and what forbids a start.
    """
    Worker(context).run(lambda: False)


def serve_once(context: ParticipantContext, wait_seconds: float) -> list[str]:
    """Take one round: train, upload, publish. Returns once the broker has the reference.

    Returns the runs that wait for a person's approval.

    Raises NoWorkError when nothing is asked of the site within ``wait_seconds``, RunStuckError
    when a finished delta finds nobody to take it in that time (it is kept for the next call),
    BrokerUnavailableError when the broker could not be reached in that time, and what the work
    failed with.
    """
    worker = Worker(context, wait_seconds)
    deadline = time.monotonic() + wait_seconds

    def is_done() -> bool:
        nonlocal deadline
        if worker.participant.handed_over:
            return True
        if not worker.is_idle:
            deadline = time.monotonic() + wait_seconds
        return time.monotonic() > deadline

    worker.run(is_done)
    waiting = worker.participant.held()
    if worker.participant.handed_over:
        return waiting
    if worker.participant.trained is not None:
        raise RunStuckError(
            f"{context.name}: round {worker.participant.trained.round} is trained, but no "
            f"coordinator took it within {wait_seconds:.0f} s; it is kept, run this again"
        )
    for error in (worker.failed, worker.not_connected):
        if error is not None:
            raise error
    held = f"; waiting for approval (gradualdiff site status): {', '.join(waiting)}"
    raise NoWorkError(
        f"{context.name}: nothing to do within {wait_seconds:.0f} s" + (held if waiting else "")
    )
