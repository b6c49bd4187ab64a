"""The coordinator: one handler per event; what it learns goes through the ledger into the state.

Every handler follows one order: check the sender's claim, make it durable (a record), fold the
record in, and let the effects notify. All are idempotent: a record that exists is adopted, a fact
that is known changes nothing, an answer may be given twice.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from coordinator.aggregation.server_optimizer import wants_more_than_zeros
from coordinator.effects import answer_of
from coordinator.intake import CHUNK_BYTES, Upload
from coordinator.limits import Limits
from coordinator.liveness import Liveness
from coordinator.round.machine import apply, pending, replay, resume
from coordinator.round.members import unfit
from coordinator.round.state import Aggregate, MakeGenesis, Ticked, WriteRecord
from shared.adapters import kind_of
from shared.errors import (
    DeltaRefusedError,
    FencedError,
    GradualDiffError,
    InterruptedRunError,
    LedgerError,
    ObjectMissingError,
    ProtocolError,
)
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.methods.averaging import delta_manifest
from shared.protocol.bounds import prose
from shared.protocol.dispatch import ABOUT_THE_MESSAGE
from shared.protocol.events import (
    AdapterEvaluated,
    CoordinatorTick,
    DeltaSubmitted,
    Event,
    MessageRefused,
    ParticipantReady,
    RunDeclined,
    SiteOnline,
    TrainingFailed,
    TrainingProgressed,
    UploadGranted,
    UploadRequested,
)
from shared.protocol.records import (
    AcceptedRecord,
    DeclinedRecord,
    EvaluatedRecord,
    FailedRecord,
    GenesisRecord,
    MemberRecord,
    OpenedRecord,
    Record,
    RefusedRecord,
    RejoinedRecord,
)
from shared.tensors.codecs import get_codec
from shared.tensors.delta_file import DeltaHeader
from shared.topology import accepted_key, site_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from coordinator.effects import Effects
    from coordinator.intake import Intake
    from coordinator.round.state import Effect, Fact, RunState, Step
    from shared.config import FederationConfig
    from shared.protocol.dispatch import Handler
    from shared.protocol.ledger import Ledger
    from shared.protocol.records import ClosingRecord

# A chunk of 16 MiB gets through in that time at 150 kbit/s; the rest is asked for again.
GRANT_SECONDS = 900.0
ASK_SECONDS = 60.0  # a site has to send a lost delta again before it is asked once more
MOST_WORDS = 100  # of one site before the run begins: a site that is fixed needs few


class Coordinator:
    """One run's coordinator. It holds nothing that ``reload()`` could not rebuild."""

    def __init__(
        self,
        config: FederationConfig,
        ledger: Ledger,
        intake: Intake,
        effects: Effects,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._ledger = ledger
        self._intake = intake
        self._effects = effects
        self._clock = clock
        self.state = replay(config, ())
        self.limits = Limits(config.limits)
        self.liveness = Liveness(ledger.store, config.run.name, ledger.writer, self.limits.over)
        self.active = False
        # Counted deltas that the store lost: when each was asked for again, what is wrong with it.
        self._lost: dict[Upload, tuple[float, str]] = {}
        self._cleared: Mapping[str, str] = {}  # the excluded sites whose uploads are deleted
        handlers: Mapping[type[Event], Handler] = {
            SiteOnline: self.on_site_online,
            ParticipantReady: self.on_participant_ready,
            RunDeclined: self.on_run_declined,
            UploadRequested: self.on_upload_requested,
            DeltaSubmitted: self.on_delta_submitted,
            TrainingFailed: self.on_training_failed,
            TrainingProgressed: self.on_training_progressed,
            AdapterEvaluated: self.on_adapter_evaluated,
            MessageRefused: self.on_message_refused,
            CoordinatorTick: self.on_tick,
        }
        self.handlers: Mapping[type[Event], Handler] = {
            kind: self._entry(handler) for kind, handler in handlers.items()
        }

    @property
    def damage(self) -> str | None:
        """What is wrong with the deltas without which the decided round cannot be closed."""
        return "; ".join(damage for _, damage in self._lost.values()) or None

    def begin(self) -> None:
        """Record or find the run. Raises RunExistsError when it has another config."""
        self._ledger.begin(self._config)

    def start(self) -> None:
        """Become the active one: rebuild the state, repeat what may have been lost.

        The first delivery calls it: until then another coordinator may be at work, and this one
        only stands by.
        """
        failpoint("start.before")
        self.reload()
        failpoint("start.reloaded")
        self._carry_out(resume(self.state))
        self._say_unfit()
        self.active = True  # not before: a store that was away in between has it all done again
        failpoint("start.after")

    def _entry(self, handler: Handler) -> Handler:
        """What precedes every handler."""

        def handle(event: Event, sender: str) -> None:
            if not self.active:
                self.start()
            if self.state.closing is not None:
                # A store that was away left the decision undone; this may be of the next round.
                self._carry_out((Aggregate(self.state.closing),))
            self.liveness.saw(sender, self._clock())
            handler(event, sender)

        return handle

    def reload(self) -> None:
        """Rebuild the state from the ledger."""
        self.state = replay(self._config, self._ledger.history())
        self._lost, self._cleared = {}, {}  # whoever noticed an exclusion may have died at it

    # Handlers --------------------------------------------------------------------------------

    def on_site_online(self, event: SiteOnline, sender: str) -> None:
        """Answer with what is pending for the site. Idempotent: writes nothing."""
        get_logger().info("site.online", holds_round=event.round)
        for notification in pending(self.state, sender, first=event.first):
            self._effects.notify(notification, self.state)

    def on_participant_ready(self, event: ParticipantReady, sender: str) -> None:
        """Record the member. Idempotent: nothing is recorded of a word that was said before.

        Until the run begins a site may be fixed: then its last word counts.
        """
        if event.config_digest != self._config.digest:
            raise ProtocolError(
                f"config_digest: {sender} is ready for {event.config_digest[:12]}, this run is "
                f"{self._config.digest[:12]}; start the site again"
            )
        known, genesis = self.state.members.get(sender), self.state.genesis
        changed = [] if known is None else _changed(known, event)
        if known is not None and not (changed and genesis is None):
            if changed:
                raise ProtocolError(
                    f"{changed[0]}: {sender} came back with another one than it joined with; give "
                    "it the base model and the versions it began the run with"
                )
            return
        if genesis is not None:
            self._check_joins(event, sender)
        self._record(self._member(event, sender))
        self._say_unfit()

    def _member(self, event: ParticipantReady, sender: str) -> MemberRecord:
        word = self.state.words.get(sender, 0) + 1
        if word > MOST_WORDS:
            raise ProtocolError(
                f"{sender}: said {MOST_WORDS} times that it is ready, each time with another "
                "model, adapter or version; take it out of the run, or begin another run"
            )
        kind: Callable[..., MemberRecord] = MemberRecord
        if word > 1:
            kind = partial(RejoinedRecord, number=word)
        return kind(
            site=sender,
            manifest=event.manifest,
            fingerprint=event.fingerprint,
            numerics=event.numerics,
            examples=event.examples,
            from_round=self._next_round() if self.state.genesis is not None else 0,
        )

    def _say_unfit(self) -> None:
        """Tell the log who does not fit, once nothing else is waited for."""
        if not self.state.silent:
            for site, why in self.state.unfit.items():
                get_logger().warning("site.unfit", site=site, reason=why)

    def on_run_declined(self, event: RunDeclined, sender: str) -> None:
        """Record that the site stays out. Idempotent: one record per site."""
        get_logger().warning("run.declined", reason=event.reason)
        self._record(DeclinedRecord(site=sender, reason=event.reason))

    def on_upload_requested(self, event: UploadRequested, sender: str) -> None:
        """Sign one PUT per missing chunk. Idempotent: signing changes nothing."""
        upload = self._upload(event, sender)
        known = (sender, event.round) in self.state.uncounted
        if upload not in self._lost and (known or self._takes(sender, event.round) is None):
            self._answer_closed(upload, record=False)
            return
        present = self._intake.uploading(upload)
        if upload not in self._lost and not self.limits.grants(
            self.state, sender, event.round, event.sha, present
        ):
            reason = f"limits.uploads: {sender} may upload no more deltas for round {event.round}"
            verdict = RefusedRecord(round=event.round, site=sender, sha=event.sha, reason=reason)
            self._effects.tell({sender: answer_of(upload.run, verdict)})
            return
        self._grant(upload)

    def _grant(self, upload: Upload) -> None:
        expires_at = self._clock() + GRANT_SECONDS
        urls = {
            number: self._ledger.store.sign_put(
                upload.chunk_key(number), expires_at, upload.chunk_size(number)
            )
            for number in self._intake.missing_chunks(upload)
        }
        grant = UploadGranted(
            run=upload.run,
            round=upload.round,
            sha=upload.sha,
            chunk_size=CHUNK_BYTES,
            urls=urls,
            expires_at=expires_at,
        )
        self._effects.tell({upload.site: grant})

    def on_delta_submitted(self, event: DeltaSubmitted, sender: str) -> None:
        """Check the delta, record the verdict. Idempotent: same bytes, same record, one count."""
        upload = self._upload(event, sender)
        if upload in self._lost:
            self._restore(upload)
            return
        opened = self._takes(sender, event.round)
        if opened is None or (sender, event.round) in self.state.uncounted:
            self._answer_closed(upload)
            return
        codec = get_codec(self._config.codec.name)
        expected = DeltaHeader(
            run=upload.run,
            round=upload.round,
            site=sender,
            source_sha=opened.source_sha,
            codec=codec.name,
            codec_version=codec.version,
        )
        if event.source_sha != opened.source_sha:
            self._refuse(
                upload,
                f"source_sha: expected {opened.source_sha[:12]}, got {event.source_sha[:12]}; "
                "the delta was trained from another adapter",
            )
            return
        limit = self._config.aggregation.max_delta_norm
        try:
            manifest = delta_manifest(self._genesis().manifest, self._config, sender, event.round)
            not_zero = wants_more_than_zeros(self._config, opened)
            norm = self._intake.take(upload, manifest, expected, limit, not_zero)
        except DeltaRefusedError as error:
            self._intake.discard(upload)
            self._refuse(upload, str(error))
            return
        get_logger().info("delta.accepted", norm=norm)
        self._record(
            AcceptedRecord(
                round=event.round,
                site=sender,
                sha=event.sha,
                size=event.size,
                examples=event.examples,
                tokens=event.tokens,
                norm=norm,
                metrics=event.metrics,
                state=event.state,
            )
        )

    def on_training_failed(self, event: TrainingFailed, sender: str) -> None:
        """Record the failed attempt. Idempotent: one record per attempt, named by its number."""
        if self._open_round_for(event.round, sender) is None:
            return
        known = self.state.troubles.get(sender)
        expected = known.attempts + 1 if known else 1
        if event.attempt < expected:
            return
        if event.attempt > expected:
            raise ProtocolError(
                f"attempt: expected {expected} of {sender} in round {event.round}, "
                f"got {event.attempt}"
            )
        get_logger().warning("training.failed", reason=event.reason)
        if not self.limits.records_failure(self.state, sender, event):
            return
        self._record(
            FailedRecord(
                round=event.round,
                site=sender,
                attempt=event.attempt,
                reason=event.reason,
                retryable=event.retryable,
            )
        )

    def on_training_progressed(self, event: TrainingProgressed, sender: str) -> None:
        """Remember how far a site is, for whoever looks. Idempotent: only the newest counts."""
        self.liveness.progressed(event, sender, self._clock())

    def on_adapter_evaluated(self, event: AdapterEvaluated, sender: str) -> None:
        """Record a held-out loss of the final adapter. Idempotent: one record per site."""
        finished = self.state.finished
        if finished is None or event.sha != finished.sha or sender not in self.state.members:
            raise ProtocolError(
                f"sha: {sender} evaluated {event.sha[:12]}, which is not the result"
            )
        self._record(
            EvaluatedRecord(
                round=finished.round, site=sender, sha=event.sha, held_out=event.held_out
            )
        )

    def on_message_refused(self, event: MessageRefused, sender: str) -> None:
        """Keep what a site could not use where people look. Idempotent: a copy more is no harm."""
        get_logger().warning("message.refused", site=sender, reason=event.reason)
        # What a site says of queue and sender is not checked by anybody: nothing may act on it.
        self._effects.keep_refused(
            event.model_copy(update={"reported_by": sender, "queue": site_queue(sender)})
        )

    def on_tick(self, event: CoordinatorTick, sender: str) -> None:
        """Fold the time in. Idempotent: the time is what it is.

        Only an own tick counts: what it overtakes in the queue had arrived before a deadline is
        judged. One of a coordinator that stands by, or went, says nothing here.
        """
        del sender  # a tick comes from a coordinator's own account, checked by the dispatcher
        if event.writer == self._ledger.writer:
            self.notice_controls()
            self.feed(Ticked(event.now))

    # Facts and effects -------------------------------------------------------------------------

    def feed(self, fact: Fact) -> None:
        """Fold a fact in and carry out what follows from it."""
        self.state, effects = apply(self.state, fact)
        self._carry_out(effects)

    def notice_controls(self) -> bool:
        """Fold in what operators asked since the last look and carry it out; whether it was any."""
        asked = self._fold_controls()
        self._carry_out(asked or ())
        return asked is not None

    def _fold_controls(self) -> tuple[Effect, ...] | None:
        """Fold in what operators asked since the last look; what follows, or None without any."""
        effects = None
        for control in self._ledger.controls(after=self.state.steering.number):
            get_logger().info(
                "control.noticed",
                number=control.number,
                action=control.action,
                site=control.site,
                rounds=control.rounds,
                reason=control.reason,
            )
            self.state, effects = apply(self.state, control)  # nothing follows before the last
        return effects

    def _clear_excluded(self) -> None:
        """Nothing of a site that is out is taken any more, but for what a decision lacks."""
        out = self.state.steering.excluded
        if out != self._cleared:
            self._intake.clear_sites(self._config.run.name, out, self._lost)
            self._cleared = out

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        """Carry out effects in their order; what follows from one comes before the next."""
        queue = deque(effects)
        while queue:
            effect = queue.popleft()
            following: tuple[Effect, ...] = ()
            if isinstance(effect, WriteRecord) and (asked := self._fold_controls()) is not None:
                following = asked  # another step may follow from what was asked
            elif isinstance(effect, Aggregate) and not self._holds_all(effect.closing):
                pass  # it is asked for again, and this again with every tick
            elif isinstance(effect, MakeGenesis | WriteRecord | Aggregate):
                self.state, following = apply(self.state, self._perform(effect))
            else:
                self._effects.notify(effect, self.state)
            queue.extendleft(reversed(following))
        self._clear_excluded()

    def _perform(self, step: Step) -> Record:
        """Take a durable step. What goes wrong there is never the fault of the message at hand.

        It is said where people look, since whoever comes next meets the same step again.
        """
        try:
            record = self._effects.perform(step, self.state)
        except (FencedError, InterruptedRunError):
            raise
        except Exception as error:
            self.liveness.problem = _why_not(step, error, self.state)
            get_logger().error("step.failed", reason=self.liveness.problem)
            self.liveness.write(self.state, self._clock())
            if _is_foreseen(error):
                raise
            raise LedgerError(self.liveness.problem) from error
        self.liveness.problem = ""
        return record

    def _holds_all(self, closing: ClosingRecord) -> bool:
        """Whether the store has every counted delta; one that is lost is asked of its site again.

        A site keeps what it trained until the round is closed, and the bytes are named by their
        sha256: the round ends in the adapter that it would have ended in.
        """
        now = self._clock()
        if any(now < asked + ASK_SECONDS for asked, _ in self._lost.values()):
            return False
        counted = [self.state.uncounted[item.site, item.from_round] for item in closing.inputs]
        lost = self._intake.lost(self._config.run.name, counted)
        self._lost = {upload: (now, damage) for upload, damage in lost.items()}
        for upload, damage in lost.items():
            get_logger().error("delta.lost", site=upload.site, round=upload.round, reason=damage)
            self._grant(upload)
        if lost:
            self.liveness.problem = f"{self.damage}; its site was asked to send it again"
            self.liveness.write(self.state, now)
        return not lost

    def _restore(self, upload: Upload) -> None:
        """Store what a site sent again. Idempotent: it is the same bytes, or nothing."""
        try:
            self._intake.restore(upload)
        except DeltaRefusedError as error:  # it is asked for again
            get_logger().warning("delta.refused", reason=str(error))
            self._intake.discard(upload)
            return
        get_logger().info("delta.restored", site=upload.site, round=upload.round)
        del self._lost[upload]
        if self.state.closing is not None:
            self._carry_out((Aggregate(self.state.closing),))

    def _record(self, record: Record) -> None:
        self.feed(self._ledger.write(record))

    def _refuse(self, upload: Upload, reason: str) -> None:
        get_logger().warning("delta.refused", reason=reason)
        self._answer(
            RefusedRecord(round=upload.round, site=upload.site, sha=upload.sha, reason=reason)
        )

    def _answer(self, verdict: RefusedRecord) -> None:
        """Record a verdict, from which the answer follows; or only answer a site with too many."""
        if self.limits.records_verdict(self.state, verdict.site, verdict.round, verdict.sha):
            self._record(verdict)
        else:
            self._effects.tell({verdict.site: answer_of(self._config.run.name, verdict)})

    def _answer_closed(self, upload: Upload, *, record: bool = True) -> None:
        """Answer a delta that the open round does not wait for: counted already, or too late.

        Without ``record`` nothing is kept of it: a request is not a delta, and costs nothing.
        """
        key = accepted_key(upload.run, upload.round, upload.site)
        try:
            accepted = self._ledger.read(AcceptedRecord, key)
        except ObjectMissingError:
            accepted = None
        if accepted is not None and accepted.sha == upload.sha:
            self._effects.tell({upload.site: answer_of(upload.run, accepted)})
            return
        self._intake.discard(upload)
        out = self.state.steering.excluded.get(upload.site)
        reason = f"round {upload.round} is not open for this site"
        if accepted is not None:
            reason = f"round {upload.round} holds this site's delta {accepted.sha[:12]} already"
        elif out is not None:
            reason = f"this site was taken out of the run: {out}"
        late = RefusedRecord(
            round=upload.round, site=upload.site, sha=upload.sha, verdict="late", reason=reason
        )
        if record:
            self._answer(late)
        else:
            self._effects.tell({upload.site: answer_of(upload.run, late)})

    # What is known -----------------------------------------------------------------------------

    def _takes(self, site: str, number: int) -> OpenedRecord | None:
        """The round, if a delta of this site for it may still count; operators may say no."""
        opened = self.state.takes(site, number)
        if opened is None or site not in self.state.steering.in_force(opened.selected):
            return None
        return opened

    def _open_round_for(self, number: int, site: str) -> OpenedRecord | None:
        opened = self.state.open_round
        if opened is None or opened.round != number:
            return None
        return opened if site in self.state.steering.in_force(opened.selected) else None

    def _genesis(self) -> GenesisRecord:
        if self.state.genesis is None:
            raise ProtocolError("the run has not begun yet")
        return self.state.genesis

    def _next_round(self) -> int:
        """The first round that is not open yet."""
        return self.state.last_round + (2 if self.state.opened is not None else 1)

    def _upload(self, event: UploadRequested | DeltaSubmitted, sender: str) -> Upload:
        """What a site says it sends. Raises ProtocolError for what cannot be of this run.

        Refused as a message and not as a delta: a made-up round or size must leave no trace in
        the ledger, and no loop over its chunks.
        """
        newest, limit = self.state.last_round + 1, self._size_limit()
        if not 1 <= event.round <= newest:
            raise ProtocolError(f"round: expected 1 to {newest}, got {event.round} from {sender}")
        if event.size > limit:
            raise ProtocolError(
                f"size: expected at most {limit} bytes for this run's adapter, got {event.size} "
                f"from {sender}"
            )
        return Upload(self._config.run.name, event.round, sender, event.sha, event.size)

    def _size_limit(self) -> int:
        """No codec here needs more than fp32 does; the rest is room for the file's header."""
        tensors = self._genesis().manifest.tensors
        return sum(4 * spec.elements for spec in tensors) + 1_000 * len(tensors) + 65_536

    def _check_joins(self, event: ParticipantReady, sender: str) -> None:
        """A site that comes after the run began must fit to those that are in it."""
        genesis = self._genesis()
        begun = genesis.manifest
        own = kind_of(begun).manifest_for(begun, self._config.lora, sender)
        for name, expected in (("fingerprint", genesis.fingerprint), ("manifest", own)):
            if getattr(event, name) != expected:
                raise ProtocolError(
                    f"{name}: {sender} came after the run began with another one; give it the "
                    "base model and the release that the others have"
                )
        members = {**self.state.members, sender: self._member(event, sender)}
        against = unfit(members, self._config).get(sender)
        if against is not None:
            raise ProtocolError(f"{sender} cannot join: {against}")


def _changed(known: MemberRecord, event: ParticipantReady) -> list[str]:
    """What is another one now than on record."""
    names = ("fingerprint", "manifest", "numerics")
    return [name for name in names if getattr(known, name) != getattr(event, name)]


def _is_foreseen(error: Exception) -> bool:
    """Whether it says itself what to do, and is an error of a step and not of a message."""
    return isinstance(error, GradualDiffError) and not isinstance(error, ABOUT_THE_MESSAGE)


def _why_not(step: Step, error: Exception, state: RunState) -> str:
    run, last = state.config.run.name, state.last_round
    match step:
        case MakeGenesis():
            what = "the run cannot begin"
        case WriteRecord(record):
            what = f"round {record.round}: a decision cannot be recorded"
        case Aggregate(closing):
            what = f"round {closing.round} is decided and cannot be closed"
    if _is_foreseen(error):
        return prose(f"{what}: {error}")
    said = prose(f"{what}: {type(error).__name__}: {error}")
    after = f"; gradualdiff runs branch {run} --at {last} --name NEW continues from the last result"
    return (
        f"{said}; nothing recorded is lost. The error returns at each start: report it with the "
        f"coordinator's log{after if last >= 0 else ''}"
    )
