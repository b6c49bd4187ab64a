"""The participant: messages say what to do, ``work()`` does it, one thing at a time.

Handlers only note an intention and return, so that messages are acknowledged long before a
training ends; what a kill makes them forget, the coordinator tells again when the site comes
online. Done work is committed to the workspace first and announced after, and announcing repeats.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from participant.checkpoints import settings_digest
from participant.guard import Guard
from participant.learner.port import Progress
from participant.workspace import Submission, Workspace
from shared import topology
from shared.config import AcceptSection
from shared.disk.durable_files import file_errors
from shared.disk.files import digest_file
from shared.errors import (
    GradualDiffError,
    GrantError,
    InterruptedRunError,
    NotAcceptedError,
    ProtocolError,
)
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.protocol.events import (
    AdapterEvaluated,
    DeltaAnswered,
    DeltaSubmitted,
    Event,
    ParticipantReady,
    RoundClosed,
    RoundStarted,
    RunAnnounced,
    RunDeclined,
    RunFinished,
    SiteOnline,
    TrainingFailed,
    UploadGranted,
    UploadRequested,
)
from shared.protocol.messages import to_coordinator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from participant.learner.port import Learned, Learner
    from shared.brokers.port import Delivery, Message
    from shared.protocol.dispatch import Handler
    from shared.stores.port import Transfer

ONLINE_EXPIRES_SECONDS = 150.0
LONGEST_DEFER_SECONDS = 60.0
ASK_SECONDS = 60.0
ASKS = 3  # in that time
UPLOADS = 3  # chunks under way at once

Task = RunAnnounced | RoundStarted | UploadGranted | RunFinished


def is_overtaken(event: Event, other: Event | Submission | None) -> bool:
    """Whether ``event`` is about an earlier round than ``other``, and was said before it.

    A broker may give out a message again or late; a word on an old round must not displace the
    word on the round that is open. Every signed URL expires later than those signed before it, by
    the coordinator's clock: so a run that begins anew under its old name is no old word.
    """
    if other is None:
        return False
    is_earlier = getattr(event, "round", 0) < getattr(other, "round", 0)
    return is_earlier and _expires(event) <= _expires(other)


def _expires(event: Event | Submission) -> float:
    return getattr(event, "expires_at", None) or 0.0


def _ignore(site: str, round_number: int | None, progress: Progress) -> None:
    """The default for ``report``: nobody watches."""


class Publishing(Protocol):
    """The part of a broker's connection that work needs; the listening side has the rest."""

    def publish(self, messages: Sequence[Message]) -> None:
        """See ``Broker.publish``."""


@dataclass(frozen=True)
class Site:
    """Who this is and what it works with. ``report(site, round, progress)`` feeds a display.

    ``accept``: what this site takes part in; None where coordinator and site are one owner's.
    """

    name: str
    outbox: Publishing
    transfer: Transfer
    workspace: Workspace
    learner: Learner
    clock: Callable[[], float]
    accept: AcceptSection | None = field(default_factory=AcceptSection)
    should_stop: Callable[[], bool] = lambda: False
    report: Callable[[str, int | None, Progress], None] = _ignore


class Participant:
    """One site's side of the protocol."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._guard = Guard(site.accept, site.workspace)
        # What is to be done, newest word per kind of work; volatile on purpose.
        self._agenda: dict[tuple[type[Event], str], Task] = {}
        # Runs whose base model is loaded; work for another run waits for its announcement.
        self._prepared: set[str] = set()
        self.finished: RunFinished | None = None
        self._asked: list[float] = []
        # Uploads asked for, by sha: the same round is announced again while one is under way.
        self._requested: dict[str, float] = {}
        # The grant in hand and its chunks that arrived: after an outage only the rest is sent.
        self._arrived: tuple[UploadGranted | None, set[int]] = (None, set())
        # Work that failed for now: not before this moment, after so many tries.
        self._deferred: dict[tuple[type[Event], str], tuple[float, int]] = {}
        # The training that nobody takes any more, once there is one; written by the listener.
        self._called_off: RoundStarted | None = None
        self.trained: Submission | None = None
        self.handed_over = False
        self.in_hand: Task | None = None
        self.handlers: Mapping[type[Event], Handler] = {
            RunAnnounced: self.on_run_announced,
            RoundStarted: self.on_round_started,
            UploadGranted: self.on_upload_granted,
            DeltaAnswered: self.on_delta_answered,
            RoundClosed: self.on_round_closed,
            RunFinished: self.on_run_finished,
        }

    def start(self, run: str | None = None, *, first: bool = True) -> None:
        """Come online: ask what is owed. ``first``: in this process, so give it another try."""
        last = self._site.workspace.last_submission(run) if run else None
        self._publish(SiteOnline(run=run, round=last.round if last else None, first=first))

    @property
    def has_work(self) -> bool:
        """Whether ``work()`` would do something."""
        return self._next_task() is not None

    # Handlers: note and return -----------------------------------------------------------------

    def on_run_announced(self, event: RunAnnounced, sender: str) -> None:
        """Note to get ready. Idempotent: preparing twice is cheap and answers the same."""
        del sender
        self._note(event)

    def on_round_started(self, event: RoundStarted, sender: str) -> None:
        """Note to train, unless it is trained already. Idempotent: the same bytes are announced.

        An old word on a round before the last one trained was repeated on its way: that round is
        over, and its delta is swept.
        """
        del sender
        if is_overtaken(event, self._site.workspace.newest(event.run)):
            get_logger().info("round.overtaken", run=event.run, round=event.round)
            return
        if event.expires_at <= self._site.clock():
            self._ask_again(event.run, "a round's URL is over already; is this clock right?")
            return
        done = self._site.workspace.submission(event)
        if done is not None:
            self._request_once(done)
            return
        self._note(event)

    def on_upload_granted(self, event: UploadGranted, sender: str) -> None:
        """Note to upload. Idempotent: chunks are named by content, the last word wins."""
        del sender
        self._note(event)

    def on_delta_answered(self, event: DeltaAnswered, sender: str) -> None:
        """Drop a refused delta. Idempotent: dropping twice is dropping once."""
        del sender
        granted = self._agenda.get((UploadGranted, event.run))
        if isinstance(granted, UploadGranted) and granted.sha == event.sha:
            del self._agenda[UploadGranted, event.run]
        self._requested.pop(event.sha, None)
        if event.verdict == "accepted":
            self._site.workspace.mark_accepted(event.run, event.round, event.sha)
            get_logger().debug("delta.answered", verdict=event.verdict, sha=event.sha)
            return
        get_logger().warning("delta.answered", verdict=event.verdict, reason=event.reason)
        self._site.workspace.forget(event.run, event.round, event.sha)

    def on_round_closed(self, event: RoundClosed, sender: str) -> None:
        """Sweep what the closed round made needless. Idempotent: sweeping repeats."""
        del sender
        self._guard.closed(event)
        waiting = self._agenda.get((RoundStarted, event.run))
        if isinstance(waiting, RoundStarted) and waiting.round <= event.round:
            del self._agenda[RoundStarted, event.run]
        lost = self._site.workspace.sweep(
            event.run, event.round, event.result_sha, keep_unanswered=event.late_counts
        )
        for number in lost:
            get_logger().warning("delta.late", run=event.run, round=number, reason="round closed")

    def on_run_finished(self, event: RunFinished, sender: str) -> None:
        """Note to evaluate the result. Idempotent: the same loss is told again."""
        del sender
        self.finished = event
        self._agenda.pop((RoundStarted, event.run), None)
        if event.get_url is not None:
            self._note(event)

    def hear(self, event: Event) -> None:
        """Take note at once, in whatever thread, of what may call off the work in hand.

        The handlers come to it only when that work is done.
        """
        task = self.in_hand
        if not isinstance(task, RoundStarted) or getattr(event, "run", None) != task.run:
            return
        if isinstance(event, RunFinished) or (
            isinstance(event, RoundClosed) and not event.late_counts and task.round <= event.round
        ):
            self._called_off = task

    def _is_over(self, task: RoundStarted) -> bool:
        """Whether nobody takes a delta of this round any more, so that no step of it is of use."""
        return task is self._called_off and not self._site.should_stop()

    # Work --------------------------------------------------------------------------------------

    def work(self) -> None:
        """Do the first thing on the agenda. Retryable errors leave it there and go on up."""
        self.in_hand = task = self._next_task()
        match task:
            case None:
                return
            case RunAnnounced():
                self._prepare(task)
            case RoundStarted():
                self._train(task)
            case UploadGranted():
                self._upload(task)
            case RunFinished():
                self._evaluate(task)
        self._deferred.pop((type(task), task.run), None)
        if self._agenda.get((type(task), task.run)) is task:
            del self._agenda[type(task), task.run]

    def defer(self) -> float:
        """The work in hand failed for now: other work comes first; seconds until it is due."""
        if self.in_hand is None:
            return 0.0
        key = (type(self.in_hand), self.in_hand.run)
        _, tries = self._deferred.get(key, (0.0, 0))
        pause = min(2.0**tries, LONGEST_DEFER_SECONDS)
        self._deferred[key] = (time.monotonic() + pause, tries + 1)
        return pause

    def _next_task(self) -> Task | None:
        """Getting ready comes first: the queue may announce a round from before a restart.

        Then uploads: a delta that waits behind another training would be late.
        """
        now = time.monotonic()
        tasks = [
            task
            for key, task in self._agenda.items()
            if key not in self._deferred or self._deferred[key][0] <= now
        ]
        ready = (t for t in tasks if isinstance(t, RunAnnounced))
        later = (t for t in tasks if t.run in self._prepared)
        ordered = sorted(later, key=lambda task: not isinstance(task, UploadGranted))
        return next(ready, None) or next(iter(ordered), None)

    def _prepare(self, task: RunAnnounced) -> None:
        # What the learner holds from here on is this announcement's: one that is not accepted
        # leaves nothing to train.
        self._prepared.discard(task.run)
        try:
            self._guard.check_run(task)
            ready = self._site.learner.prepare(task, self._reporter(None))
            self._guard.check_run(task, ready)
        except GradualDiffError as error:
            if error.retryable or isinstance(error, InterruptedRunError):
                raise
            get_logger().warning("run.declined", run=task.run, reason=str(error))
            self._decline(task, self._guard.outward(error))
            return
        except Exception as error:  # noqa: BLE001 - whether this site takes part is chosen here
            # As in training: a library's message may hold text, so only its type goes out.
            get_logger().exception("preparation.crashed", run=task.run)
            self._decline(
                task, f"{type(error).__name__} while loading model and text; see the site's log"
            )
            return
        self._site.workspace.begin(task.run, task.config_digest)
        self._prepared.add(task.run)
        self._publish(
            ParticipantReady(
                run=task.run,
                config_digest=task.config_digest,
                manifest=ready.manifest,
                fingerprint=ready.fingerprint,
                numerics=ready.numerics,
                examples=ready.examples,
            )
        )
        # One that came too late, or whose upload a kill cut off: the run may take it still.
        for submission in self._site.workspace.unanswered(task.run):
            self._request_once(submission)

    def _decline(self, task: RunAnnounced, reason: str) -> None:
        self._publish(RunDeclined(run=task.run, reason=reason))

    def _train(self, task: RoundStarted) -> None:
        try:
            # Trained before, if only the word of it did not get out.
            done = self._site.workspace.submission(task)
            self.trained = submission = done or self._trained(task)
        except GrantError as error:
            # The URL is stale; a fresh one comes with the next RoundStarted.
            self._ask_again(task.run, str(error))
            return
        except GradualDiffError as error:
            if isinstance(error, InterruptedRunError) and self._is_over(task):
                get_logger().info("round.called_off", run=task.run, round=task.round)
                return
            if error.retryable or isinstance(error, InterruptedRunError):
                raise
            get_logger().warning("training.failed", run=task.run, reason=str(error))
            if not isinstance(error, NotAcceptedError):
                self._guard.failed(task)
            self._fail(task, self._guard.outward(error), retryable=False)
            return
        except Exception as error:  # noqa: BLE001 - a training's outcome is chosen here
            # The message of a library's error may hold text of the site: it stays in its own log.
            get_logger().exception("training.crashed", run=task.run, round=task.round)
            self._guard.failed(task)
            self._fail(task, f"{type(error).__name__}; see the site's log", retryable=True)
            return
        self._request_upload(submission)

    def _fail(self, task: RoundStarted, reason: str, *, retryable: bool) -> None:
        failure = TrainingFailed(
            run=task.run,
            round=task.round,
            attempt=task.attempt,
            reason=reason,
            retryable=retryable,
        )
        self._publish(failure)

    def _trained(self, task: RoundStarted) -> Submission:
        site, workspace = self._site, self._site.workspace
        self._guard.check_round(task)
        started = time.monotonic()
        source = self._fetch(task.run, task.source_sha, task.get_url, task.fetched_sha)
        fetched = time.monotonic()
        making = workspace.new_round(task.run)
        state = workspace.state_path(task.run, task.last_counted)
        failpoint("learn.before")
        with file_errors(making):
            learned = site.learner.learn(
                task,
                source,
                state,
                making,
                lambda: site.should_stop() or self._is_over(task),
                self._reporter(task.round),
                workspace.checkpoints(task, site.name),
            )
            failpoint("learn.after")
            self._guard.check_delta(learned)
            submission = _submission(task, learned)
            submission.metrics.seconds["fetch"] = round(fetched - started, 3)
            told = self._guard.told(submission.metrics)
            submission = submission.model_copy(update={"metrics": told})
            workspace.commit(making, submission)
        get_logger().info("round.trained", site=site.name, run=task.run, round=task.round)
        return submission

    def _upload(self, task: UploadGranted) -> None:
        submission = self._site.workspace.committed(task.run, task.round, task.sha)
        if submission is None:
            # The disk lost it since it was announced: ask what is owed, and train it again.
            self.start(task.run)
            return
        try:
            self._send_chunks(task, submission)
        except GrantError as error:
            # The chunks still missing are granted anew: the answer names the round, we the delta.
            self._requested.clear()
            self._ask_again(task.run, str(error))
            return
        self._publish(DeltaSubmitted(**submission.model_dump(exclude={"expires_at", "settings"})))
        self.handed_over = True

    def _send_chunks(self, task: UploadGranted, submission: Submission) -> None:
        path = self._site.workspace.delta_path(submission)
        report = self._reporter(task.round)
        if self._arrived[0] is not task:
            self._arrived = (task, set())
        arrived = self._arrived[1]

        def send(item: tuple[int, str]) -> None:
            number, url = item
            if number in arrived:
                return
            start = number * task.chunk_size
            length = min(task.chunk_size, submission.size - start)
            failpoint("upload.before")
            self._site.transfer.upload(url, path, start, length)
            arrived.add(number)
            failpoint("upload.after")

        report(Progress("upload", 0, len(task.urls)))
        with ThreadPoolExecutor(UPLOADS) as pool:
            for count, _ in enumerate(pool.map(send, sorted(task.urls.items())), start=1):
                report(Progress("upload", count, len(task.urls)))

    def _evaluate(self, task: RunFinished) -> None:
        if task.sha is None or task.fetched_sha is None or task.get_url is None:
            return
        try:
            told = self._guard.evaluated(task)
            if told is not None:
                self._publish(told)
                return
            source = self._fetch(task.run, task.sha, task.get_url, task.fetched_sha)
        except GrantError as error:
            self._ask_again(task.run, str(error))
            return
        except NotAcceptedError as error:
            get_logger().warning("evaluation.refused", run=task.run, reason=str(error))
            return
        held_out = self._site.learner.evaluate(task.run, source, self._reporter(None))
        if held_out is None:
            return
        told = AdapterEvaluated(run=task.run, round=task.round, sha=task.sha, held_out=held_out)
        if self._guard.may_tell(told):
            self._publish(told)

    # Parts -------------------------------------------------------------------------------------

    def _note(self, task: Task) -> None:
        key = (type(task), task.run)
        if not is_overtaken(task, self._agenda.get(key)):
            self._agenda[key] = task

    def _ask_again(self, run: str, reason: str) -> None:
        """Ask what is owed, but not on and on: a store that refuses every URL would make us spin.

        Whoever listens asks once a minute anyway.
        """
        now = time.monotonic()
        self._asked = [then for then in self._asked if now - then < ASK_SECONDS]
        if len(self._asked) < ASKS:
            self._asked.append(now)
            self.start(run, first=False)
            return
        get_logger().warning("grant.refused", run=run, reason=reason)

    def _request_once(self, submission: Submission) -> None:
        """Request the upload unless that was done a moment ago: notifications are repeated."""
        asked = self._requested.get(submission.sha)
        if asked is None or time.monotonic() - asked > ASK_SECONDS / 2:
            self._request_upload(submission)

    def _request_upload(self, submission: Submission) -> None:
        self._requested[submission.sha] = time.monotonic()
        self._publish(
            UploadRequested(
                run=submission.run,
                round=submission.round,
                sha=submission.sha,
                size=submission.size,
            )
        )

    def _fetch(self, run: str, adapter_sha: str, url: str, fetched_sha: str) -> Path:
        path = self._site.workspace.adapter_path(run, adapter_sha)
        # What lies there from before is trusted no more than what comes over the wire.
        if not path.is_file() or digest_file(path)[0] != adapter_sha:
            failpoint("download.before")
            self._site.transfer.download(url, path, fetched_sha)
            failpoint("download.after")
        return path

    def _publish(self, event: Event) -> None:
        # Nobody needs an old one: it is said again every minute.
        expires = ONLINE_EXPIRES_SECONDS if isinstance(event, SiteOnline) else None
        message = to_coordinator(self._site.name, event, self._site.clock(), expires)
        self._site.outbox.publish([message])

    def _reporter(self, round_number: int | None) -> Callable[[Progress], None]:
        return lambda progress: self._site.report(self._site.name, round_number, progress)


def _submission(task: RoundStarted, learned: Learned) -> Submission:
    return Submission(
        run=task.run,
        round=task.round,
        source_sha=task.source_sha,
        sha=learned.delta.sha256,
        size=learned.delta.size,
        examples=learned.examples,
        tokens=learned.tokens,
        metrics=learned.metrics,
        state=learned.state,
        expires_at=task.expires_at,
        settings=settings_digest(task),
    )


def sender_of(delivery: Delivery, event: Event) -> str:
    """Only the coordinator's account speaks to a site. Raises ProtocolError."""
    if delivery.sender != topology.COORDINATOR:
        raise ProtocolError(
            f"sender: expected {topology.COORDINATOR} for {type(event).__name__}, "
            f"got {delivery.sender or 'none'}"
        )
    return delivery.sender
