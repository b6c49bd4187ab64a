"""The state machine under every order of facts, duplicates, late ones and restarts."""

from __future__ import annotations

import hashlib

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.round.machine import apply, replay, resume
from coordinator.round.state import Aggregate, MakeGenesis, Ticked, WriteRecord
from shared.errors import ObjectExistsError
from shared.protocol.manifest import LocalMetrics
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    FailedRecord,
    FederationRecord,
    GenesisRecord,
    MemberRecord,
    RefusedRecord,
    RejoinedRecord,
    StampedRecord,
)
from tests.federations import config
from tests.numpy_learner import MANIFEST, NUMERICS

SITES = ("a", "b", "c")
ROUNDS = 3
METRICS = LocalMetrics(
    steps=1, train_nll=1.0, first_step_nll=1.0, last_step_nll=1.0, mean_grad_norm=1.0
)


def sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def accepted(site: str, number: int, source: str) -> AcceptedRecord:
    """The one delta that a deterministic site makes in a round."""
    return AcceptedRecord(
        round=number,
        site=site,
        sha=sha("delta", site, number, source),
        size=1,
        examples=1,
        tokens=1,
        norm=1.0,
        metrics=METRICS,
        state="fresh",
    )


class Ledger:
    """Records by key in memory: conditional create, and history in folding order."""

    def __init__(self) -> None:
        self.records: dict[str, object] = {}

    def write(self, record, writer: str):
        if isinstance(record, StampedRecord):
            record = record.model_copy(update={"writer": writer, "time": 1.0})
        key = record.key("test")
        if key in self.records:
            existing = self.records[key]
            if not isinstance(record, StampedRecord) and existing != record:
                raise ObjectExistsError(f"{key}: another result is on record")
            return existing
        self.records[key] = record
        return record

    def history(self):
        """As the real ledger folds: round by round, opened, accepted, ..., closing, closed."""
        kinds = ("opened", "accepted", "refused", "failed", "closing", "closed")

        first = ("federation", "members", "rejoined")

        def place(key: str):
            if "/rounds/" not in key:
                return (next((i for i, name in enumerate(first) if name in key), 9**9), 0, key)
            number, rest = key.split("/rounds/")[1].split("/", 1)
            kind = next(i for i, name in enumerate(kinds) if rest.startswith(name))
            return (len(first) + int(number), kind, key)

        return [self.records[key] for key in sorted(self.records, key=place)]


def perform(step, state, ledger: Ledger, writer: str):
    """A durable step with hashes in place of arithmetic."""
    match step:
        case MakeGenesis(members):
            record = GenesisRecord(
                members=members,
                manifest=MANIFEST,
                fingerprint="f" * 64,
                adapter_sha=sha("genesis"),
                adapter_size=1,
            )
        case WriteRecord(record):
            pass
        case Aggregate(closing):
            inputs = tuple((i.site, i.from_round, i.sha, i.weight) for i in closing.inputs)
            record = ClosedRecord(
                round=closing.round,
                adapter_sha=sha("adapter", closing.source_sha, inputs),
                adapter_size=1,
                mean_norm=1.0,
                delta_norms={},
                cosines={},
                source_held_out=None,
            )
    return ledger.write(record, writer)


class AnyOrder(RuleBasedStateMachine):
    """Policy ``all``: whatever happens, the run ends in one and the same adapter."""

    on_failure = "wait"

    @initialize()
    def begin(self) -> None:
        self.config = config(SITES, ROUNDS, policy={"on_failure": self.on_failure})
        self.ledger = Ledger()
        self.lives = 1
        self.pending: list = []
        record = FederationRecord(config={}, digest="0" * 64)
        self.ledger.write(record, self.writer)
        self.restart()

    @property
    def writer(self) -> str:
        return f"life-{self.lives}"

    def feed(self, fact) -> None:
        self.state, effects = apply(self.state, fact)
        self.pending = [e for e in effects if isinstance(e, MakeGenesis | WriteRecord | Aggregate)]

    @rule()
    def restart(self) -> None:
        """Die between any two effects: memory is gone, the ledger is not."""
        self.lives += 1
        self.state = replay(self.config, self.ledger.history())
        effects = resume(self.state)
        self.pending = [e for e in effects if isinstance(e, MakeGenesis | WriteRecord | Aggregate)]

    @rule()
    def one_effect(self) -> None:
        if self.pending:
            self.feed(perform(self.pending.pop(0), self.state, self.ledger, self.writer))

    @rule()
    def written_but_not_folded(self) -> None:
        """Die after the durable write and before anybody knew of it."""
        if self.pending:
            perform(self.pending.pop(0), self.state, self.ledger, self.writer)
            self.restart()

    @rule(site=st.sampled_from(SITES), base=st.sampled_from("fe"))
    def join(self, site: str, base: str = "f") -> None:
        """A first word, or one of a site that was mended (or spoilt) since; the last one counts."""
        known, word = self.state.members.get(site), self.state.words.get(site, 0) + 1
        if self.state.genesis is not None or (known and known.fingerprint == base * 64):
            return
        said = {"site": site, "fingerprint": base * 64}
        said |= {"manifest": MANIFEST, "numerics": NUMERICS, "examples": 1}
        record = MemberRecord(**said) if word == 1 else RejoinedRecord(**said, number=word)
        self.feed(self.ledger.write(record, self.writer))

    @rule(site=st.sampled_from(SITES))
    def submit(self, site: str) -> None:
        """A delta for the open round: recorded once, folded as often as it comes."""
        opened = self.state.open_round
        if opened is not None:
            record = accepted(site, opened.round, opened.source_sha)
            self.feed(self.ledger.write(record, self.writer))

    @rule(site=st.sampled_from(SITES), back=st.integers(0, ROUNDS))
    def submit_late_or_again(self, site: str, back: int) -> None:
        """A record of any earlier round is folded again, out of order."""
        number = max(1, self.state.last_round - back)
        for record in list(self.ledger.records.values()):
            if isinstance(record, AcceptedRecord) and (record.site, record.round) == (site, number):
                self.feed(record)

    @rule(site=st.sampled_from(SITES), attempt=st.integers(1, 4), retryable=st.booleans())
    def fail(self, site: str, attempt: int, retryable: bool) -> None:
        opened = self.state.open_round
        if opened is not None and (site, opened.round) not in self.state.uncounted:
            record = FailedRecord(
                round=opened.round, site=site, attempt=attempt, reason="x", retryable=retryable
            )
            self.feed(self.ledger.write(record, self.writer))

    @rule(site=st.sampled_from(SITES))
    def refuse(self, site: str) -> None:
        opened = self.state.open_round
        if opened is not None and (site, opened.round) not in self.state.uncounted:
            bad = sha("bad", site, opened.round)
            record = RefusedRecord(round=opened.round, site=site, sha=bad, reason="NaN")
            self.feed(self.ledger.write(record, self.writer))

    @rule(now=st.floats(0, 10))
    def tick(self, now: float) -> None:
        self.feed(Ticked(now))

    @invariant()
    def memory_is_the_fold_of_the_ledger(self) -> None:
        again = replay(self.config, self.ledger.history())
        for name in (
            "members",
            "words",
            "unfit",
            "genesis",
            "opened",
            "closing",
            "closed",
            "uncounted",
            "finished",
        ):
            assert getattr(again, name) == getattr(self.state, name), name

    @invariant()
    def all_members_hold_one_base(self) -> None:
        if self.state.genesis is not None:
            assert len({member.fingerprint for member in self.state.members.values()}) == 1

    @invariant()
    def nothing_counts_twice_and_weights_sum_to_one(self) -> None:
        closings = [r for r in self.ledger.records.values() if isinstance(r, ClosingRecord)]
        counted = [(i.site, i.from_round) for c in closings for i in c.inputs]
        assert len(counted) == len(set(counted))
        for closing in closings:
            assert abs(sum(i.weight for i in closing.inputs) - 1) < 1e-12

    @precondition(lambda self: self.state.finished is not None)
    @rule()
    def stay_finished(self) -> None:
        assert not self.pending

    def teardown(self) -> None:
        if not hasattr(self, "state"):
            return
        self.finish()
        assert self.state.adapter_sha == undisturbed()

    def finish(self) -> None:
        """Everybody does the work that is left."""
        for _ in range(200):
            if self.state.finished is not None:
                return
            while self.pending:
                self.one_effect()
            for site in SITES:
                self.join(site)
                self.submit(site)
        raise AssertionError("the run does not end although every site delivers")


class AnyOrderExclude(AnyOrder):
    """``exclude``: who is left out depends on what happened; the chain must still hold."""

    on_failure = "exclude"

    def teardown(self) -> None:
        if not hasattr(self, "state"):
            return
        self.finish()
        result = sha("genesis")
        for record in self.ledger.history():
            if isinstance(record, ClosingRecord):
                assert record.source_sha == result
                sites = {i.site for i in record.inputs}
                assert sites.isdisjoint(record.excluded)
                assert sites | set(record.excluded) == set(SITES)
            if isinstance(record, ClosedRecord):
                result = record.adapter_sha
        assert self.state.adapter_sha == result


def undisturbed() -> str:
    """The result of the run in which nothing goes wrong."""
    source = sha("genesis")
    for number in range(1, ROUNDS + 1):
        inputs = tuple(
            (site, number, accepted(site, number, source).sha, 1 / len(SITES)) for site in SITES
        )
        source = sha("adapter", source, inputs)
    return source


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
AnyOrderExclude.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestAnyOrder = AnyOrder.TestCase
TestAnyOrderExclude = AnyOrderExclude.TestCase
