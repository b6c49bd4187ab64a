"""The run as a pure state machine: ``apply(state, fact) -> (state, effects)``.

Facts are the ledger's records and ticks of the clock; there is no other input. State is the fold
of the facts, so a restart is: fold the ledger's history, then carry out ``resume(state)``. Every
effect may be carried out twice without harm. No driver, clock, logger or file is known here.

What must happen next is at most one durable step and is derived from the state alone
(``next_step``); the rest are notifications, which may be lost or repeated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from coordinator.round.controls import added
from coordinator.round.members import misfit
from coordinator.round.selection import is_among, select
from coordinator.round.state import (
    Aggregate,
    AnnounceClosed,
    AnnounceFinished,
    AnnounceRound,
    AnnounceRun,
    AnswerDelta,
    AskUnmask,
    Effect,
    Fact,
    MakeGenesis,
    Notification,
    RunState,
    SetSigned,
    Step,
    Ticked,
    Update,
    WriteRecord,
)
from coordinator.round.unmasking import is_enough, lacks_survivors, must_reopen, terms_for
from coordinator.round.weighting import clips, shares
from shared import modes
from shared.config.secure import SMALLEST_COHORT
from shared.methods.policies import Trouble, get_policy, given_up, weighting
from shared.methods.rules import too_few
from shared.protocol.events import MOST_UPDATES
from shared.protocol.record import delta_label
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    ControlRecord,
    DeclinedRecord,
    EvaluatedRecord,
    FailedRecord,
    FederationRecord,
    FinishedRecord,
    GenesisRecord,
    Input,
    MemberRecord,
    OpenedRecord,
    OriginRecord,
    RefusedRecord,
    UnmaskedRecord,
)
from shared.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shared.config import FederationConfig
    from shared.protocol.record import Record

REMEMBERED_ROUNDS = 5  # an adaptive deadline looks at the deltas of so many


def apply(state: RunState, fact: Fact) -> tuple[RunState, tuple[Effect, ...]]:
    """Fold one fact in. Facts that are known already or came too late change nothing."""
    after, notifications = _fold(state, fact)
    step = next_step(after)
    return after, (*notifications, *((step,) if step else ()))


def replay(config: FederationConfig, history: Iterable[Record]) -> RunState:
    """The state after the ledger's history; nothing is carried out."""
    state = RunState(config)
    for record in history:
        state, _ = _fold(state, record)
    return state


def resume(state: RunState) -> tuple[Effect, ...]:
    """After a restart: send every notification that may have been lost, then do the next step."""
    notifications: list[Effect] = []
    if state.genesis is None and state.finished is None:
        notifications.append(AnnounceRun(state.waiting_for))
    if state.open_round is not None:
        notifications.append(AnnounceRound(state.waiting_for))
    if silent := state.silent_survivors:
        notifications.append(AskUnmask(silent))
    if state.finished is not None:
        notifications.append(AnnounceFinished(tuple(sorted(state.members))))
    step = next_step(state)
    return (*notifications, *((step,) if step else ()))


def pending(state: RunState, site: str, *, first: bool = True) -> tuple[Notification, ...]:
    """What the ledger owes a site that came online, in the order it needs it.

    ``first``: its process has just begun. A site that is given up in the open round gets another
    try then, when somebody may have fixed it, and not every minute.
    """
    if site not in state.members and site not in state.config.run.participants:
        return ()
    if state.finished is not None:
        if site not in state.members:
            return ()
        nothing_to_do = state.finished.sha is None or site in state.evaluated
        end = AnnounceFinished((site,))
        return (end,) if nothing_to_do else (AnnounceRun((site,)), end)
    notifications: list[Notification] = [AnnounceRun((site,))]
    opened = state.open_round
    if opened is not None and state.steering.is_in_force(site, opened.selected):
        mine = state.uncounted.get((site, opened.round))
        trouble = state.troubles.get(site)
        if mine is not None:
            notifications.append(AnswerDelta(mine))
        elif first or trouble is None or not given_up(state.config.policy, trouble):
            notifications.append(AnnounceRound((site,)))
    if site in state.silent_survivors:
        notifications.append(AskUnmask((site,)))
    return tuple(notifications)


def next_step(state: RunState) -> Step | None:  # noqa: PLR0911 - one return per phase
    """The one durable step that the state calls for, or None while it waits for facts."""
    if state.finished is not None:
        return None
    steering = state.steering
    if state.closing is not None and _is_open(state):
        return Aggregate(state.closing)
    if steering.stopped is not None:
        return _finish(state, f"stopped: {steering.stopped}", failed=state.genesis is None)
    if state.genesis is None:
        return _toward_genesis(state)
    if state.opened is not None:
        return None if state.closing else _toward_closing(state, state.opened)
    if steering.paused is not None:
        return None  # not the end either: what is paused may still be extended
    if state.last_round >= state.total_rounds:
        return _finish(state, f"all {state.total_rounds} rounds are closed")
    if has_converged(state):
        return _finish(
            state, f"converged: held-out loss stopped falling at round {state.last_round}"
        )
    if not steering.in_force(state.members_in(state.last_round + 1)):
        return None  # every site was taken out: only a person can say what now
    return _open_next(state)


def _is_open(state: RunState) -> bool:
    """Whether what was decided can be computed: nothing is masked, or enough survivors answered."""
    survivors = state.survivors
    return survivors is None or is_enough(survivors, state.unmasked)


def has_converged(state: RunState) -> bool:
    """No fall of ``min_delta`` nats in the last ``patience`` known held-out losses.

    The loss of A(t) is measured by the sites at the start of round t, so this looks one round
    behind: it is a function of what the accepted records hold, hence the same after a restart.
    """
    section = state.config.convergence
    losses = [loss for loss in state.held_out if loss is not None]
    if section.patience is None or len(losses) <= section.patience:
        return False
    before, since = losses[: -section.patience], losses[-section.patience :]
    return min(since) > min(before) - section.min_delta


def _fold(  # noqa: C901, PLR0911, PLR0912 - one flat case per fact is the clearest form
    state: RunState, fact: Fact
) -> tuple[RunState, tuple[Effect, ...]]:
    match fact:
        case Ticked():
            return replace(state, now=max(state.now, fact.now)), ()
        case FederationRecord():
            return replace(state, began=fact.time, now=fact.time), ()
        case OriginRecord():
            return replace(state, origin=fact), ()
        case ControlRecord():
            return replace(state, controls=added(state.controls, fact)), ()
        case MemberRecord() if fact.word > state.words.get(fact.site, 0):
            return _fold_member(state, fact), ()
        case DeclinedRecord() if state.genesis is None and fact.site not in state.members:
            return replace(state, declined={**state.declined, fact.site: fact.reason}), ()
        case GenesisRecord():
            # Who did not fit and was not waited for stays out until it joins a later round.
            members = {
                site: member
                for site, member in state.members.items()
                if site in fact.members or member.from_round > 0
            }
            return replace(state, genesis=fact, members=members), ()
        case OpenedRecord() if fact.round == state.last_round + 1:
            return _fold_opened(state, fact)
        case AcceptedRecord() | RefusedRecord():
            return _fold_delta(state, fact)
        case FailedRecord():
            return _fold_failure(state, fact)
        case ClosingRecord() if state.opened and _is_of(fact, state.opened):
            after = replace(state, closing=fact)
            silent = after.silent_survivors
            return after, (AskUnmask(silent),) if silent else ()
        case SetSigned() if state.closing and fact.round == state.closing.round:
            signatures = {**state.signatures, fact.site: fact.signature}
            after = replace(state, signatures=signatures)
            enough = after.may_unmask and not state.may_unmask
            return after, (AskUnmask(after.silent_survivors),) if enough else ()
        case UnmaskedRecord() if state.closing and _is_of(fact, state.closing):
            return replace(state, unmasked={**state.unmasked, fact.site: fact}), ()
        case ClosedRecord() if state.closing and fact.round == state.closing.round:
            return _fold_closed(state, state.closing, fact)
        case EvaluatedRecord() if fact.sha == state.adapter_sha:
            return replace(state, evaluated=state.evaluated | {fact.site}), ()
        case FinishedRecord():
            everybody = AnnounceFinished(tuple(sorted(state.members)))
            return replace(state, finished=fact), (everybody,)
        case _:
            return state, ()


def _fold_opened(state: RunState, fact: OpenedRecord) -> tuple[RunState, tuple[Effect, ...]]:
    """A further attempt begins anew: what was masked for the one before counts no more.

    A decision on that one, of a coordinator that was replaced meanwhile, was told to nobody.
    """
    uncounted = {key: record for key, record in state.uncounted.items() if key[1] != fact.round}
    after = replace(
        state,
        opened=fact,
        openings={**state.openings, fact.round: fact},
        troubles=state.troubles if fact.number > 1 else {},
        uncounted=uncounted,
        closing=None,
    )
    return after, (AnnounceRound(fact.selected),)


def _fold_member(state: RunState, fact: MemberRecord) -> RunState:
    words = {**state.words, fact.site: fact.word}
    if state.genesis is not None and fact.from_round == 0 and fact.site not in state.members:
        return replace(state, words=words)
    fact = _shared(state, fact)
    declined = {s: r for s, r in state.declined.items() if s != fact.site}
    members = {**state.members, fact.site: fact}
    return replace(state, members=members, declined=declined, words=words)


def _shared(state: RunState, fact: MemberRecord) -> MemberRecord:
    """The same with the first member's own values where they are equal.

    Almost all say the same of hundreds of tensors: thousands of copies of it take gigabytes.
    """
    first = next(iter(state.members.values()), fact)
    names = ("manifest", "numerics")
    same = {
        name: getattr(first, name) for name in names if getattr(first, name) == getattr(fact, name)
    }
    return fact.model_copy(update=same)


def _fold_delta(
    state: RunState, fact: AcceptedRecord | RefusedRecord
) -> tuple[RunState, tuple[Effect, ...]]:
    opened, key = state.open_round, (fact.site, fact.round)
    if isinstance(fact, RefusedRecord):
        shas = state.verdicts.get(key, frozenset()) | {fact.sha}
        state = replace(state, verdicts={**state.verdicts, key: shas})
    if isinstance(fact, AcceptedRecord):
        counted = fact.round in state.counted_rounds.get(fact.site, ())
        taking = state.takes(fact.site, fact.round)
        if key in state.uncounted or counted or taking is None or taking.number != fact.number:
            return state, (AnswerDelta(fact),)
        telling = state.telling
        if (fact.metrics.held_out is not None) != (fact.site in telling):
            telling ^= {fact.site}
        uncounted = {**state.uncounted, key: fact}
        return replace(state, uncounted=uncounted, telling=telling), (AnswerDelta(fact),)
    if opened is None or fact.round != opened.round or not is_among(fact.site, opened.selected):
        return state, (AnswerDelta(fact),)
    if fact.verdict == "late" or key in state.uncounted:
        return state, (AnswerDelta(fact),)
    # The same text and seed give the same bytes again, so asking again by itself is no use.
    before = state.troubles.get(fact.site)
    trouble = Trouble((before.attempts if before else 0) + 1, final=True, reason=fact.reason)
    return replace(state, troubles={**state.troubles, fact.site: trouble}), (AnswerDelta(fact),)


def _fold_failure(state: RunState, fact: FailedRecord) -> tuple[RunState, tuple[Effect, ...]]:
    opened = state.open_round
    before = state.troubles.get(fact.site)
    known = before is not None and before.attempts >= fact.attempt
    if opened is None or fact.round != opened.round or known:
        return state, ()
    if not is_among(fact.site, opened.selected) or (fact.site, fact.round) in state.uncounted:
        return state, ()
    trouble = Trouble(fact.attempt, final=not fact.retryable, reason=fact.reason)
    if before is not None and before.final:
        # A replay folds refusals before failures: what was final stays so, in either order.
        trouble = replace(before, attempts=fact.attempt)
    after = replace(state, troubles={**state.troubles, fact.site: trouble})
    again = not given_up(state.config.policy, trouble)
    return after, (AnnounceRound((fact.site,)),) if again else ()


def _fold_closed(
    state: RunState, closing: ClosingRecord, fact: ClosedRecord
) -> tuple[RunState, tuple[Effect, ...]]:
    counted = {(item.site, item.from_round): item.sha for item in closing.inputs}
    uncounted = {key: record for key, record in state.uncounted.items() if key not in counted}
    rounds = {**state.counted_rounds}
    for site, number in counted:
        rounds[site] = (*rounds.get(site, ()), number)
    held_out = fact.source_held_out.nll if fact.source_held_out else None
    last = dict(state.last_counted)
    for (site, number), sha in sorted(counted.items()):
        # A carried delta may be older than the one that was counted last.
        if number == max(rounds[site]):
            last[site] = sha
    after = replace(
        state,
        closed=fact,
        closing=None,
        opened=None,
        troubles={},
        held_out=(*state.held_out, held_out),
        unmasked={},
        signatures={},
        uncounted=uncounted,
        counted_rounds=rounds,
        last_counted=last,
        times=(*state.times, _arrivals(state, closing))[-REMEMBERED_ROUNDS:],
        updates=(*state.updates, *_update_of(closing, fact))[-MOST_UPDATES:],
    )
    return after, (AnnounceClosed(fact, tuple(sorted(state.members))),)


def _update_of(closing: ClosingRecord, fact: ClosedRecord) -> Iterator[Update]:
    if fact.update_sha is not None and fact.update_size is not None:
        yield Update(fact.round, closing.source_sha, fact.update_sha, fact.update_size)


def _arrivals(state: RunState, closing: ClosingRecord) -> tuple[float, ...]:
    """Seconds from a round's opening to each of its own deltas' acceptance."""
    opened = state.openings[closing.round]
    own = (item for item in closing.inputs if item.from_round == closing.round)
    records = (state.uncounted.get((item.site, item.from_round)) for item in own)
    return tuple(max(0.0, record.time - opened.time) for record in records if record is not None)


def _is_of(fact: ClosingRecord | UnmaskedRecord, begun: OpenedRecord | ClosingRecord) -> bool:
    return (fact.round, fact.number) == (begun.round, begun.number)


def _toward_genesis(state: RunState) -> Step | None:
    section = state.config.run
    problem = misfit(state.config, state.origin)
    if problem is not None:
        return _finish(state, problem, failed=True)
    timed_out = state.now - state.began >= section.start_timeout_seconds
    if not timed_out and (state.is_incomplete or state.waiting_for):
        return None
    # Too few because a site declined or does not fit is no end: its operator fixes the cause and
    # starts it again.
    fitting = [site for site in state.members if site not in state.unfit]
    there = state.steering.in_force(fitting)
    enough = section.min_participants or len(state.steering.in_force(section.participants))
    if there and len(there) >= enough:
        return MakeGenesis(tuple(sorted(fitting)))
    return None


def _open_next(state: RunState, attempt: int = 1) -> Step | None:
    section, number = state.config.run, state.last_round + 1
    policy, total = state.config.policy, state.total_rounds
    assert state.adapter_sha is not None  # genesis drew one
    members = state.steering.in_force(state.members_in(number))
    times = [time for one in state.times for time in one]
    selected = select(state.config.selection, members, section.seed, number)
    assert state.genesis is not None
    if state.config.aggregation.secure and len(selected) < SMALLEST_COHORT:
        return None  # operators took out so many that a sum would give the others away
    manifest = state.genesis.manifest
    return WriteRecord(
        OpenedRecord(
            round=number,
            selected=selected,
            source_sha=state.adapter_sha,
            seed=derive_seed(section.seed, "round", number),
            progress_from=(number - 1) / total,
            progress_to=number / total,
            deadline_seconds=get_policy(policy.kind).deadline(policy, times),
            grace_seconds=policy.grace_seconds,
            rounds=total,
            members=members,
            controls=state.steering.number,
            secure=terms_for(
                state.config, manifest, state.members, selected, number, state.closed, attempt
            ),
        )
    )


def _must_reopen(state: RunState, opened: OpenedRecord) -> bool:
    keys = {site: member.exchange for site, member in state.members.items()}
    there = state.steering.in_force(opened.selected)
    return must_reopen(opened, there, keys, state.waiting_for)


def _toward_closing(state: RunState, opened: OpenedRecord) -> Step | None:
    if opened.secure is not None and _must_reopen(state, opened):
        return _open_next(state, opened.number + 1)
    policy, steering = state.config.policy, state.steering
    there = len(state.uncounted) + len(state.troubles) + len(steering.excluded)
    with modes.at_work("policies", policy.kind):
        if there < get_policy(policy.kind).least(policy, opened, state.now):
            return None
    uncounted = steering.reachable(state.uncounted)
    here = opened.model_copy(update={"selected": steering.in_force(opened.selected)})
    section = state.config.aggregation
    with modes.at_work("policies", policy.kind):
        decide = get_policy(policy.kind).decide
        decision = decide(policy, here, uncounted, state.troubles, state.now)
        if decision is None or too_few(section, len(decision.counted)) is not None:
            return None
    if lacks_survivors(state.config, opened, len(decision.counted)) is not None:
        return None
    mode = section.weights
    share = shares(mode, decision.counted, opened.round)
    clipped = clips(section, decision.counted, opened.round)
    inputs = tuple(
        Input(
            site=r.site,
            from_round=r.round,
            sha=r.sha,
            weight=share[delta_label(r.site, r.round, opened.round)],
            scale=clipped[delta_label(r.site, r.round, opened.round)],
        )
        for r in decision.counted
    )
    return WriteRecord(
        ClosingRecord(
            round=opened.round,
            source_sha=opened.source_sha,
            inputs=inputs,
            excluded={**decision.excluded, **steering.excluded_among(opened.selected)},
            weighting=weighting(policy, mode),
            controls=steering.number,
            number=opened.number,
        )
    )


def _finish(state: RunState, reason: str, *, failed: bool = False) -> Step:
    record = FinishedRecord(
        round=max(state.last_round, 0),
        sha=state.adapter_sha,
        reason=reason,
        failed=failed,
        controls=state.steering.number,
    )
    return WriteRecord(record)
