"""The participant: messages say what to do, ``work()`` does it, one thing at a time.

Handlers only note an intention and return, so that messages are acknowledged long before a
training ends; what a kill makes them forget, the coordinator tells again when the site comes
online. Done work is committed to the workspace first and announced after, and announcing repeats.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from participant.agenda import Agenda, is_overtaken
from participant.births import Births
from participant.fetching import fetch_adapter, fetch_bases
from participant.guard import Guard
from participant.heads import Heads
from participant.local_round import train_and_commit
from participant.secure_round import answer_once, exchange_of, is_for_a_lost_key, sign_once
from participant.site_noise import with_site_noise
from participant.traffic import Counted, Meter
from participant.uploads import Uploads
from shared import topology
from shared.errors import (
    GradualDiffError,
    GrantError,
    InterruptedRunError,
    NotAcceptedError,
    ProtocolError,
)
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
    SurvivorsSigned,
    TrainingFailed,
    UnmaskAnswered,
    UnmaskRequested,
    UploadGranted,
)
from shared.protocol.messages import to_coordinator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from participant.learner.port import Progress, Readiness
    from participant.site import Site
    from participant.workspace import Submission
    from shared.brokers.port import Delivery
    from shared.protocol.dispatch import Handler

ONLINE_EXPIRES_SECONDS = 150.0
ASK_SECONDS = 60.0
ASKS = 3  # in that time

Task = RunAnnounced | RoundStarted | UploadGranted | UnmaskRequested | RunFinished


class Participant:
    """One site's side of the protocol."""

    def __init__(self, site: Site) -> None:
        self.meter = Meter(site.workspace)
        counted = Counted(site.transfer, self.meter)
        self._site = site = replace(site, transfer=counted, refused=self.meter.refused)
        self._guard = Guard(site.accept, site.workspace)
        self._heads = Heads(site.workspace)
        self.births = Births(site.workspace)
        self._agenda = Agenda()
        self._uploads = Uploads(site, self._publish)
        # Runs whose base model is loaded, and what was found then; work for another run waits for
        # its announcement.
        self._prepared: dict[str, Readiness] = {}
        self._held: dict[str, RunAnnounced] = {}  # until a person at the site says yes or no
        self.finished: RunFinished | None = None
        self._asked: list[float] = []
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
            UnmaskRequested: self.on_unmask_requested,
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
        self._agenda.note(event)

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
            self._uploads.request_once(done)
            return
        self._agenda.note(event)

    def on_upload_granted(self, event: UploadGranted, sender: str) -> None:
        """Note to upload. Idempotent: chunks are named by content, the last word wins."""
        del sender
        self._agenda.note(event)

    def on_delta_answered(self, event: DeltaAnswered, sender: str) -> None:
        """Drop a refused delta. Idempotent: dropping twice is dropping once."""
        del sender
        granted = self._agenda.find(UploadGranted, event.run, event.sha)
        if granted is not None:
            self._agenda.drop(granted)
        self._uploads.forget(event.sha)
        self.meter.answered(event.run, event.sha, taken=event.verdict == "accepted")
        if event.verdict == "accepted":
            self._heads.keep(event, self._site.clock())
            self._site.workspace.mark_accepted(event.run, event.round, event.sha)
            get_logger().debug("delta.answered", verdict=event.verdict, sha=event.sha)
            return
        get_logger().warning("delta.answered", verdict=event.verdict, reason=event.reason)
        self._site.workspace.forget(event.run, event.round, event.sha)

    def on_unmask_requested(self, event: UnmaskRequested, sender: str) -> None:
        """Note to answer. Idempotent: there is one answer, which is told again."""
        del sender
        self._agenda.note(event)

    def on_round_closed(self, event: RoundClosed, sender: str) -> None:
        """Sweep what the closed round made needless. Idempotent: sweeping repeats."""
        del sender
        self._heads.keep(event, self._site.clock())
        self._guard.closed(event)
        waiting = self._agenda.find(RoundStarted, event.run)
        if waiting is not None and waiting.round <= event.round:
            self._agenda.drop(waiting)
        lost = self._site.workspace.sweep(
            event.run,
            event.round,
            event.result_sha,
            keep_unanswered=event.late_counts,
            keep_source=event.by_update,
            keep={waiting.last_counted, waiting.last_accepted} if waiting is not None else set(),
        )
        if not event.late_counts:
            self._site.workspace.end_held(event.run, event.round)
        for number in lost:
            get_logger().warning("delta.late", run=event.run, round=number, reason="round closed")

    def on_run_finished(self, event: RunFinished, sender: str) -> None:
        """Note to evaluate the result. Idempotent: the same loss is told again."""
        del sender
        self._heads.keep(event, self._site.clock())
        self.finished = event
        self._held.pop(event.run, None)
        waiting = self._agenda.find(RoundStarted, event.run)
        if waiting is not None:
            self._agenda.drop(waiting)
        if event.get_url is not None:
            self._agenda.note(event)

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
        if task is None:
            return
        self.meter.run, self.meter.ready = task.run, not isinstance(task, RunAnnounced)
        match task:
            case RunAnnounced():
                self._prepare(task)
            case RoundStarted():
                self._train(task)
            case UploadGranted():
                self._upload(task)
            case UnmaskRequested():
                self._unmask(task)
            case RunFinished():
                self._evaluate(task)
        self._agenda.done(task)

    def offer_released(self) -> None:
        """Offer the deltas that the site's operator released while this process was running."""
        for run in self._prepared:
            for submission in self._site.workspace.take_released(run):
                self._uploads.request(submission)

    def defer(self) -> float:
        """The work in hand failed for now: other work comes first; seconds until it is due."""
        return 0.0 if self.in_hand is None else self._agenda.defer(self.in_hand)

    def _next_task(self) -> Task | None:
        """What a sum waits for comes first: it takes no time and no model.

        Then getting ready: the queue may announce a round from before a restart. Then uploads: a
        delta that waits behind another training would be late.
        """
        for held in list(self._held.values()):
            if self._guard.is_answered(held):
                self._agenda.note(self._held.pop(held.run))
        tasks = [word for word in self._agenda.due() if isinstance(word, Task)]
        asked = next((task for task in tasks if isinstance(task, UnmaskRequested)), None)
        if asked is not None:
            return asked
        ready = (t for t in tasks if isinstance(t, RunAnnounced))
        later = (t for t in tasks if t.run in self._prepared)
        ordered = sorted(later, key=lambda task: not isinstance(task, UploadGranted))
        return next(ready, None) or next(iter(ordered), None)

    def _prepare(self, task: RunAnnounced) -> None:
        # What the learner holds from here on is this announcement's: one that is not accepted
        # leaves nothing to train.
        self._prepared.pop(task.run, None)
        self._held.pop(task.run, None)
        try:
            self._guard.check_run(task)
            if not self._guard.is_approved(task, self._site.clock()):
                get_logger().warning("run.awaits_approval", run=task.run)
                self._held[task.run] = task
                return
            fetch_bases(self._site, task)
            ready = with_site_noise(task, self._site.learner.prepare(task, self._reporter(None)))
            self._guard.check_run(task, ready)
        except GrantError as error:
            # The URL is stale; a fresh one comes with the next announcement.
            self._ask_again(task.run, str(error))
            return
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
        if self._site.workspace.begin(task.run, task.config_digest):
            self.meter.forget(task.run)
        self._prepared[task.run] = ready
        self._publish(
            ParticipantReady(
                run=task.run,
                config_digest=task.config_digest,
                manifest=ready.manifest,
                fingerprint=ready.fingerprint,
                numerics=ready.numerics,
                examples=ready.examples,
                bases=ready.bases,
                base_parameters=ready.base_parameters,
                exchange=exchange_of(self._site) if task.secure else None,
                private=task.privacy is not None,
            )
        )
        # One that came too late, or whose upload a kill cut off: the run may take it still.
        for submission in self._site.workspace.unanswered(task.run):
            self._uploads.request_once(submission)

    def held(self) -> list[str]:
        """The runs that wait for a person at the site; asked by the listener too."""
        return list(self._held)

    def _decline(self, task: RunAnnounced, reason: str) -> None:
        self._publish(RunDeclined(run=task.run, reason=reason))

    def _train(self, task: RoundStarted) -> None:
        if is_for_a_lost_key(self._site, task):
            get_logger().warning("round.for_a_lost_key", run=task.run, round=task.round)
            return
        try:
            # Trained before, if only the word of it did not get out.
            done = self._site.workspace.submission(task)
            self.trained = submission = done or train_and_commit(
                self._site,
                self._guard,
                task,
                self._prepared[task.run],
                lambda: self._site.should_stop() or self._is_over(task),
                self._reporter(task.round),
            )
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
        self._uploads.request(submission)

    def _fail(self, task: RoundStarted, reason: str, *, retryable: bool) -> None:
        failure = TrainingFailed(
            run=task.run,
            round=task.round,
            attempt=task.attempt,
            reason=reason,
            retryable=retryable,
        )
        self._publish(failure)

    def _upload(self, task: UploadGranted) -> None:
        submission = self._site.workspace.committed(task.run, task.round, task.sha)
        if submission is None:
            # The disk lost it since it was announced: ask what is owed, and train it again.
            self.start(task.run)
            return
        try:
            self._uploads.send(task, submission, self._reporter(task.round))
        except GrantError as error:
            # The chunks still missing are granted anew: the answer names the round, we the delta.
            self._uploads.forget()
            self._ask_again(task.run, str(error))
            return
        kept_here = {"expires_at", "settings", "left_out", "mask_seed", "terms"}
        told = submission.model_dump(exclude=kept_here)
        number = submission.terms.number if submission.terms else 1
        traffic = self.meter.tell(task.run, task.sha)
        self._publish(DeltaSubmitted(**told, traffic=traffic, number=number))
        self.handed_over = True

    def _unmask(self, task: UnmaskRequested) -> None:
        try:
            signature = sign_once(self._site, task)
            if signature is not None:
                self._publish(
                    SurvivorsSigned(
                        run=task.run, round=task.round, attempt=task.attempt, signature=signature
                    )
                )
                return
            revealed = answer_once(self._site, task)
        except ProtocolError as error:
            get_logger().warning("sum.refused", run=task.run, round=task.round, reason=str(error))
            return
        answered = UnmaskAnswered(
            run=task.run, round=task.round, attempt=task.attempt, revealed=revealed
        )
        self._publish(answered)
        get_logger().info("sum.answered", run=task.run, round=task.round)

    def _evaluate(self, task: RunFinished) -> None:
        if task.sha is None or task.get_url is None:
            return
        noise = self._prepared[task.run].privacy
        if noise is not None and noise.of_site:
            return  # a loss of this site's text has no noise
        try:
            told = self._guard.evaluated(task)
            if told is not None:
                self._publish(told)
                return
            manifest = self._prepared[task.run].manifest
            source = fetch_adapter(self._site, self._guard, task, manifest)
        except GrantError as error:
            self._ask_again(task.run, str(error))
            return
        except NotAcceptedError as error:
            get_logger().warning("evaluation.refused", run=task.run, reason=str(error))
            return
        held_out = self._site.learner.evaluate(task.run, source, self._reporter(None))
        if held_out is None:
            return
        told = AdapterEvaluated(
            run=task.run,
            round=task.round,
            sha=task.sha,
            held_out=held_out,
            traffic=self.meter.tell(task.run, task.sha),
        )
        if self._guard.may_tell(told):
            self._publish(told)

    # Parts -------------------------------------------------------------------------------------

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

    def _publish(self, event: Event) -> None:
        # Nobody needs an old one: it is said again every minute.
        expires = ONLINE_EXPIRES_SECONDS if isinstance(event, SiteOnline) else None
        run = getattr(event, "run", None)
        voice = self.births.voice(self._site.trust.key, run)
        message = to_coordinator(self._site.name, event, self._site.clock(), expires, voice)
        self._site.outbox.publish([message])
        self.meter.said(run, len(message.body))

    def _reporter(self, round_number: int | None) -> Callable[[Progress], None]:
        return lambda progress: self._site.report(self._site.name, round_number, progress)


def sender_of(delivery: Delivery, event: Event) -> str:
    """Only the coordinator's account speaks to a site. Raises ProtocolError."""
    if delivery.sender != topology.COORDINATOR:
        raise ProtocolError(
            f"sender: expected {topology.COORDINATOR} for {type(event).__name__}, "
            f"got {delivery.sender or 'none'}"
        )
    return delivery.sender
