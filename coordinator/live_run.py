"""A run under way: its state, and the loop that carries out what follows from a fact.

What is learned goes through the ledger into the state (``record``); what follows from it is carried
out before the call returns.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from coordinator.batching import Task, at_once
from coordinator.limits import Limits
from coordinator.liveness import Liveness
from coordinator.round.machine import apply, replay
from coordinator.round.state import Aggregate, MakeGenesis, WriteRecord
from shared.errors import (
    FencedError,
    GradualDiffError,
    InterruptedRunError,
    LedgerError,
    ProtocolError,
    RunFailedError,
)
from shared.failpoints import failpoint
from shared.log import get_logger
from shared.protocol.bounds import prose
from shared.protocol.dispatch import ABOUT_THE_MESSAGE, Desk, UnsettledError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coordinator.arrivals import Upload
    from coordinator.batching import Result
    from coordinator.effects import Effects
    from coordinator.intake import Intake
    from coordinator.linking import Links
    from coordinator.round.state import Effect, Fact, RunState, Step
    from shared.config import FederationConfig
    from shared.protocol.ledger import Ledger
    from shared.protocol.record import Record
    from shared.protocol.records import (
        AcceptedRecord,
        ClosingRecord,
        DeclinedRecord,
        EvaluatedRecord,
        FailedRecord,
        GenesisRecord,
        MemberRecord,
        RefusedRecord,
        UnmaskedRecord,
    )

    SiteRecord = (
        AcceptedRecord
        | DeclinedRecord
        | EvaluatedRecord
        | FailedRecord
        | MemberRecord
        | RefusedRecord
        | UnmaskedRecord
    )

ASK_SECONDS = 60.0  # a site has to send a lost delta again before it is asked once more


class LiveRun(Desk):
    """One run. It holds nothing that ``reload()`` could not rebuild."""

    def __init__(
        self,
        config: FederationConfig,
        ledger: Ledger,
        intake: Intake,
        effects: Effects,
        links: Links,
        clock: Callable[[], float],
    ) -> None:
        self.config = config
        self.ledger = ledger
        self.intake = intake
        self.effects = effects
        self.links = links
        self.clock = clock
        self.state = replay(config, ())
        self.limits = Limits(config.limits)
        self.liveness = Liveness(ledger.store, config.run.name, ledger.writer, self.limits.over)
        # Counted deltas that the store lost: when each was asked for again, what is wrong with it.
        self.lost: dict[Upload, tuple[float, str]] = {}
        self.standing = effects.standing
        self._cleared: frozenset[str] = frozenset()  # the sites that are out, uploads deleted
        # What a batch left for its end, in the order of delivery, and the state before all of it.
        self._tasks: list[Task[Any]] = []
        self._settled = self.state

    @property
    def damage(self) -> str | None:
        """What is wrong with the deltas without which the decided round cannot be closed."""
        return "; ".join(damage for _, damage in self.lost.values()) or None

    def begin(self) -> None:
        """Record or find the run. Raises RunExistsError when it has another config."""
        self.ledger.begin(self.config)

    def reload(self) -> None:
        """Rebuild the state from the ledger. Raises LedgerDamagedError if its chain is broken."""
        self.links.reload()
        self.state = replay(self.config, self.ledger.history())
        self.links.check()
        # Whoever noticed that a site is out may have died at it.
        self.lost, self._cleared = {}, frozenset()
        self._tasks = []

    def feed(self, fact: Fact) -> None:
        """Fold a fact in and carry out what follows from it."""
        self.state, effects = apply(self.state, fact)
        self.carry_out(effects)

    def notice_controls(self) -> bool:
        """Carry out what operators asked since the last look, between batches; whether any was."""
        asked = self._fold_controls()
        self.carry_out(asked or ())
        self.effects.say()
        return asked is not None

    def notice_accounts(self) -> None:
        """Look whose account has ended: what such a site sent and no record names is deleted."""
        self.standing.look()
        self._clear_excluded()

    def _fold_controls(self) -> tuple[Effect, ...] | None:
        """Fold in what operators asked since the last look; what follows, or None without any."""
        effects = None
        for control in self.ledger.controls(after=self.state.steering.number):
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
        out = frozenset({*self.state.steering.excluded, *self.standing.all_ended()})
        if out != self._cleared:
            last, late = self.state.last_round, self.config.policy.late_rounds
            rounds = range(max(1, last - late + 1), last + 2)  # the others are swept already
            self.intake.arrivals.sweep_sites(self.config.run.name, rounds, out, self.lost)
            self._cleared = out

    def carry_out(self, effects: Iterable[Effect]) -> None:
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
                if not isinstance(effect, WriteRecord):
                    self.effects.say()  # nobody waits for an answer while this is computed
                self.state, following = apply(self.state, self._perform(effect))
            else:
                self.effects.notify(effect, self.state)
            queue.extendleft(reversed(following))
        self._clear_excluded()

    def _perform(self, step: Step) -> Record:
        """Take a durable step. What goes wrong there is never the fault of the message at hand.

        It is said where people look, since whoever comes next meets the same step again.
        """
        try:
            record = self.effects.perform(step, self.state)
        except (FencedError, InterruptedRunError):
            raise
        except Exception as error:
            self.liveness.problem = _why_not(step, error, self.state)
            get_logger().error("step.failed", reason=self.liveness.problem)
            self.liveness.write(self.state, self.clock())
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
        now = self.clock()
        if any(now < asked + ASK_SECONDS for asked, _ in self.lost.values()):
            return False
        counted = [self.state.uncounted[item.site, item.from_round] for item in closing.inputs]
        lost = self.intake.lost(self.config.run.name, counted)
        self.lost = {upload: (now, damage) for upload, damage in lost.items()}
        for upload, damage in lost.items():
            get_logger().error("delta.lost", site=upload.site, round=upload.round, reason=damage)
            self.effects.grant(upload)
        if lost:
            self.liveness.problem = f"{self.damage}; its site was asked to send it again"
            self.liveness.write(self.state, now)
        return not lost

    # Until a batch's end --------------------------------------------------------------------

    def later(self, site: str, do: Callable[[], Result], then: Callable[[Result], None]) -> None:
        """Have ``do`` done beside what other sites wait for; ``then``, in order, what came of it.

        Before the next message of this site is handled, and before the end of the batch.
        """
        if not self._tasks:
            self._settled = self.state
        self._tasks.append(Task(site, do, then))

    def record(self, record: SiteRecord) -> None:
        """Put it on record: folded in now, written with the others, and then carried out.

        A step that follows is taken at once: so it is the one that would follow without batches.
        """
        before, mine = self.state, self.ledger.stamped(record)
        after, effects = apply(before, mine.folded())

        def fold(written: Record) -> None:
            if written is mine and self.state is before:  # all went as was foreseen
                self.state = after
                self.carry_out(effects)
            else:
                self.feed(written.folded())

        self.later(record.site, partial(self.ledger.put, mine), fold)
        self.state = after
        if any(isinstance(effect, MakeGenesis | WriteRecord | Aggregate) for effect in effects):
            self.settle()

    def awaits(self, site: str) -> bool:
        """Whether something of this site is left for later."""
        return any(task.site == site for task in self._tasks)

    def settle(self) -> None:
        """Do what was left for later and fold in, in order, what came of it; then link it all.

        What was written is folded also where something else was not. Raises UnsettledError from
        the first error.
        """
        self._settle_tasks()
        self.links.link()

    def _settle_tasks(self) -> None:
        if not self._tasks:
            return
        tasks, self._tasks = self._tasks, []
        done = at_once([task.do for task in tasks])
        if len(tasks) > 1:
            failpoint("batch.written")
        self.state = self._settled
        failures: list[Exception] = []
        for task, outcome in zip(tasks, done, strict=True):
            try:
                task.then(outcome.result())
            except Exception as error:  # noqa: BLE001 - the others were done all the same
                failures.append(error)
        if failures:
            raise UnsettledError from failures[0]

    def publish(self) -> None:
        """Say what there is to say, and return once it is confirmed."""
        self.effects.say()

    def genesis(self) -> GenesisRecord:
        """What the run began with. Raises ProtocolError before that."""
        if self.state.genesis is None:
            raise ProtocolError("the run has not begun yet")
        return self.state.genesis


def checked_end(state: RunState) -> RunState:
    """The state as it is. Raises RunFailedError where the run ended without a result."""
    if state.finished is not None and state.finished.failed:
        raise RunFailedError(
            f"run {state.config.run.name} ended without a result: {state.finished.reason}"
        )
    return state


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
