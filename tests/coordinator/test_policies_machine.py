"""Quorum, carried and buffered deltas under every order of facts, deadlines, joins and restarts.

Which deltas count depends on time here; so what must hold is the chain: every decision adopts what
is on record, each (site, round) counts at most once, weights follow the rule, memory is the fold.
"""

from __future__ import annotations

import math
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from coordinator.round.machine import replay
from coordinator.round.state import Ticked
from shared.protocol.records import (
    AcceptedRecord,
    ClosedRecord,
    ClosingRecord,
    FederationRecord,
    MemberRecord,
    OpenedRecord,
    StampedRecord,
)
from tests.coordinator.test_rounds_machine import SITES, AnyOrder, Ledger, accepted, sha
from tests.federations import config
from tests.numpy_learner import MANIFEST, NUMERICS

ROUNDS = 4
STALENESS = 2


class ClockedLedger(Ledger):
    """Stamps each record with the time that it is."""

    now = 1.0

    def write(self, record, writer: str):
        is_new = record.key("test") not in self.records
        written = super().write(record, writer)
        if is_new and isinstance(written, StampedRecord):
            written = written.model_copy(update={"time": self.now})
            self.records[record.key("test")] = written
        return written


class Quorum(AnyOrder):
    policy: ClassVar = {
        "kind": "quorum",
        "quorum": 2,
        "deadline_seconds": 10.0,
        "grace_seconds": 5.0,
        "max_staleness": STALENESS,
    }

    @initialize()
    def begin(self) -> None:
        run = {"min_participants": 2, "start_timeout_seconds": 1.0}
        self.config = config(SITES, ROUNDS, policy=self.policy, run=run)
        self.ledger = ClockedLedger()
        self.lives = 1
        self.pending: list = []
        self.ledger.write(FederationRecord(config={}, digest="0" * 64), self.writer)
        self.restart()

    @rule(seconds=st.floats(0, 30))
    def tick(self, seconds: float) -> None:
        self.ledger.now += seconds
        self.feed(Ticked(self.ledger.now))

    @rule(site=st.sampled_from(SITES))
    def join(self, site: str) -> None:
        """At the start, or in the middle of the run, as the coordinator's handler records it."""
        state = self.state
        if site in state.members or state.finished is not None:
            return
        next_round = state.last_round + (2 if state.opened is not None else 1)
        record = MemberRecord(
            site=site,
            manifest=MANIFEST,
            fingerprint="f" * 64,
            numerics=NUMERICS,
            examples=1,
            from_round=0 if state.genesis is None else next_round,
        )
        self.feed(self.ledger.write(record, self.writer))

    @rule(site=st.sampled_from(SITES), back=st.integers(1, ROUNDS))
    def submit_after_its_round(self, site: str, back: int) -> None:
        """A delta of an earlier round arrives; the coordinator asks ``takes`` as its handler."""
        number = self.state.last_round + 1 - back
        opened = self.state.takes(site, number)
        if opened is None or (site, number) in self.state.uncounted:
            return
        record = accepted(site, number, opened.source_sha)
        self.feed(self.ledger.write(record, self.writer))

    @invariant()
    def every_weight_follows_the_rule(self) -> None:
        for closing in self.closings():
            parts = [1 / math.sqrt(1 + closing.round - i.from_round) for i in closing.inputs]
            for item, part in zip(closing.inputs, parts, strict=True):
                assert math.isclose(item.weight, part / sum(parts), rel_tol=1e-12)

    @invariant()
    def a_round_closes_complete_or_after_its_deadline_with_a_quorum(self) -> None:
        for closing in self.closings():
            opened = self.opened(closing.round)
            fresh = [i for i in closing.inputs if i.from_round == closing.round]
            failed = set(closing.excluded)
            assert {i.site for i in fresh} | failed == set(opened.selected)
            if failed:
                assert len(fresh) >= 2
                assert closing.time >= opened.closes_at

    @invariant()
    def late_deltas_count_only_where_they_are_carried(self) -> None:
        for closing in self.closings():
            ages = [closing.round - i.from_round for i in closing.inputs]
            assert max(ages) <= (STALENESS if self.config.policy.carries else 0)
            assert min(ages) >= 0

    def closings(self) -> list[ClosingRecord]:
        return [r for r in self.ledger.records.values() if isinstance(r, ClosingRecord)]

    def opened(self, number: int) -> OpenedRecord:
        return next(
            r
            for r in self.ledger.records.values()
            if isinstance(r, OpenedRecord) and r.round == number
        )

    def teardown(self) -> None:
        if not hasattr(self, "state"):
            return
        for _ in range(60):
            if self.state.finished is not None:
                break
            while self.pending:
                self.one_effect()
            for site in SITES:
                self.join(site)
                self.submit(site)
            self.tick(20.0)
        assert self.state.finished is not None
        assert self.state.last_round == ROUNDS
        again = replay(self.config, self.ledger.history())
        assert again.last_counted == self.state.last_counted
        for site in SITES:
            newest = self.newest_accepted().get(site)
            assert again.last_accepted(site) == self.state.last_accepted(site) == newest
        assert again.adapter_sha == self.state.adapter_sha == self.recomputed()

    def newest_accepted(self) -> dict[str, str]:
        """Each site's delta of the highest round, in whatever order they were accepted."""
        found = (r for r in self.ledger.records.values() if isinstance(r, AcceptedRecord))
        return {record.site: record.sha for record in sorted(found, key=lambda r: r.round)}

    def recomputed(self) -> str:
        """The chain of results from the decisions alone."""
        result = sha("genesis")
        for record in self.ledger.history():
            if isinstance(record, ClosingRecord):
                assert record.source_sha == result
            if isinstance(record, ClosedRecord):
                result = record.adapter_sha
        return result


class Carry(Quorum):
    policy: ClassVar = {**Quorum.policy, "late": "carry", "deadline": "adaptive"}


class Buffered(Quorum):
    policy: ClassVar = {"kind": "buffered", "buffer": 2, "max_staleness": STALENESS}

    @invariant()
    def a_round_closes_complete_or_after_its_deadline_with_a_quorum(self) -> None:
        """Here: with the buffer full, and nobody is left out for being slow."""
        for closing in self.closings():
            assert len(closing.inputs) >= 2
            assert not closing.excluded


def test_carried_deltas_are_met_by_these_machines():
    """The rules above do reach a closing that counts a late delta: else they would prove little."""
    machine = Carry()
    machine.begin()
    for site in SITES:
        machine.join(site)
    while machine.pending:
        machine.one_effect()
    machine.submit("a")
    machine.submit("b")
    machine.tick(20.0)
    while machine.pending:
        machine.one_effect()
    machine.submit_after_its_round("c", 1)
    for site in SITES:
        machine.submit(site)
    while machine.pending:
        machine.one_effect()
    second = machine.closings()[-1]
    assert [(i.site, i.from_round) for i in second.inputs] == [
        ("a", 2),
        ("b", 2),
        ("c", 1),
        ("c", 2),
    ]
    old = 1 / math.sqrt(2)
    assert math.isclose(second.inputs[2].weight, old / (3 + old))
    accepted_records = [r for r in machine.ledger.records.values() if isinstance(r, AcceptedRecord)]
    assert len(accepted_records) == 6
    machine.every_weight_follows_the_rule()
    machine.late_deltas_count_only_where_they_are_carried()


for kind in (Quorum, Carry, Buffered):
    kind.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestQuorum = Quorum.TestCase
TestCarry = Carry.TestCase
TestBuffered = Buffered.TestCase
