"""The coordinator: one handler per event; what it learns goes through the ledger into the state.

Every handler follows one order: check the sender's claim, say what goes on record; that is made
durable and folded in before the effects notify anybody. All are idempotent: a record that exists is
adopted, a fact that is known changes nothing, an answer may be given twice.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from coordinator.batching import BATCH
from coordinator.deltas import Deltas
from coordinator.live_run import LiveRun
from coordinator.round.machine import next_step, pending, resume
from coordinator.round.members import unfit
from coordinator.round.state import SetSigned, Ticked
from shared.adapters import kind_of
from shared.errors import ProtocolError
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.protocol.events import (
    AdapterEvaluated,
    CoordinatorTick,
    DeltaSubmitted,
    Event,
    MessageRefused,
    ParticipantReady,
    RunDeclined,
    SiteOnline,
    SurvivorsSigned,
    TrainingFailed,
    TrainingProgressed,
    UnmaskAnswered,
    UploadRequested,
)
from shared.protocol.records import (
    DeclinedRecord,
    EvaluatedRecord,
    FailedRecord,
    MemberRecord,
    OpenedRecord,
    RejoinedRecord,
    UnmaskedRecord,
)
from shared.secure_sum.opening import check_answer
from shared.topology import site_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coordinator.effects import Effects
    from coordinator.intake import Intake
    from coordinator.linking import Links
    from shared.config import FederationConfig
    from shared.protocol.dispatch import Handler
    from shared.protocol.ledger import Ledger

MOST_WORDS = 100  # of one site before the run begins: a site that is fixed needs few


class Coordinator(LiveRun):
    """One run's coordinator, with a handler for each event."""

    def __init__(
        self,
        config: FederationConfig,
        ledger: Ledger,
        intake: Intake,
        effects: Effects,
        links: Links,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(config, ledger, intake, effects, links, clock)
        self.active = False
        self._digest = config.digest  # of all the participants' names: not for each of them again
        self._deltas = deltas = Deltas(self)
        handlers: Mapping[type[Event], Handler] = {
            SiteOnline: self.on_site_online,
            ParticipantReady: self.on_participant_ready,
            RunDeclined: self.on_run_declined,
            UploadRequested: deltas.on_upload_requested,
            DeltaSubmitted: deltas.on_delta_submitted,
            SurvivorsSigned: self.on_survivors_signed,
            UnmaskAnswered: self.on_unmask_answered,
            TrainingFailed: self.on_training_failed,
            TrainingProgressed: self.on_training_progressed,
            AdapterEvaluated: self.on_adapter_evaluated,
            MessageRefused: self.on_message_refused,
            CoordinatorTick: self.on_tick,
        }
        self.handlers: Mapping[type[Event], Handler] = {
            kind: self._entry(handler) for kind, handler in handlers.items()
        }

    def start(self) -> None:
        """Become the active one: rebuild the state, repeat what may have been lost.

        The first delivery calls it: until then another coordinator may be at work, and this one
        only stands by.
        """
        failpoint("start.before")
        self.reload()
        failpoint("start.reloaded")
        self.standing.look(now=True)
        self.carry_out(resume(self.state))
        self._say_unfit()
        self.publish()
        self.active = True  # not before: a store that was away in between has it all done again
        failpoint("start.after")

    def most(self) -> int:
        """How many messages are handled together: fewer where their deltas take long to read."""
        return BATCH if self.state.genesis is None else self._deltas.most()

    def prepare(self, told: Sequence[tuple[Event, str]]) -> None:
        """Check what was submitted, each beside the others."""
        if self.active:
            self._deltas.check_ahead(told)

    def _entry(self, handler: Handler) -> Handler:
        """What precedes every handler."""

        def handle(event: Event, sender: str) -> None:
            if not self.active:
                self.start()
            if self.state.closing is not None or self.awaits(sender):
                self.settle()
            if self.state.closing is not None:
                # A store that was away left the decision undone; this may be of the next round.
                self.carry_out(filter(None, [next_step(self.state)]))
            if self.standing.ended(sender):
                self.limits.count(sender, "account")
                return
            self.liveness.saw(sender, self.clock())
            handler(event, sender)

        return handle

    # Handlers --------------------------------------------------------------------------------

    def on_site_online(self, event: SiteOnline, sender: str) -> None:
        """Answer with what is pending for the site. Idempotent: writes nothing."""
        get_logger().info("site.online", holds_round=event.round)
        for notification in pending(self.state, sender, first=event.first):
            self.effects.notify(notification, self.state)

    def on_participant_ready(self, event: ParticipantReady, sender: str) -> None:
        """Record the member. Idempotent: nothing is recorded of a word that was said before.

        Until the run begins a site may be fixed: then its last word counts. Later a site that
        lost its exchange key may bring another one, which the same key of its own signed.
        """
        if event.config_digest != self._digest:
            raise ProtocolError(
                f"config_digest: {sender} is ready for {event.config_digest[:12]}, this run is "
                f"{self._digest[:12]}; start the site again"
            )
        if self.config.privacy is not None and not event.private:
            raise ProtocolError(
                f"privacy: {sender} knows of none and would train without noise; update its release"
            )
        if event.exchange is not None and event.exchange.identity is not None:
            event.exchange.check(sender)  # or every site would refuse a cohort with it
        known, genesis = self.state.members.get(sender), self.state.genesis
        changed = [] if known is None else _changed(known, event)
        renews = changed == ["exchange"] and known is not None and _renews(known, event)
        if known is not None and not renews and not (changed and genesis is None):
            if changed:
                raise ProtocolError(
                    f"{changed[0]}: {sender} came back with another one than it joined with; give "
                    "it the base model and the versions it began the run with"
                )
            return
        if genesis is not None:
            self.settle()  # it has to fit to others that may have come just before
            self._check_joins(event, sender)
        self.record(self._member(event, sender))
        self._say_unfit()

    def _member(self, event: ParticipantReady, sender: str) -> MemberRecord:
        word = self.state.words.get(sender, 0) + 1
        if word > MOST_WORDS:
            raise ProtocolError(
                f"{sender}: said {MOST_WORDS} times that it is ready, each time with another "
                "model, adapter or version; take it out of the run, or begin another run"
            )
        known, from_round = self.state.members.get(sender), 0
        if self.state.genesis is not None:
            from_round = known.from_round if known is not None else self._next_round()
        kind: Callable[..., MemberRecord] = MemberRecord
        if word > 1:
            kind = partial(RejoinedRecord, number=word)
        return kind(
            site=sender,
            manifest=event.manifest,
            fingerprint=event.fingerprint,
            numerics=event.numerics,
            examples=event.examples,
            bases=event.bases,
            from_round=from_round,
            base_parameters=event.base_parameters,
            said=event.said,
            exchange=event.exchange if self.config.aggregation.secure else None,
        )

    def _say_unfit(self) -> None:
        """Tell the log who does not fit, once nothing else is waited for."""
        if not (self.state.is_incomplete or self.state.silent):
            for site, why in self.state.unfit.items():
                get_logger().warning("site.unfit", site=site, reason=why)

    def on_run_declined(self, event: RunDeclined, sender: str) -> None:
        """Record that the site stays out. Idempotent: one record per site."""
        get_logger().warning("run.declined", reason=event.reason)
        self.record(DeclinedRecord(site=sender, reason=event.reason, said=event.said))

    def on_survivors_signed(self, event: SurvivorsSigned, sender: str) -> None:
        """Keep a signature of the decision's set. Idempotent: it is the same one each time.

        No record is made of it: after a restart sites are asked again, and sign the same.
        """
        self.settle()
        state, survivors = self.state, self.state.survivors
        if survivors is None or event.round != survivors.cohort.attempt.round:
            return
        terms = state.opened.secure if state.opened else None
        identity = terms.identities.get(sender) if terms else None
        if identity is None or sender not in survivors.shas:
            raise ProtocolError(f"signature: expected one of a survivor that signs, got {sender}'s")
        identity.verify("survivors", bytes.fromhex(event.signature), survivors.signed)
        self.feed(SetSigned(event.round, sender, event.signature))

    def on_unmask_answered(self, event: UnmaskAnswered, sender: str) -> None:
        """Record what a survivor revealed. Idempotent: a site has one answer, on record once.

        One that the decision at hand does not wait for is of a round that is closed by now.
        """
        state, survivors = self.state, self.state.survivors
        if survivors is None or event.round != survivors.cohort.attempt.round:
            return
        if event.attempt != survivors.cohort.attempt.number or sender in state.unmasked:
            return
        offers = {
            site: masked.offer(sha)
            for site, sha in survivors.shas.items()
            if (masked := state.uncounted[site, event.round].masked) is not None
        }
        check_answer(survivors, sender, event.revealed.answer, offers)
        get_logger().info("sum.answered", round=event.round)
        self.record(
            UnmaskedRecord(
                round=event.round,
                site=sender,
                revealed=event.revealed,
                said=event.said,
                number=event.attempt,
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
        self.record(
            FailedRecord(
                round=event.round,
                site=sender,
                attempt=event.attempt,
                reason=event.reason,
                retryable=event.retryable,
                said=event.said,
            )
        )

    def on_training_progressed(self, event: TrainingProgressed, sender: str) -> None:
        """Remember how far a site is, for whoever looks. Idempotent: only the newest counts."""
        self.liveness.progressed(event, sender, self.clock())

    def on_adapter_evaluated(self, event: AdapterEvaluated, sender: str) -> None:
        """Record a held-out loss of the final adapter. Idempotent: one record per site."""
        finished = self.state.finished
        if finished is None or event.sha != finished.sha or sender not in self.state.members:
            raise ProtocolError(
                f"sha: {sender} evaluated {event.sha[:12]}, which is not the result"
            )
        if event.round != finished.round:
            raise ProtocolError(
                f"round: expected {finished.round} for the result from {sender}, got {event.round}"
            )
        self.record(
            EvaluatedRecord(
                round=finished.round,
                site=sender,
                sha=event.sha,
                held_out=event.held_out,
                traffic=event.traffic,
                said=event.said,
            )
        )

    def on_message_refused(self, event: MessageRefused, sender: str) -> None:
        """Keep what a site could not use where people look. Idempotent: a copy more is no harm."""
        get_logger().warning("message.refused", site=sender, reason=event.reason)
        # What a site says of queue and sender is not checked by anybody: nothing may act on it.
        self.effects.keep_refused(
            event.model_copy(update={"reported_by": sender, "queue": site_queue(sender)})
        )

    def on_tick(self, event: CoordinatorTick, sender: str) -> None:
        """Fold the time in. Idempotent: the time is what it is.

        Only an own tick counts: what it overtakes in the queue had arrived before a deadline is
        judged. One of a coordinator that stands by, or went, says nothing here.
        """
        del sender  # a tick comes from a coordinator's own account, checked by the dispatcher
        if event.writer == self.ledger.writer:
            self.settle()
            self.carry_out(self._fold_controls() or ())
            self.feed(Ticked(event.now))

    # What is known -----------------------------------------------------------------------------

    def _open_round_for(self, number: int, site: str) -> OpenedRecord | None:
        opened = self.state.open_round
        if opened is None or opened.round != number:
            return None
        return opened if self.state.steering.is_in_force(site, opened.selected) else None

    def _next_round(self) -> int:
        """The first round that is not open yet."""
        return self.state.last_round + (2 if self.state.opened is not None else 1)

    def _check_joins(self, event: ParticipantReady, sender: str) -> None:
        """A site that comes after the run began must fit to those that are in it."""
        genesis = self.genesis()
        begun = genesis.manifest
        own = kind_of(begun).manifest_for(begun, self.config.lora, sender)
        for name, expected in (("fingerprint", genesis.fingerprint), ("manifest", own)):
            if getattr(event, name) != expected:
                raise ProtocolError(
                    f"{name}: {sender} came after the run began with another one; give it the "
                    "base model and the release that the others have"
                )
        members = {**self.state.members, sender: self._member(event, sender)}
        against = unfit(members, self.config).get(sender)
        if against is not None:
            raise ProtocolError(f"{sender} cannot join: {against}")


def _renews(known: MemberRecord, event: ParticipantReady) -> bool:
    return event.exchange is not None and event.exchange.renews(known.exchange)


def _changed(known: MemberRecord, event: ParticipantReady) -> list[str]:
    """What is another one now than on record."""
    names = ["fingerprint", "manifest", "numerics", "bases"]
    if known.exchange is not None:
        names.append("exchange")
    return [name for name in names if getattr(known, name) != getattr(event, name)]
